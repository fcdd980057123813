"""The static graph of a step, and the pass that computes it.

A model family marks small methods with `@quantity`; the parameter names of a method are the quantities or batch fields
that it needs, as fixtures are in pytest:

    @quantity
    def fused(self, video: Grid, text: Tokens) -> Fused: ...

A *view* is a callable with `writes`, a tuple of names; its parameters name what it reads from the unchanged step.
`fused:masked_words+masked_patches` is `fused` as it would be if those views had replaced what they write. A view that
changes nothing a quantity depends on is dropped from its name, so `video:masked_words` *is* `video`, computed once.
What a view reads without gradient it names in `detached`. Inputs are found in signatures, the parts that a quantity
uses in its source; nothing runs to make the plan.

    batch fields --> view --> replaced fields or quantities
         |                        |
         +--> quantity --> quantity:view --> roles of the objectives
"""

import ast
import copy
import difflib
import functools
import inspect
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from vlp import ops

Wiring = Mapping[str, str | Sequence[str]]  # role -> node name, or several


def quantity(method: Callable) -> Callable:
    """Mark a method of a model family as a node of the step's graph."""
    method.is_quantity = True  # type: ignore[attr-defined]
    return method


class Node(NamedTuple):
    """A quantity or field under the views that change it; `views` is sorted and holds no view without effect."""

    name: str
    views: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name + (":" + "+".join(self.views) if self.views else "")


class Step(NamedTuple):
    """One line of the plan of a step: what is computed, from what, by which parts of the model."""

    node: Node
    needs: tuple[Node, ...]
    parts: tuple[str, ...]
    view: str | None  # the view that produces the node, or None for a quantity


class GraphError(ValueError):
    """A name in the wiring means nothing, or the views contradict each other."""


class Graph:
    """The graph of one model family under named views; knows every step before the first batch.

    Args:
        model: the module whose class carries the quantities.
        fields: names of the batch fields.
        views: name -> view object (callable with `writes` and `detached`).
    """

    def __init__(self, model: nn.Module, *, fields: Iterable[str], views: Mapping[str, Any]) -> None:
        self.model_type = type(model)
        self.children = {name for name, child in model._modules.items() if child is not None}
        # Parts that the config leaves out: `self.fusion = None` makes a plain attribute, not a child.
        self.absent = {name for name, value in {**vars(model), **model._modules}.items() if value is None}
        self.fields = tuple(fields)
        self.views = dict(views)
        self.quantities = {
            name: _parameters(method)
            for name, method in inspect.getmembers(self.model_type, inspect.isfunction)
            if getattr(method, "is_quantity", False)
        }
        self.view_reads = {name: _parameters(type(view).__call__) for name, view in self.views.items()}
        self.written = {name for view in self.views.values() for name in view.writes}

    def node(self, text: str) -> Node:
        """Parse "name:view+view" and drop the views without effect.

        Raises:
            GraphError: unknown name or view (with the nearest known one), two views that write the same name, a cycle.
        """
        name, _, suffix = text.partition(":")
        views = tuple(suffix.split("+")) if suffix else ()
        for view in views:
            if view not in self.views:
                raise GraphError(f"'{text}': there is no view '{view}'{_near(view, self.views)}")
        self._check_writers(text, views)
        if name not in self.quantities and name not in self.fields and name not in self.written:
            known = [*self.quantities, *self.fields, *sorted(self.written)]
            raise GraphError(f"'{text}': there is no quantity or batch field '{name}'{_near(name, known)}")
        node = Node(name, tuple(sorted(self._effective(name, frozenset(views), ()))))
        if not self._exists(node):
            writers = [view for view, obj in self.views.items() if name in obj.writes]
            raise GraphError(f"'{text}': '{name}' exists only under a view; write '{name}:{writers[0]}'.")
        return node

    def needs(self, node: Node) -> list[Node | None]:
        """Return what a node is computed from, in call order; None where an optional input is absent."""
        writer = self.writer(node)
        if writer is not None:
            return [self._need(Node(name), optional) for name, optional in self.view_reads[writer].items()]
        if node.name not in self.quantities:
            return []
        parameters = self.quantities[node.name]
        return [self._need(Node(name, node.views), optional) for name, optional in parameters.items()]

    def writer(self, node: Node) -> str | None:
        """Return the view that produces the node itself, if one does."""
        return next((view for view in node.views if node.name in self.views[view].writes), None)

    def plan(self, wanted: Iterable[str]) -> list[Step]:
        """Return the steps that compute the wanted nodes, each once, every step after what it needs."""
        steps: dict[Node, Step] = {}
        for text in wanted:
            self._visit(self.node(text), steps)
        return list(steps.values())

    def reads(self, node: Node) -> set[str]:
        """Return the batch fields that a node is computed from."""
        steps: dict[Node, Step] = {}
        self._visit(node, steps)
        return {step.name for step in steps if step.name in self.fields and not step.views}

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the child modules of the model that the quantity's code uses."""
        return tuple(sorted(_attributes(self.model_type, name, set()) & self.children))

    def trained_parts(self, wanted: Iterable[str]) -> set[str]:
        """Return the child modules that get a gradient from the wanted nodes: a view may read without gradient."""
        parts: set[str] = set()
        todo, seen = [self.node(text) for text in wanted], set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            writer = self.writer(node)
            if writer is None and node.name in self.quantities:
                parts.update(self.parts(node.name))
            cut = self.views[writer].detached if writer is not None else ()
            todo += [need for need in self.needs(node) if need is not None and need.name not in cut]
        return parts

    def errors(self, wanted: Mapping[str, Wiring]) -> list[str]:
        """Return one line for each name in the objectives' wiring that cannot be computed."""
        messages = []
        for owner, wiring in wanted.items():
            for role, text in flat(wiring):
                try:
                    self.plan([text])
                except GraphError as error:
                    messages.append(f"{owner}.inputs.{role}: {error}")
        return messages

    def _visit(self, node: Node, steps: dict[Node, Step]) -> None:
        if node in steps:
            return
        needs = [need for need in self.needs(node) if need is not None]
        for need in needs:  # ends: `_effective` has refused every cycle
            self._visit(need, steps)
        writer = self.writer(node)
        own = writer is None and node.name in self.quantities
        missing = sorted(_attributes(self.model_type, node.name, set()) & self.absent) if own else []
        if missing:
            raise GraphError(
                f"'{node.name}' needs the part '{missing[0]}', which this config leaves out ({missing[0]}=null)."
            )
        steps[node] = Step(node, tuple(needs), self.parts(node.name) if own else (), writer)

    def _need(self, node: Node, optional: bool) -> Node | None:
        canonical = Node(node.name, tuple(sorted(self._effective(node.name, frozenset(node.views), ()))))
        if self._exists(canonical):
            return canonical
        if optional:
            return None
        known = [*self.quantities, *self.fields]
        raise GraphError(
            f"'{node.name}' is needed, but no batch field, quantity or view provides it{_near(node.name, known)}"
        )

    def _exists(self, node: Node) -> bool:
        return node.name in self.quantities or node.name in self.fields or self.writer(node) is not None

    def _effective(self, name: str, views: frozenset[str], path: tuple[str, ...]) -> frozenset[str]:
        """The subset of views that changes `name`."""
        writers = frozenset(view for view in views if name in self.views[view].writes)
        if writers or name not in self.quantities:
            return writers
        if name in path:
            raise GraphError(f"'{name}' needs itself: {' <- '.join([*path, name])}.")
        changed: frozenset[str] = frozenset()
        for need in self.quantities[name]:
            changed |= self._effective(need, views, (*path, name))
        return changed

    def _check_writers(self, text: str, views: Sequence[str]) -> None:
        for index, first in enumerate(views):
            for second in views[index + 1 :]:
                both = set(self.views[first].writes) & set(self.views[second].writes)
                if both:
                    raise GraphError(f"'{text}': '{first}' and '{second}' both write {sorted(both)}; name only one.")


class ForwardPass:
    """Computes nodes of one batch on demand, each at most once.

    Every rank must take the same nodes in the same order: which nodes is a matter of config, never of data.
    """

    def __init__(self, model: nn.Module, batch: NamedTuple, graph: Graph) -> None:
        self.model, self.graph = model, graph
        self.fields = batch._asdict()
        self.values: dict[Node, Any] = {}
        self.base: ForwardPass | None = None  # computes what `changes`, the replaced fields, do not touch
        self.changes: frozenset[str] = frozenset()

    def with_fields(self, **changes: Any) -> "ForwardPass":
        """Return a pass with some batch fields replaced; what does not depend on them is computed once, by this one."""
        assert changes.keys() <= self.fields.keys(), f"not batch fields: {changes.keys() - self.fields.keys()}"
        changed = copy.copy(self)
        changed.base, changed.values = self, {}
        changed.fields, changed.changes = {**self.fields, **changes}, frozenset(changes)
        return changed

    def take(self, text: str) -> Any:
        """Return the value of "name" or "name:view+view"."""
        return self._value(self.graph.node(text))

    def roles(self, wiring: Wiring) -> list[Any]:
        """Return the values of an objective's roles in order; a role wired to several nodes gets a list."""
        return [
            self.take(names) if isinstance(names, str) else [self.take(n) for n in names] for names in wiring.values()
        ]

    def _value(self, node: Node) -> Any:
        if node in self.values:
            return self.values[node]
        if self.base is not None and self.changes.isdisjoint(self.graph.reads(node)):
            return self.base._value(node)
        writer = self.graph.writer(node)
        if writer is not None:
            self._run_view(writer, node)
        elif node.name in self.graph.quantities:
            self.values[node] = getattr(self.model, node.name)(*self._inputs(node))
        else:
            self.values[node] = self.fields[node.name]
        return self.values[node]

    def _inputs(self, node: Node) -> list[Any]:
        return [None if need is None else self._value(need) for need in self.graph.needs(node)]

    def _run_view(self, name: str, node: Node) -> None:
        view = self.graph.views[name]
        inputs = self._inputs(node)
        for index, read in enumerate(self.graph.view_reads[name]):
            if read == "key":  # each view draws from a stream of its own, but those that say so share one
                stream = getattr(view, "stream", name)
                inputs[index] = ops.fold(inputs[index], zlib.crc32(stream.encode()))
        for written, value in zip(view.writes, view(*inputs), strict=True):
            self.values[Node(written, (name,))] = value


def flat(wiring: Wiring) -> list[tuple[str, str]]:
    """Return (role, node name) pairs of a wiring, with lists unrolled."""
    return [(role, name) for role, names in wiring.items() for name in ([names] if isinstance(names, str) else names)]


def unused_parts(graph: Graph, steps: Iterable[Step]) -> list[str]:
    """Return the child modules of the model that no step of the plan uses."""
    return sorted(graph.children - {part for step in steps for part in step.parts})


def describe(graph: Graph, wanted: Mapping[str, Wiring], parameters: Mapping[str, int]) -> str:
    """Return the plan of the step as text: objective <- quantities <- modules, and the calls of each module."""
    lines = ["The plan of a step: objective <- what it takes; then what is computed, from what, by which modules"]
    for name, wiring in wanted.items():
        lines.append(f"  {name:<18} <- " + ", ".join(f"{role}={node}" for role, node in flat(wiring)))
    steps = graph.plan(text for wiring in wanted.values() for _, text in flat(wiring))
    computed = [step for step in steps if step.needs or step.parts]
    for step in computed:
        how = f"view {step.view}" if step.view else " + ".join(step.parts)
        lines.append(
            f"  {step.node!s:<34} <- {', '.join(map(str, step.needs)) or '-':<44} {how and f'[{how}]'}".rstrip()
        )
    calls = {part: sum(part in step.parts for step in computed) for part in sorted(parameters)}
    used = (f"{part} x{count} ({parameters[part]:,} parameters)" for part, count in calls.items() if count)
    return "\n".join([*lines, "  calls a step: " + ", ".join(used)])


def to_json(
    graph: Graph, wanted: Mapping[str, Wiring], weights: Mapping[str, float], parameters: Mapping[str, int]
) -> dict:
    """Return the plan for `graph.json`, which the report draws."""
    steps = graph.plan(text for wiring in wanted.values() for _, text in flat(wiring))
    used_views = {view for step in steps for view in step.node.views}
    return {
        "fields": [str(step.node) for step in steps if step.node.name in graph.fields and step.view is None],
        "nodes": [
            {
                "name": step.node.name,
                "view": "+".join(step.node.views),
                "needs": [str(need) for need in step.needs],
                "parts": list(step.parts),
                "calls": 1,
                "parameters": sum(parameters.get(part, 0) for part in step.parts),
            }
            for step in steps
            if step.needs or step.parts
        ],
        "views": [
            {"name": name, "reads": list(graph.view_reads[name]), "writes": list(view.writes)}
            for name, view in graph.views.items()
            if name in used_views
        ],
        "objectives": [
            {"name": name, "weight": weights[name], "inputs": _json_inputs(graph, wiring)}
            for name, wiring in wanted.items()
        ],
    }


def _json_inputs(graph: Graph, wiring: Wiring) -> dict[str, str]:
    names: dict[str, list[str]] = {}
    for role, text in flat(wiring):
        names.setdefault(role, []).append(str(graph.node(text)))
    return {
        role if index == 0 else f"{role} {index + 1}": n for role, all_ in names.items() for index, n in enumerate(all_)
    }


def _parameters(function: Callable) -> dict[str, bool]:
    """Parameter name -> is it optional; `self` left out."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {p.name: p.default is not inspect.Parameter.empty for p in parameters}


def _attributes(model_type: type, name: str, seen: set[str]) -> frozenset[str]:
    """Names that a method reads from self, through the helper methods that it calls, without running anything."""
    function = getattr(model_type, name, None)
    if name in seen or not inspect.isfunction(function):
        return frozenset()
    seen.add(name)
    names = _own_names(function)
    return names.union(*(_attributes(model_type, inner, seen) for inner in names))


@functools.cache
def _own_names(function: Callable) -> frozenset[str]:
    """Names that a method's source reads from `self`; `fused.text` is no use of `self.text`."""
    source = inspect.getsource(function)
    tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    arguments = next(node.args for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    own = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][:1]
    reads = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return frozenset(node.attr for node in reads if isinstance(node.value, ast.Name) and node.value.id in own)


def _near(word: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f". Did you mean '{near[0]}'?" if near else f"; known: {', '.join(names) or 'none'}."
