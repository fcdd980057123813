import json

import numpy as np
import pytest

from vlp.eval import moments
from vlp.eval.moments import QVHIGHLIGHTS, STRICT, evaluate

# Three queries of 2 s clips; the expected scores were computed with the public evaluator of QVHighlights.
TRUTH = [
    {
        "qid": 1,
        "duration": 20,
        "relevant_windows": [[0, 4], [6, 18]],
        "relevant_clip_ids": [0, 1, 5, 6, 7],
        "saliency_scores": [[4, 3, 4], [2, 2, 2], [1, 0, 1], [4, 4, 4], [3, 2, 1]],
    },
    {
        "qid": 2,
        "duration": 20,
        "relevant_windows": [[6, 10]],
        "relevant_clip_ids": [3, 4],
        "saliency_scores": [[4, 4, 2], [3, 3, 3]],
    },
    {
        "qid": 3,
        "duration": 60,
        "relevant_windows": [[0, 40]],
        "relevant_clip_ids": [0, 1],
        "saliency_scores": [[2, 2, 2], [1, 1, 1]],
    },
]
SPANS = [[[6, 16, 0.9], [0, 6, 0.8], [16, 20, 0.3]], [[4, 8, 0.7], [6, 10, 0.6]], [[0, 30, 0.7]]]
SALIENCY = [[0.9, 0.1, 0, 0, 0.2, 0.1, 0.8, 0.3, 0, 0], [0, 0, 0.9, 0.5, 0.4] + [0] * 5, [0.5] + [0] * 29]
GUESSES = [
    {"qid": one["qid"], "pred_relevant_windows": spans, "pred_saliency_scores": saliency}
    for one, spans, saliency in zip(TRUTH, SPANS, SALIENCY, strict=True)
]
WANTED = {"R1@0.5": 66.67, "R1@0.7": 66.67, "mAP@0.5": 83.33, "mAP@0.75": 66.67, "mAP": 55.0}
WANTED |= {"mAP short": 35.0, "mAP middle": 70.0, "mAP long": 60.0}
WANTED |= {"HL mAP very_good": 38.89, "HL HIT@1 very_good": 33.33, "HL mAP good": 51.85, "HL HIT@1 good": 33.33}
WANTED |= {"HL mAP fair": 85.19, "HL HIT@1 fair": 66.67}


@pytest.mark.parametrize("protocol", [STRICT, QVHIGHLIGHTS])
def test_hand_case_agrees_with_the_public_evaluator(protocol):
    scores = evaluate(GUESSES, TRUTH, protocol)
    assert {name: round(scores[name], 2) for name in WANTED} == WANTED


def test_an_absent_prediction_stays_in_the_denominator():
    scores, all_three = evaluate(GUESSES[:2], TRUTH), evaluate(GUESSES, TRUTH)
    assert scores["R1@0.5"] == pytest.approx(all_three["R1@0.5"] - 100 / 3)
    assert scores["HL HIT@1 fair"] == pytest.approx(all_three["HL HIT@1 fair"] - 100 / 3)


def test_a_bucket_without_a_span_is_left_out():
    scores = evaluate(GUESSES[1:2], TRUTH[1:2])
    assert "mAP short" in scores and "mAP long" not in scores


def test_strict_ranks_by_score_and_the_public_evaluator_by_the_order_of_the_file():
    turned = [GUESSES[0] | {"pred_relevant_windows": SPANS[0][::-1]}]
    assert evaluate(turned, TRUTH[:1])["R1@0.5"] == 100 and evaluate(turned, TRUTH[:1], QVHIGHLIGHTS)["R1@0.5"] == 0


def test_tied_highlights_count_each_in_strict_and_once_in_the_public_evaluator():
    right, scores = np.array([True, False, True, True]), np.array([0.9, 0.8, 0.1, 0.1])
    assert STRICT.average_precision(right, scores) == pytest.approx((1 + 2 * 0.75) / 3)
    assert QVHIGHLIGHTS.average_precision(right, scores) == pytest.approx((1 + 0.75) / 2)


@pytest.mark.parametrize(("a", "b", "value"), [([0, 0.2], [0.4, 0.6], -1 / 3), ([0, 0.4], [0.2, 0.6], 1 / 3)])
def test_generalised_iou_of_hand_cases(a, b, value):
    assert moments.giou(np.array([a]), np.array([b])).item() == pytest.approx(value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"qid": 9}, "1 predictions have a qid that no annotation has, such as 9"),
        ({"pred_saliency_scores": [0.5]}, "qid 1: 1 saliency scores for 10 clips of 2 s"),
        ({"pred_relevant_windows": [[0, 4]]}, "must hold \\[start, end, score\\]"),
        ({"pred_relevant_windows": [[0, 4, float("nan")]]}, "must hold"),
    ],
)
def test_what_cannot_be_scored_is_refused(changes, line):
    with pytest.raises(ValueError, match=line):
        evaluate([GUESSES[0] | changes], TRUTH)


def test_command_prints_scores_and_one_line_for_a_mistake(tmp_path, capsys):
    paths = [tmp_path / "guesses.jsonl", tmp_path / "truth.jsonl"]
    for path, rows in zip(paths, (GUESSES, TRUTH), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert moments.main([*map(str, paths), "--protocol", "qvhighlights"]) == 0
    assert "protocol: qvhighlights" in (out := capsys.readouterr().out) and "mAP" in out
    assert moments.main([str(paths[0]), str(tmp_path / "absent")]) == 78
    assert "absent" in capsys.readouterr().err
