"""The static graph of a step: names, plan, views, and what is computed how often."""

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from vlp import ops
from vlp.forward import ForwardPass, Graph, GraphError, describe, quantity, to_json, unused_parts


class Facts(NamedTuple):
    frames: float
    words: float
    valid: Tensor
    key: Tensor


class Pair(NamedTuple):
    text: float


class Model(nn.Module):
    """video, text -> both -> score; `head` stands for a part that a config may leave out."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.eye, self.ear, self.mixer, self.idle, self.head = *(nn.Linear(2, 3) for _ in range(4)), head
        self.calls: Counter[str] = Counter()

    @quantity
    def video(self, frames: float, hidden: float | None = None) -> float:
        self.calls["video"] += 1
        return self._look(frames) - (hidden or 0.0)

    @quantity
    def text(self, words: float) -> float:
        self.calls["text"] += 1
        return sum([10 * word * (self.ear is not None) for word in [words]])

    @quantity
    def both(self, video: float, text: float) -> Pair:
        self.calls["both"] += 1
        assert self.mixer is not None
        return Pair(video + 1000 * text)

    @quantity
    def second(self, both: Pair) -> float:
        return both.text

    @quantity
    def scale(self) -> float:
        return 7.0

    @quantity
    def score(self, second: float) -> float:
        assert self.head is not None
        return second + 1

    def _look(self, frames: float) -> float:
        return frames * (self.eye is not None)


class Cover:
    writes, detached = ("words", "labels"), ()

    def __init__(self, factor: float = 2.0) -> None:
        self.factor, self.keys = factor, []

    def __call__(self, words: float, key: Tensor) -> tuple[float, float]:
        self.keys.append(key)
        return words * self.factor, words


class Hide:
    writes, detached = ("hidden",), ()

    def __call__(self, frames: float) -> tuple[float]:
        return (frames / 4,)


class Swap:
    writes, detached = ("text", "swapped"), ("video", "scale")

    def __call__(self, text: float, video: float, scale: float) -> tuple[float, bool]:
        return text + video + scale, True


BATCH = Facts(frames=4.0, words=3.0, valid=torch.ones(2, dtype=torch.bool), key=torch.tensor([5, 6]))


def make(model: nn.Module | None = None, **views) -> tuple[Graph, ForwardPass]:
    model = model or Model()
    graph = Graph(model, fields=Facts._fields, views=views or {"cover": Cover(), "hide": Hide(), "swap": Swap()})
    return graph, ForwardPass(model, BATCH, graph)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("video:cover", "video"),
        ("text:cover", "text:cover"),
        ("text:hide", "text"),
        ("both:hide+cover", "both:cover+hide"),
        ("both:cover+hide", "both:cover+hide"),
        ("text:swap+cover", "text:swap"),  # what swap writes replaces what cover changes
        ("labels:cover+hide", "labels:cover"),
        ("frames:cover+hide+swap", "frames"),
        ("scale:cover", "scale"),
    ],
)
def test_node_drops_views_without_effect(text, canonical):
    assert str(make()[0].node(text)) == canonical


def test_take_computes_each_quantity_once():
    _, forward = make()
    names = ["both", "both:cover", "second", "second:cover", "video:cover", "both:cover+hide", "text:cover"]
    values = [forward.take(name) for name in names * 2]
    assert values[:7] == values[7:]
    assert forward.model.calls == {"video": 2, "text": 2, "both": 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("video", 4),
        ("video:hide", 3),
        ("second:cover", 4 + 1000 * 60),
        ("second:cover+hide", 3 + 1000 * 60),
        ("labels:cover", 3),
        ("text:swap", 30 + 4 + 7),
        ("second:swap", 4 + 1000 * 41),
        ("second:swap+hide", 3 + 1000 * 41),  # a view reads the unchanged step: swap sees the open video
        ("swapped:swap", True),
        ("words", 3),
    ],
)
def test_take_gives_the_value_under_the_views(text, value):
    assert make()[1].take(text) == value


def test_a_view_runs_once_for_all_that_it_writes():
    cover = Cover()
    _, forward = make(cover=cover)
    for name in ("labels:cover", "words:cover", "text:cover"):
        forward.take(name)
    assert len(cover.keys) == 1


def test_each_view_draws_from_a_stream_of_its_own():
    covers = {"cover": Cover(), "other": Cover()}
    _, forward = make(**covers)
    forward.take("text:cover"), forward.take("text:other")
    first, second = (cover.keys[0] for cover in covers.values())
    assert not first.eq(second).any() and not first.eq(BATCH.key).any()
    assert first.unique().numel() == 2 and torch.equal(forward.take("key"), BATCH.key)


def test_the_stream_of_a_view_is_named_by_the_view():
    cover = Cover()
    make(cover=cover)[1].take("text:cover")
    torch.testing.assert_close(cover.keys[0], ops.fold(BATCH.key, 0x8D0886C5), rtol=0, atol=0)  # crc32 of "cover"


def test_plan_puts_every_step_after_what_it_needs_and_only_once():
    steps = make()[0].plan(["second:cover+hide", "second", "second:cover"])
    nodes = [step.node for step in steps]
    assert len(nodes) == len(set(nodes))
    assert all(nodes.index(need) < place for place, step in enumerate(steps) for need in step.needs)
    assert sum(node.name == "video" for node in nodes) == 2 and sum(node.name == "text" for node in nodes) == 2


def test_plan_names_parts_through_helpers_and_comprehensions():
    parts = {str(step.node): step.parts for step in make()[0].plan(["second"])}
    assert parts == {"frames": (), "video": ("eye",), "words": (), "text": ("ear",), "both": ("mixer",), "second": ()}


def test_plan_does_not_take_a_field_of_an_input_for_a_quantity():
    assert make()[0].parts("second") == ()  # it reads both.text, not self.text, which uses the ear


def test_unused_parts_are_those_that_no_step_touches():
    graph, _ = make()
    assert unused_parts(graph, graph.plan(["video:hide", "text"])) == ["idle", "mixer"]


def test_roles_gives_lists_where_several_nodes_are_wired():
    wiring = {"a": "text", "b": ["video", "video:hide"]}
    assert make()[1].roles(wiring) == [30, [4, 3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vidoe", "'vidoe': there is no quantity or batch field 'vidoe'. Did you mean 'video'?"),
        ("zzzz", "'zzzz': there is no quantity or batch field 'zzzz'; known: both, scale, score, second, text, video,"),
        ("text:covr", "'text:covr': there is no view 'covr'. Did you mean 'cover'?"),
        ("labels", "'labels': 'labels' exists only under a view; write 'labels:cover'."),
        ("labels:hide", "'labels:hide': 'labels' exists only under a view; write 'labels:cover'."),
        ("text:cover+cover", "'cover' and 'cover' both write ['labels', 'words']"),
        ("score", "'score' needs the part 'head', which this config leaves out (head=null)."),
    ],
)
def test_wrong_names_are_refused_with_the_fix(text, message):
    with pytest.raises(GraphError) as error:
        make()[0].plan([text])
    assert message in str(error.value)


def test_views_that_write_the_same_are_refused_together_only():
    graph, _ = make(cover=Cover(), louder=Cover())
    assert graph.plan(["text:cover", "text:louder"])
    with pytest.raises(GraphError, match=r"'cover' and 'louder' both write .*; name only one"):
        graph.node("text:cover+louder")


def test_a_view_that_is_not_configured_is_refused_with_the_views_that_are():
    with pytest.raises(GraphError, match=r"there is no view 'wrong'; known: hide\."):
        make(hide=Hide())[0].node("text:wrong")


class Circle(nn.Module):
    @quantity
    def egg(self, hen: float) -> float:
        return hen

    @quantity
    def hen(self, egg: float) -> float:
        return egg

    @quantity
    def lost(self, framse: float) -> float:
        return framse


def test_a_cycle_is_refused_with_its_path():
    with pytest.raises(GraphError, match="'hen' needs itself: hen <- egg <- hen"):
        Graph(Circle(), fields=(), views={}).plan(["hen"])


def test_an_unknown_parameter_of_a_quantity_is_refused():
    with pytest.raises(GraphError, match=r"'framse' is needed, but no .* provides it. Did you mean 'frames'\?"):
        Graph(Circle(), fields=("frames",), views={}).plan(["lost"])


def test_errors_lists_every_wrong_role_with_its_owner():
    wanted = {"first": {"a": "vidoe", "b": "text"}, "second": {"c": ["video", "text:covr"]}}
    messages = make()[0].errors(wanted)
    assert [message.split(":")[0] for message in messages] == ["first.inputs.a", "second.inputs.c"]


def test_an_optional_input_is_none_where_no_view_provides_it():
    class Missing(nn.Module):
        @quantity
        def shown(self, frames: float, hidden: float | None = None) -> tuple:
            return frames, hidden

    model = Missing()
    graph = Graph(model, fields=Facts._fields, views={"hide": Hide()})
    forward = ForwardPass(model, BATCH, graph)
    assert forward.take("shown") == (4, None) and forward.take("shown:hide") == (4, 1)


def test_a_part_that_is_present_lets_its_quantity_run():
    assert make(Model(head=nn.Linear(2, 1)))[1].take("score") == 4 + 1000 * 30 + 1


def test_trained_parts_leave_out_what_a_view_reads_without_gradient():
    graph, _ = make()
    assert graph.trained_parts(["text:swap"]) == {"ear"}
    assert graph.trained_parts(["second:swap"]) == {"ear", "mixer", "eye"}


def test_trained_parts_are_found_through_views_that_read_with_gradient():
    class Attached(Swap):
        detached = ()

    assert make(swap=Attached())[0].trained_parts(["text:swap"]) == {"ear", "eye"}


def test_with_fields_recomputes_only_what_depends_on_the_change():
    _, forward = make()
    forward.take("both")
    changed = forward.with_fields(words=5.0)
    assert changed.take("second") == 4 + 1000 * 50 and changed.take("second:cover") == 4 + 1000 * 100
    assert forward.take("second") == 4 + 1000 * 30
    assert forward.model.calls == {"video": 1, "text": 3, "both": 3}


def test_with_fields_twice_keeps_the_first_change():
    changed = make()[1].with_fields(words=5.0).with_fields(frames=8.0)
    assert changed.take("second") == 8 + 1000 * 50


def test_with_fields_refuses_what_is_no_batch_field():
    with pytest.raises(AssertionError, match=r"not batch fields: {'labels'}"):
        make()[1].with_fields(labels=1.0)


def test_reads_are_the_batch_fields_behind_a_node():
    graph, _ = make()
    assert graph.reads(graph.node("text:swap")) == {"words", "frames"}
    assert graph.reads(graph.node("labels:cover")) == {"words", "key"}


def test_describe_counts_the_calls_of_each_part():
    wanted = {"match": {"a": "second", "b": ["second:cover", "second:swap"]}}
    text = describe(make()[0], wanted, {"eye": 1_000, "ear": 20, "mixer": 3, "idle": 9})
    assert "calls a step: ear x2 (20 parameters), eye x1 (1,000 parameters), mixer x3 (3 parameters)" in text
    assert "idle" not in text and "[view cover]" in text


def test_to_json_holds_the_plan_that_the_report_draws():
    graph, _ = make()
    data = to_json(graph, {"match": {"a": "video:cover", "b": ["text:cover", "text"]}}, {"match": 0.5}, {"ear": 20})
    assert set(data["fields"]) == {"frames", "words", "key"}
    assert {(n["name"], n["view"], n["parameters"]) for n in data["nodes"]} >= {("text", "cover", 20), ("video", "", 0)}
    assert data["objectives"][0]["inputs"] == {"a": "video", "b": "text:cover", "b 2": "text"}
    assert data["views"] == [{"name": "cover", "reads": ["words", "key"], "writes": ["words", "labels"]}]
