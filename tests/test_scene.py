from collections import Counter

import numpy as np
import pytest

from vlp.data.scene import FAMILIES, KEEP_OUT, MOVES, OPPOSITES, Palette, Scene, is_held_out, negatives, scene, tracks

TRAIN = [scene(0, index, "train") for index in range(1500)]
TEST = [scene(0, index, "test") for index in range(200)]
BOTH = TRAIN[:200] + TEST


def combinations(one: Scene) -> set[tuple]:
    """Shape, colours and family of each event, as a reader would list them; independent of the rule under test."""
    found = set()
    for event in one.events:
        target = one.objects[event.target]
        family = next((kinds for kinds in FAMILIES if event.kind in kinds), event.kind)
        if family not in ("stop", "wait"):
            found.add((target.shape, frozenset({target.colour, event.colour} - {""}), family))
    return found


def test_scene_is_the_same_for_the_same_seed_index_and_split():
    assert scene(3, 7, "train") == scene(3, 7, "train")
    assert len({scene(seed, index, split) for seed in (0, 1) for index in (0, 1) for split in ("train", "test")}) == 8


def test_scene_refuses_another_split():
    with pytest.raises(ValueError, match=r"split='val' is not a split.*'train' or 'test'"):
        scene(0, 0, "val")


def test_a_small_palette_leaves_few_looks_and_every_kind_of_event():
    palette = Palette(num_shapes=2, num_colours=4)
    made = [scene(0, index, split, palette=palette) for split in ("train", "test") for index in range(300)]
    assert {thing.shape for one in made for thing in one.objects} == {"circle", "square"}
    assert {thing.colour for one in made for thing in one.objects} == {"red", "orange", "yellow", "green"}
    assert {event.kind for one in made for event in one.events} == set(OPPOSITES)
    assert [is_held_out(one) for one in made] == [False] * 300 + [True] * 300


def test_a_palette_of_one_object_leaves_out_stories_of_two():
    made = [
        scene(0, index, split, palette=Palette(num_objects=1)) for split in ("train", "test") for index in range(300)
    ]
    assert {len(one.objects) for one in made} == {1}
    assert {event.kind for one in made for event in one.events} == set(OPPOSITES)
    assert 0.5 < sum(len(one.events) == 2 for one in made) / len(made) < 0.7


def test_every_test_scene_shows_a_combination_that_train_never_shows():
    seen = set().union(*(combinations(one) for one in TRAIN))
    assert all(combinations(one) - seen for one in TEST)


def test_train_shows_every_shape_and_colour_in_most_families():
    seen = Counter((shape, colour) for one in TRAIN for shape, colours, _ in combinations(one) for colour in colours)
    families = {(shape, colour, family) for one in TRAIN for shape, cs, family in combinations(one) for colour in cs}
    assert len(seen) == 7 * 8 and min(Counter(key[:2] for key in families).values()) >= 4


def test_spans_lie_inside_the_clip_in_order():
    for one in BOTH:
        times = [time for event in one.events for time in (event.start_s, event.end_s)]
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= one.duration_s
        assert all(event.end_s - event.start_s > 0.3 for event in one.events)


def test_objects_stay_inside_the_frame_and_apart():
    for one in BOTH:
        found = tracks(one, 32)
        for track in found:
            reach = KEEP_OUT * track.radius
            assert min((track.x - reach).min(), (track.y - reach).min()) > 0
            assert max((track.x + reach).max(), (track.y + reach).max()) < 1
        if len(found) == 2:
            gap = np.hypot(found[0].x - found[1].x, found[0].y - found[1].y)
            assert (gap > KEEP_OUT * (found[0].radius + found[1].radius)).all()


def test_two_objects_differ_in_shape_and_colour_at_all_times():
    for one in (one for one in BOTH if len(one.objects) == 2):
        assert one.objects[0].shape != one.objects[1].shape
        new = [event.colour for event in one.events if event.colour]
        assert len({*(each.colour for each in one.objects), *new}) == 2 + len(new)


@pytest.mark.parametrize("split", [TRAIN, TEST], ids=["train", "test"])
def test_negatives_are_possible_scenes_of_the_same_split(split):
    for one in split[:200]:
        others = list(negatives(one))
        assert others and all(is_held_out(other) == is_held_out(one) for other in others)
        assert all(one in [Scene(*back) for back in negatives(other)] for other in others)  # so no side is the likelier


def test_no_object_acts_before_it_is_there_or_after_it_is_gone():
    for one in TRAIN + [other for train in TRAIN for other in negatives(train)]:
        for number in range(len(one.objects)):
            kinds = [event.kind for event in one.events if event.target == number]
            assert "appear" not in kinds[1:] or kinds == ["vanish", "appear"]
            assert "vanish" not in kinds[:-1] or kinds == ["vanish", "appear"]


def test_negative_of_a_stop_is_a_wait():
    stops = [one for one in TRAIN if one.events[-1].kind == "stop"]
    for one in stops:
        (other,) = (other for other in negatives(one) if other.events[0].kind == "wait")
        assert other.events[1].kind == one.events[0].kind and other.objects == one.objects
    assert len(stops) > 5


def test_opposite_events_are_equally_frequent():
    counts = Counter(event.kind for one in TRAIN for event in one.events)
    for kind in ("left", "up", "grow", "appear", "stop"):
        total = counts[kind] + counts[OPPOSITES[kind]]
        assert abs(counts[kind] - total / 2) < 3.5 * np.sqrt(total) / 2, (kind, counts)


def test_the_places_seen_without_order_do_not_tell_the_direction():
    middles = {kind: [] for kind in MOVES}
    for one in (one for one in TRAIN if len(one.events) == 1 and one.events[0].kind in MOVES):
        track = tracks(one, 32)[one.events[0].target]
        middles[one.events[0].kind].append(
            track.x.mean() if one.events[0].kind in ("left", "right") else track.y.mean()
        )
    for kind, opposite in (("left", "right"), ("up", "down")):
        a, b = np.array(middles[kind]), np.array(middles[opposite])
        assert abs(a.mean() - b.mean()) < 3.5 * np.sqrt(a.var() / len(a) + b.var() / len(b))


def test_the_first_frame_alone_does_not_settle_the_direction():
    starts = {"left": [], "right": []}
    for one in (one for one in TRAIN if one.events[0].kind in starts):
        starts[one.events[0].kind].append(tracks(one, 32)[one.events[0].target].x[0])
    left, right = np.array(starts["left"]), np.array(starts["right"])
    guesses = [(np.mean(left > at) + np.mean(right < at)) / 2 for at in np.arange(0, 1, 0.01)]
    assert max(guesses) < 0.85
