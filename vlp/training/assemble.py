"""From a checked config to the things that are trained: model, objectives, views, and the graph that wires them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from torch import nn

from vlp import config
from vlp.forward import Graph, Wiring, flat, unused_parts
from vlp.types import Batch

_UNREAD = {"checkpoint_path": None, "path": None, "pretrained": False}  # of a part that reads published weights


class System(NamedTuple):
    """What a config describes, built, wired and checked, before any data is opened."""

    model: nn.Module
    objectives: dict[str, nn.Module]
    wirings: Mapping[str, Wiring]
    weights: dict[str, float]
    graph: Graph
    dropped: dict[str, int]  # parts of the model that no objective uses, with their parameters; they are gone
    trained: frozenset[str]  # parts of the model that get a gradient; the others that remain are frozen


def assemble(cfg: DictConfig) -> System:
    """Build the model, the objectives and the views, check the wiring and drop unused parts.

    Raises:
        config.ConfigError: every part that refuses its arguments, every wrong name, every shape that does not fit.
    """
    messages: list[str] = []
    model = _try(lambda: config.build(cfg.model, "model"), messages)
    nodes = {name: node for name, node in cfg.objective.items() if node is not None}
    objectives = {
        n: _try(lambda node=node, n=n: build_part(node, f"objective.{n}"), messages) for n, node in nodes.items()
    }
    views = {
        name: _try(lambda node=node, name=name: config.build(node, f"view.{name}"), messages)
        for name, node in cfg.view.items()
        if node is not None
    }
    texts = _try(lambda: config.build(cfg.texts, "texts"), messages)
    if messages:
        raise config.ConfigError(messages)
    wirings = {n: {**type(objectives[n]).inputs, **plain(node.get("inputs") or {})} for n, node in nodes.items()}
    graph = Graph(model, fields=Batch._fields, views=views)
    messages = _wiring_errors(wirings, objectives, graph) + _shape_errors(model, wirings, graph)
    messages += _more_errors(cfg.clip.more_clips, texts.num_others, wirings, graph)
    if messages:
        raise config.ConfigError(messages)
    weights = {name: float(node.get("weight", 1.0)) for name, node in nodes.items()}
    dropped = _drop_unused(model, wirings, graph)
    _adapt(model, cfg.adapter)
    trained = frozenset(graph.trained_parts(wanted(wirings)))
    for name, part in model.named_children():
        if name not in trained:  # read by a view without gradient only; data parallelism would wait for its gradient
            part.requires_grad_(False)
    return System(model, objectives, wirings, weights, graph, dropped, trained)


def build_part(node: Any, path: str) -> Any:
    """Build a part whose node carries keys of its section beside the arguments of its class."""
    return config.build(
        {key: value for key, value in plain(node).items() if key not in ("weight", "inputs", "modality")}, path
    )


def without_weights(cfg: DictConfig) -> DictConfig:
    """Return the config whose parts read no files of weights, for what needs the shapes alone."""
    return DictConfig(_emptied(plain(cfg)))


def _emptied(node: Any) -> Any:
    if isinstance(node, list):
        return [_emptied(child) for child in node]
    if not isinstance(node, dict):
        return node
    given = {key: value for key, value in _UNREAD.items() if "_target_" in node and key in node}
    return {key: _emptied(child) for key, child in node.items()} | given


def plain(node: Any) -> Any:
    """Return a config node as plain lists and dicts."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def wanted(wirings: Mapping[str, Wiring]) -> list[str]:
    """Return the names of all nodes that the objectives take."""
    return [name for wiring in wirings.values() for _, name in flat(wiring)]


def _try(make: Callable[[], Any], messages: list[str]) -> Any:
    try:
        return make()
    except config.ConfigError as error:
        messages += error.messages
    return None


def _wiring_errors(wirings: Mapping[str, Wiring], objectives: Mapping[str, nn.Module], graph: Graph) -> list[str]:
    messages = []
    for name, wiring in wirings.items():
        known = type(objectives[name]).inputs  # type: ignore[attr-defined]
        for role in wiring.keys() - known.keys():
            messages.append(f"objective.{name}.inputs.{role}: there is no such role; it takes {', '.join(known)}.")
    wiring_of = {f"objective.{name}": wiring for name, wiring in wirings.items()}
    return messages + graph.errors(wiring_of)


def _shape_errors(model: nn.Module, wirings: Mapping[str, Wiring], graph: Graph) -> list[str]:
    """Ask the family whether its parts fit together, for the quantities that this config takes."""
    names = _names(wirings, graph)
    return list(model.shape_errors(names)) if names else []  # type: ignore[operator]


def _more_errors(num_clips: int, num_texts: int, wirings: Mapping[str, Wiring], graph: Graph) -> list[str]:
    """Refuse objectives over other clips, or other texts, of a sample where samples bring none."""
    messages, names = [], _names(wirings, graph)
    if "more_frames" in names and not num_clips:
        messages.append(
            "clip.more_clips: 0 other clips of a sample, but an objective takes some; set it to at least 1."
        )
    if "more_ids" in names and not num_texts:
        messages.append(
            "texts: one text a sample, but an objective takes others; use texts=many_captions, one_of_each or options."
        )
    return messages


def _names(wirings: Mapping[str, Wiring], graph: Graph) -> set[str]:
    """Return the quantities and batch fields that the objectives are computed from."""
    try:
        return {step.node.name for step in graph.plan(wanted(wirings))}
    except ValueError:
        return set()  # already reported as a wiring error


def _adapt(model: nn.Module, nodes: DictConfig) -> None:
    """Let the adapters change the model, which keeps the names of its parameters."""
    module = nn.ModuleDict({"model": model})
    for name, node in nodes.items():
        if node is None:
            continue
        try:
            config.build(node, f"adapter.{name}")(module)
        except config.ConfigError:
            raise
        except ValueError as error:
            raise config.ConfigError([f"adapter.{name}.{error}"]) from None


def _drop_unused(model: nn.Module, wirings: Mapping[str, Wiring], graph: Graph) -> dict[str, int]:
    dropped = {}
    for part in unused_parts(graph, graph.plan(wanted(wirings))):
        dropped[part] = sum(p.numel() for p in getattr(model, part).parameters())
        setattr(model, part, None)
    return dropped
