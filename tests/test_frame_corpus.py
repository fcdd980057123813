"""A share of the frame corpus; `python tests/frame_corpus.py` is the whole."""

import frame_corpus
import pytest

from vlp.data import decode as module

SHARE = ["h264_many_references", "h264_open_gop_ts", "h264_missing_key_flags", "h264_no_key_flags_at_all"]
SHARE += ["h264_cut_copy_mov", "h264_rotated_270", "hevc_variable_rate", "vp9_hidden_frames", "av1_mkv", "mjpeg_avi"]


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_every_frame_is_the_right_one_bit_for_bit(start_method):
    rows = frame_corpus.run(SHARE, draws=2, seed=3, start_method=start_method)
    assert [row.name for row in rows] == SHARE and sum(row.compared for row in rows) > 200
    assert [(row.name, row.exact) for row in rows] == [(row.name, row.compared) for row in rows]


def test_a_wrong_frame_is_counted(monkeypatch):
    right = module._ticks
    monkeypatch.setattr(module, "_ticks", lambda times_s, source, start: right(times_s + 0.1, source, start=start))
    row = frame_corpus.check("h264_tall", draws=2, seed=0)
    assert row.exact < row.compared


def test_the_corpus_covers_what_it_says():
    assert len(frame_corpus.FILES) >= 60
