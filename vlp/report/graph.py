"""Lays out the graph of a step in columns: batch fields left, views and quantities between, objectives right.

The usual four moves of a layered drawing: give every box a column; break long arrows into pieces, one for each column
that they cross, and let the arrows of one box share them; order each column so that few arrows cross; then move each
column up and down towards its neighbours. The pieces take room like boxes do, so that no arrow runs through a box.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from vlp.report import words
from vlp.report.records import Graph, Node

FIELD, VIEW, QUANTITY, OBJECTIVE, UNKNOWN = "field", "view", "quantity", "objective", "unknown"
TITLE_CHAR, SMALL_CHAR, PADDING, MAX_CHARS = 8.5, 6.5, 11.0, 18  # widths in the widest of the usual fonts
LINE_HEIGHT, BADGE_HEIGHT, BOX_PADDING = 15.0, 17.0, 8.0
COLUMN_GAP, BOX_GAP, TRUNK_HEIGHT, TRUNK_GAP = 34.0, 13.0, 2.0, 9.0
TOP, SIDE = 34.0, 2.0  # room for the headings; for the outlines
ROUNDS = 12


class Vertex(NamedTuple):
    """A box before it has a place."""

    kind: str
    title: str
    badges: tuple[str, ...] = ()  # views
    lines: tuple[str, ...] = ()


class Box(NamedTuple):
    """A box in its place."""

    name: str
    vertex: Vertex
    x: float
    y: float
    width: float
    height: float


class Arrow(NamedTuple):
    """From the right side of one box to the left side of another."""

    source: str
    target: str
    label: str
    path: str  # SVG


class Drawing(NamedTuple):
    """The whole graph, ready to draw."""

    boxes: list[Box]
    arrows: list[Arrow]
    headings: list[tuple[float, str, str]]  # position, text, SVG text-anchor
    width: float
    height: float
    unused: list[str]  # batch fields that nothing reads


Edges = dict[tuple[str, str], str]  # (source, target) -> label
Columns = list[list[str]]


def identity(node: Node) -> str:
    """Return "name" or "name:view"."""
    return f"{node.name}:{node.view}" if node.view else node.name


def _writer(graph: Graph, name: str) -> str | None:
    """Return the view that produces "name:view+view" itself, if one does."""
    quantity, _, views = name.partition(":")
    return next((view.name for view in graph.views if view.name in views.split("+") and quantity in view.writes), None)


def collect(graph: Graph) -> tuple[dict[str, Vertex], Edges]:
    """Return the boxes by name and the arrows; a name that nothing explains becomes an unknown box, never an error."""
    vertices = {name: Vertex(FIELD, name) for name in graph.fields}
    for view in graph.views:
        vertices[f"view {view.name}"] = Vertex(VIEW, view.name, (), tuple(f"new {name}" for name in view.writes))
    nodes = [
        node for node in graph.nodes if identity(node) not in graph.fields and _writer(graph, identity(node)) is None
    ]
    for node in nodes:
        vertices[identity(node)] = _quantity(node)
    for objective in graph.objectives:
        line = f"weight {words.plain(objective.weight)}"
        vertices[f"objective {objective.name}"] = Vertex(OBJECTIVE, objective.name, (), (line,))

    edges: Edges = {}

    def connect(needs: Iterable[str], target: str, role: str = "") -> None:
        for need in needs:
            writer = _writer(graph, need)
            source = f"view {writer}" if writer and need not in vertices else need
            vertices.setdefault(source, Vertex(UNKNOWN, source))
            label = f"{role}: {need}" if role else need
            edges[source, target] = f"{edges[source, target]}, {label}" if (source, target) in edges else label

    for view in graph.views:  # what its nodes need is exact; `reads` also names optional inputs that do not exist here
        written = [node.needs for node in graph.nodes if _writer(graph, identity(node)) == view.name]
        connect((need for needs in written or [view.reads] for need in needs), f"view {view.name}")
    for node in nodes:
        connect(node.needs, identity(node))
    for objective in graph.objectives:
        for role, wired in objective.inputs.items():
            names = wired if isinstance(wired, list) else [wired]
            connect((str(name) for name in names if name is not None), f"objective {objective.name}", role)
    used = {name for edge in edges for name in edge}
    return {name: vertex for name, vertex in vertices.items() if vertex.kind != FIELD or name in used}, edges


def _quantity(node: Node) -> Vertex:
    cost = f"{words.plural(node.calls, 'call')}" + (f" · {words.short(node.parameters)}" if node.parameters else "")
    return Vertex(QUANTITY, node.name, tuple(node.view.split("+")) if node.view else (), (*node.parts, cost))


def assign_columns(vertices: dict[str, Vertex], edges: Edges) -> dict[str, int]:
    """Return the column of each box: right of all it needs, objectives last; arrows that close a cycle are ignored."""
    columns: dict[str, int] = {}

    def place(name: str, path: tuple[str, ...]) -> int:
        if name not in columns:
            needs = [source for source, target in edges if target == name and source not in path]
            columns[name] = max((place(need, (*path, name)) + 1 for need in needs), default=0)
        return columns[name]

    for name in vertices:
        place(name, (name,))
    for name, vertex in vertices.items():  # a quantity that needs nothing stands next to what needs it
        targets = [columns[target] for source, target in edges if source == name]
        if columns[name] == 0 and vertex.kind != FIELD and targets:
            columns[name] = max(1, min(targets) - 1)
    inner = [columns[name] for name, vertex in vertices.items() if vertex.kind != OBJECTIVE]
    for name, vertex in vertices.items():
        if vertex.kind == OBJECTIVE:
            columns[name] = max(inner, default=0) + 1
    return columns


def add_trunks(columns: dict[str, int], edges: Edges) -> tuple[Columns, set[tuple[str, str]]]:
    """Break arrows that cross columns; returns the names in each column and the short arrows between neighbours."""
    table: Columns = [[] for _ in range(max(columns.values(), default=0) + 1)]
    for name, column in columns.items():
        table[column].append(name)
    links: set[tuple[str, str]] = set()
    for source, target in edges:
        stops = route(source, target, columns)
        for column, stop in enumerate(stops[1:-1], columns[source] + 1):
            if stop not in table[column]:
                table[column].append(stop)
        links |= set(pairwise(stops))
    return table, links


def route(source: str, target: str, columns: dict[str, int]) -> list[str]:
    """Return the stops of an arrow, one for each column."""
    between = range(columns[source] + 1, columns[target])
    return [source, *(f"trunk {column} {source}" for column in between), target]


def order(table: Columns, links: set[tuple[str, str]]) -> Columns:
    """Order each column by the mean place of its neighbours, back and forth; keep the best order seen."""
    before: dict[str, list[str]] = {}
    after: dict[str, list[str]] = {}
    for source, target in sorted(links):
        before.setdefault(target, []).append(source)
        after.setdefault(source, []).append(target)
    best, fewest = table, math.inf
    for turn in range(ROUNDS):
        forward = turn % 2 == 0
        table = [list(column) for column in table]
        sweep = range(1, len(table)) if forward else range(len(table) - 2, -1, -1)
        for index in sweep:
            neighbours = before if forward else after
            beside = {name: place for place, name in enumerate(table[index - 1 if forward else index + 1])}
            own = {name: place for place, name in enumerate(table[index])}

            def mean(name: str, neighbours=neighbours, beside=beside, own=own) -> float:
                places = [beside[other] for other in neighbours.get(name, ()) if other in beside]
                return sum(places) / len(places) if places else own[name]

            table[index].sort(key=mean)
        crossings = count_crossings(table, links)
        if crossings < fewest:
            best, fewest = table, crossings
    return best


def count_crossings(table: Columns, links: set[tuple[str, str]]) -> int:
    """Return how many pairs of short arrows cross."""
    place = {name: (column, row) for column, names in enumerate(table) for row, name in enumerate(names)}
    total = 0
    for column in range(len(table) - 1):
        ends = [(place[a][1], place[b][1]) for a, b in links if place[a][0] == column]
        total += sum((a - c) * (b - d) < 0 for index, (a, b) in enumerate(ends) for c, d in ends[:index])
    return total


def settle(wanted: list[float], distances: list[float]) -> list[float]:
    """Return the increasing positions closest to `wanted` (least squares) that keep at least `distances` to the next.

    Pool adjacent violators: without the distances the task is isotonic regression.
    """
    offsets = [sum(distances[:index]) for index in range(len(wanted))]
    blocks: list[tuple[float, int]] = []  # mean, size
    for value, offset in zip(wanted, offsets, strict=True):
        blocks.append((value - offset, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (low_mean, low), (high_mean, high) = blocks[-2:]
            blocks[-2:] = [((low_mean * low + high_mean * high) / (low + high), low + high)]
    flat = [mean for mean, size in blocks for _ in range(size)]
    return [value + offset for value, offset in zip(flat, offsets, strict=True)]


def size(vertex: Vertex) -> tuple[float, float]:
    """Return width and height of a box."""
    texts = [len(shorten(vertex.title)) * TITLE_CHAR, *(len(shorten(text)) * SMALL_CHAR for text in vertex.lines)]
    texts += [len(shorten(badge)) * SMALL_CHAR + PADDING for badge in vertex.badges]
    height = (1 + len(vertex.lines)) * LINE_HEIGHT + len(vertex.badges) * BADGE_HEIGHT + BOX_PADDING
    return max(texts) + 2 * PADDING, height


def shorten(text: str) -> str:
    """Cut a text that would make a box too wide."""
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"


def centres(table: Columns, heights: dict[str, float], links: set[tuple[str, str]]) -> dict[str, float]:
    """Return the vertical middle of each box and trunk, from `TOP` down."""
    middle: dict[str, float] = {}
    gaps: list[list[float]] = []
    for column in table:
        gaps.append([_distance(heights, a, b) for a, b in pairwise(column)])
        middle |= dict(zip(column, settle([0.0] * len(column), gaps[-1]), strict=True))
    for turn in range(2 * ROUNDS):
        for column, distances in zip(table[:: 1 if turn % 2 else -1], gaps[:: 1 if turn % 2 else -1], strict=True):
            wanted = []
            for name in column:
                beside = [middle[a if b == name else b] for a, b in links if name in (a, b)]
                wanted.append(sum(beside) / len(beside) if beside else middle[name])
            middle |= dict(zip(column, settle(wanted, distances), strict=True))
    top = min((middle[name] - heights[name] / 2 for name in middle), default=0.0)
    return {name: value - top + TOP for name, value in middle.items()}


def _distance(heights: dict[str, float], upper: str, lower: str) -> float:
    trunk = upper.startswith("trunk ") or lower.startswith("trunk ")
    return (heights[upper] + heights[lower]) / 2 + (TRUNK_GAP if trunk else BOX_GAP)


def layout(graph: Graph) -> Drawing | None:
    """Return the drawing of a step's graph, or None if it is empty."""
    vertices, edges = collect(graph)
    if not vertices:
        return None
    columns = assign_columns(vertices, edges)
    forward = {edge: label for edge, label in edges.items() if columns[edge[0]] < columns[edge[1]]}
    table, links = add_trunks(columns, forward)
    table = order(table, links)
    sizes = {name: size(vertex) for name, vertex in vertices.items()}
    heights = {name: sizes[name][1] if name in sizes else TRUNK_HEIGHT for column in table for name in column}
    middle = centres(table, heights, links)
    widths = [max((sizes[name][0] for name in column if name in sizes), default=20.0) for column in table]
    lefts = [SIDE + sum(widths[:index]) + index * COLUMN_GAP for index in range(len(widths))]
    boxes = [
        Box(name, vertices[name], lefts[at], middle[name] - sizes[name][1] / 2, widths[at], sizes[name][1])
        for name, at in columns.items()
    ]
    arrows = [
        Arrow(a, b, label, _path([middle[stop] for stop in route(a, b, columns)], columns[a], lefts, widths))
        for (a, b), label in forward.items()
    ]
    right = lefts[-1] + widths[-1]
    headings = [(lefts[0], "Batch fields", "start"), (right, "Objectives", "end")]
    if len(lefts) > 2:
        headings.insert(1, ((lefts[1] + lefts[-2] + widths[-2]) / 2, "Views and quantities", "middle"))
    bottom = max(middle[name] + heights[name] / 2 for name in middle)
    read = {source for source, _ in edges}
    unused = [name for name in graph.fields if name not in read]
    return Drawing(boxes, arrows, headings, right + SIDE, bottom + SIDE, unused)


def _path(heights: list[float], column: int, lefts: list[float], widths: list[float]) -> str:
    """Return a smooth line: curved between columns, straight where it crosses one."""
    path = f"M{lefts[column] + widths[column]:.1f} {heights[0]:.1f}"
    for index, (y, next_y) in enumerate(pairwise(heights)):
        start, end = lefts[column + index] + widths[column + index], lefts[column + index + 1]
        middle = (start + end) / 2
        path += f"C{middle:.1f} {y:.1f} {middle:.1f} {next_y:.1f} {end:.1f} {next_y:.1f}"
        if index + 2 < len(heights):
            path += f"H{end + widths[column + index + 1]:.1f}"
    return path
