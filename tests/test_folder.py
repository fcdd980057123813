import hashlib
import json
import multiprocessing
import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from clips import clip, image

from vlp.data.folder import Folder
from vlp.data.index import meta_of, open_index, read_part
from vlp.types import Reason

REAL = Path(__file__).parents[2] / "shared" / "real_clips"
SHORT, LONG, SOUND = clip(3), clip(7), clip(4, layout="a")


@pytest.fixture
def videos(tmp_path):
    (tmp_path / "videos" / "sub").mkdir(parents=True)
    for name, data in (("a.mp4", SHORT), ("sub/b.mkv", clip(4, container="matroska")), ("sub/c.JPG", image("mjpeg"))):
        (tmp_path / "videos" / name).write_bytes(data)
    return tmp_path / "videos"


def folder(videos, **options) -> Folder:
    return Folder(str(videos), **{"cache": str(videos.parent / "cache"), **options})


def captions(source: Folder, split: str = "train") -> dict[str, list[str]]:
    rows = [(index, row) for index in map(open_index, source.shards(split)) for row in range(len(index))]
    assert all(index.status(row) == Reason.OK for index, row in rows)
    return {index.key(row): meta_of(index, row)["captions"] for index, row in rows}


def dropped(source: Folder) -> dict[str, str]:
    return {item["key"]: item["reason"] for item in source.dropped()}


def written(videos, name: str, text: str | bytes) -> str:
    path = videos.parent / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


EXPECTED = {"a": ["a cat", "one cat"], "sub/b": ["two, dogs"], "sub/c": ["three"]}
TABLES = {
    "path.csv": 'video,caption\na.mp4,a cat\nsub/b.mkv,"two, dogs"\nsub/c.JPG,three\na.mp4,one cat\n',
    "stem.csv": 'ID, Text\r\na,a cat\r\nb,"two, dogs"\r\nc,three\r\na,one cat\r\n',
    "above.csv": 'n,file,sentence\n,/data/a.mp4,a cat\n,v\\sub\\b.mkv,"two, dogs"\n,sub/c,three\n,a,one cat\n',
    "bom.csv": '\ufeffname,caption\na.mp4,a cat\nb.mkv,"two, dogs"\nc.JPG,three\na.mp4, one cat \na,a cat\n',
    "list.jsonl": """{"key": "a", "captions": ["a cat", "one cat"]}

        {"video": "b.mkv", "caption": "two, dogs"}
        {"file": "sub/c", "caption": "three"}""",
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_names_videos_by_path_file_name_or_stem(videos, name):
    source = folder(videos, captions=written(videos, name, TABLES[name]))
    source.prepare()
    assert captions(source) == EXPECTED and source.dropped() == []


def test_texts_beside_the_videos_hold_a_caption_a_line(videos):
    for name, text in (("a.txt", "a cat\n\none cat\n"), ("sub/b.txt", "two, dogs"), ("sub/c.txt", "three")):
        (videos / name).write_text(text)
    assert captions(folder(videos)) == EXPECTED


def test_a_captions_file_in_the_folder_is_found(videos):
    (videos / "captions.jsonl").write_text(TABLES["list.jsonl"])
    assert captions(folder(videos)) == EXPECTED
    (videos / "captions.csv").write_text(TABLES["path.csv"])
    with pytest.raises(ValueError, match="set captions to one of them"):
        folder(videos).prepare()


BROKEN = {"empty": b"", "broken": b"?", "sound": SOUND, "cut": LONG[:-7], "mute": LONG}
REASONS = {
    **{"empty": "video_empty", "broken": "video_broken", "sound": "no_video_stream", "cut": "video_truncated"},
    **{"mute": "caption_missing", "gone": "video_missing", "sub/b": "caption_missing", "sub/c": "caption_missing"},
}


def test_what_is_lost_is_named_with_its_reason_and_stops_nothing(videos):
    for name, data in BROKEN.items():
        (videos / f"{name}.mp4").write_bytes(data)
    table = "video,caption\n" + "".join(f"{name},words\n" for name in ("a", "empty", "broken", "sound", "cut", "gone"))
    source = folder(videos, captions=written(videos, "x.csv", table))
    assert captions(source) == {"a": ["words"]} and dropped(source) == REASONS
    assert all(set(item) == {"key", "where", "reason", "detail"} and item["detail"] for item in source.dropped())


def test_broken_lines_of_a_table_are_named(videos):
    good, broken = (
        '{"video": "a", "caption": "words"}',
        ['["no object"]', "no json", '{"caption": "whose?"}', "[" * 9999],
    )
    broken += ['{"video": "b", "caption": 5}', '{"video": "b", "caption": "\\ud800"}', '{"video": "b", "caption": ""}']
    long = '{"video": "b", "caption": "' + "x" * 3_000_000 + '"}'
    source = folder(videos, captions=written(videos, "x.jsonl", "\n".join([good, *broken, long, good])))
    assert captions(source) == {"a": ["words"]}
    lines = {os.path.basename(i["where"]): i["reason"] for i in source.dropped() if " line " in i["where"]}
    assert lines == {f"x.jsonl line {n}": "caption_missing" if n == 8 else "caption_broken" for n in range(2, 10)}


def test_a_line_that_is_not_utf8_costs_itself_only(videos):
    table = b"video,caption\na,caf\xe9\na,a cat\nb,\x00two\nc,three\n"
    source = folder(videos, captions=written(videos, "x.csv", table))
    assert captions(source) == {"a": ["a cat"], "sub/c": ["three"]}
    assert [item["reason"] for item in source.dropped()] == ["caption_broken", "caption_broken", "caption_missing"]


def test_broken_and_lonely_texts_are_named(videos):
    for name, text in (("a.txt", b"a cat"), ("sub/b.txt", b"\xff"), ("lonely.txt", b"who?")):
        (videos / name).write_bytes(text)
    source = folder(videos)
    assert captions(source) == {"a": ["a cat"]}
    assert [(item["where"], item["reason"]) for item in source.dropped()] == [
        ("lonely.txt", "video_missing"),
        ("sub/b.txt", "caption_broken"),
        ("sub/b.mkv", "caption_missing"),
        ("sub/c.JPG", "caption_missing"),
    ]


def test_a_name_of_two_videos_is_not_guessed(videos):
    (videos / "b.mp4").write_bytes(SHORT)
    table = "video,caption\nb,which\nother/b.mp4,above\nno/a/c.JPG,no\nb.mp4,exact\na,a cat\nsub/b.mkv,two\n"
    source = folder(videos, captions=written(videos, "x.csv", table))
    assert captions(source) == {"a": ["a cat"], "b": ["above", "exact"], "sub/b": ["two"]}
    assert [item["key"] for item in source.dropped()] == ["b", "no/a/c.JPG", "sub/c"]
    assert "2 videos have this name" in source.dropped()[0]["detail"]


def test_a_picture_beside_its_video_is_a_thumbnail(videos):
    (videos / "a.jpg").write_bytes(image("mjpeg"))
    source = folder(videos, captions=written(videos, "x.csv", "video,caption\na,a cat\n"))
    (row,) = [(index, 0) for index in map(open_index, source.shards("train"))]
    assert read_part(*row, "video") == SHORT


def test_keys_are_made_of_any_file_name_and_differ(videos):
    names = ["x.y.mp4", "x_y.mp4", "é ü.mp4", "new\nline.mp4", ".hidden.mp4", "n" * 240 + ".mp4", "d.ir/z.mp4"]
    names.append("/".join(["d" * 200] * 6) + "/deep.mp4")
    for name in names:
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        (videos / name).write_bytes(SHORT)
        (videos / name).with_suffix(".txt").write_text(repr(name))
    keys = captions(folder(videos))
    assert sorted(text for (text,) in keys.values()) == sorted(map(repr, set(names) - {".hidden.mp4"}))
    assert {"é ü", "new_line", "d_ir/z"} <= keys.keys() and all("." not in key for key in keys)


def test_questions_and_events_of_a_jsonl_are_kept(videos):
    extra = {"questions": [{"question": "q", "answer": "a"}], "hard_negative": "no cat"}
    lines = [
        {"video": "a", "caption": "a cat", **extra},
        {"video": "a", "caption": "one cat", "hard_negative": "other"},
    ]
    source = folder(videos, captions=written(videos, "x.jsonl", "\n".join(map(json.dumps, lines))))
    assert meta_of(open_index(source.shards("train")[0]), 0) == {"captions": ["a cat", "one cat"], **extra}


@pytest.fixture
def many(tmp_path):
    (tmp_path / "videos").mkdir()
    for i in range(30):
        (tmp_path / "videos" / f"{i}.png").write_bytes(image(size=(8, 8)))
        (tmp_path / "videos" / f"{i}.txt").write_text(f"picture {i}")
    return tmp_path / "videos"


def test_the_test_split_is_held_out_by_the_hash_of_the_key(many):
    source = folder(many, holdout=0.3, min_test=9, max_samples_per_shard=4)
    train, test = captions(source), captions(source, "test")
    assert (len(train), len(test), source.test_is_train()) == (21, 9, False)
    assert not train.keys() & test.keys() and len(source.shards("train")) == 6
    order = sorted(train | test, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    assert test.keys() == set(order[:9])


def test_too_few_clips_test_on_the_training_clips_and_say_so(many):
    source = folder(many, holdout=0.3, min_test=10)
    assert source.test_is_train() and source.shards("test") == source.shards("train") and len(captions(source)) == 30


def changed(many, what: str) -> Folder:
    if what == "content":
        (many / "0.png").write_bytes(image(size=(9, 9)))
    elif what == "time":
        os.utime(many / "0.png", (1, 1))
    elif what == "caption":
        (many / "0.txt").write_text("another")
    elif what == "gone":
        (many / "0.png").unlink()
    return folder(many, max_samples_per_shard=7 if what == "option" else 256)


@pytest.mark.parametrize("what", ["nothing", "content", "time", "caption", "gone", "option"])
def test_the_cache_is_used_again_unless_something_changed(many, what):
    first = folder(many)
    first.prepare()
    shard = first.shards("train")[0]
    written_at = os.stat(shard).st_mtime_ns
    second = changed(many, what)
    second.prepare()
    assert (second.shards("train")[0] == shard) == (what == "nothing")
    assert os.stat(shard).st_mtime_ns == written_at


@pytest.mark.parametrize("damage", ["shard", "index", "summary", "cut"])
def test_a_cache_with_missing_files_is_made_again(many, damage):
    first = folder(many)
    shard = Path(first.shards("train")[0])
    if damage == "cut":
        os.truncate(shard, 512)
    else:
        {"shard": shard, "index": shard.with_suffix(".index"), "summary": shard.parent / "folder.json"}[damage].unlink()
    assert len(captions(folder(many))) == 30


def prepare(videos, cache, pause_s=0) -> None:
    """Prepare in another process, with a pause after the first shards are written."""
    from vlp.data import folder as module

    write = module.write_shards
    module.write_shards = lambda *args, **options: (write(*args, **options), time.sleep(pause_s))[0]
    Folder(str(videos), cache=str(cache)).prepare()


def started(*args) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=prepare, args=args)
    process.start()
    return process


def paused(videos, cache) -> BaseProcess:
    process = started(videos, cache, 60)
    while not list(cache.glob("*.partial/*.index")):
        time.sleep(0.02)
    return process


def test_processes_at_once_make_one_cache(many):
    cache = many.parent / "cache"
    work = [started(many, cache) for _ in range(3)]
    assert [process.join(60) or process.exitcode for process in work] == [0, 0, 0]
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"] and len(captions(folder(many))) == 30


def test_a_killed_process_blocks_nobody_and_nothing_of_it_is_used(many):
    cache = many.parent / "cache"
    process = paused(many, cache)
    (leftover,) = cache.glob("*.partial")
    (leftover / "train-000099.tar").write_bytes(b"old")
    process.kill()
    process.join()
    assert len(captions(folder(many))) == 30
    assert not list(cache.glob("*.partial")) and not list(cache.glob("*/train-000099.tar"))


def test_a_second_process_waits_for_the_first(many):
    cache = many.parent / "cache"
    first = paused(many, cache)
    second = started(many, cache)
    second.join(0.5)
    assert second.exitcode is None and len(list(cache.glob("*"))) == 2
    first.kill()
    second.join(60)
    assert second.exitcode == 0 and len(captions(folder(many))) == 30


def table(name: str, text: str | bytes):
    return lambda videos: {"captions": written(videos, name, text)}


MISTAKES = {
    "no_folder": (lambda v: {"videos": "/nowhere"}, "'/nowhere' is not a folder"),
    "no_video": (lambda v: {"videos": str(v.parent / "none")}, r"holds no video \(2 .gif\); allowed are mp4, mkv"),
    "type": (table("x.xlsx", ""), r"unknown type; allowed are \.csv and \.jsonl"),
    "missing": (lambda v: {"captions": "/nowhere.csv"}, "No such file"),
    "columns": (table("x.csv", "url,words\n1,2\n"), "found url, words; wanted one of video"),
    "caption": (table("x.jsonl", '{"video": 1, "words": 2}'), "holds the caption: found video, words"),
    "empty": (table("x.csv", ""), "found none"),
    "no_lines": (table("x.csv", "video,caption\n"), "none of its 0 lines is usable"),
    "utf16": (table("x.csv", "video,caption\na,b\n".encode("utf-16")), "no column"),
    "one_field": (table("x.csv", "video,caption\na," + "x" * 200_000), "not CSV"),
    "no_captions": (lambda v: {}, r"no clip is usable \(3 caption_missing\)"),
    "no_match": (table("x.csv", "video,caption\nq,b\n"), "3 caption_missing, 1 video_missing"),
    "cache": (lambda v: {"cache": str(v / "a.mp4")}, "cannot be written"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_the_user_is_one_clear_line(videos, name):
    (videos.parent / "none").mkdir()
    for i in range(2):
        (videos.parent / "none" / f"{i}.gif").write_bytes(b"GIF89a")
    options, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message) as caught:
        Folder(**{"videos": str(videos), "cache": str(videos.parent / "cache"), **options(videos)}).prepare()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"holdout": 1}, {"holdout": -0.1}, {"min_test": 0}, {"max_samples_per_shard": 0}])
def test_senseless_options_are_refused(videos, options):
    with pytest.raises(ValueError, match="must be at least"):
        folder(videos, **options)
    with pytest.raises(ValueError, match="'train' or 'test'"):
        folder(videos).shards("val")


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/real_clips is not there")
def test_real_web_clips_become_shards(tmp_path):
    source = Folder(str(REAL), captions=str(REAL / "captions.jsonl"), cache=str(tmp_path), holdout=0.3, min_test=3)
    assert source.dropped() == [] and not source.test_is_train()
    both = captions(source) | captions(source, "test")
    assert len(both) == 10 and all(len(texts) == 2 for texts in both.values()) and len(captions(source, "test")) == 3
