"""P1: decoding N evenly spaced frames of a 10 s clip from memory, scaled to short side 224, in CPU time of one thread.

Every method decodes every clip in turns; a ratio is that of the medians, over several clips their geometric mean. Each
frame carries its number, and all methods must return the right ones. "Codec" is the decoder alone on the packets that
vlp's plan chooses.
"""

import io
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import av
import numpy as np
from fixtures import CODECS, FPS, GOPS, SIZES, Clip, clips
from peer import Peer, PeerError, started
from peers.barcode import numbers

from vlp.data import decode as decoding
from vlp.data import gop
from vlp.data.container import container_format
from vlp.data.decode import decode
from vlp.data.probe import VideoFacts, probe

SIDE, NUM_FRAMES, COUNTS, REPEATS = 224, 300, (4, 8, 16, 32), 3
PEERS = (("torchcodec", "decoders"), ("decord", "decoders"))
# Clips a second that one H100 can train on: 8 frames, forward and backward of the image towers of open_clip's profile,
# at 40 % of 989 TFLOP/s in bf16. What a GPU really reaches, `train.py` logs.
CLIPS_PER_GPU = {"ViT-B/16": 469, "ViT-L/14": 102, "ViT-H/14": 49}
EXACT, MAPPED, DECORD, SEQUENTIAL, CODEC = "torchcodec exact", "torchcodec mapped", "decord", "PyAV", "codec"

Cell = dict[str, list[float]]  # seconds of CPU by method
Wrong = dict[str, int]  # frames that are not the wanted ones, by method


class Case:
    """One clip and what each method needs to know of it."""

    def __init__(self, clip: Clip, count: int) -> None:
        self.clip, self.data = clip, clip.path.read_bytes()
        self.facts: VideoFacts = probe(self.data)
        self.times_s = (np.arange(count) + 0.5) * clip.num_frames / FPS / count
        self.expected = (self.times_s * FPS).astype(int).tolist()
        width, height = clip.shape
        self.size = round(width * SIDE / min(clip.shape)), round(height * SIDE / min(clip.shape))

    def vlp(self) -> tuple[float, list[int]]:
        """Decode as training does, with the key-frame table of the index."""
        return _timed(lambda: decode(self.data, self.times_s, short_side=SIDE, key_frames=self.facts.key_frames).frames)

    def sequential(self) -> tuple[float, list[int]]:
        """Decode everything with PyAV, convert what is wanted."""
        return _timed(self._sequential)

    def codec(self) -> tuple[float, list[int]]:
        """Decode the packets of the plan and convert nothing."""
        kind = container_format(self.data)
        assert kind is not None
        with decoding._opened(self.data, kind, decode_to_probe=False) as source:
            first, start = gop.head(source)
            targets = np.unique(decoding._ticks(self.times_s, source, start=start))
            plan = gop.plan(source, first, targets, key_frames=self.facts.key_frames)
            began = time.process_time()
            for run in plan.runs:
                for _ in decoding._decode_run(source, run):
                    pass
            return time.process_time() - began, self.expected

    def peer(self, peer: Peer, method: str, *, mapped: bool = False) -> Callable[[], tuple[float, list[int]]]:
        """Return a call of a peer."""
        arguments = {
            "method": method,
            "path": str(self.clip.path),
            "times_s": self.times_s.tolist(),
            "size": self.size,
            "mappings": self._mappings() if mapped else None,
        }

        def call() -> tuple[float, list[int]]:
            answer = peer.call("decode", **arguments)
            return answer["cpu_s"], answer["numbers"]

        return call

    def _sequential(self) -> np.ndarray:
        wanted, images = set(self.expected), []
        with av.open(io.BytesIO(self.data)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    images.append(frame.to_ndarray(format="rgb24", width=self.size[0], height=self.size[1], threads=1))
                if len(images) == len(wanted):
                    break
        return np.stack(images)

    def _mappings(self) -> str:
        with av.open(io.BytesIO(self.data)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        packets.sort(key=lambda packet: packet.pts or 0)
        frames = [{"pts": p.pts, "duration": p.duration, "key_frame": int(p.is_keyframe)} for p in packets]
        return json.dumps({"frames": frames})


def main(*, quick: bool = False, peers: bool = True) -> dict[str, Any]:
    """Return ratios by codec, and a row for every clip."""
    grid = (("h264",), ("270p",), (12,)) if quick else (tuple(CODECS), tuple(SIZES), GOPS)
    counts, repeats = ((4,), 1) if quick else (COUNTS, REPEATS)
    with started(*(PEERS if peers else ())) as (running, failures):
        cells: dict[tuple[Clip, int], Cell] = {}
        wrong: Wrong = {}
        for clip in clips(*grid, num_frames=60 if quick else NUM_FRAMES):
            if not cells:
                _cell(Case(clip, 4), running, repeats=1, failures={}, wrong={})  # imports, code that is compiled once
            for count in counts:
                cells[clip, count] = _cell(Case(clip, count), running, repeats=repeats, failures=failures, wrong=wrong)
            print(f"decoding: {clip.name}, {_summary(cells[clip, counts[-1]])}", flush=True)
        versions = ", ".join(peer.call("versions") for peer in running.values())
    return {
        **{
            f"frames that are not the wanted ones, {method}": f"{count:,} of {_num_frames(cells, method):,}"
            for method, count in wrong.items()
        },
        **{f"does not run: {name}": error for name, error in failures.items()},
        "FFmpeg of vlp": ".".join(map(str, av.library_versions["libavcodec"])) + " (libavcodec, with PyAV)",
        "peers": versions or "none",
        "Times as fast as ... (geometric mean over sizes, GOPs and N)": _by_codec(cells),
        "Cores that decode for one GPU, by what 8 frames cost": _cores(cells),
        "Each clip: ms of vlp, and times as fast as torchcodec exact": _by_clip(cells),
    }


def _timed(make: Callable[[], np.ndarray]) -> tuple[float, list[int]]:
    began = time.process_time()
    frames = make()
    return time.process_time() - began, numbers(frames)


def _cell(case: Case, running: dict[str, Peer], *, repeats: int, failures: dict[str, str], wrong: Wrong) -> Cell:
    """Run all methods in turns."""
    methods = {"vlp": case.vlp, SEQUENTIAL: case.sequential, CODEC: case.codec}
    if "torchcodec" in running:
        methods[EXACT] = case.peer(running["torchcodec"], "torchcodec")
        methods[MAPPED] = case.peer(running["torchcodec"], "torchcodec", mapped=True)
    if "decord" in running:
        methods[DECORD] = case.peer(running["decord"], "decord")
    cell: Cell = {}
    for _ in range(repeats):
        for method, call in list(methods.items()):
            try:
                cpu_s, found = call()
            except PeerError as error:
                failures.setdefault(f"{method} on {case.clip.codec}", str(error))
                del methods[method]
                continue
            cell.setdefault(method, []).append(cpu_s)
            bad = sum(a != b for a, b in zip(found, case.expected, strict=True))
            wrong[method] = wrong.get(method, 0) + bad
    return cell


def _num_frames(cells: dict[tuple[Clip, int], Cell], method: str) -> int:
    return sum(count * len(cell.get(method, [])) for (_, count), cell in cells.items())


def _ratio(cell: Cell, method: str) -> float | None:
    return statistics.median(cell[method]) / statistics.median(cell["vlp"]) if method in cell else None


def _mean(ratios: list[float | None]) -> str:
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{statistics.geometric_mean(known):.2f}" if known else "-"


def _summary(cell: Cell) -> str:
    return ", ".join(f"{method} {1000 * statistics.median(seconds):.0f} ms" for method, seconds in cell.items())


def _by_codec(cells: dict[tuple[Clip, int], Cell]) -> list[dict[str, str]]:
    rows = []
    groups: dict[str, list[str]] = {codec: [codec] for codec in CODECS}
    for name, codecs in {**groups, "H.264 and HEVC": ["h264", "hevc"], "all": list(CODECS)}.items():
        chosen = [cell for (clip, _), cell in cells.items() if clip.codec in codecs]
        if chosen:
            means = {m: _mean([_ratio(cell, m) for cell in chosen]) for m in (EXACT, MAPPED, DECORD, SEQUENTIAL)}
            rows.append({"codec": name, **means, "codec alone": _mean([_ratio(cell, CODEC) for cell in chosen])})
    return rows


def _by_clip(cells: dict[tuple[Clip, int], Cell]) -> list[dict[str, str]]:
    rows: dict[Clip, dict[str, str]] = {}
    for (clip, count), cell in cells.items():
        row = rows.setdefault(clip, {"clip": clip.name})
        share = _mean([_ratio(cell, CODEC)])
        row[f"N = {count}"] = (
            f"{1000 * statistics.median(cell['vlp']):.1f}; {_mean([_ratio(cell, EXACT)])}; codec {share}"
        )
    return list(rows.values())


def _cores(cells: dict[tuple[Clip, int], Cell]) -> list[dict[str, str]]:
    rows = []
    for (clip, count), cell in cells.items():
        if count == 8 and clip.codec == "h264":
            cpu_s = statistics.median(cell["vlp"])
            needed = {f"{model}, {rate} clips/s": f"{rate * cpu_s:.1f}" for model, rate in CLIPS_PER_GPU.items()}
            rows.append({"clip": clip.name, "ms": f"{1000 * cpu_s:.1f}", **needed})
    return rows


if __name__ == "__main__":
    print(main())
