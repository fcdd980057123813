import random

import pytest

from vlp.eval import compare, scores
from vlp.eval.scores import Each, ScoreFile


def made(values, clips=None, statistic="mean"):
    clips = list(range(len(values))) if clips is None else clips
    return Each(clips, [0] * len(values), [float(value) for value in values], statistic)


def test_interval_of_a_share_is_that_of_the_binomial():
    low, high = scores.interval(made([100] * 60 + [0] * 40))
    assert (low, high) == (pytest.approx(100 * (0.6 - 1.96 * 0.049), abs=1.5), pytest.approx(69.6, abs=1.5))


def test_items_of_one_clip_are_drawn_together():
    apart = scores.interval(made([100, 0] * 50))
    together = scores.interval(made([100] * 50 + [0] * 50, clips=[n // 10 for n in range(100)]))
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])


def test_interval_of_a_median_holds_it():
    values = [random.Random(0).expovariate(1) for _ in range(1)] + [random.Random(n).expovariate(1) for n in range(200)]
    low, high = scores.interval(made(values, statistic="median"))
    assert low < sorted(values)[100] < high and high - low < 0.5
    assert scores.interval(made([3, 1, 2], statistic="median"))[0] >= 1


def test_paired_test_sees_a_small_constant_gain_that_intervals_hide():
    noise = [random.Random(n).gauss(0, 30) for n in range(80)]
    found = scores.paired(made(noise), made([x + 1 + n % 2 for n, x in enumerate(noise)]))
    assert found.value == pytest.approx(1.5) and found.low > 1.3 and found.p < 0.001
    same = scores.paired(made(noise), made(noise))
    assert same[:3] == (0, 0, 0) and same.p == 1


def test_paired_test_of_noise_finds_nothing():
    a, b = ([random.Random(seed + n).gauss(0, 1) for n in range(60)] for seed in (0, 1000))
    assert scores.paired(made(a), made(b)).p > 0.05


@pytest.mark.parametrize("other", [made([1, 2]), made([1, 2, 3], clips=[0, 0, 1]), made([1, 2, 3], statistic="median")])
def test_other_items_are_not_compared(other):
    with pytest.raises(ValueError, match=r"other items|only means"):
        scores.paired(made([1, 2, 3]), other)


def written(path, values, **protocol):
    card = {"protocol": {"frames": 8, "split": "abc"} | protocol, "subject": {"checkpoint": path.name}}
    rows = [{"key": "acc", "raw": sum(values) / len(values)}, {"key": "bleu", "raw": 1.0}]
    scores.write(path, ScoreFile(card, rows, {"acc": made(values)}, {0: "clip"}))
    return str(path)


def test_compare_prints_means_and_a_test(tmp_path, capsys):
    a, b = written(tmp_path / "a.json", [0] * 20), written(tmp_path / "b.json", [100] * 20)
    assert compare.main([a, b]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["acc", "0.00", "100.00", "+100.00", "+100.00", "to", "+100.00", "0.0001"]
    assert lines[2].split() == ["bleu", "1.00", "1.00", "+0.00", "-", "-"]


def test_other_cards_are_refused_in_one_line_or_marked(tmp_path, capsys):
    a, b = written(tmp_path / "a.json", [0, 1]), written(tmp_path / "b.json", [1, 1], frames=16)
    assert compare.main([a, b]) == 76
    assert capsys.readouterr().out.splitlines() == [
        "compare: the protocols differ in frames: 8 and 16 (--mark-differences compares all the same)"
    ]
    assert compare.main([a, b, "--mark-differences"]) == 0
    assert "acc*" in (out := capsys.readouterr().out) and "frames: 8 and 16" in out


def test_a_file_that_is_none_is_one_line(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 78
    assert "is no score file" in capsys.readouterr().err
