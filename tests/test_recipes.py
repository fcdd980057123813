"""Each recipe on annotation files of the public format, cut down to a few lines, and tiny real videos."""

import base64
import importlib
import json
from pathlib import Path

import pytest
from clips import clip, image
from recipe_runs import dropped, run, samples

RECIPES = sorted(
    path.stem
    for path in (Path(__file__).parent.parent / "data_recipes").glob("*.py")
    if "RECIPE = " in path.read_text()
)
VIDEO, LONG = clip(6), clip(75, size=(48, 32))


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "videos").mkdir()
    return tmp_path


def put(place: Path, *names: str, data: bytes = VIDEO) -> Path:
    for name in names:
        path = place / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return place / "videos"


def file(place: Path, name: str, content: object) -> Path:
    path = place / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def metas(place: Path, split: str) -> dict[str, dict]:
    return {key: each.meta for key, each in samples(place / "out", split).items()}


def captions(place: Path, split: str) -> dict[str, list[str]]:
    return {key: meta["captions"] for key, meta in metas(place, split).items()}


def test_there_are_twenty_three_recipes_and_each_tells_its_format_and_source():
    assert len(RECIPES) == 23
    for name in RECIPES:
        module = importlib.import_module(f"data_recipes.{name}")
        assert module.RECIPE.name == name and "Format: " in module.__doc__
        assert name == "folder" or "Source: " in module.__doc__


def test_the_recipe_of_the_documentation_works(place, monkeypatch):
    page = (Path(__file__).parent.parent / "docs/recipes.md").read_text().split("## A recipe of your own")[1]
    code = "\n".join(line[4:] for line in page.splitlines() if line.startswith("    ") or not line)
    assert len(code.strip().splitlines()) <= 25
    monkeypatch.syspath_prepend(str(file(place, "my_corpus.py", code).parent))
    module = importlib.import_module("my_corpus")
    table = file(place, "train.jsonl", '{"id": "a", "texts": ["one", "two"], "topic": "x"}\n{"id": "b"}\n')
    words = ["--videos", str(put(place, "a.m4v")), "--annotations", str(table), "--out", str(place / "out")]
    assert module.main(module.RECIPE, words) == 0
    assert metas(place, "train") == {"a": {"captions": ["one", "two"], "topic": "x"}}
    assert (
        samples(place / "out", "train")["a"].video == VIDEO and samples(place / "out", "train")["a"].extension == "mp4"
    )
    assert dropped(place / "out") == {f"{table} line 2": "annotation_broken"}


def test_webvid(place):
    videos = put(place, "008001_008050/1.mp4", "2.mp4")
    table = file(
        place,
        "results_2M_train.csv",
        "videoid,contentUrl,duration,page_dir,name\n"
        '1,https://x/1.mp4,PT00H00M10S,008001_008050,"A cat, asleep"\n'
        "2,https://x/2.mp4,PT00H00M09S,000001_000050,A dog\n3,u,d,p,gone\n",
    )
    assert run("webvid", videos, "--annotations", table) == 0
    assert captions(place, "train") == {"1": ["A cat, asleep"], "2": ["A dog"]} and dropped(place / "out") == {
        "3": "video_missing"
    }


@pytest.mark.parametrize("order", ["cc3m", "cc12m"])
def test_cc(place, order):
    videos = put(place, "00000/000000000.jpg", "named.jpg", data=image("mjpeg"))
    rows = [('a "quoted" cat', "http://x/0"), ("a dog", "https://x/1")]
    lines = ["\t".join(row if order == "cc3m" else row[::-1]) for row in rows]
    table = file(place, "Train_GCC-training.tsv", "\n".join(lines))
    assert run("cc", videos, "--annotations", table) == 0
    assert captions(place, "train") == {"000000000": ['a "quoted" cat']}
    names = file(place, "files.tsv", "https://x/1\tnamed.jpg\n")
    assert run("cc", videos, "--annotations", table, "--files", names, "--overwrite") == 0
    assert captions(place, "train") == {"000000001": ["a dog"]}


MSRVTT = {
    "info": {"year": "2016"},
    "videos": [
        {
            "category": 9,
            "url": "u",
            "video_id": f"video{n}",
            "start time": 1.0,
            "end time": 9.0,
            "split": split,
            "id": n,
        }
        for n, split in enumerate(("train", "validate", "test", "train"))
    ],
    "sentences": [{"caption": f"words {n} of {n % 4}", "video_id": f"video{n % 4}", "sen_id": n} for n in range(8)],
}


def test_msrvtt_full_and_1k_a(place):
    videos = put(place, *(f"video{n}.mp4" for n in range(4)))
    data = file(place, "MSRVTT_data.json", MSRVTT)
    assert run("msrvtt", videos, "--annotations", data) == 0
    assert metas(place, "train")["video0"] == {"captions": ["words 0 of 0", "words 4 of 0"], "category": 9}
    assert [captions(place, split).keys() for split in ("train", "val", "test")] == [
        {"video0", "video3"},
        {"video1"},
        {"video2"},
    ]
    train = file(place, "MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo1\n")
    test = file(place, "MSRVTT_JSFUSION_test.csv", "key,vid_key,video_id,sentence\nret0,msr3,video3,the one sentence\n")
    assert run("msrvtt", videos, "--annotations", data, "--train-csv", train, "--test-csv", test, "--overwrite") == 0
    assert captions(place, "train").keys() == {"video0", "video1"} and captions(place, "test") == {
        "video3": ["the one sentence"]
    }
    assert captions(place, "val") == {}


def test_msvd_by_lists_and_by_mapping(place):
    videos = put(place, "-4wsuPCjDBc_5_15.avi", "vid1201.avi", data=clip(6, container="avi", codec="mpeg4"))
    text = file(
        place,
        "AllVideoDescriptions.txt",
        "# comment\n\n-4wsuPCjDBc_5_15 a squirrel is eating\n-4wsuPCjDBc_5_15 a squirrel eats\n",
    )
    lists = file(place, "train_list.txt", "-4wsuPCjDBc_5_15\n")
    assert run("msvd", videos, "--annotations", text, "--lists", lists) == 0
    assert captions(place, "train") == {"-4wsuPCjDBc_5_15": ["a squirrel is eating", "a squirrel eats"]}
    table = file(
        place,
        "video_corpus.csv",
        "VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description\n"
        "X,1,2,3,clean,4,English,a man\nX,1,2,3,clean,4,German,ein Mann\n",
    )
    mapping = file(place, "youtube_mapping.txt", "X_1_2 vid1201\n")
    arguments = ("--annotations", table, "--mapping", mapping, "--numbered")
    assert run("msvd", videos, *arguments, "--overwrite") == 0 and captions(place, "val") == {"X_1_2": ["a man"]}
    assert run("msvd", videos, "--annotations", text) == 78


def test_didemo(place):
    videos = put(place, "12090392@N02_134_87ef.mp4", data=LONG)
    rows = [
        {
            "annotation_id": n,
            "description": f"sentence {n}.",
            "video": "12090392@N02_134_87ef.mov",
            "times": times,
            "num_segments": 6,
            "dl_link": "u",
            "second_annotation_id": 5,
            "reference_description": "",
        }
        for n, times in enumerate(([[0, 0], [1, 2], [0, 0], [0, 0]], [[1, 2], [1, 2]]))
    ]
    assert run("didemo", videos, "--annotations", file(place, "train_data.json", rows)) == 0
    (meta,) = metas(place, "train").values()
    assert meta["captions"] == ["sentence 0. sentence 1."]
    assert [(e["text"], e["start_s"], e["end_s"]) for e in meta["events"]] == [
        ("sentence 0.", 0, 5),
        ("sentence 1.", 5, 15),
    ]


def test_lsmdc(place):
    name = "0001_American_Beauty_00.00.51.926-00.00.54.129"
    videos = put(place, f"0001_American_Beauty/{name}.avi", data=clip(6, container="avi", codec="mpeg4"))
    line = f'{name}\t00.00.51.926\t00.00.54.129\t00.00.51.926\t00.00.54.129\tSOMEONE\'s "caf\xe9".\n'
    path = place / "LSMDC16_annos_training.csv"
    path.write_bytes(line.encode("cp1252"))
    assert run("lsmdc", videos, "--annotations", path, "--encoding", "cp1252") == 0
    (meta,) = metas(place, "train").values()
    assert meta == {"captions": ['SOMEONE\'s "café".'], "film": "0001_American_Beauty"}


EVENTS = {"v_abc": {"duration": 2.5, "timestamps": [[0.5, 1.5], [2.0, 1.0]], "sentences": ["One thing. ", " Another."]}}


def test_activitynet_captions_as_videos_and_as_clips(place):
    videos = put(place, "v_abc.mp4", data=LONG)
    files = [file(place, name, EVENTS) for name in ("train.json", "val_1.json", "val_2.json")]
    assert run("activitynet_captions", videos, "--annotations", *files) == 0
    wanted = [{"text": "One thing.", "start_s": 0.5, "end_s": 1.5}, {"text": "Another.", "start_s": 1.0, "end_s": 2.0}]
    for split in ("train", "val_1", "val_2"):
        assert metas(place, split) == {"v_abc": {"captions": ["One thing. Another."], "events": wanted}}
    assert run("activitynet_captions", videos, "--annotations", *files, "--unit", "clip", "--overwrite") == 0
    assert captions(place, "train") == {"v_abc_500_1500": ["One thing."], "v_abc_1000_2000": ["Another."]}
    assert {each.facts.num_frames for each in samples(place / "out", "val_1").values()} == {30}
    assert run("activitynet_captions", videos, "--annotations", *files, "--texts", "sentences", "--overwrite") == 0
    assert captions(place, "val_1") == {"v_abc": ["One thing.", "Another."]}


def test_vatex(place):
    videos = put(place, "Ptf_2VRj-V0_000122_000132.mp4")
    rows = [{"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["A man.", "Someone."], "chCap": ["一个人。"]}]
    data = file(place, "vatex_training_v1.0.json", rows)
    assert run("vatex", videos, "--annotations", data) == 0
    assert captions(place, "train") == {"Ptf_2VRj-V0_000122_000132": ["A man.", "Someone."]}
    assert run("vatex", videos, "--annotations", data, "--language", "zh", "--overwrite") == 0
    assert captions(place, "train") == {"Ptf_2VRj-V0_000122_000132": ["一个人。"]}


def test_youcook2(place):
    videos = put(place, "training/113/xHr8X2Wpmno.mp4", "validation/101/other.mp4", data=LONG)
    steps = [
        {"segment": [0, 1], "id": 0, "sentence": "cut the onion"},
        {"segment": [1, 2], "id": 1, "sentence": "fry it"},
    ]
    video = {"duration": 2.5, "recipe_type": "113", "annotations": steps, "video_url": "u"}
    data = {
        "database": {
            "xHr8X2Wpmno": {**video, "subset": "training"},
            "other": {**video, "subset": "validation"},
            "t": {"subset": "testing"},
        }
    }
    path = file(place, "youcookii_annotations_trainval.json", data)
    assert run("youcook2", videos, "--annotations", path) == 0
    assert captions(place, "train") == {"xHr8X2Wpmno_0_1000": ["cut the onion"], "xHr8X2Wpmno_1000_2000": ["fry it"]}
    assert metas(place, "val")["other_0_1000"] == {"captions": ["cut the onion"], "recipe_type": "113"}


def test_howto100m(place):
    videos = put(place, "abc.mp4", data=LONG)
    data = file(
        place, "caption.json", {"abc": {"start": [0.0, 1.2], "end": [1.2, 2.4], "text": ["take the flour", "mix it"]}}
    )
    assert run("howto100m", videos, "--annotations", data) == 0
    assert metas(place, "train")["abc"]["events"][1] == {"text": "mix it", "start_s": 1.2, "end_s": 2.4}
    assert captions(place, "train") == {"abc": ["take the flour", "mix it"]}


def test_charades_sta(place):
    videos = put(place, "3MSZA.mp4", data=LONG)
    text = file(place, "charades_sta_test.txt", "3MSZA 0.5 1.5##person turn a light on.\n3MSZA 1.0 2.0##person sits.\n")
    assert run("charades_sta", videos, "--annotations", text) == 0
    events = [
        {"text": "person turn a light on.", "start_s": 0.5, "end_s": 1.5},
        {"text": "person sits.", "start_s": 1.0, "end_s": 2.0},
    ]
    assert metas(place, "test") == {
        "3MSZA": {"captions": ["person turn a light on.", "person sits."], "events": events}
    }


def test_qvhighlights(place):
    name = "bP5KfdFJzC4_660.0_810.0"
    videos = put(place, f"{name}.mp4", data=LONG)
    row = {
        "qid": 8737,
        "query": "A family.",
        "duration": 126,
        "vid": name,
        "relevant_windows": [[0, 2]],
        "relevant_clip_ids": [0],
        "saliency_scores": [[4, 1, 1]],
    }
    train = file(place, "highlight_train_release.jsonl", json.dumps(row) + "\n{broken\n")
    test = file(
        place,
        "highlight_test_release.jsonl",
        json.dumps({name: row[name] for name in ("qid", "query", "duration", "vid")}),
    )
    assert run("qvhighlights", videos, "--annotations", train, test) == 0
    key = "bP5KfdFJzC4_660_0_810_0"
    highlights = [{"text": "A family.", "qid": 8737, "clip_ids": [0], "saliency": [[4, 1, 1]]}]
    events = [{"text": "A family.", "start_s": 0.0, "end_s": 2.0, "qid": 8737}]
    assert metas(place, "train") == {key: {"captions": ["A family."], "events": events, "highlights": highlights}}
    assert metas(place, "test")[key]["highlights"] == [{"text": "A family.", "qid": 8737}]
    assert dropped(place / "out") == {f"{train} line 2": "annotation_broken"}


def test_tgif_qa(place):
    videos = put(place, "tumblr_a_250.mp4", "tumblr_b_250.mp4")
    action = file(
        place,
        "Train_action_question.csv",
        "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey\n"
        "tumblr_a_250\tWhat does the cat do 2 times ?\tsit\tjump\trun\teat\tspin\t1\tACTION4\t1\n"
        "tumblr_b_250\tq\ta\tb\tc\td\te\t7\tACTION5\t2\n",
    )
    frame = file(
        place,
        "Train_frameqa_question.csv",
        'gif_name\tquestion\tanswer\ttype\tvid_id\tdescription\ntumblr_a_250\twhat jumps ?\tcat\t0\tFRAMEQA1\ta "cat\n',
    )
    assert run("tgif_qa", videos, "--annotations", action, frame) == 0
    (meta,) = metas(place, "train").values()
    assert meta["choices"] == [
        {
            "question": "What does the cat do 2 times ?",
            "options": ["sit", "jump", "run", "eat", "spin"],
            "answer": 1,
            "task": "action",
        }
    ]
    assert meta["questions"] == [{"question": "what jumps ?", "answer": "cat", "task": "frameqa"}]
    assert meta["captions"] == ["What does the cat do 2 times ? jump", "what jumps ? cat"]
    assert list(dropped(place / "out").values()) == ["annotation_broken"]


def test_msrvtt_qa_and_msvd_qa(place):
    videos = put(place, "video7.mp4", "X_1_2.mp4")
    rows = [{"answer": "couch", "category_id": 14, "id": 0, "question": "what is he on?", "video_id": 7}]
    assert run("msrvtt_qa", videos, "--annotations", file(place, "train_qa.json", rows)) == 0
    question = {"question": "what is he on?", "answer": "couch", "id": 0}
    assert metas(place, "train") == {"video7": {"captions": ["what is he on? couch"], "questions": [question]}}
    mapping = file(place, "youtube_mapping.txt", "X_1_2 vid7\n")
    arguments = ("--annotations", file(place, "test_qa.json", rows), "--mapping", mapping)
    assert run("msvd_qa", videos, *arguments, "--overwrite") == 0 and metas(place, "test")["vid7"]["questions"] == [
        question
    ]


def test_next_qa_with_options_and_open(place):
    videos = put(place, "1164/3238737531.mp4")
    head = "video,frame_count,width,height,question,answer,qid,type"
    choice = file(
        place,
        "val.csv",
        f"{head},a0,a1,a2,a3,a4\n3238737531,411,640,480,how do the two man play,0,6,CH,roll,tap,strum,hit,pat\n",
    )
    mapping = file(place, "map_vid_vidorID.json", {"3238737531": "1164/3238737531"})
    assert run("next_qa", videos, "--annotations", choice, "--mapping", mapping) == 0
    wanted = {
        "question": "how do the two man play",
        "options": ["roll", "tap", "strum", "hit", "pat"],
        "answer": 0,
        "qid": "6",
        "type": "CH",
    }
    assert metas(place, "val")["3238737531"]["choices"] == [wanted]
    opened = file(place, "test.csv", f"{head}\n3238737531,411,640,480,why,to eat,1,CW\n")
    assert run("next_qa", videos, "--annotations", opened, "--overwrite") == 0
    assert metas(place, "test")["3238737531"]["questions"] == [
        {"question": "why", "answer": "to eat", "qid": "1", "type": "CW"}
    ]


def lines(place: Path, name: str) -> list[str]:
    return (place / "out" / name).read_text().splitlines()


def test_kinetics_as_clips_and_cut_out_of_whole_videos(place):
    videos = put(place, "val/ID-a_000001_000002.mp4", "ID_b.mp4", data=LONG)
    rows = "label,youtube_id,time_start,time_end,split,is_cc\nzumba,ID-a,1,2,val,0\nair drumming,ID_b,1.0,2.0,val,1\n"
    table = file(place, "validate.csv", rows)
    assert run("kinetics", videos, "--annotations", table) == 0
    assert metas(place, "val") == {"ID-a_000001_000002": {"captions": ["zumba"], "label": "zumba"}}
    assert lines(place, "classes.txt") == ["air drumming", "zumba"]  # of the annotations, not of what was found
    assert run("kinetics", videos, "--annotations", table, "--whole", "--overwrite") == 0
    (cut,) = samples(place / "out", "val").values()
    assert cut.meta["label"] == "air drumming" and cut.facts.duration_s == pytest.approx(1, abs=0.1)


def test_lists_of_paths_and_numbers(place):
    videos = put(place, "a b/x.mp4", "y.mp4")
    classes, table = (
        file(place, "map.txt", "1 run\n2 sit down\n"),
        file(place, "val.txt", "a b/x.mp4 1\ny.mp4,0\nz 2\n"),
    )
    assert run("action_lists", videos, "--annotations", table, "--classes", classes) == 0
    assert {key: meta["label"] for key, meta in metas(place, "val").items()} == {"a b/x": "sit down", "y": "run"}
    assert "is not `PATH NUMBER` with a number below 2" in (place / "out" / "dropped.jsonl").read_text()
    same = file(place, "same.txt", "run\nrun\n")
    assert run("action_lists", videos, "--annotations", table, "--classes", same, "--overwrite") == 78


def test_ucf101(place):
    videos = put(place, "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "v_YoYo_g01_c01.avi")
    train = file(place, "trainlist01.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\n")
    test = file(place, "testlist01.txt", "YoYo/v_YoYo_g01_c01.avi\n")
    assert run("ucf101", videos, "--annotations", train, test) == 0
    assert metas(place, "train")["v_ApplyEyeMakeup_g08_c01"]["captions"] == ["apply eye makeup"]
    assert metas(place, "test") == {"v_YoYo_g01_c01": {"captions": ["yo yo"], "label": "YoYo"}}
    assert lines(place, "classes.txt") == ["ApplyEyeMakeup", "YoYo"]
    assert run("ucf101", videos, "--annotations", file(place, "classInd.txt", "1 YoYo\n"), "--overwrite") == 78


def test_hmdb51(place):
    videos = put(place, "brush_hair/a_0.avi", "brush_hair/b_1.avi", "brush_hair/c_2.avi")
    rows = "a_0.avi 1 \nb_1.avi 2 \nc_2.avi 0 \n"
    assert run("hmdb51", videos, "--annotations", file(place, "brush_hair_test_split1.txt", rows)) == 0
    wanted = {"captions": ["brush hair"], "label": "brush_hair"}
    assert (metas(place, "train"), metas(place, "test")) == ({"a_0": wanted}, {"b_1": wanted})
    assert dropped(place / "out") == {}  # a clip of neither part is no loss


def test_something_something(place):
    rows = {"label": "putting cup on table", "template": "Putting [something] on [something]"}
    rows = [{"id": "74225", **rows, "placeholders": ["cup", "table"]}, {"id": 8}]
    videos = put(place, "74225.webm", data=clip(6, codec="libvpx-vp9", container="webm"))
    assert run("something_something", videos, "--annotations", file(place, "validation.json", rows)) == 0
    meta = metas(place, "val")["74225"]
    assert (meta["captions"], meta["template"]) == (["putting cup on table"], "Putting something on something")
    assert lines(place, "templates.txt") == ["Putting something on something"]


def test_a_folder_with_texts_beside_the_videos(place):
    videos = put(place, "a.mp4", "sub/b.mp4")
    for name in ("a", "sub/b"):
        (videos / name).with_suffix(".txt").write_text(f"words of {name}\nmore\n")
    assert run("folder", videos, "--holdout", 0.5) == 0
    assert captions(place, "train") | captions(place, "test") == {
        name: [f"words of {name}", "more"] for name in ("a", "sub/b")
    }
    assert len(captions(place, "test")) == 1


def packed(*rows: list[str | bytes], end: str = "\n") -> str:
    """Lines of a TSV of frames: bytes are written as base64."""
    words = [[base64.b64encode(word).decode() if isinstance(word, bytes) else word for word in row] for row in rows]
    return "".join("\t".join(row) + end for row in words)


RED, WIDE = image("mjpeg"), image("mjpeg", size=(48, 32))


def test_violet_frames_are_stored_bit_for_bit(place):
    text = packed(["v/1", RED, RED], ["v2", '{"class": -1}', WIDE], ["v3", RED])
    file(place, "videos/img_a.tsv", text)
    offsets = [0, text.index("\nv2") + 1, text.index("\nv3") + 1]
    file(place, "videos/img_a.lineidx", "".join(f"{offset}\n" for offset in offsets))
    texts = file(place, "txt_a.json", {"train": {"v/1": ["one", "two"], "v9": ["gone"]}, "val": {"v2": ["three"]}})
    assert run("violet", place / "videos", "--annotations", texts) == 0
    made = samples(place / "out", "train")
    assert captions(place, "val") == {"v2": ["three"]} and list(made) == ["v/1"]
    assert made["v/1"].meta["captions"] == ["one", "two"] and made["v/1"].video.count(RED) == 2
    assert made["v/1"].facts[2:5] == (2, 1.0, 2.0)
    assert dropped(place / "out") == {"v9": "video_missing"}


def test_violet_tasks_have_captions_questions_or_choices(place):
    file(place, "videos/img_a.tsv", packed(["v1", RED], ["v2", RED]))
    options = {"option_0": "a dog", "option_1": "a cat"}
    tasks = [{"video": "v1", "caption": ["one", "two"]}, {"video": "v2", "question": "who", "answer": 1, **options}]
    open_ended = {"test": [{"video": "v1", "question": "how many", "answer": 7}], "ans2label": {"three": 7}}
    given = [file(place, "txt_a.json", {"train": tasks}), file(place, "txt_b.json", open_ended)]
    assert run("violet", place / "videos", "--annotations", *given) == 0
    train, test = metas(place, "train"), metas(place, "test")
    assert train["v1"] == {"captions": ["one two"]}
    assert train["v2"]["choices"] == [{"question": "who", "options": ["a dog", "a cat"], "answer": 1}]
    assert test["v1"]["questions"] == [{"question": "how many", "answer": "three"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (["v1"], "video_empty"),
        (["v1", "/9j/*"], "video_broken"),
        (["v1", RED, WIDE], "video_broken"),
        (["v1", RED[:300]], "video_broken"),
        (["v1", "{}", VIDEO], "video_broken"),
    ],
)
def test_a_bad_line_of_violet_is_named_and_costs_itself(place, line, reason):
    file(place, "videos/img_a.tsv", packed(["v0", RED]) + packed([*line, ""] if len(line) < 2 else line))
    texts = file(place, "txt_a.json", {"train": {"v0": ["a"], "v1": ["b"]}})
    assert run("violet", place / "videos", "--annotations", texts) == 0
    assert dropped(place / "out") == {"v1": reason} and list(captions(place, "train")) == ["v0"]


@pytest.mark.parametrize("offsets", ["0\n5\n", "x\n", "0\n9999999\n", ""])
def test_a_table_of_lines_that_is_not_of_its_file_is_one_clear_line(place, offsets, capsys):
    file(place, "videos/img_a.tsv", packed(["v0", RED], ["v1", RED]))
    file(place, "videos/img_a.lineidx", offsets)
    texts = file(place, "txt_a.json", {"train": {"v0": ["a"]}})
    assert run("violet", place / "videos", "--annotations", texts) == 78
    assert "img_a" in (error := capsys.readouterr().err) and "Traceback" not in error and error.count("\n") == 1
