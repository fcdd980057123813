import fcntl
import hashlib
import json
import multiprocessing
import os

import numpy as np
import pytest

from vlp.data import synthetic
from vlp.data.decode import decode
from vlp.data.index import open_index, read_part
from vlp.data.scene import scene
from vlp.data.synthetic import World, meta
from vlp.data.wording import canonical
from vlp.types import Reason

TINY = {"num_train": 7, "num_test": 3, "size": 32, "num_frames": 6, "clips_per_shard": 3}


def files(world: World) -> dict[str, tuple]:
    """Inode, time of change and digest of each file, so that any work on it shows."""
    found = {}
    for entry in os.scandir(world.directory):
        with open(entry.path, "rb") as file:
            status = entry.stat()
            found[entry.name] = (status.st_ino, status.st_mtime_ns, hashlib.sha256(file.read()).hexdigest())
    return found


def prepare_tiny(root: str) -> None:
    World(root=root, **TINY).prepare()


@pytest.fixture
def world(tmp_path) -> World:
    made = World(root=str(tmp_path), **TINY)
    made.prepare()
    return made


def test_prepare_writes_every_clip_once_with_its_meta(world):
    for split, counts in (("train", [3, 3, 1]), ("test", [3])):
        indexes = [open_index(path) for path in world.shards(split)]
        assert [len(index) for index in indexes] == counts
        rows = [(index, row) for index in indexes for row in range(len(index))]
        for number, (index, row) in enumerate(rows):
            clip = scene(0, number, split, duration_s=0.5)
            assert (index.key(row), index.status(row)) == (f"{split}-{number:06d}", Reason.OK)
            assert json.loads(read_part(index, row, "json")) == meta(clip)
            assert read_part(index, row, "txt").decode() == canonical(clip)


def test_clips_decode_with_the_wanted_shape(world):
    index = open_index(world.shards("test")[0])
    facts = index.facts(0)
    assert facts is not None and (facts.width, facts.height, facts.num_frames, round(facts.fps, 6)) == (32, 32, 6, 12)
    clip = decode(read_part(index, 0, "video"), np.linspace(0, facts.duration_s, 3), short_side=None)
    assert clip.frames.shape == (3, 32, 32, 3)


def test_second_prepare_does_no_work(world):
    before = files(world)
    World(root=os.path.dirname(world.directory), **TINY).prepare()
    assert files(world) == before


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "index", "no index"])
def test_only_the_damaged_shard_is_rendered_again(world, damage):
    path, before = world.shards("train")[1], files(world)
    index = path.replace(".tar", ".index")
    if "index" in damage or damage == "remove":
        os.remove(path if damage == "remove" else index)
    if damage == "index":
        os.link(world.shards("train")[0].replace(".tar", ".index"), index)
    if damage in ("flip", "cut"):
        with open(path, "rb+") as file:
            file.seek(2000)
            file.write(b"x") if damage == "flip" else file.truncate()
    world.prepare()
    after = files(world)
    changed = {name for name in before if after[name][:2] != before[name][:2]}
    assert changed == {os.path.basename(path), os.path.basename(index)}
    assert all(after[name][2] == before[name][2] for name in before)


def test_a_shard_of_another_world_is_found_by_the_manifest(world, tmp_path):
    other = World(root=str(tmp_path / "other"), seed=1, **TINY)
    other.prepare()
    mine, before = world.shards("test")[0], files(world)
    for kind in (".tar", ".index"):
        os.replace(other.shards("test")[0].replace(".tar", kind), mine.replace(".tar", kind))
    world.prepare()
    assert {name: digest for name, (*_, digest) in files(world).items()} == {
        name: d for name, (*_, d) in before.items()
    }


@pytest.mark.parametrize("content", [None, "", "{}", '{"shards": 3}', "[]"])
def test_lost_manifest_is_written_again_without_rendering(world, content):
    path, before = os.path.join(world.directory, "manifest.json"), files(world)
    os.remove(path)
    if content is not None:
        with open(path, "w") as file:
            file.write(content)
    world.prepare()
    after = files(world)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    assert after["manifest.json"][2] == before["manifest.json"][2]


def test_changed_parameters_have_a_folder_of_their_own(tmp_path):
    changes = [{}, {"seed": 1}, {"num_train": 8}, {"num_test": 4}, {"size": 34}, {"num_frames": 7}, {"fps": 13.0}]
    changes += [{"clips_per_shard": 2}, {"num_shapes": 2}, {"num_colours": 4}, {"num_objects": 1}]
    assert len({World(root=str(tmp_path), **(TINY | change)).directory for change in changes}) == len(changes)
    whole = {"num_shapes": 7, "num_colours": 8, "num_objects": 2}
    assert World(root=str(tmp_path), **TINY).directory == World(root=str(tmp_path), **TINY, **whole).directory


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_train": 0}, "num_train=0 must be at least 1"),
        ({"num_test": -1}, "num_test=-1"),
        ({"clips_per_shard": 0}, "clips_per_shard=0"),
        ({"fps": 0.0}, "fps=0.0 must be above 0"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"size": 33}, "size=33"),
        ({"num_frames": 1}, "num_frames=1"),
        ({"num_shapes": 1}, "num_shapes=1 must be 2 to 7"),
        ({"num_colours": 3}, "num_colours=3 must be 4 to 8"),
        ({"num_objects": 3}, "num_objects=3 must be 1 to 2"),
    ],
)
def test_world_refuses_impossible_parameters(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        World(root=str(tmp_path), **(TINY | change))


def test_root_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"root: .* cannot be written"):
        World(root=str(tmp_path / "file"), **TINY).prepare()


def test_shards_refuses_another_split(world):
    with pytest.raises(ValueError, match="split='val' must be 'train' or 'test'"):
        world.shards("val")


def test_world_drops_nothing_and_tests_on_clips_of_its_own(world):
    assert world.dropped() == [] and world.test_is_train() is False


def test_processes_render_the_same_bytes(world, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "_FEW", 0)
    other = World(root=str(tmp_path / "other"), **TINY)
    other.prepare()
    digests = [{name: digest for name, (*_, digest) in files(one).items()} for one in (world, other)]
    assert digests[0] == digests[1]


def test_prepare_waits_for_a_process_that_prepares_the_same_world(tmp_path):
    world = World(root=str(tmp_path), **TINY)
    os.makedirs(world.directory)
    second = multiprocessing.get_context("fork").Process(target=prepare_tiny, args=(str(tmp_path),))
    with open(os.path.join(world.directory, "lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second.start()
        second.join(1)
        assert second.is_alive() and os.listdir(world.directory) == ["lock"]
        fcntl.flock(lock, fcntl.LOCK_UN)  # the child has inherited the open file, so that closing it is not enough
    second.join(60)
    assert second.exitcode == 0
    before = files(world)
    world.prepare()
    assert files(world) == before
