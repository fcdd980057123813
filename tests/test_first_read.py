"""What first reads write beside an index of headers: by many processes, torn, damaged, or nowhere to write to."""

import forks
import numpy as np
import pytest

from vlp.data.first_read import FirstReads, Seen, seen_path
from vlp.data.probe import VideoFacts

FACTS = VideoFacts(48, 32, 9, 29.97, 9 / 29.97, 90, "h264", 0.1, np.array([0, 512, 2**40]))


@pytest.fixture
def path(tmp_path):
    return seen_path(str(tmp_path / "x.index"))


def test_what_is_noted_is_known_to_others_and_the_first_counts(path):
    one, two = FirstReads(path, count=3), FirstReads(path, count=3)
    assert two.get(2, "video") is None and not two.knows(2, "video")
    one.note(2, "video", Seen(7, FACTS))
    two.note(2, "video", Seen(8, None))
    two.note(0, "json", Seen(2**32 - 1, None))
    assert repr(two.get(2, "video")) == repr(Seen(7, FACTS)) and two.knows(2, "video")
    assert one.get(0, "json") == Seen(2**32 - 1, None) and one.get(0, "txt") is None


@pytest.mark.parametrize("torn", [b"0123", b"00000000 1 txt 5 null\n", b"\n \xff \x00\n\n", b"9 99 video 1 null\n"])
def test_a_torn_or_damaged_line_costs_itself_alone(path, torn):
    FirstReads(path, count=3).note(0, "txt", Seen(1, None))
    with open(path, "ab") as file:
        file.write(torn)
    FirstReads(path, count=3).note(1, "txt", Seen(2, FACTS._replace(key_frames=np.zeros(10_001, np.int64))))
    again = FirstReads(path, count=3)
    assert [again.get(row, "txt") for row in range(3)] == [Seen(1, None), Seen(2, None), None]


def test_a_line_that_says_something_else_is_not_believed(path):
    known = FirstReads(path, count=1)
    known.note(0, "txt", Seen(1, None))
    with open(path, "r+b") as file:
        file.write(b"x")
    assert known.get(0, "txt") is None and FirstReads(path, count=1).get(0, "txt") is None


def test_a_folder_that_is_not_there_costs_one_warning(tmp_path, caplog):
    nowhere = FirstReads(str(tmp_path / "no" / "x.seen"), count=2)
    for row in range(2):
        nowhere.note(row, "txt", Seen(1, None))
    assert nowhere.get(0, "txt") is None and len(caplog.records) == 1


def _note_all(path):
    known = FirstReads(path, count=200)
    for row in range(200):
        known.note(row, "video", Seen(row, FACTS))


def test_processes_that_write_at_once_do_not_mix(path):
    context = forks.context()
    writers = [context.Process(target=_note_all, args=(path,)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    known = FirstReads(path, count=200)
    assert [known.get(row, "video").crc32 for row in range(200)] == list(range(200))
