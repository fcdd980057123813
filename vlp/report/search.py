"""Search a folder of videos by text, in a browser: `python -m vlp.report.search run=runs/NAME videos=DIR [port=8000]`.

    folder --index, once--> windows and their vectors      text --model--> vector --cosine--> the best windows, playing

Safe by default: it listens on 127.0.0.1 only, answers only requests that name this host, serves the page, results and
the files of the index by their number, and nothing else. The page builds everything from plain text.
"""

import base64
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from torch import Tensor

from vlp.eval import ranking
from vlp.inference import Loaded
from vlp.report.search_index import Index, open_index

MAX_QUERY = 500  # characters
MAX_TARGET = 8 * 1024  # bytes of a request's path and query
NUM_RESULTS = 12
WINDOW_S = 4.0
WRONG = 78  # as vlp.training.exits has it
_KEYS = ("run", "videos", "port", "window_s")
_TYPES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm", ".mkv": "video/webm"}
_PAGE = (Path(__file__).parent / "search.html").read_text(encoding="utf-8")
_BLOCK = 256 * 1024


class Refused(ValueError):  # noqa: N818  (the answer to a request, not a failure)
    """A request that gets no answer: status and one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Searcher:
    """Finds windows of an index by text. Args: embed_text: text -> unit vector [E]."""

    def __init__(self, index: Index, embed_text: Callable[[str], Tensor]) -> None:
        self.index, self.embed_text = index, embed_text

    def __call__(self, query: str) -> dict[str, Any]:
        """Return the best windows of a query. Raises Refused if it is none."""
        places, scores = ranking.best(self.embed_text(checked(query))[None], self.index.embeds, NUM_RESULTS)
        found = zip((self.index.windows[place] for place in places[0].tolist()), scores[0].tolist(), strict=True)
        results = [
            {**window._asdict(), "name": self.index.files[window.file], "score": round(score, 4)}
            for window, score in found
        ]
        return {"results": results, "num_windows": len(self.index.windows), "num_files": len(self.index.files)}


def checked(query: str) -> str:
    """Return a query without surrounding space. Raises Refused if it is empty, huge, or no plain text."""
    text = query.strip()
    if not text:
        raise Refused(400, "Type what happens in the video.")
    if len(text) > MAX_QUERY:
        raise Refused(413, f"The query has {len(text)} characters; at most {MAX_QUERY} are searched.")
    if re.search(r"[<>\x00-\x1f\x7f]", text):
        raise Refused(400, "A query is plain text, without < and > and control characters.")
    return text


def serve(search: Searcher, *, port: int) -> ThreadingHTTPServer:
    """Return a server on 127.0.0.1 (port 0: a free one), to `serve_forever`. Raises ValueError: a port in use."""
    handler = type("Handler", (_Handler,), {"search": search})
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"port={port} cannot be used ({error}); choose another, or 0 for a free one.") from None


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    search: Searcher
    server_version, sys_version = "vlp", ""
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds a connection may be silent

    def do_GET(self) -> None:
        """Answer with the page, results or a file; with one line for everything else."""
        try:
            self._check_host()
            if len(self.path) > MAX_TARGET:
                raise Refused(414, f"The request has {len(self.path)} characters; at most {MAX_TARGET} are read.")
            target = urlsplit(self.path)
            if target.path == "/" and not target.query:
                return self._send(200, "text/html; charset=utf-8", _PAGE.encode())
            if target.path == "/search":
                found = self.search(parse_qs(target.query, max_num_fields=4).get("q", [""])[0])
                return self._send(200, "application/json", json.dumps(found).encode())
            number = re.fullmatch(r"/video/(\d{1,9})", target.path)
            if number and int(number[1]) < len(self.search.index.files):
                return self._send_file(self.search.index.files[int(number[1])])
            raise Refused(404, "There is no such page; the index holds nothing of this name.")
        except Refused as refused:
            return self._send(refused.status, "application/json", json.dumps({"error": refused.message}).encode())
        except ValueError as error:  # a query string of too many fields
            return self._send(400, "application/json", json.dumps({"error": f"This is no query ({error})."}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Keep requests off the screen: a query is nobody else's business."""

    def _check_host(self) -> None:
        """Refuse requests of pages elsewhere that were pointed at this machine by name."""
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost"):
            raise Refused(421, "This server answers to 127.0.0.1 and localhost only.")

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self._headers(kind, len(body))
        self.wfile.write(body)

    def _headers(self, kind: str, length: int, **more: str) -> None:
        fixed = {
            "Content-Type": kind,
            "Content-Length": str(length),
            "Content-Security-Policy": _policy(),
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        for name, value in {**fixed, **{key.replace("_", "-"): value for key, value in more.items()}}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_file(self, name: str) -> None:
        """Send a file of the index, or the range of it that a player asks for."""
        folder = self.search.index.folder
        path = (folder / name).resolve()
        if not path.is_relative_to(folder) or not path.is_file():  # it may have become a link since
            raise Refused(404, "This file is no longer there.")
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d{1,15})-(\d{0,15})", self.headers.get("Range") or "")
        first = int(wanted[1]) if wanted else 0
        last = min(size, int(wanted[2]) + 1 if wanted and wanted[2] else size)
        if first >= last:
            raise Refused(416, "There is nothing in this range.")
        self.send_response(206 if wanted else 200)
        more = {"Content_Range": f"bytes {first}-{last - 1}/{size}"} if wanted else {}
        self._headers(_TYPES[path.suffix.lower()], last - first, Accept_Ranges="bytes", **more)
        with path.open("rb") as file:
            file.seek(first)
            while first < last and (block := file.read(min(_BLOCK, last - first))):
                try:
                    self.wfile.write(block)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the player has seen enough
                    return
                first += len(block)


def _policy() -> str:
    """Return what the browser may do: run the page's own script, fetch results and videos from here, nothing else."""
    script = _PAGE.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    allowed = (
        f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; media-src 'self'"
    )
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"


def main(arguments: Sequence[str]) -> int:
    """Index the folder and serve the page until interrupted; return the exit code."""
    try:
        given = _parse(arguments)
        model = Loaded(Path(given["run"]))
        window_s = float(given.get("window_s", WINDOW_S))
        if not window_s > 0:
            raise ValueError(f"window_s={window_s} must be above 0.")
        index = open_index(
            Path(given["videos"]),
            embed=lambda path: model.embed_windows(path, window_s=window_s),
            identity=f"{Path(given['run']).resolve()} {model.step} {window_s}",
            store=Path(given["run"]) / "search",
        )
        server = serve(Searcher(index, lambda text: model.embed_text([text])[0]), port=int(given.get("port", "8000")))
    except ValueError as error:
        print(f"search: {error}", file=sys.stderr)
        return WRONG
    for name, why in index.refused.items():
        print(f"not indexed: {name}: {why}")
    print(
        f"{len(index.windows)} parts of {len(index.files)} videos. Open http://127.0.0.1:{server.server_port}/",
        flush=True,
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped")
    finally:
        server.server_close()
    return 0


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in arguments]
    unknown = [word for word, (key, equals, _) in zip(arguments, pairs, strict=True) if key not in _KEYS or not equals]
    given = {key: value for key, _, value in pairs}
    if unknown or not {"run", "videos"} <= given.keys():
        raise ValueError(
            f"{' '.join(unknown) or 'run= and videos= are needed'}; write run=runs/NAME videos=DIR [port=8000]."
        )
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
