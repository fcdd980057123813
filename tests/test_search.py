"""The search page: what it answers, what it refuses, and that it works in a browser."""

import http.client
import json
import threading
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Browser
from tiny_runs import train

import vlp
from vlp.data.render import encode_h264, render
from vlp.data.scene import scene
from vlp.report import search
from vlp.report.search import Searcher, serve
from vlp.report.search_index import open_index, videos_of
from vlp.training.exits import Exit


def vectors(path):
    """Two windows of each file; the first letter of its name says where they point."""
    if path.stem == "broken":
        raise ValueError("no frame")
    number = "ab".index(path.stem[0])
    return [(0.0, 1.5), (1.5, 3.0)], torch.eye(4)[2 * number : 2 * number + 2]


@pytest.fixture
def folder(tmp_path):
    """Two real clips, a file that cannot be read, a secret beside the folder, and a link to it."""
    videos = tmp_path / "videos"
    (videos / "inner").mkdir(parents=True)
    for number, name in enumerate(("a <b>.mp4", "inner/b.mp4")):
        clip = render(scene(0, number, "train"), size=64, num_frames=24)
        (videos / name).write_bytes(encode_h264(clip, fps=8))
    (videos / "broken.mp4").write_bytes(b"none")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (videos / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    return videos


@pytest.fixture
def server(folder, tmp_path):
    index = open_index(folder, embed=vectors, identity="x", store=tmp_path / "store")
    words = {"a": torch.eye(4)[0], "b": torch.eye(4)[3]}
    server = serve(Searcher(index, lambda text: words[text[0]]), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, headers={key.replace("_", "-"): value for key, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def test_results_name_file_times_and_score(server):
    status, body, headers = ask(server, "/search?q=b%20word")
    found = json.loads(body)
    assert status == 200 and (found["num_windows"], found["num_files"]) == (4, 2)
    assert found["results"][0] == {"file": 1, "start_s": 1.5, "end_s": 3.0, "name": "inner/b.mp4", "score": 1.0}
    assert (
        "script-src 'sha256-" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    )


def test_files_are_served_whole_and_in_ranges(server, folder):
    data = (folder / "inner/b.mp4").read_bytes()
    assert ask(server, "/video/1")[:2] == (200, data)
    status, body, headers = ask(server, "/video/1", Range="bytes=10-19")
    assert (status, body) == (206, data[10:20]) and headers["Content-Range"] == f"bytes 10-19/{len(data)}"
    assert ask(server, "/video/1", Range=f"bytes={len(data)}-")[0] == 416


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/search?q=" + "a" * 501, 413),
        ("/search?q=" + "a" * 9000, 414),
        ("/search?q=%3Cscript%3Ealert(1)%3C/script%3E", 400),
        ("/search?q=a%00b", 400),
        ("/search?q=", 400),
        ("/search?" + "&".join(f"a{n}=1" for n in range(9)), 400),
        ("/video/2", 404),
        ("/video/-1", 404),
        ("/video/../../secret.mp4", 404),
        ("/video/..%2F..%2Fsecret.mp4", 404),
        ("/secret.mp4", 404),
        ("//etc/passwd", 404),
        ("/?q=a", 404),
    ],
)
def test_what_is_no_question_gets_one_line(server, path, status):
    found, body, headers = ask(server, path)
    assert found == status and headers["Content-Type"] == "application/json"
    assert json.loads(body)["error"].count("\n") == 0 and b"Traceback" not in body


def test_other_hosts_and_methods_are_refused(server):
    assert ask(server, "/", Host="evil.example")[0] == 421
    assert ask(server, "/", Host=f"localhost:{server.server_port}")[0] == 200
    assert ask(server, "/search?q=a", method="POST")[0] == 501
    assert server.server_address[0] == "127.0.0.1"


def test_a_file_that_became_a_link_is_not_served(server, folder):
    (folder / "inner/b.mp4").unlink()
    (folder / "inner/b.mp4").symlink_to(folder.parent / "secret.mp4")
    status, body, _ = ask(server, "/video/1")
    assert status == 404 and b"secret" not in body


def test_index_leaves_out_links_and_broken_files_and_is_made_once(folder, tmp_path):
    assert videos_of(folder) == ["a <b>.mp4", "broken.mp4", "inner/b.mp4"]
    made = open_index(folder, embed=vectors, identity="x", store=tmp_path)
    kept = open_index(folder, embed=None, identity="x", store=tmp_path)  # type: ignore[arg-type]
    assert kept.refused == {"broken.mp4": "no frame"} and kept.windows == made.windows
    assert kept.embeds.equal(made.embeds)
    with pytest.raises(TypeError):  # another model: made again
        open_index(folder, embed=None, identity="y", store=tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["run=runs/x"], "run= and videos= are needed"),
        (["run=a", "videos=b", "prot=1"], "prot=1; write run=runs/NAME"),
        (["run=nowhere", "videos=b"], "nowhere: there is no run here"),
    ],
)
def test_mistakes_are_one_line(capsys, words, line):
    assert search.main(words) == 78
    assert line in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to load the page")
def test_page_finds_and_plays_clips_in_a_browser(place, folder, tmp_path):
    assert train(place, "searched", "objective=[contrastive]") == Exit.DONE
    model = vlp.load(place / "runs" / "searched")
    index = open_index(
        folder, embed=lambda path: model.embed_windows(path, window_s=1.5), identity="m", store=tmp_path / "store"
    )
    assert [window.file for window in index.windows] == [0, 0, 1, 1]
    server = serve(Searcher(index, lambda text: model.embed_text([text])[0]), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = Browser(tmp_path / "profile", f"http://127.0.0.1:{server.server_port}/")
    try:
        browser.wait("document.readyState === 'complete' && document.activeElement.id === 'query'")
        browser.type("a red circle moves left")
        browser.wait("document.querySelectorAll('#results li').length === 4")
        browser.wait("document.querySelector('li[data-plays=yes]') !== null")
        names = browser.look("[...document.querySelectorAll('.file')].map((e) => e.textContent).sort().join('|')")
        assert names == "a <b>.mp4|a <b>.mp4|inner/b.mp4|inner/b.mp4"
        assert "score" in str(browser.look("document.querySelector('.facts').textContent"))
        browser.look("document.getElementById('query').value = ''")
        browser.type("<script>document.title='taken'</script>")
        browser.wait("document.getElementById('status').className === 'bad'")
        assert "plain text" in str(browser.look("document.getElementById('status').textContent"))
        assert browser.look("document.title") == "Search videos" and browser.log == []
    finally:
        browser.close()
        server.shutdown()
        server.server_close()


def picture(run: str, videos: str, query: str, path: str) -> None:
    """Take the picture of the documentation: python tests/test_search.py RUN VIDEOS QUERY PNG."""
    import tempfile

    model = vlp.load(run)
    index = open_index(
        Path(videos), embed=lambda p: model.embed_windows(p, window_s=4.0), identity="m", store=Path(tempfile.mkdtemp())
    )
    server = serve(Searcher(index, lambda text: model.embed_text([text])[0]), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = Browser(Path(tempfile.mkdtemp()), f"http://127.0.0.1:{server.server_port}/")
    browser.wait("document.activeElement.id === 'query'")
    browser.type(query)
    browser.wait("document.querySelectorAll('li[data-plays=yes]').length > 8")
    browser.picture(Path(path))
    browser.close()


if __name__ == "__main__":
    import sys

    picture(*sys.argv[1:])
