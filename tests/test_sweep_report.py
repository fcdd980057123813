"""The table and the page of a sweep: means, intervals, differences, what is missing, and nothing a value can break."""

import colorsys
import json
import math
import shutil
import subprocess

import fake_sweep
import numpy as np
import pytest
from PIL import Image
from test_report import CHROMIUM, Tags, spoil

from vlp.report import cells, sweep_stats, sweep_text
from vlp.report.sweep import status, write_page_of

SECTIONS = ("scores", "curves", "cells", "all", "notes")
R1 = cells.Metric("world", "retrieval", "t2v_r1")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    directory = fake_sweep.write_sweep_dir(tmp_path_factory.mktemp("sweep") / "weights")
    files = cells.read_sweep(directory)
    return files, write_page_of(files).read_text(encoding="utf-8")


def test_interval_over_seeds_is_that_of_students_t():
    found = sweep_stats.estimate([80.0, 82.0, 81.5])
    deviation = math.sqrt(sum((x - 81.16667) ** 2 for x in (80.0, 82.0, 81.5)) / 2)
    assert found.mean == pytest.approx(81.16667) and found.half == pytest.approx(4.303 * deviation / 3**0.5, rel=1e-3)
    assert sweep_stats.estimate([3.0]).half is None
    assert sweep_stats.t_point(60) == pytest.approx(2.000, abs=2e-3)  # beyond the table


def test_differences_are_paired_by_seed(tmp_path):
    files = cells.read_sweep(fake_sweep.write_sweep_dir(tmp_path / "s", broken=False))
    low, base, high = sweep_stats.groups(files)
    assert base.is_base and base.scores[R1].difference is None
    difference = high.scores[R1].difference
    assert difference is not None and difference.values == (5.0, 4.0, 4.0)  # 85-80, 86-82, 85.5-81.5
    assert (high.scores[R1].verdict, low.scores[R1].verdict) == ("better", "worse")
    median = sweep_stats.groups(files)[0].scores[R1._replace(key="t2v_medr")]
    assert median.difference is not None and median.difference.mean > 0 and median.verdict == "worse"  # lower is better


def test_each_way_to_be_unfinished_is_told_apart(full):
    states = [(cell.status, cell.reason) for cell in full[0].cells if cell.status != cells.DONE]
    assert states == [
        ("failed", "a loss was not a finite number (exit 79), at step 300 of 400"),
        ("stopped", "stopped at step 300 of 400, saved"),
        ("waiting", "not started"),
    ]
    assert status(full[0]) == "failed"


def test_newest_attempt_counts_where_it_ended_before_it_could_write_its_record(tmp_path):
    directory = fake_sweep.write_sweep_dir(tmp_path / "s")
    name = "contrastive.weight=1,seed=1"
    (directory / "_logs" / f"{name}.exit").write_text("73\n")
    (directory / "_logs" / f"{name}.log").write_text("the run directory x cannot be written\n")
    found, reason, detail, _ = cells.state(directory, name)
    assert found == "failed" and "(exit 73)" in reason and detail == "the run directory x cannot be written"
    (directory / "_logs" / f"{name}.exit").write_text("-9\n")
    assert cells.state(directory, name)[1].startswith("stopped by signal 9")


def test_table_shows_means_differences_and_the_command_for_the_rest(full):
    text = sweep_text.text(full[0], None)
    assert "6 done, 1 stopped, 1 failed, 1 waiting" in text and fake_sweep.COMMAND in text
    row = next(line for line in text.splitlines() if line.startswith("0.5 "))
    assert "2 of 3" in row and f"81.0 {sweep_text.PLUS_MINUS} 12.7 % (base)" in row
    assert "t-interval over seeds" in text and "paired by seed" in text


def test_table_fits_a_narrow_screen(full, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = sweep_text.text(full[0], None).splitlines()
    table = lines[lines.index("") + 3 :][:4]
    assert max(map(len, table)) <= 80 and "Not shown for want of room" in "\n".join(lines)


def test_page_has_all_sections_and_fetches_nothing(full):
    seen = Tags(full[1]).seen
    assert {attrs.get("id") for tag, attrs in seen if tag == "section"} == set(SECTIONS)
    for _, attrs in seen:
        for name in ("src", "href", "srcset"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:")) or value.endswith("/report.html")
    assert "default-src 'none'" in full[1] and "url(" not in full[1]
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for tag, attrs in seen if tag == "svg")


def test_text_of_a_sweep_is_escaped_everywhere(tmp_path):
    directory = fake_sweep.write_sweep_dir(tmp_path / "s")
    content = json.loads((directory / "sweep.json").read_text())
    names = [cell["name"] for cell in content["cells"]]
    spoilt = spoil(content)
    for cell, name in zip(spoilt["cells"], names, strict=True):
        cell["name"] = name  # it is a folder
    (directory / "sweep.json").write_text(json.dumps(spoilt))
    seen = Tags(write_page_of(cells.read_sweep(directory)).read_text()).seen
    assert sum(tag == "script" for tag, _ in seen) == 1
    assert not any(name.startswith("on") for _, attrs in seen for name in attrs)


def test_sweep_that_has_only_begun_makes_a_page(tmp_path):
    directory = fake_sweep.write_sweep_dir(tmp_path / "s")
    for path in directory.glob("contrastive*"):
        shutil.rmtree(path)
    for path in (directory / "_logs").iterdir():
        path.unlink()
    files = cells.read_sweep(directory)
    assert "There are no scores" in write_page_of(files).read_text() and "9 waiting" in sweep_text.text(files, None)


def test_directory_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no sweep: sweep\.json is missing"):
        cells.read_sweep(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to load the page")
def test_page_is_drawn_by_a_browser(full, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={tmp_path}", "--window-size=1300,2400"]
    page = (full[0].directory / "report.html").as_uri()
    done = subprocess.run([CHROMIUM, *flags, "--dump-dom", page], capture_output=True, timeout=120)
    assert 'data-ready="yes"' in done.stdout.decode() and "CONSOLE" not in done.stderr.decode()
    shot = tmp_path / "page.png"
    subprocess.run([CHROMIUM, *flags, f"--screenshot={shot}", page], capture_output=True, timeout=120, check=True)
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3).astype(int)
    for hue in (217, 38, 152):  # of the three groups, in dots, lines and legends
        colour = 255 * np.array(colorsys.hls_to_rgb(hue / 360, 0.5, 0.62))
        assert (abs(pixels - colour).max(1) < 3).sum() > 500, hue
