"""The language of the embedded world: captions, hard negatives, open questions and questions with five options.

The canonical caption names what differs between clips and keeps the order of time: "a small red circle moves left, then
turns blue", "a red circle moves left, then a green square grows", "a red circle moves left while a green square stays
still". "then" is an order, "while" says that the other object does nothing. Medium is the size that is not said.
"""

from typing import Any

import numpy as np

from vlp.data.rng import generator
from vlp.data.scene import COLOURS, MOVES, OPPOSITES, SHAPES, Event, Scene, negatives

# The first wording of a kind is the canonical one; {} is the new colour.
VERBS = {
    "left": ("moves left", "goes left", "moves to the left", "slides to the left"),
    "right": ("moves right", "goes right", "moves to the right", "slides to the right"),
    "up": ("moves up", "goes up", "slides up", "rises"),
    "down": ("moves down", "goes down", "slides down", "falls"),
    "clockwise": ("loops clockwise", "goes around clockwise", "makes a clockwise loop"),
    "anticlockwise": ("loops anticlockwise", "goes around anticlockwise", "makes an anticlockwise loop"),
    "grow": ("grows", "gets bigger", "becomes bigger"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller"),
    "appear": ("appears", "fades in", "comes into view"),
    "vanish": ("vanishes", "fades out", "disappears"),
    "turn": ("turns {}", "becomes {}", "changes colour to {}"),
    "stop": ("stops", "comes to a stop", "stands still"),
    "wait": ("waits", "stays in place", "stands still"),
}
# {a} {b}: objects with an article; {v} {w}: what they do; {the}: the first object once it is known.
ONE_EVENT = ("{a} {v}", "there is {a} that {v}", "in this clip {a} {v}", "we see {a}, it {v}", "{the} {v}")
ONE_OBJECT = (
    "{a} {v}, then {w}",
    "first {a} {v}, after that it {w}",
    "{the} {v} before it {w}",
    "{the} {w} after it {v}",
    "{a} {v} and then it {w}",
    "there is {a} that first {v} and then {w}",
)
TWO_OBJECTS = (
    "{a} {v}, then {b} {w}",
    "first {a} {v}, after that {b} {w}",
    "{a} {v} before {b} {w}",
    "{b} {w} after {a} {v}",
    "{a} {v} and then {b} {w}",
    "in this clip {a} {v} first and {b} {w} later",
)
BESIDE = (
    "{a} {v} while {b} stays still",
    "{b} stays still while {a} {v}",
    "there is {b} that stays still, and {a} {v}",
    "{a} {v} and {b} does nothing",
    "we see {a} and {b}, only the first one {v}",
)
NUM_PARAPHRASES = 4
NUM_OPTIONS = 5


def captions(scene: Scene) -> list[str]:
    """Return the canonical caption and then NUM_PARAPHRASES others that mean the same, all different."""
    rng = generator(scene.key, "captions")
    templates = _templates(scene)
    found = [canonical(scene)]
    others = [templates[number] for number in 1 + rng.permutation(len(templates) - 1)]
    for template in (others + [templates[0]] * NUM_PARAPHRASES)[:NUM_PARAPHRASES]:
        text = _fill(template, scene, rng)
        while text in found:
            text = _fill(template, scene, rng)
        found.append(text)
    return found


def canonical(scene: Scene) -> str:
    """Return the one caption that says everything about the scene in the plainest words."""
    return _fill(_templates(scene)[0], scene, None)


def hard_negative(scene: Scene) -> str:
    """Return the canonical caption of a possible scene that differs only in time: reversed or in the other order."""
    return canonical(_negative(scene))


def phrases(scene: Scene) -> list[str]:
    """Return one short canonical sentence per event, in the order of time: "red circle moves left"."""
    return [f"{_name(scene, event.target)} {_verb(event, None)}" for event in scene.events]


def questions(scene: Scene) -> list[dict[str, str]]:
    """Return open questions with their answers: {"question", "answer"}. The answers are one to three words."""
    found = [("how many objects are there?", ("zero", "one", "two")[len(scene.objects)])]
    for number, one in enumerate(scene.objects):
        turned = [event for event in scene.events if event.kind == "turn" and event.target == number]
        found.append((f"what colour is the {one.shape}{' at first' * len(turned)}?", one.colour))
        found += [(f"what colour is the {one.shape} at the end?", event.colour) for event in turned]
        found.append((f"what shape is the {one.colour} object{' at first' * len(turned)}?", one.shape))
        if one.size in ("small", "large"):
            found.append((f"is the {_name(scene, number)} small or large?", one.size))
    found += [(_what_happens(scene, number), _verb(event, None)) for number, event in enumerate(scene.events)]
    for event in scene.events:
        if event.kind in MOVES:
            found.append((f"which way does the {_name(scene, event.target)} move?", event.kind))
    found += _order_questions(scene)
    asked = [question for question, _ in found]
    return [{"question": text, "answer": answer} for text, answer in found if asked.count(text) == 1]


def choices(scene: Scene) -> list[dict[str, Any]]:
    """Return questions with five different options: {"question", "options", "answer"}; `answer` is a position."""
    rng = generator(scene.key, "choices")
    found = []
    for number, event in enumerate(scene.events):
        others = [_verb(other, None) for other in scene.events if other != event]
        wrong = [*others, _verb(event._replace(kind=OPPOSITES[event.kind]), None), *_any_verbs(rng)]
        found.append(_choice(_what_happens(scene, number), _verb(event, None), wrong, rng))
    for number, one in enumerate(scene.objects):
        turned = any(event.kind == "turn" and event.target == number for event in scene.events)
        present = [other.colour for other in scene.objects] + [event.colour for event in scene.events if event.colour]
        colours = [*present, *(str(colour) for colour in rng.permutation(list(COLOURS)))]
        found.append(_choice(f"what colour is the {one.shape}{' at first' * turned}?", one.colour, colours, rng))
        shapes = [*(other.shape for other in scene.objects), *(str(shape) for shape in rng.permutation(SHAPES))]
        found.append(_choice(f"what shape is the {one.colour} object{' at first' * turned}?", one.shape, shapes, rng))
    found.append(_choice("which sentence is true?", canonical(scene), _false_sentences(scene, rng), rng))
    return found


def _templates(scene: Scene) -> tuple[str, ...]:
    if len(scene.events) == 1:
        return ONE_EVENT if len(scene.objects) == 1 else BESIDE
    return ONE_OBJECT if len(scene.objects) == 1 else TWO_OBJECTS


def _fill(template: str, scene: Scene, rng: np.random.Generator | None) -> str:
    """Put objects and verbs into a template; without `rng` in their canonical wording."""
    names = [_name(scene, number, with_size=True) for number in range(len(scene.objects))]
    with_article = [("an " if name[0] in "aeiou" else "a ") + name for name in names]
    verbs = [_verb(event, rng) for event in scene.events]
    first = scene.events[0].target
    return template.format(
        a=with_article[first], b=with_article[1 - first] if len(names) > 1 else "", the=f"the {names[first]}",
        v=verbs[0], w=verbs[-1],
    )  # fmt: skip


def _name(scene: Scene, number: int, *, with_size: bool = False) -> str:
    one = scene.objects[number]
    return (f"{one.size} " if with_size and one.size in ("small", "large") else "") + f"{one.colour} {one.shape}"


def _verb(event: Event, rng: np.random.Generator | None) -> str:
    wordings = VERBS[event.kind]
    return wordings[0 if rng is None else int(rng.integers(len(wordings)))].format(event.colour)


def _what_happens(scene: Scene, number: int) -> str:
    """Ask for one event so that the objects and the order, where there is one, point at it alone."""
    target = scene.events[number].target
    shared = len(scene.events) > 1 and len(scene.objects) == 1
    return f"what does the {_name(scene, target)} do{(' first', ' last')[number] * shared}?"


def _order_questions(scene: Scene) -> list[tuple[str, str]]:
    if len(scene.events) < 2:
        return []
    first, last = scene.events
    if len(scene.objects) > 1:
        return [
            ("which object changes first?", _name(scene, first.target)),
            ("which object changes last?", _name(scene, last.target)),
        ]
    name = _name(scene, 0)
    return [
        (f"what does the {name} do after it {_verb(first, None)}?", _verb(last, None)),
        (f"what does the {name} do before it {_verb(last, None)}?", _verb(first, None)),
    ]


def _any_verbs(rng: np.random.Generator) -> list[str]:
    """Return what an object can do, in random order."""
    return [VERBS[str(kind)][0].format(rng.choice(list(COLOURS))) for kind in rng.permutation(list(VERBS))]


def _negative(scene: Scene) -> Scene:
    options = list(negatives(scene))
    return options[int(generator(scene.key, "negative").integers(len(options)))]


def _false_sentences(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Return the hard negative, both in another colour, and one in a third colour.

    So the words that most options share do not point at the answer.
    """
    used = {one.colour for one in scene.objects} | {event.colour for event in scene.events}
    second, third = (str(colour) for colour in rng.choice([name for name in COLOURS if name not in used], 2, False))
    negative, old = _negative(scene), scene.objects[scene.events[0].target].colour
    both = [canonical(_recoloured(one, old, second)) for one in (scene, negative)]
    return [canonical(negative), *both, canonical(_recoloured(scene, old, third))]


def _recoloured(scene: Scene, old: str, new: str) -> Scene:
    objects = (one._replace(colour=new) if one.colour == old else one for one in scene.objects)
    events = (event._replace(colour=new) if event.colour == old else event for event in scene.events)
    return scene._replace(objects=tuple(objects), events=tuple(events))


def _choice(question: str, answer: str, wrong: list[str], rng: np.random.Generator) -> dict[str, Any]:
    """Return five options in random order: the answer and the first four different wrong ones."""
    others = list(dict.fromkeys(text for text in wrong if text != answer))[: NUM_OPTIONS - 1]
    assert len(others) == NUM_OPTIONS - 1, f"{question} has only {len(others)} wrong options"
    options = [str(text) for text in rng.permutation([answer, *others])]
    return {"question": question, "options": options, "answer": options.index(answer)}
