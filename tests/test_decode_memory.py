"""A share of the memory harness; `python tests/decode_memory.py 10000` is the whole."""

import decode_memory
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_worker_stays_as_large_as_it_is_unless_frames_are_kept(tmp_path, keep):
    memory = decode_memory.run(tmp_path, num_decodes=600, keep=keep)
    assert memory.decodes > 400 and (memory.growth > decode_memory.BOUND_MIB) == keep
