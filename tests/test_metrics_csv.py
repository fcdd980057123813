"""The CSV of a run, through new columns, kills and resumes."""

import pytest

from vlp.training.metrics_csv import MetricsCsv, read


@pytest.fixture
def path(tmp_path):
    csv = MetricsCsv(tmp_path / "metrics.csv", after_step=0)
    for step in (10, 20, 30):
        csv.append(step, {"train/loss": 1 / step, "time/step_s": 0.5})
    return csv.path


def test_rows_are_on_disk_after_each_append(path):
    assert read(path)[1] == {"step": "20", "train/loss": "0.05", "time/step_s": "0.5"} and len(read(path)) == 3


def test_a_new_key_adds_a_column_and_leaves_old_rows_empty(path):
    MetricsCsv(path, after_step=30).append(40, {"train/loss": 0.1, "val/recall": 0.25})
    assert path.read_text().splitlines()[0] == "step,train/loss,time/step_s,val/recall"
    assert [row.get("val/recall") for row in read(path)] == [None, None, None, "0.25"]
    assert "time/step_s" not in read(path)[3]


@pytest.mark.parametrize(("after_step", "left"), [(0, []), (10, [10]), (25, [10, 20]), (99, [10, 20, 30])])
def test_rows_behind_the_resumed_step_are_dropped(path, after_step, left):
    MetricsCsv(path, after_step=after_step)
    assert [int(row["step"]) for row in read(path)] == left


def test_a_cut_last_line_is_left_out_wherever_it_was_cut(path):
    whole = path.read_bytes()
    last = whole.rstrip().rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        assert [int(row["step"]) for row in read(path)] == [10, 20], whole[last:cut]


def test_a_resumed_file_grows_on_whole_lines(path):
    path.write_bytes(path.read_bytes()[:-3])
    MetricsCsv(path, after_step=30).append(30, {"train/loss": 2.0})
    assert [row["train/loss"] for row in read(path)] == ["0.1", "0.05", "2"]


def test_an_absent_or_empty_file_has_no_rows(tmp_path):
    (tmp_path / "empty.csv").touch()
    assert read(tmp_path / "absent.csv") == [] == read(tmp_path / "empty.csv")


def test_nothing_temporary_is_left(path):
    assert [each.name for each in path.parent.iterdir()] == ["metrics.csv"]
