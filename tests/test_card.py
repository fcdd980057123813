"""The model card of a run."""

import fake_run
import pytest

from vlp.report.card import main, plain, write_card


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    directory = fake_run.write_run(tmp_path_factory.mktemp("run") / "full")
    return write_card(directory, use="Finding <b>clips</b>.").read_text()


def test_card_says_data_recipe_scores_and_use(card):
    for part in ("## Intended use", "## Training data", "## Recipe", "## Scores", "95 % interval", "dual softmax"):
        assert part in card
    assert card.startswith("---\nlibrary_name: vlp\n") and "Finding &#60;b&#62;clips&#60;/b&#62;." in card


def test_names_of_data_cannot_become_markup():
    assert plain("a|b <i> [x](y) `c`\n#") == "a&#124;b &#60;i&#62; &#91;x&#93;(y) &#96;c&#96; #"


def test_an_empty_directory_gives_a_card_that_says_what_is_missing(tmp_path):
    text = write_card(tmp_path).read_text()
    assert "None yet" in text and "run.json is missing" in text


def test_no_directory_is_one_line(tmp_path, capsys):
    with pytest.raises(ValueError, match="is not a directory"):
        write_card(tmp_path / "absent")
    assert main([str(tmp_path / "absent")]) == 78 and "card: run_dir=" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 0 and capsys.readouterr().out.strip() == str(tmp_path / "MODEL_CARD.md")
