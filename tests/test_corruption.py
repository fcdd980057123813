"""A small share of the sweeps of tests/corruption.py, with a seed of its own."""

from itertools import pairwise

import corruption
import pytest


@pytest.mark.parametrize("kind", ["shards", "clips"])
def test_damage_is_named_or_changes_nothing(kind):
    found = corruption.run(corruption.KINDS[kind], count=60, seed=77)
    assert not found.wrong, "\n".join(found.wrong)
    assert len(found.counts) >= 7  # the harness saw the outcomes that there are, not one of them


def test_the_harness_sees_a_reader_without_checksums(monkeypatch):
    monkeypatch.setattr("vlp.data.index.zlib.crc32", lambda *data: 0)
    found = corruption.run(corruption.DamagedClips, count=12, seed=1)
    assert sum("without a word" in text for text in found.wrong) >= 4


def test_blocks_of_samples_cover_all_members_and_do_not_overlap():
    for shard in corruption.pristine():
        places = sorted(place for sample in corruption.blocks(shard).values() for place in sample)
        assert all(one[1] <= two[0] for one, two in pairwise(places)) and len(places) >= 8
        assert places[0][0] == 0 and not shard[places[-1][1] :].strip(b"\0")
