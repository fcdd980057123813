"""What happens in the embedded world: objects, events in time, the two splits and the hard negatives.

A scene is a pure function of (seed, index, split). `wording` says it in words, `render` draws it, `synthetic` stores
it. Lengths are fractions of the frame, x grows to the right and y downwards, times are seconds from the first frame.

Only time decides a hard negative. Events and their opposites, and an order and the swapped order, are equally frequent,
happen in the same places and last equally long: a clip played backwards is a likely clip of the opposite events. So
words alone never tell a caption from its hard negative. Frames without their order do not either where one event is
reversed; where two are swapped, what is seen between them does.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vlp.data.rng import generator, mix

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")
COLOURS = {
    "red": (222, 36, 42),
    "orange": (247, 138, 22),
    "yellow": (250, 226, 50),
    "green": (40, 166, 62),
    "blue": (34, 88, 226),
    "purple": (146, 48, 188),
    "white": (246, 246, 242),
    "black": (22, 22, 26),
}
RADII = {"small": 0.092, "medium": 0.122, "large": 0.162}
KEEP_OUT = 1.25  # no shape reaches further from its centre than this many radii
DURATION_S = 32 / 12

MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITES = {
    **{"left": "right", "right": "left", "up": "down", "down": "up", "clockwise": "anticlockwise"},
    **{"anticlockwise": "clockwise", "grow": "shrink", "shrink": "grow", "appear": "vanish", "vanish": "appear"},
    **{"turn": "turn", "stop": "wait", "wait": "stop"},
}
# Families of kinds, for the held-out combinations; "turn", "stop" and "wait" are treated apart.
FAMILIES = (("left", "right"), ("up", "down"), ("clockwise", "anticlockwise"), ("grow", "shrink"), ("appear", "vanish"))
_SHARED = ("left", "right", "up", "down", "grow", "shrink", "appear", "vanish", "turn", "turn")  # turn: a family of one
_ALONE = (*_SHARED, "clockwise", "anticlockwise")  # a full turn needs the whole clip
_BRIEF = ("appear", "vanish", "turn")
_BRIEF_SHARE = 0.14  # of the clip: 0.37 s
_STORIES = (("alone", 0.18), ("twice", 0.27), ("in_turn", 0.30), ("beside", 0.25))
_GAP = 0.015  # at least, between objects and to the edge
_NUM_CANDIDATES = 64
_GRID = np.linspace(0, 1, 33)  # moments, as fractions of the clip, at which two objects must not touch


class Object(NamedTuple):
    """One object; `colour` and `x`, `y` are those at the start. `size` is empty where an event changes it."""

    shape: str
    colour: str
    size: str
    x: float = 0.5
    y: float = 0.5
    tilt: float = 0.0  # radians


class Event(NamedTuple):
    """One event of object number `target`; `colour` is the colour after a turn, `reach` the distance of a move."""

    kind: str
    target: int
    colour: str = ""
    start_s: float = 0.0
    end_s: float = 0.0
    reach: float = 0.0  # or the radius of a loop
    phase: float = 0.0  # radians, where a loop begins


class Scene(NamedTuple):
    """One clip. Events are in the order of time; objects in the order in which the canonical caption names them."""

    key: int
    duration_s: float
    objects: tuple[Object, ...]
    events: tuple[Event, ...]


class Track(NamedTuple):
    """An object at T moments: float64 [T], `rgb` [T, 3] in 0..255, `alpha` 0 = not there."""

    shape: str
    tilt: float
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    alpha: np.ndarray
    rgb: np.ndarray


class Palette(NamedTuple):
    """How much clips differ in looks: the first of the shapes and of the colours. The fewer, the more time decides."""

    num_shapes: int = len(SHAPES)
    num_colours: int = len(COLOURS)
    num_objects: int = 2  # at most, in a clip

    def check(self) -> None:
        """Raise ValueError unless two objects, and what they turn into, can look different."""
        limits = (("num_shapes", 2, len(SHAPES)), ("num_colours", 4, len(COLOURS)), ("num_objects", 1, 2))
        for name, least, most in limits:
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} to {most}.")


FULL = Palette()


def scene(seed: int, index: int, split: str, *, duration_s: float = DURATION_S, palette: Palette = FULL) -> Scene:
    """Return scene number `index` of a split: "train" never shows a held-out combination, each "test" scene does.

    Raises ValueError for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is not a split of the embedded world; use 'train' or 'test'.")
    key = mix(seed, zlib.crc32(split.encode()), index)
    rng = generator(key, "scene")
    names, shares = zip(*(each for each in _STORIES if _num_objects(each[0]) <= palette.num_objects), strict=True)
    story = str(rng.choice(names, p=np.array(shares) / sum(shares)))
    while True:  # the kind of story is drawn once, so that refusals do not change the mixture
        drawn = _draw(story, rng, Scene(key, duration_s, (), ()), palette)
        if is_held_out(drawn) == (split == "test") and _is_possible(drawn) and next(negatives(drawn), None):
            break
    return _place(_in_time(drawn, rng), rng)


def is_held_out(scene: Scene) -> bool:
    """Return whether an event of the scene belongs to the (shape, colour, event) combinations kept for the test split.

    Opposites are held out together, so that a hard negative is as new as its caption.
    """
    return any(_event_is_held_out(scene.objects[event.target], event) for event in scene.events)


def negatives(scene: Scene) -> Iterator[Scene]:
    """Yield the scenes with the same objects that differ only in time: events swapped, or one event reversed.

    Places and times are not adapted: the results are for wording only. Each could occur in the same split.
    """
    swapped = tuple(_swap_role(event) for event in reversed(scene.events))
    candidates = [scene._replace(events=swapped)] if len(scene.events) > 1 else []
    candidates += [_reversed_event(scene, number) for number in range(len(scene.events))]
    for candidate in candidates:
        if _is_possible(candidate) and is_held_out(candidate) == is_held_out(scene):
            yield candidate


def tracks(scene: Scene, num_frames: int) -> list[Track]:
    """Return where and how each object is at the `num_frames` evenly spaced moments of the clip."""
    times = np.arange(num_frames) / num_frames * scene.duration_s  # [T]
    return [_track(scene, number, times) for number in range(len(scene.objects))]


def _num_objects(story: str) -> int:
    return 2 if story in ("in_turn", "beside") else 1


def _draw(story: str, rng: np.random.Generator, empty: Scene, palette: Palette) -> Scene:
    """Draw objects and kinds of events, without regard to what is possible."""
    num_objects = _num_objects(story)
    num_events = 2 if story in ("in_turn", "twice") else 1
    shapes = rng.choice(SHAPES[: palette.num_shapes], num_objects, replace=False)
    colours = [str(colour) for colour in rng.permutation(list(COLOURS)[: palette.num_colours])]
    kinds = [str(kind) for kind in rng.choice(_SHARED if num_events == 2 else _ALONE, num_events)]
    if story == "twice":  # "stop" and "wait" need a move of the same object
        kinds = [str(rng.choice((*_SHARED, "wait"))), str(rng.choice((*_SHARED, "stop")))]
    events = tuple(
        Event(kind, min(number, num_objects - 1), colours[2 + number] if kind == "turn" else "")
        for number, kind in enumerate(kinds)
    )
    resized = {event.target for event in events if event.kind in ("grow", "shrink")}
    sizes = ["" if number in resized else str(rng.choice(list(RADII))) for number in range(num_objects)]
    objects = tuple(
        Object(str(shape), colour, size, tilt=rng.uniform(-0.16, 0.16))
        for shape, colour, size in zip(shapes, colours, sizes, strict=False)
    )
    return empty._replace(objects=objects, events=events)


def _is_possible(scene: Scene) -> bool:
    """Return whether one object can do both of its events in this order; events of two objects are independent."""
    if len(scene.events) < 2 or len(scene.objects) > 1:
        return True
    first, second = (event.kind for event in scene.events)
    if "wait" in (first, second) or "stop" in (first, second):
        return (first == "wait" and second in MOVES) or (first in MOVES and second == "stop")
    if first == "vanish" or second == "appear":
        return (first, second) == ("vanish", "appear")
    same_family = OPPOSITES[first] == second or first == second
    return not same_family or (first != second)  # there and back is a story, the same twice is not


def _event_is_held_out(target: Object, event: Event) -> bool:
    """Every pair of shape and colour misses one of the five families in train, and some of the new colours."""
    code = SHAPES.index(target.shape) + list(COLOURS).index(target.colour)
    if event.kind == "turn":
        return (code + list(COLOURS).index(event.colour)) % 5 == 0
    return any(event.kind in kinds and (code + family) % 5 == 0 for family, kinds in enumerate(FAMILIES))


def _swap_role(event: Event) -> Event:
    """Standing still is "stop" after a move and "wait" before it."""
    return event._replace(kind=OPPOSITES[event.kind]) if event.kind in ("stop", "wait") else event


def _reversed_event(scene: Scene, number: int) -> Scene:
    """Reverse one event; a turn from red to blue becomes one from blue to red."""
    event = scene.events[number]
    objects, changed = list(scene.objects), event._replace(kind=OPPOSITES[event.kind])
    if event.kind == "turn":
        objects[event.target] = objects[event.target]._replace(colour=event.colour)
        changed = event._replace(colour=scene.objects[event.target].colour)
    events = (*scene.events[:number], changed, *scene.events[number + 1 :])
    return scene._replace(objects=tuple(objects), events=events)


def _in_time(scene: Scene, rng: np.random.Generator) -> Scene:
    """Give each event its span: alone over most of the clip, or one in each half. Symmetric under playing backwards."""
    edges = [rng.uniform(0.04, 0.1), *(rng.uniform(0.45, 0.55, len(scene.events) - 1)), 1 - rng.uniform(0.04, 0.1)]
    events = []
    for number, event in enumerate(scene.events):
        start, end = edges[number] + (number > 0) * 0.02, edges[number + 1] - (number + 1 < len(scene.events)) * 0.02
        if event.kind in _BRIEF:  # keeps a distance from the edges of the clip, so that before and after are seen
            room = 0.22 if len(scene.events) == 1 else 0.09
            left, right = start + room * (number == 0), end - room * (number + 1 == len(scene.events))
            start = rng.uniform(left, right - _BRIEF_SHARE)
            end = start + _BRIEF_SHARE
        start, end = (0.0 if event.kind == "wait" else start), (1.0 if event.kind == "stop" else end)
        reach = rng.uniform(0.12, 0.14) if "clockwise" in event.kind else rng.uniform(0.22, 0.27)
        spans = {"start_s": start * scene.duration_s, "end_s": end * scene.duration_s}
        events.append(event._replace(reach=reach, phase=rng.uniform(0, 2 * np.pi), **spans))
    return scene._replace(events=tuple(events))


def _place(scene: Scene, rng: np.random.Generator) -> Scene:
    """Put the objects where they stay inside the frame and apart from each other, at random otherwise."""
    times = _GRID * scene.duration_s
    ways = [_way(scene, number, times) for number in range(len(scene.objects))]  # [2, T] each
    radii = [_radius(scene, number, times) for number in range(len(scene.objects))]  # [T] each
    while True:
        places = []  # [C, 2] each: C candidates at once, because with two large objects most are refused
        for way, radius in zip(ways, radii, strict=True):
            margin = KEEP_OUT * radius.max() + _GAP
            places.append(rng.uniform(margin - way.min(1), 1 - margin - way.max(1), (_NUM_CANDIDATES, 2)))
        apart = np.ones(_NUM_CANDIDATES, dtype=bool)
        if len(places) > 1:
            between = ways[0] - ways[1] + (places[0] - places[1])[..., None]  # [C, 2, T]
            apart = (np.hypot(between[:, 0], between[:, 1]) > KEEP_OUT * (radii[0] + radii[1]) + _GAP).all(1)
        if apart.any():
            break
    chosen = [place[apart.argmax()] for place in places]
    objects = (one._replace(x=float(x), y=float(y)) for one, (x, y) in zip(scene.objects, chosen, strict=True))
    return scene._replace(objects=tuple(objects))


def _progress(event: Event, times: np.ndarray) -> np.ndarray:
    """Return how far an event is at each moment, 0 before and 1 after it, with soft ends."""
    share = np.clip((times - event.start_s) / (event.end_s - event.start_s), 0, 1)
    return 0.5 * share + 0.5 * share**2 * (3 - 2 * share)


def _way(scene: Scene, target: int, times: np.ndarray) -> np.ndarray:
    """Return the offsets [2, T] of an object from where it starts."""
    offset = np.zeros((2, len(times)))
    for event in (event for event in scene.events if event.target == target):
        if event.kind in MOVES:
            offset += event.reach * np.array(MOVES[event.kind])[:, None] * _progress(event, times)
        if event.kind in ("clockwise", "anticlockwise"):
            turn = 2 * np.pi * (1 if event.kind == "clockwise" else -1)  # y points down: growing angles are clockwise
            angle = event.phase + turn * _progress(event, times)
            offset += event.reach * np.stack([np.cos(angle) - np.cos(event.phase), np.sin(angle) - np.sin(event.phase)])
    return offset


def _radius(scene: Scene, target: int, times: np.ndarray) -> np.ndarray:
    """Return the radius [T]; growing and shrinking go between small and large."""
    events = [event for event in scene.events if event.target == target and event.kind in ("grow", "shrink")]
    if not events:
        return np.full(len(times), RADII[scene.objects[target].size])
    level = np.full(len(times), 0.0 if events[0].kind == "grow" else 1.0)
    for event in events:
        level += _progress(event, times) * (1 if event.kind == "grow" else -1)
    return RADII["small"] * (RADII["large"] / RADII["small"]) ** level


def _track(scene: Scene, target: int, times: np.ndarray) -> Track:
    """Return the track of one object at these moments."""
    what = scene.objects[target]
    events = [event for event in scene.events if event.target == target]
    alpha = np.full(len(times), float(next((e.kind for e in events if e.kind in ("appear", "vanish")), "") != "appear"))
    rgb = np.tile(np.array(COLOURS[what.colour], dtype=np.float64), (len(times), 1))  # [T, 3]
    for event in events:
        share = _progress(event, times)
        if event.kind in ("appear", "vanish"):
            alpha += share if event.kind == "appear" else -share
        if event.kind == "turn":
            rgb += share[:, None] * (np.array(COLOURS[event.colour]) - rgb)
    x, y = _way(scene, target, times) + np.array([[what.x], [what.y]])
    return Track(what.shape, what.tilt, x, y, _radius(scene, target, times), alpha, rgb)
