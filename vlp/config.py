"""Configuration: the schema of the sections, the checks that run before anything is opened, and `build`.

Sections are typed here. Parts (`video`, `objective.*`, ...) are open maps whose `_target_` names the class that is
built; their keys are checked against its signature. Hydra's struct mode stops a typo on the command line only; one in
an experiment file would be merged silently, so all is checked after composition, and all findings are reported at once.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import operator
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from vlp.hints import Node, fits, hint_name, hints_of
from vlp.schema import Parts, Root

CONF = Path(__file__).parent.parent / "conf"
ALLOWED = ("vlp.", "torch.optim.", "torch.nn.", "pytorch_lightning.loggers.")
NODE_KEYS = {"_target_", "_partial_", "facts", "tiny"}  # of a node; the others are arguments of its target
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,127}")
_REFERENCE = re.compile(r"\$\{[\w.\[\]-]+\}")
_MISSING_CHOICE = re.compile(r"Could not (?:find|load) '([\w/]+)/([^'/]+)'")  # of a group, alone or in a list
_BESIDE_ARGUMENTS = {  # types of what a node may hold that is no argument
    "_target_": str,
    "_partial_": bool,
    "facts": dict[str, Any] | None,
    "tiny": dict[str, Any] | None,
    "weight": float,
    "inputs": dict[str, str | list[str]] | None,
    "modality": str | None,
}


class ConfigError(ValueError):
    """The user's config cannot run; `messages` holds one line for each finding."""

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = list(messages)


def load(overrides: Sequence[str], *, conf: Path = CONF) -> DictConfig:
    """Compose and check a config from the command line's overrides.

    Raises:
        ConfigError: everything that is wrong with it, one line each.
    """
    words = _prepared(overrides, conf)
    cfg, messages = _compose(words, conf)
    if cfg is not None:
        _settle_size(cfg, tiny=bool(OmegaConf.select(cfg, "run.tiny")))
        if not messages:
            _say_again(cfg, words)
        messages += check(cfg)
    if cfg is None or messages:
        raise ConfigError(messages)
    return cfg


def check(cfg: DictConfig) -> list[str]:
    """Return one line for each unknown key, wrong type or value, missing value and bad `_target_` of a composed config.

    Where something cannot be resolved, all references stay unread, and everything else is still judged.
    """
    tree: Any = OmegaConf.to_container(cfg, resolve=False)
    texts = list(_texts(tree, ""))
    messages = [_refuse_resolver(path, text) for path, text in texts if "${" in _REFERENCE.sub("", text)]
    may_resolve = not messages  # `${oc.env:TOKEN}` would put a secret into the config
    messages += [
        f"{path}: a value is required; give it on the command line: {path}=VALUE."
        for path, text in texts
        if text == "???"
    ]
    try:
        if may_resolve:
            tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
            messages += [
                _refuse_resolver(path, text) for path, text in _texts(tree, "") if "${" in text
            ]  # put together
    except OmegaConfBaseException as error:
        reason = _reference_error(str(error)) or _first_line(error)
        messages = messages or [f"{error.full_key or 'config'}: {reason}"]  # else it refers to what is missing
    unread = {path for path, text in _texts(tree, "") if "${" in text or text == "???"}
    found = ((_path(line), line) for line in _section_errors(tree, Root, ""))
    messages += [line for path, line in found if not any(_is_in(path, one) or _is_in(one, path) for one in unread)]
    # A part that another node refers to (model.video: ${video}) is found twice; its own place is the one to change.
    messages = [line for line in messages if not any(line.endswith(f".{other}") for other in messages)]
    return messages + list(_value_errors(tree, {*map(_path, messages), *unread}))


def build(node: Any, path: str = "") -> Any:
    """Build the object that a checked node describes, its inner nodes first.

    A node may state `facts` about what it builds, such as its width, for other parts to refer to
    (`dim: ${video.facts.dim}`); they are compared with the object's attributes.

    Raises:
        ConfigError: a target outside the allow-list, refused arguments, a fact that is not true; each with its path.
    """
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    bad = list(target_errors(plain, path))
    if bad:
        raise ConfigError(bad)
    return _make(plain, path)


def _make(node: Any, path: str) -> Any:
    if isinstance(node, list):
        return [_make(child, f"{path}.{index}") for index, child in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    is_part = "_target_" in node
    arguments = {k: _make(v, f"{path}.{k}".lstrip(".")) for k, v in node.items() if not (is_part and k in NODE_KEYS)}
    if not is_part:
        return arguments
    function = resolve(node["_target_"])
    if node.get("_partial_"):
        return functools.partial(function, **arguments)
    try:
        made = function(**arguments)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError([f"{path or node['_target_']}: {_first_line(error)}"]) from error
    for key, stated in (node.get("facts") or {}).items():
        true = getattr(made, key, "absent")
        if true != stated:
            raise ConfigError([f"{path}.facts.{key}: the config says {stated}, the part has {true}; set it to that."])
    return made


def target_errors(node: Any, path: str, extra: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield one message for each `_target_` below `node` that is not allowed or does not accept its keys."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield from target_errors(child, f"{path}.{key}".lstrip("."))
    if not isinstance(node, Mapping) or "_target_" not in node:
        return
    target = node["_target_"]
    try:
        function = resolve(target)
    except ConfigError as error:
        yield f"{path or 'node'}._target_: {error}"
        return
    yield from _argument_errors(node, function, path, extra)


def resolve(target: Any) -> Callable:
    """Return the class that a `_target_` names, or the function in a package of the user's own.

    The string is checked before anything is imported, and the module of what was found afterwards: a prefix test alone
    would accept `vlp.data.storage.urlopen`, because modules show what they import. Functions of ours are no parts, and
    some of them write files.

    Raises:
        ConfigError: not a string, outside the allow-list, not found, or no class.
    """
    allowed = (*ALLOWED, *_user_packages())
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_][\w.]*", target) or not target.startswith(allowed):
        raise ConfigError([f"{target!r} is outside the allowed packages {_listed(allowed)}{_how_to_allow(target)}"])
    module_name, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise ConfigError([f"'{target}' needs the package '{error.name}', which is not installed."]) from None
        raise ConfigError([f"there is no module '{module_name}'."]) from None
    except AttributeError:
        module = importlib.import_module(module_name)
        public = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
        raise ConfigError([f"'{module_name}' has no '{name}'{_near(name, public)}"]) from None
    home = f"{getattr(found, '__module__', None)}."
    if not home.startswith(allowed) or not callable(found):
        raise ConfigError([f"'{target}' is defined in '{home[:-1]}', outside the allowed packages {_listed(allowed)}."])
    if not inspect.isclass(found) and home.startswith(ALLOWED):
        raise ConfigError([f"'{target}' is no class; a config names the class of a part."])
    return found


def _user_packages() -> tuple[str, ...]:
    """Packages of the user's own, from the environment and not from any config: a config may come from a stranger."""
    return tuple(f"{name.strip()}." for name in os.environ.get("VLP_ALLOW", "").split(",") if name.strip())


def _listed(packages: Iterable[str]) -> str:
    return ", ".join(package.rstrip(".") for package in packages)


def _how_to_allow(target: Any) -> str:
    package = str(target).partition(".")[0]
    if not package.isidentifier() or package in sys.stdlib_module_names:
        return "."  # no advice that opens the way to os.system
    return f"; for a package of your own set VLP_ALLOW={package} in the environment."


def _prepared(overrides: Sequence[str], conf: Path) -> list[str]:
    """Say what the user means in the grammar of Hydra, and put `+scale` last, because it changes the experiment.

    GROUP=null leaves a group out, GROUP=NAME adds one that has no default, and a key that no file sets is added:
    whether it exists is the question of `check`, which knows the parameters of every part.
    """
    listed = yaml.safe_load((conf / "train.yaml").read_text(encoding="utf-8"))["defaults"]
    defaults = {group for entry in listed if isinstance(entry, Mapping) for group in entry}
    groups = {path.name for path in conf.iterdir() if path.is_dir()}
    texts = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if key in groups:
            text = ("" if key in defaults else "+") + (f"{key}=[]" if value == "null" else text)
        elif equals and re.fullmatch(r"[\w.-]+", key):
            text = f"++{text}"
        texts.append(text)
    return sorted(texts, key=lambda text: text.startswith("+scale"))


def _compose(overrides: list[str], conf: Path) -> tuple[DictConfig | None, list[str]]:
    """Compose; an override that Hydra refuses is reported and left out, so that the others are still checked."""
    messages: list[str] = []
    GlobalHydra.instance().clear()
    with _environment_hidden(), initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        while True:
            try:
                return compose("train", overrides=overrides), messages
            except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
                guilty = _guilty(overrides, str(error))
                messages.append(_explain(error, guilty, conf))
                if guilty is None:
                    return None, messages
                overrides = [text for text in overrides if text != guilty]


@contextmanager
def _environment_hidden() -> Iterator[None]:
    """Let no defaults list read the environment: Hydra resolves those while it composes, before `check` can look."""

    def refuse(*_: Any) -> None:
        raise ValueError("a config may not read the environment.")

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _settle_size(node: Any, *, tiny: bool) -> None:
    """Put what parts state below `tiny` into their arguments and facts if the run is to be small; drop it if not."""
    if isinstance(node, ListConfig):
        children: Iterable[Any] = (node._get_node(index) for index in range(len(node)))
    elif isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        if "_target_" in node and "tiny" in node:
            with open_dict(node):
                smaller = node.pop("tiny")
                if tiny and OmegaConf.is_dict(smaller):
                    for key in smaller:  # another class has other arguments: nothing of the large one may stay
                        if isinstance(smaller._get_node(key), DictConfig) and "_target_" in smaller[key]:
                            node.pop(key, None)
                    node.merge_with(smaller)
        children = (node._get_node(key) for key in node)
    else:
        return
    for child in list(children):
        _settle_size(child, tiny=tiny)


def _say_again(cfg: DictConfig, words: Sequence[str]) -> None:
    """Let the values of the command line, which are composed before `_settle_size`, win over the small sizes too."""
    for said in OverridesParser.create().parse_overrides([word for word in words if word.startswith("++")]):
        OmegaConf.update(cfg, said.key_or_group, said.value(), force_add=True)


def _texts(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the path and the value of every text in a plain tree."""
    if isinstance(node, str):
        yield path, node
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield from _texts(child, f"{path}.{key}".lstrip("."))


def _refuse_resolver(path: str, text: str) -> str:
    return f"{path}: {text!r} is more than a reference; a config may only refer to its own values, as ${{section.key}}."


def _reference_error(text: str) -> str | None:
    left_out = re.search(r"trying to access ([\w.]+): node `([\w.]+)` is not a container", text)
    return left_out and f"refers to {left_out[1]}, but {left_out[2]} is left out; leave this out too, or choose one."


def _guilty(overrides: Sequence[str], message: str) -> str | None:
    """Find the override that an error of Hydra speaks of."""
    missing = _MISSING_CHOICE.search(message)
    for text in sorted(overrides, key=len, reverse=True):
        key, _, value = text.lstrip("+~").partition("=")
        if text in message or f"'{key}'" in message:
            return text
        if missing and key == missing[1] and missing[2] in re.split(r"[\[\], ]+", value):
            return text
    return None


def _explain(error: Exception, guilty: str | None, conf: Path) -> str:
    text = str(error)
    if isinstance(error, yaml.YAMLError):  # several lines, of which the file and the place come last
        return " ".join(text.split())
    missing = _MISSING_CHOICE.search(text)
    if missing:
        group, name = missing.groups()
        known = sorted(path.stem for path in (conf / group).glob("*.yaml"))
        return f"{group}={name}: there is no conf/{group}/{name}.yaml{_near(name, known)}"
    return f"{guilty}: {_first_line(error)}" if guilty else _first_line(error)


def _section_errors(tree: Any, schema: type, path: str) -> Iterator[str]:
    if not isinstance(tree, Mapping):
        yield f"{path or 'config'}: expected a section with keys, got {tree!r}."
        return
    hints = typing.get_type_hints(schema, include_extras=True)
    for key in tree:
        if key not in hints:
            yield f"{f'{path}.{key}'.lstrip('.')}: unknown key '{key}'{_near(str(key), hints)}"
    for name, hint in hints.items():
        here = f"{path}.{name}".lstrip(".")
        if name not in tree:
            yield f"{here}: missing; a file under conf/ must set it."
        elif typing.get_origin(hint) is Annotated:
            yield from _parts_errors(tree[name], here, hint.__metadata__[0])
        elif dataclasses.is_dataclass(hint):
            yield from _section_errors(tree[name], typing.cast(type, hint), here)
        else:
            yield from _leaf_errors(tree[name], hint, here)


def _leaf_errors(value: Any, hint: Any, path: str) -> Iterator[str]:
    if value == "???":
        return  # `check` has found it
    if not fits(value, hint):
        yield f"{path}: {value!r} has the wrong type; expected {hint_name(hint)}."
    else:
        yield from target_errors(value, path)


def _parts_errors(tree: Any, path: str, extra: Parts) -> Iterator[str]:
    if not isinstance(tree, Mapping):
        yield f"{path}: expected named parts, got {tree!r}; write {{}} for none."
        return
    for name, node in tree.items():
        if node is None:
            continue  # a part switched off: objective.matching=null
        if not fits(node, Node):
            yield f"{path}.{name}: a part needs a '_target_', the class that is built; got {node!r}."
        else:
            yield from target_errors(node, f"{path}.{name}", extra)


def _argument_errors(node: Mapping, function: Callable, path: str, extra: frozenset[str]) -> Iterator[str]:
    known = inspect.signature(function).parameters
    hints = hints_of(function.__init__ if inspect.isclass(function) else function)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    for key in node:
        if key in extra or key in NODE_KEYS:
            hint = _BESIDE_ARGUMENTS[key]
            if node[key] != "???" and not fits(node[key], hint):
                yield f"{path}.{key}: {node[key]!r} has the wrong type; expected {hint_name(hint)}."
        elif key not in known and not takes_any:
            yield f"{path}.{key}: {node['_target_']} has no parameter '{key}'{_near(str(key), known)}"
    for key, parameter in known.items():
        if key not in node:
            if parameter.default is inspect.Parameter.empty and not node.get("_partial_") and _named(parameter):
                yield f"{path}.{key}: {node['_target_']} needs a value for '{key}'."
        elif node[key] != "???" and key in hints and not fits(node[key], Node) and not fits(node[key], hints[key]):
            yield f"{path}.{key}: {node[key]!r} has the wrong type; {node['_target_']} takes {hint_name(hints[key])}."


def _path(message: str) -> str:
    return message.partition(":")[0]


def _is_in(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.")


def _named(parameter: inspect.Parameter) -> bool:
    return parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _value_errors(tree: Any, blamed: Iterable[str]) -> Iterator[str]:
    """Rules between values that no single type can state; values at paths that are blamed already are passed over."""

    def value(path: str) -> Any:
        """Return None where there is nothing to judge."""
        is_sound = not any(_is_in(path, other) for other in blamed)
        return functools.reduce(operator.getitem, path.split("."), tree) if is_sound else None

    for (words, is_met), paths in _RANGES.items():
        for path in paths:
            number = value(path)
            if number is not None and not is_met(number):
                yield f"{path}: {number} is not possible; it must be {words}."
    name = value("run.name")
    if name is not None and not NAME.fullmatch(name):
        yield f"run.name: {name!r} is no name; use letters, digits and ._=,+- (at most 128, not first a dot)."
    for path, allowed in _CHOICES.items():
        if value(path) is not None and value(path) not in allowed:
            yield f"{path}: {value(path)!r} is not known; use one of {', '.join(allowed)}."
    clips, lanes = value("data.batch_size"), value("data.num_lanes")
    if clips and lanes and clips % lanes:
        yield (
            f"data.num_lanes: {lanes} does not divide data.batch_size={clips}; "
            f"set data.num_lanes to one of {_divisors(clips)}."
        )
    strategy = value("trainer.strategy")
    if value("trainer.zero.offload_parameters") and strategy not in (None, "zero3"):
        yield f"trainer.zero.offload_parameters: {strategy} cannot; set trainer.strategy=zero3."
    short_side, size = value("clip.short_side"), value("clip.size")
    if None not in (short_side, size) and short_side < size:
        yield f"clip.short_side: {short_side} is below clip.size={size}; set it to at least clip.size."
    betas = value("optim.betas")
    if fits(betas, list[float]) and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
        yield f"optim.betas: {betas} is not possible; write two numbers of at least 0 and below 1."
    modality = value("clip.modality")
    for name, node in (value("data.sources") or {}).items():
        other = value(f"data.sources.{name}.modality") if isinstance(node, Mapping) and "modality" in node else None
        if None not in (modality, other) and other != modality:
            yield f"data.sources.{name}.modality: {other!r} is not what clips show; set modality={other}."
    objectives = value("objective")
    if objectives is not None and not any(objectives.values()):
        yield "objective: nothing to train on; choose at least one, for example objective=[contrastive]."


_RANGES: dict[tuple[str, Callable[[float], bool]], tuple[str, ...]] = {
    ("at least 1", lambda value: value >= 1): (
        *(f"trainer.{key}" for key in ("max_steps", "accumulate", "log_every", "checkpoint_every")),
        *("eval.every", "eval.batch_size"),
        *(f"trainer.{key}" for key in ("num_nodes", "num_threads", "keep_checkpoints", "zero.bucket_elements")),
        *("trainer.spike_window", "trainer.check_replicas_every", "run.hold_after"),
        *(f"data.{key}" for key in ("batch_size", "num_lanes", "window_shards", "bucket_steps")),
        *(
            "clip.num_frames",
            "clip.size",
            "clip.width",
            "tokenizer.vocab_size",
            "tokenizer.max_length",
            "run.stop_after",
        ),
        *(f"cluster.{key}" for key in ("nodes", "gpus_per_node", "cores_per_node", "num_clips")),
    ),
    ("0 or more", lambda value: value >= 0): (
        *("trainer.max_skipped_steps", "trainer.max_rewinds", "trainer.zero.persistent_elements", "data.num_workers"),
        *("optim.weight_decay", "clip.more_clips"),
        *(f"cluster.{key}" for key in ("reserved_gib", "launch_us", "save_stall_s", "save_write_s", "restart_s")),
    ),
    ("above 0", lambda value: value > 0): (
        *("optim.lr", "optim.eps", "trainer.clip_grad_norm", "cluster.network_gb_s", "cluster.epochs"),
        *("cluster.gpu_mtbf_hours", "trainer.timeout_s", "trainer.max_time_s", "data.decode_timeout_s"),
        "data.outage_s",
        "data.worker_memory_gib",
    ),
    ("above 1", lambda value: value > 1): ("trainer.spike_factor",),
    ("between 0 and 1", lambda value: 0 <= value <= 1): ("trainer.bad_sample_budget", "data.holdout"),
    ("above 0 and at most 1", lambda value: 0 < value <= 1): ("optim.layer_decay", "cluster.utilisation"),
    ("above 0 and below 1", lambda value: 0 < value < 1): ("optim.ema_decay",),
}
_POLICIES = ("stop", "skip", "rewind")
_CHOICES = {
    "trainer.nan_policy": _POLICIES,
    "trainer.spike_policy": _POLICIES,
    "trainer.precision": ("32-true", "bf16-mixed", "16-mixed", "bf16-true"),
    "trainer.strategy": ("auto", "ddp", "zero1", "zero2", "zero3"),
}


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _near(word: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f". Did you mean '{near[0]}'?"
    return f"; known: {', '.join(names) or 'none'}." if len(names) < 40 else "."


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
