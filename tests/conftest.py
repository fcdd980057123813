"""What tests share: one folder a test process, with a rendered world, and real ranks that stay alive for a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny runs and their data lie."""
    return tmp_path_factory.mktemp("vlp")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[RankPool]:
    """One process without a group."""
    with RankPool(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool
