import json

import numpy as np
import pytest

from vlp.eval import top_clips
from vlp.eval.top_clips import evaluate

# One annotator, six clips, median 2 (of 1 1 1 | 3 3 4: the lower one is 1): clips 0, 2 and 5 are right.
TRUTH = [{"video": "a", "domain": "VT", "scores": [[3], [1], [3], [1], [1], [4]]}]
GUESS = [{"video": "a", "saliency": [0.9, 0.8, 0.7, 0.6, 0.5, 0.1]}]


def test_hand_case_in_both_protocols():
    assert evaluate(GUESS, TRUTH)["mAP VT"] == pytest.approx(100 * (1 + 2 / 3) / 3)  # clip 5 comes sixth
    # Recall is of the two that are found: 0.5 at precision 1, then 0.5 between precision 1/2 and 2/3.
    assert evaluate(GUESS, TRUTH, "tvsum")["mAP VT"] == pytest.approx(100 * (0.5 + 0.5 * (1 / 2 + 2 / 3) / 2))


def test_public_protocol_equals_a_loop_over_annotators():
    rng = np.random.default_rng(0)
    scores, guess = rng.integers(1, 6, (11, 20)), rng.random(11)  # [C, A]
    found = []
    for column in scores.T:
        right = [column[clip] > sorted(column)[5] for clip in np.argsort(-guess)][:5]
        area, recall, precision, hits = 0.0, 0.0, 1.0, 0
        for place, hit in enumerate(right, 1):
            hits += hit
            area += (hits / max(1, sum(right)) - recall) * (precision + hits / place) / 2
            recall, precision = hits / max(1, sum(right)), hits / place
        found.append(area)
    truth = [{"video": "a", "domain": "VT", "scores": scores.tolist()}]
    wanted = 100 * np.mean(found)
    assert evaluate([{"video": "a", "saliency": guess.tolist()}], truth, "tvsum")["mAP"] == pytest.approx(wanted)


def test_domains_weigh_the_same_and_absent_videos_score_nothing():
    truth = [*TRUTH, TRUTH[0] | {"video": "b"}, TRUTH[0] | {"video": "c", "domain": "GA"}]
    found = evaluate([*GUESS, GUESS[0] | {"video": "c"}], truth)
    assert found["mAP VT"] == pytest.approx(found["mAP GA"] / 2) and found["mAP"] == pytest.approx(
        0.75 * found["mAP GA"]
    )


def test_a_constant_guess_is_no_ranking_in_strict():
    flat = [{"video": "a", "saliency": [0.5] * 6}]
    assert evaluate(flat, TRUTH)["mAP"] == pytest.approx(100 * (1 / 4 + 2 / 5) / 3)  # wrong ones first, then 3 of 6


@pytest.mark.parametrize(
    ("guesses", "line"),
    [
        ([GUESS[0] | {"video": "z"}], "1 predictions are of a video that no annotation has, such as 'z'"),
        ([*GUESS, *GUESS], "each video may stand once in each file"),
        ([GUESS[0] | {"saliency": [1, 2]}], "a: saliency must hold 6 finite numbers"),
        ([GUESS[0] | {"saliency": [float("nan")] * 6}], "a: saliency must hold 6 finite numbers"),
    ],
)
def test_what_cannot_be_scored_is_one_line(tmp_path, capsys, guesses, line):
    paths = [tmp_path / "guesses.jsonl", tmp_path / "truth.jsonl"]
    for path, rows in zip(paths, (guesses, TRUTH), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert top_clips.main([*map(str, paths)]) == 78
    error = capsys.readouterr().err
    assert line in error and len(error.splitlines()) == 1
    paths[0].write_text(json.dumps(GUESS[0]))
    assert top_clips.main([*map(str, paths), "--protocol", "tvsum"]) == 0
    assert "protocol: tvsum" in capsys.readouterr().out
