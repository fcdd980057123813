import hashlib
import io
import json
import multiprocessing
import os
import time
from pathlib import Path

import av
import numpy as np
import pytest
from clips import clip, image, numbers, rotated
from recipe_runs import audit, dropped, run, samples

from data_recipes.encode import Encoding, SpanError, stored
from data_recipes.items import Item, joined, safe_keys
from data_recipes.looks import Look, duplicates, look
from data_recipes.videos import File, Refused, Videos
from vlp.data.decode import decode
from vlp.data.index import check_shard
from vlp.data.probe import ProbeError, probe

LONG = clip(60, options={"g": "12"})


def download(folder: Path, files: dict[str, bytes], captions: dict[str, str] | None = None) -> Path:
    """Put files into folder/videos, and a table of captions beside it; return the videos."""
    for name, data in files.items():
        (folder / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "videos" / name).write_bytes(data)
    lines = [{"video": name, "caption": text} for name, text in (captions or {n: f"clip {n}" for n in files}).items()]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "videos"


def folder_run(videos: Path, *arguments: object) -> int:
    return run("folder", videos, "--captions", videos.parent / "captions.jsonl", "--holdout", 0, *arguments)


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir() if path.suffix == ".tar"}


def shown(video: bytes) -> list[int]:
    facts = probe(video)
    times_s = (np.arange(facts.num_frames) + 0.5) / facts.fps
    return numbers(decode(video, times_s, short_side=None).frames)


def test_bytes_are_stored_as_they_are_unless_an_option_changes_them(tmp_path):
    files = {"a.mp4": clip(5, layout="va"), "b.mkv": clip(4, container="matroska"), "c.png": image()}
    videos = download(tmp_path, files)
    assert folder_run(videos) == 0
    found = samples(tmp_path / "out", "train")
    assert {f"{key}.{each.extension}": each.video for key, each in found.items()} == files
    assert found["a"].meta == {"captions": ["clip a.mp4"]}


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi", "mpegts"])
@pytest.mark.parametrize(("start_s", "end_s"), [(0.5, 1.5), (1.21, 1.6), (0, 0.41), (1.512, 9)])
def test_spans_are_cut_to_within_half_a_frame(container, start_s, end_s):
    codec = {"codec": "mpeg4"} if container == "avi" else {"options": {"g": "12"}}
    video = clip(60, container=container, **codec)
    extension = {"matroska": "mkv", "mpegts": "ts"}.get(container, container)
    cut = stored(video, extension, span=(start_s, end_s), encoding=Encoding())
    frames = shown(cut.video)
    assert abs(frames[0] / 30 - start_s) <= 0.5 / 30 + 1e-3
    assert abs((frames[-1] + 1) / 30 - min(end_s, 2)) <= 0.5 / 30 + 1e-3
    assert frames == list(range(frames[0], frames[-1] + 1))
    assert abs(cut.facts.duration_s - len(frames) / 30) < 2e-3 and cut.facts.start_s == 0


@pytest.mark.parametrize("span", [(2.5, 3), (1, 1), (1.5, 1), (-2, -1), (float("nan"), 1)])
def test_spans_without_a_frame_are_refused(span):
    with pytest.raises(SpanError, match=r"of a video of 2\.00 s"):
        stored(LONG, "mp4", span=span, encoding=Encoding())


def test_gop_and_short_side_are_those_of_the_output(tmp_path):
    videos = download(tmp_path, {"a.mp4": LONG, "small.mp4": clip(5, size=(32, 16)), "p.png": image(size=(96, 64))})
    assert folder_run(videos, "--gop", 5, "--short-side", 32) == 0
    found = samples(tmp_path / "out", "train")
    facts = found["a"].facts
    assert (facts.width, facts.height, facts.num_frames) == (48, 32, 60)
    assert np.allclose(np.diff(facts.key_frames) * float(_tick(found["a"].video)), 5 / 30)
    assert (found["small"].facts.width, found["small"].facts.height) == (32, 16)
    assert (found["p"].facts.width, found["p"].facts.height, found["p"].extension) == (48, 32, "jpg")


def _tick(video: bytes):
    with av.open(io.BytesIO(video)) as container:
        return container.streams.video[0].time_base


def test_a_lower_rate_shows_the_frame_of_each_time_and_a_higher_one_changes_nothing():
    slow = stored(LONG, "mp4", span=None, encoding=Encoding(fps=7.5))
    assert shown(slow.video) == list(range(0, 60, 4)) and slow.facts.fps == pytest.approx(7.5)
    assert shown(stored(LONG, "mp4", span=None, encoding=Encoding(fps=60)).video) == list(range(60))


def test_variable_rates_keep_their_times():
    pts = [0, 20, 100, 120, 300, 310]
    video = stored(clip(pts=pts), "mp4", span=None, encoding=Encoding(gop=2)).video
    assert np.allclose(decode(video, np.array(pts) / 600 + 0.002, short_side=None).times_s, np.array(pts) / 600)


def test_rotated_videos_stand_upright():
    video = rotated(clip(3, size=(96, 64)), 90)
    again = stored(video, "mp4", span=None, encoding=Encoding(gop=1))
    assert (again.facts.width, again.facts.height, again.facts.rotation) == (64, 96, 0)
    one, two = (decode(each, np.zeros(1), short_side=None).frames[0].astype(int) for each in (video, again.video))
    assert np.abs(one - two).mean() < 8


@pytest.mark.parametrize("span", [None, (0.2, 0.6)])
def test_sound_is_kept_or_dropped(span):
    video = clip(30, layout="va")
    for keep in (True, False):
        made = stored(video, "mp4", span=span, encoding=Encoding(keep_audio=keep))
        assert shown(made.video) == (list(range(6, 18)) if span else list(range(30))) and made.notes == ()
        with av.open(io.BytesIO(made.video)) as container:
            tracks = container.streams.audio
            assert bool(tracks) == keep
            if span and keep:
                assert float(tracks[0].duration * tracks[0].time_base) == pytest.approx(0.4, abs=0.07)


def test_a_gif_becomes_mp4():
    file = io.BytesIO()
    with av.open(file, "w", format="gif") as output:
        stream = output.add_stream("gif", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "rgb8"
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 40 * number, np.uint8), format="rgb24")
            frame.pts = number
            output.mux(stream.encode(frame.reformat(format="rgb8")))
        output.mux(stream.encode(None))
    made = stored(file.getvalue(), "gif", span=None, encoding=Encoding())
    frames = decode(made.video, np.arange(5) / 10 + 0.05, short_side=None).frames
    assert made.extension == "mp4" and made.facts.num_frames == 5
    assert np.abs(frames.mean(axis=(1, 2, 3)) - 40 * np.arange(5)).max() < 20
    with pytest.raises(ProbeError, match="video_broken"):
        stored(b"GIF89a" + bytes(50), "gif", span=None, encoding=Encoding())


LOST = {
    **{"broken": b"?", "empty": b"", "sound": clip(4, layout="a"), "cut": clip(20)[:-7]},
    **{"web": b"<html>not found</html>"},
}
REASONS = {
    **{"broken": "video_broken", "empty": "video_empty", "sound": "no_video_stream", "cut": "video_truncated"},
    **{"web": "video_broken", "gone": "video_missing", "../../etc/passwd": "path_refused", "/root": "path_refused"},
    **{"mute": "caption_missing"},
}


def sentences(folder: Path, *names: str) -> Path:
    path = folder / "charades_sta_train.txt"
    path.write_text("".join(f"{name} 0.0 0.5##words about {name}\n" for name in names))
    return path


def test_the_audit_names_what_is_lost_with_its_reason(tmp_path, capsys):
    videos = download(tmp_path, {"good.mp4": LONG, **{f"{name}.mp4": data for name, data in LOST.items()}})
    (videos / "mute.mp4").write_bytes(LONG)
    table = sentences(tmp_path, "good", *LOST, "gone", "../../etc/passwd", "/root")
    table.write_text(table.read_text() + "mute 0 1##  \nno mark here\ngood 1##one number\ngood zero 1##no number\n")
    assert run("charades_sta", videos, "--annotations", table) == 0
    assert samples(tmp_path / "out", "train").keys() == {"good"}
    broken = {f"{table} line {n}": "annotation_broken" for n in (11, 12, 13)}
    assert dropped(tmp_path / "out") == REASONS | broken
    report = audit(tmp_path / "out")
    assert report["splits"]["train"]["written"] == 1 and sum(report["dropped"].values()) == len(REASONS) + 3
    printed = capsys.readouterr().out
    assert all(name in printed for name in REASONS) and "annotation_broken: 3" in printed


def test_the_audit_counts_captions_bytes_and_hours(tmp_path):
    short = clip(30)
    videos = download(tmp_path, {"a.mp4": LONG, "b.mp4": short}, {"a": "one two three", "b": "one"})
    assert folder_run(videos) == 0
    train = audit(tmp_path / "out")["splits"]["train"]
    assert train["bytes"] == len(LONG) + len(short) and train["hours"] == pytest.approx(3 / 3600, abs=1e-4)
    wanted = {"count": 2, "distinct": 2, "mean_a_sample": 1, "mean_words": 2, "max_words": 3}
    assert train["captions"].items() >= wanted.items()


def test_a_dry_run_writes_nothing_and_tells_what_is_missing(tmp_path, capsys):
    videos = download(tmp_path, {"good.mp4": LONG})
    table = sentences(tmp_path, "good", "gone")
    before = sorted(tmp_path.rglob("*"))
    assert run("charades_sta", videos, "--annotations", table, "--dry-run", "--unit", "clip") == 0
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    assert "train               2       1       1" in printed and "no file 'gone'" in printed


def test_files_are_found_by_path_or_name_and_never_outside_the_folder(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(LONG)
    videos = Videos(
        str(download(tmp_path, {"x/a.mp4": b"1", "y/b.mkv": b"2", "y/c.mp4": b"", "z/c.mp4": b"", "b.png": b""}))
    )
    for name, path in (
        ("x/a.mp4", "x/a.mp4"),
        ("a", "x/a.mp4"),
        ("a.avi", "x/a.mp4"),
        ("b", "b.png"),
        ("q/b.mov", "y/b.mkv"),
    ):
        found = videos.find(name)
        assert isinstance(found, File) and found.path == path, name
    reasons = {
        name: videos.find(name)
        for name in ("../secret", "x/../../secret.mp4", "/x/a.mp4", "..\\secret", "a\0", "c", "")
    }
    assert all(isinstance(each, Refused) for each in reasons.values())
    assert [reasons[n].reason for n in ("../secret", "/x/a.mp4", "c")] == ["path_refused"] * 2 + ["video_missing"]
    assert "2 files have the name 'c': y/c.mp4, z/c.mp4" in reasons["c"].detail


def many(folder: Path, count: int = 12) -> Path:
    return download(folder, {f"v{number:02d}.mp4": clip(20 + number, size=(160, 120)) for number in range(count)})


OPTIONS = ("--clips-per-shard", 2, "--short-side", 64)


def test_a_killed_run_continues_and_ends_with_the_same_bytes(tmp_path):
    videos, out = many(tmp_path), tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=folder_run, args=(videos, *OPTIONS))
    process.start()
    while len(list(out.glob("records/*.json"))) < 2 and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    done = sorted(out.glob("records/*.json"))
    assert 2 <= len(done) < 6 and not (out / "audit.json").exists()
    times = {path: os.stat(path).st_mtime_ns for path in (out / f"{p.stem}-000000.tar" for p in done)}
    assert folder_run(videos, *OPTIONS) == 0
    assert all(os.stat(path).st_mtime_ns == time_ns for path, time_ns in times.items())
    assert len(samples(out, "train")) == 12 and all(not check_shard(str(out / name)) for name in digests(out))
    arguments = ("--captions", tmp_path / "captions.jsonl", "--holdout", 0, *OPTIONS, "--workers", 2)
    assert run("folder", videos, *arguments, out=tmp_path / "other") == 0
    assert digests(tmp_path / "other") == digests(out) and len(digests(out)) == 6


def test_a_shard_is_made_again_only_if_something_of_it_changed(tmp_path):
    videos, out = many(tmp_path, 6), tmp_path / "out"
    (videos / "v03.mp4").rename(tmp_path / "v03.mp4")
    table = sentences(tmp_path, *(f"v{number:02d}" for number in range(6)))
    arguments = ("--annotations", table, "--clips-per-shard", 2)
    assert run("charades_sta", videos, *arguments) == 0
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert run("charades_sta", videos, *arguments) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")} == times
    (tmp_path / "v03.mp4").rename(videos / "v03.mp4")
    assert run("charades_sta", videos, *arguments) == 0
    changed = {path.name for path in out.glob("*.tar") if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {"train-000001-000000.tar"} and len(samples(out, "train")) == 6


def test_shards_of_other_options_are_not_mixed(tmp_path, capsys):
    videos, out = many(tmp_path, 3), tmp_path / "out"
    assert folder_run(videos) == 0
    assert folder_run(videos, "--gop", 2) == 78
    assert "--gop was None, now 2; give another --out, or --overwrite" in capsys.readouterr().err
    download(tmp_path, {}, {"v00.mp4": "other words"})
    assert folder_run(videos) == 78 and "annotations of train have changed" in capsys.readouterr().err
    assert folder_run(videos, "--overwrite") == 0
    assert {key: each.meta["captions"] for key, each in samples(out, "train").items()} == {"v00": ["other words"]}


def test_foreign_shards_are_never_touched(tmp_path, capsys):
    videos, out = many(tmp_path, 1), tmp_path / "out"
    out.mkdir()
    (out / "train-000000-000000.tar").write_bytes(b"mine")
    assert folder_run(videos) == 78 and "was not made by a recipe" in capsys.readouterr().err
    assert folder_run(videos, "--overwrite") == 78
    assert (out / "train-000000-000000.tar").read_bytes() == b"mine"


def test_splits_shards_and_items_are_limited(tmp_path):
    videos = many(tmp_path, 5)
    arguments = ("--captions", tmp_path / "captions.jsonl", "--holdout", 0.4)
    assert run("folder", videos, *arguments, "--clips-per-shard", 1, "--max-items", 2) == 0
    out = tmp_path / "out"
    assert len(samples(out, "train")) == 2 and len(samples(out, "test")) == 2 and len(digests(out)) == 4
    assert run("folder", videos, *arguments, "--splits", "test", out=tmp_path / "test") == 0
    assert {name[:4] for name in digests(tmp_path / "test")} == {"test"}


def moving(seed: int, *, size=(128, 96)) -> bytes:
    """A clip of smooth random pictures, all different."""
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = size[0], size[1], "yuv420p"
        coarse = rng.integers(0, 255, (4, 9, 12, 3), dtype=np.uint8)
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(coarse[number // 5], format="rgb24")
            output.mux(stream.encode(frame.reformat(*size, "yuv420p")))
        output.mux(stream.encode(None))
    return file.getvalue()


def test_dedupe_drops_training_copies_and_never_test_clips(tmp_path):
    originals = {name: moving(seed) for seed, name in enumerate("abc")}
    copy = stored(originals["a"], "mp4", span=None, encoding=Encoding(short_side=48, gop=3)).video
    files = {f"{name}.mp4": data for name, data in originals.items()} | {"copy.mp4": copy, "again.mp4": originals["c"]}
    videos = download(tmp_path, files)
    train = sentences(tmp_path, "a", "b", "copy", "c")
    test = tmp_path / "charades_sta_test.txt"
    test.write_text("c 0 1##words\nagain 0 1##words\n")
    assert run("charades_sta", videos, "--annotations", train, test, "--dedupe") == 0
    out = tmp_path / "out"
    assert samples(out, "train").keys() == {"a", "b"} and samples(out, "test").keys() == {"c", "again"}
    pairs = {(each["sample"], each["looks_like"]) for each in audit(out)["duplicates"]}
    assert pairs == {("train/copy", "train/a"), ("train/c", "test/c"), ("test/again", "test/c")}
    assert dropped(out) == {"copy": "duplicate", "c": "duplicate"}


def test_looks_say_nothing_of_one_colour_and_tell_lengths_apart():
    assert look(stored(clip(30), "mp4", span=None, encoding=Encoding()).video, None).duration_s == 1
    assert look(b"broken", None) == Look("", 0.0)
    grey = io.BytesIO()
    with av.open(grey, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), format="rgb24")
        output.mux([*stream.encode(frame), *stream.encode(None)])
    assert look(grey.getvalue(), None).bits == ""
    bits = "0123456789abcdef" * 4
    assert list(duplicates([Look(bits, 10), Look(bits, 12), Look(bits, 10.5), Look("", 10), Look("", 10)])) == [(2, 0)]


MISTAKES = {
    "no_arguments": ([], "the following arguments are required: --videos"),
    "no_folder": (["--videos", "/nowhere"], "is not a folder"),
    "unknown_option": (["--shortside", "3"], "unrecognized arguments: --shortside"),
    "number": (["--gop", "0"], "0 must be at least 1"),
    "no_number": (["--fps", "fast"], "invalid"),
    "split": (["--splits", "val"], "--splits val: charades_sta has train, test"),
    "no_file": (["--annotations", "/nowhere_train.txt"], "No such file"),
    "unnamed": (["--annotations", "/sentences.txt"], "does not tell its split; write SPLIT=/sentences.txt"),
    "other_split": (["--annotations", "val=/x.txt"], "no split 'val'; there are train, test"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_the_user_is_one_clear_line(tmp_path, name, capsys):
    from data_recipes import charades_sta

    videos = download(tmp_path, {"a.mp4": LONG})
    arguments, message = MISTAKES[name]
    usual = {"--videos": videos, "--annotations": sentences(tmp_path, "a"), "--out": tmp_path / "out"}
    words = [str(word) for pair in usual.items() for word in pair] if arguments else []
    assert charades_sta.main(charades_sta.RECIPE, [*words, *arguments]) == 78
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_nothing_usable_is_a_data_error(tmp_path, arguments, capsys):
    videos = download(tmp_path, {"a.mp4": b"" if not arguments else LONG})
    table = sentences(tmp_path, "b" if arguments else "a")
    assert run("charades_sta", videos, "--annotations", table, *arguments) == 65
    assert "nothing is usable" in capsys.readouterr().err


def test_a_file_that_is_no_annotation_is_named(tmp_path, capsys):
    videos = download(tmp_path, {"a.mp4": LONG})
    for recipe, text, message in (
        ("msrvtt", "{}", "is not what msrvtt reads: there is no 'videos'"),
        ("vatex", "[", "is not JSON"),
        ("vatex", "7", "a list or an object is wanted"),
        ("next_qa", "a,b\n1,2\n", "has no column video, question, answer, qid, type; its first line holds 'a', 'b'"),
    ):
        (tmp_path / "train.x").write_text(text)
        assert run(recipe, videos, "--annotations", tmp_path / "train.x") == 78
        assert message in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    videos = download(tmp_path, {"a.mp4": LONG})
    assert run("folder", videos, "--captions", tmp_path / "captions.jsonl", out=videos / "a.mp4" / "x") == 73
    assert "Not a directory" in capsys.readouterr().err


def test_text_in_another_encoding_costs_its_row_only(tmp_path):
    videos = download(tmp_path, {"a.mp4": LONG, "b.mp4": LONG})
    table = tmp_path / "charades_sta_train.txt"
    table.write_bytes(b"a 0 1##caf\xe9\nb 0 1##cafe\n")
    assert run("charades_sta", videos, "--annotations", table) == 0
    assert samples(tmp_path / "out", "train").keys() == {"b"} and dropped(tmp_path / "out") == {"a": "caption_broken"}


def test_items_of_one_key_are_merged_in_order():
    one = Item("k", "f", ["a", "b"], fields={"events": [1], "category": 3})
    two = Item("k", "f", ["b", "c"], fields={"events": [2], "category": 4, "film": "x"})
    merged = joined(one, two)
    assert merged.captions == ["a", "b", "c"]
    assert merged.fields == {"events": [1, 2], "category": 3, "film": "x"} and one.captions == ["a", "b"]


def test_different_keys_stay_different_and_fit_a_shard():
    names = ["a.b", "a_b", "x/../y", "/abs", "", "n" * 300, "n" * 301, "é ü", "a\ud800b", "."]
    keys = safe_keys(names)
    assert len(set(keys.values())) == len(names) and keys["é ü"] == "é ü" and keys["a.b"] == "a_b"
    assert all(len(key.encode()) < 300 and "." not in key and not key.startswith("/") and key for key in keys.values())
