"""Exit codes are explained where people look for them."""

from pathlib import Path

import pytest

from vlp.training.exits import Exit

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("code", [code for code in Exit if code != Exit.DONE])
def test_every_exit_code_has_a_row_on_the_page_of_clusters_and_in_the_readme(code):
    assert f"\n| {int(code)} |" in (ROOT / "docs" / "cluster.md").read_text()
    assert f"\n| {int(code)} |" in (ROOT / "README.md").read_text()
