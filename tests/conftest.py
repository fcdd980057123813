"""One folder a test process, so that the tests of a process share a rendered world."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny runs and their data lie."""
    return tmp_path_factory.mktemp("vlp")
