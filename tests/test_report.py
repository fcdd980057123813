"""The report of a run: whatever is in the directory, a page comes out, and nothing in it can harm its reader."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import fake_run
import numpy as np
import pytest
from PIL import Image

from vlp.report import curves, graph, media, panels, read, words
from vlp.report.drops import drops
from vlp.report.examples import gallery
from vlp.report.records import (
    Dropped,
    Evaluation,
    Example,
    Graph,
    Node,
    Objective,
    Result,
    Row,
    Run,
    Source,
    Task,
    View,
)
from vlp.report.results import TIMES, banners, headline, times_chance
from vlp.report.run import main, write_report
from vlp.types import Reason

SECTIONS = ("results", "curves", "examples", "data", "step", "parameters", "environment", "config", "notes")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>document.title='taken'</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    directory = fake_run.write_run(tmp_path_factory.mktemp("run") / "full")
    return directory, write_report(directory).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Collects what a browser would see as tags and attributes."""

    def __init__(self, page):
        super().__init__()
        self.seen = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_sections_are_all_there_with_a_lead(full):
    for name in SECTIONS:
        section = re.search(rf'<section id="{name}">\s*<h2>[^<]+</h2>\s*<p class="lead">[^<]+Good [^<]+</p>', full[1])
        assert section, name


def test_contents_link_to_what_exists(full):
    seen = Tags(full[1]).seen
    names = {attrs["id"] for _, attrs in seen if "id" in attrs}
    links = {attrs["href"][1:] for tag, attrs in seen if tag == "a" and attrs["href"].startswith("#")}
    assert set(SECTIONS) <= links <= names


def test_results_keep_raw_and_dual_softmax_apart(full):
    row = re.search(r"<tr><th scope=\"row\">text-to-video R@1</th>(.*?)</tr>", full[1]).group(1)
    cells = re.findall(r'<td class="number[^"]*">([^<]*)</td>', row)
    final = json.loads((full[0] / "eval/step-000600.json").read_text())["tasks"]["retrieval"]["rows"][0]
    assert cells == ["200", f"{final['raw']:.1f} %", f"{final['dual_softmax']:.1f} %", "0.5 %"]


def test_page_fetches_nothing(full):
    for tag, attrs in Tags(full[1]).seen:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    assert "url(" not in full[1] and "@import" not in full[1] and "default-src 'none'" in full[1]


def test_policy_allows_the_one_script(full):
    script = re.search(r"<script>(.*?)</script>", full[1], re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in full[1]


def test_pictures_and_graphics_have_alternatives(full):
    for tag, attrs in Tags(full[1]).seen:
        if tag == "img":
            assert attrs["alt"].startswith("8 frames of a clip")
        if tag == "svg":
            assert attrs.get("aria-hidden") == "true" or (attrs["role"] == "img" and attrs["aria-label"])


def test_text_of_a_run_is_escaped_everywhere(tmp_path):
    directory = fake_run.write_run(tmp_path / "run", step=8)
    for name in ("run.json", "graph.json", *(f"eval/{path.name}" for path in (directory / "eval").glob("*.json"))):
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(spoil(content)))
    (directory / "config.yaml").write_text(EVIL)
    page = write_report(directory).read_text()
    seen = Tags(page).seen
    assert sum(tag == "script" for tag, _ in seen) == 1
    assert not any(name.startswith("on") for _, attrs in seen for name in attrs)
    assert "&lt;script&gt;document.title" in page and "{{ 7*7 }}" in page


def spoil(value, key=""):
    if isinstance(value, dict):
        return {name: spoil(child, name) for name, child in value.items()}
    if isinstance(value, list):
        return [spoil(child) for child in value]
    return value + EVIL if isinstance(value, str) and key not in ("status", "kind", "strip", "key") else value


def test_empty_directory_renders_and_says_what_is_missing(tmp_path):
    page = write_report(tmp_path).read_text()
    assert page.count('class="missing"') == 10
    for name in ("run.json", "graph.json", "metrics.csv", "config.yaml"):
        assert f"{name} is missing" in page


@pytest.mark.parametrize("name", ["run.json", "graph.json", "metrics.csv", "config.yaml", "eval", "eval/media"])
def test_report_renders_without(name, tmp_path):
    directory = fake_run.write_run(tmp_path / "run", step=8)
    path = directory / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "missing" in write_report(directory).read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"name": 3, "parts": 1}', '{"sources": [1]}', "\xff"])
def test_report_renders_with_damaged_json(content, tmp_path):
    directory = fake_run.write_run(tmp_path / "run", step=8)
    for name in ("run.json", "graph.json", "eval/step-000008.json"):
        (directory / name).write_bytes(content.encode("latin-1"))
    assert "run.json" in write_report(directory).read_text().split('id="notes"')[1]


def test_report_leaves_no_other_file_behind(full):
    assert not [path for path in full[0].iterdir() if "report" in path.name and path.name != "report.html"]


def test_command_line_refuses_what_is_no_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        main()
    assert "give the directory of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "title"), [("failed", "failed"), ("preempted", "was stopped"), ("running", "was at step")]
)
def test_banner_says_that_a_run_did_not_finish(status, title):
    files = read.RunFiles(Path(), Run(status=status, exit_code=79), None, None, [], "", [])
    (banner,) = banners(files)
    assert title in banner.title and (status == "running" or "79" in banner.text)


def test_banner_is_absent_for_a_clean_run():
    assert banners(read.RunFiles(Path(), Run(status="finished"), None, None, [], "", [])) == []


def test_banner_warns_of_training_clips_and_of_drops():
    source = Source(name="a", train=98, dropped=[Dropped("k"), Dropped("l")], test_is_train=True)
    run = Run(status="finished", sources=[source])
    evaluation = Evaluation(source="b", trained_on_these=True)
    files = read.RunFiles(Path(), run, None, None, [evaluation], "", [])
    titles = [banner.title for banner in banners(files)]
    assert titles == ["The test clips of a, b are its training clips.", "2 samples could not be used (2.0 %)."]


def test_every_reason_has_words():
    assert set(words.REASONS) == set(Reason)
    assert words.reason("video_broken") == words.REASONS[Reason.VIDEO_BROKEN]
    assert words.reason("something_new") == ("something new", "")


def test_drops_are_counted_by_reason():
    dropped = [Dropped("a", "s", "checksum", "", "train")] * 3 + [Dropped("b", "s", "PADDING", "", "index")]
    found = drops(Source(train=6, dropped=dropped))
    assert [(r.name, r.number, r.bar) for r in found.reasons] == [("Checksum", 3, 100), ("Padding", 1, 100 / 3)]
    assert found.share == "40.0 %" and found.reasons[0].stages == "during training"


def test_headline_takes_the_newest_and_each_first_metric():
    rows = [Row(metric=f"m{k}", key=f"t2v_r{k}", raw=40.0, chance=0.5, unit="%") for k in (5, 1, 10)]
    old = Evaluation(step=1, tasks={"a": Task("A", rows)})
    new = Evaluation(step=2, tasks={"a": Task("A", [row._replace(raw=50.0) for row in rows])})
    cards = headline([old, new])
    assert [(card.label, card.value) for card in cards] == [("m5", "50.0 %"), ("m1", "50.0 %")]


@pytest.mark.parametrize(
    ("raw", "chance", "higher", "text"),
    [
        (41.0, 0.5, True, f"82 {TIMES} chance"),
        (2.0, 100.5, False, f"50.2 {TIMES} better than chance"),
        (3.0, 0.0, True, ""),
    ],
)
def test_times_chance_follows_the_direction(raw, chance, higher, text):
    assert times_chance(Row(raw=raw, chance=chance, higher_is_better=higher)) == text


def test_metrics_merge_repeated_steps_and_refuse_cut_lines(tmp_path):
    path, problems = tmp_path / "metrics.csv", []
    path.write_text("step,a,b\n3,1,2\n5,7,\n5,,4\n3,9,8\n7,nan,1\n8,1\nx,1,1\n9,1,1")
    metrics = read.read_metrics(path, problems)
    assert metrics.steps.tolist() == [3, 5, 7]
    np.testing.assert_equal(metrics.columns["a"], [9, 7, np.inf])
    np.testing.assert_equal(metrics.columns["b"], [8, 4, 1])
    assert problems == ["metrics.csv has 3 damaged lines, left out"]


def test_smooth_equals_the_weighted_mean():
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0])
    distance = abs(np.arange(5)[:, None] - np.arange(5)[None])
    weights = np.exp(-distance / 2.0)
    np.testing.assert_allclose(curves.smooth(values, 2.0), weights @ values / weights.sum(1))


def test_thin_keeps_the_extremes():
    values = np.random.default_rng(0).normal(size=5000)
    values[1234], values[4321] = 99, -99
    steps, kept = curves.thin(np.arange(5000), values)
    assert len(steps) <= curves.MAX_POINTS + 2 and steps[0] == 0 and steps[-1] == 4999
    assert kept.max() == 99 and kept.min() == -99 and (np.diff(steps) > 0).all()


@pytest.mark.parametrize(("low", "high", "ticks"), [(0, 10, [0, 2, 4, 6, 8, 10]), (0.13, 0.42, [0.2, 0.3, 0.4])])
def test_ticks_are_round_and_inside(low, high, ticks):
    np.testing.assert_allclose(curves.nice_ticks(low, high, 5 if high == 10 else 4), ticks)


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0, 0.0], [np.nan, 3.0], [1.0, np.inf], [1e-30, 1e30]])
def test_chart_stays_inside_its_frame(values):
    look = curves.Look((520, 190))
    found = curves.chart("x", steps=np.arange(len(values)), values=np.array(values), look=look, chance=1.0)
    numbers = [float(number) for number in re.findall(r"[\d.]+(?:e-?\d+)?", found.line + found.area)]
    assert max(numbers) <= 520 and len(found.broken) == sum(np.isinf(values))
    assert all(0 <= tick.at <= 190 for tick in found.y_ticks) and 0 <= found.chance <= 190


def test_chart_cuts_rare_spikes_at_its_edge():
    values = np.r_[np.linspace(3, 1, 1000), 1e6]
    found = curves.chart("x", steps=np.arange(1001), values=values, look=curves.Look((520, 190)))
    heights = [float(y) for y in re.findall(r" ([\d.-]+)", found.raw)]
    assert min(heights) >= curves.TOP - 0.1 and max(heights) <= 190


def test_chart_without_finite_values_is_none():
    look = curves.Look((520, 190))
    assert curves.chart("x", steps=np.arange(2), values=np.array([np.nan, np.inf]), look=look) is None


def test_curves_show_losses_wait_share_and_temperature(full):
    metrics = read.read_metrics(full[0] / "metrics.csv", [])
    found = panels.training_curves(metrics, None)
    titles = [chart.title for chart in found["main"]]
    assert sorted(titles[:4]) == sorted(f"{words.title(name)} loss" for name in fake_run.LOSSES)
    assert titles[4:] == ["Learning rate", "Temperature", "Clips per second", "Share of time waiting for data"]
    assert [chart.title for chart in found["more"]] == ["time/step_s", "train/grad_norm"]


def test_evaluation_curves_take_the_longer_history():
    rows = [Row(metric="m", key="k", raw=3.0, chance=1.0, unit="%")]
    evaluations = [Evaluation(step=step, source="s", tasks={"t": Task("T", rows)}) for step in (2, 4)]
    metrics = read.Metrics(np.arange(3), {"val/s/k": np.array([5.0, 6.0, 7.0])})
    (short,) = panels.evaluation_curves(evaluations, read.Metrics(np.arange(3), {}))
    (long,) = panels.evaluation_curves(evaluations, metrics)
    assert (short.last, len(short.dots)) == ("3.0 %", 2) and (long.last, len(long.dots)) == ("7.0 %", 3)


def test_gallery_shows_right_and_wrong_and_the_right_clip_further_down(tmp_path):
    results = [Result(key=str(n), correct=n == 4) for n in range(7)]
    examples = [Example(kind="retrieval", rank=1 if n < 9 else 5, results=results) for n in range(12)]
    found = gallery("T", Task("T", [], examples), tmp_path, [])
    assert [shown.right for shown in found.front] == [True, True, False, False]
    assert (found.num_right, found.num_wrong, len(found.folded)) == (9, 3, 5)
    assert [clip.place for clip in found.front[0].clips] == [1, 2, 3, 5]


def test_picture_outside_the_run_is_refused(tmp_path):
    fake_run.draw_strip(tmp_path / "secret.jpg", "red", "circle", "grows")
    (tmp_path / "run").mkdir()
    problems = []
    assert media.embed(tmp_path / "run", "../secret.jpg", problems) is None
    assert "outside" in problems[0]


def test_picture_that_is_no_jpeg_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_text("<svg onload=alert(1)>")
    Image.new("RGB", (7, 5)).save(tmp_path / "b.jpg", "PNG")
    problems = []
    assert [media.embed(tmp_path, name, problems) for name in ("a.jpg", "b.jpg")] == [None, None]
    assert all("cannot be read" in problem for problem in problems) and len(problems) == 2


def test_wide_picture_is_shrunk(tmp_path):
    fake_run.draw_strip(tmp_path / "a.jpg", "red", "circle", "moves up", size=300, num_frames=7)
    strip = media.embed(tmp_path, "a.jpg", [])
    with Image.open(io.BytesIO(base64.b64decode(strip.uri.partition(",")[2]))) as picture:
        assert picture.size == (media.MAX_WIDTH, media.MAX_WIDTH // 7) and strip.num_frames == 7


def overlap(a, b):
    return a.x < b.x + b.width and b.x < a.x + a.width and a.y < b.y + b.height and b.y < a.y + a.height


def wide_graph(seed):
    """A random graph with far arrows, several views and odd names."""
    rng = np.random.default_rng(seed)
    names = [f"q{n}_{'x' * int(rng.integers(0, 25))}" for n in range(23)]
    nodes = []
    for n, name in enumerate(names):
        needs = rng.choice(["f0", "f1", "text_ids:mask", *names[:n]], size=min(3, n + 2), replace=False).tolist()
        nodes.append(Node(name, "", needs, [f"part{k}" for k in range(int(rng.integers(0, 4)))], 2, 10**n))
    wiring = [Objective(f"o{n}", 1.0, {"a": names[n], "b": [names[-n], "f2"]}) for n in range(1, 6)]
    return Graph([f"f{n}" for n in range(4)], nodes, [View("mask", ["f0"], ["text_ids"])], wiring)


@pytest.mark.parametrize("seed", range(5))
def test_graph_boxes_do_not_overlap_and_arrows_run_to_the_right(seed):
    drawing = graph.layout(wide_graph(seed))
    assert not [(a.name, b.name) for a, b in combinations(drawing.boxes, 2) if overlap(a, b)]
    boxes = {box.name: box for box in drawing.boxes}
    for arrow in drawing.arrows:
        source, target = boxes[arrow.source], boxes[arrow.target]
        assert source.x + source.width < target.x
        end = [float(number) for number in arrow.path.split()[-2:]]
        np.testing.assert_allclose(end, [target.x, target.y + target.height / 2], atol=0.1)
    assert all(box.y >= 0 and box.y + box.height <= drawing.height for box in drawing.boxes)
    assert drawing.unused == ["f3"]


@pytest.mark.parametrize("seed", range(3))
def test_graph_arrows_do_not_run_through_boxes(seed):
    drawing = graph.layout(wide_graph(seed))
    for arrow in drawing.arrows:
        for start, y, end in re.findall(r"([\d.]+) ([\d.]+)H([\d.]+)", arrow.path):
            inside = [box for box in drawing.boxes if box.x < float(end) and float(start) < box.x + box.width]
            assert not [box.name for box in inside if box.y < float(y) < box.y + box.height]


def test_graph_resolves_what_a_view_writes_to_the_view():
    nodes = [Node("text", "mask", ["text_ids:mask"]), Node("fused", "mask+other", ["text:mask", "labels:mask+other"])]
    found = Graph(["text_ids", "key"], nodes, [View("mask", ["text_ids", "key"], ["text_ids", "labels"])])
    vertices, edges = graph.collect(found)
    assert set(edges) == {
        ("text_ids", "view mask"),
        ("key", "view mask"),
        ("view mask", "text:mask"),
        ("text:mask", "fused:mask+other"),
        ("view mask", "fused:mask+other"),
    }
    assert vertices["fused:mask+other"].badges == ("mask", "other")


def test_graph_takes_the_inputs_of_a_view_from_its_nodes():
    nodes = [Node("hidden", "mask", ["frames"]), Node("x", "mask", ["hidden:mask"])]
    vertices, edges = graph.collect(Graph(["frames"], nodes, [View("mask", ["frames", "optional"], ["hidden"])]))
    assert set(vertices) == {"frames", "view mask", "x:mask"}
    assert set(edges) == {("frames", "view mask"), ("view mask", "x:mask")}


def test_graph_with_a_cycle_or_an_unknown_name_is_still_drawn():
    nodes = [Node("a", "", ["b"]), Node("b", "", ["a", "nowhere"])]
    drawing = graph.layout(Graph([], nodes, [], [Objective("o", 1.0, {"x": "b", "y": None})]))
    assert {box.vertex.kind for box in drawing.boxes} == {"quantity", "unknown", "objective"}


def test_settle_moves_least():
    placed = graph.settle([0.0, 0.0, 10.0], [2.0, 3.0])
    np.testing.assert_allclose(placed, [-1.0, 1.0, 10.0])


@pytest.mark.parametrize(
    ("function", "arguments", "text"),
    [
        (words.duration, (7503,), "2 h 5 min"),
        (words.duration, (None,), "unknown"),
        (words.short, (86_400_000,), "86.4 M"),
        (words.plain, (-0.012345,), "\N{MINUS SIGN}0.01235"),
        (words.measure, (None, "%"), "—"),
        (words.measure, (float("nan"), "%"), "not finite"),
        (words.share, (1, 100_000), "< 0.1 %"),
        (words.when, ("2026-11-23T00:47:12",), "23 Nov 2026, 00:47"),
        (words.when, ("yesterday",), "yesterday"),
    ],
)
def test_words_of_numbers(function, arguments, text):
    assert function(*arguments) == text


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to load the page")
def test_page_runs_in_a_browser_without_errors(full, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={tmp_path}", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, (full[0] / "report.html").as_uri()], capture_output=True, timeout=120)
    dom, log = done.stdout.decode(), done.stderr.decode()
    assert 'data-ready="yes"' in dom and 'class="here"' in dom and "Text-video retrieval" in dom
    assert "CONSOLE" not in log, [line for line in log.splitlines() if "CONSOLE" in line]
