"""`python plan.py +experiment=NAME [section.key=value ...] [--json] [audit | graph]`. No data is opened.

Without a further word: what the run costs. `audit`: which parameters are trained, which are frozen and why.
`graph`: what a step computes, from what. `--json`: the costs for programs. With stages=FILE: each stage, and the sum.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from vlp import config, stages
from vlp.forward import describe
from vlp.layers.low_rank import adapted
from vlp.planning.estimate import estimate
from vlp.planning.page import chosen_time, page
from vlp.planning.system import Planned, build
from vlp.training import optim, stages_run
from vlp.training.exits import Exit, reported


def main(words: Sequence[str]) -> int:
    """Print what the command line asks for; return the exit code."""
    asked = [word for word in words if word in COMMANDS]
    overrides = [word for word in words if word not in COMMANDS]
    return reported(lambda: _print(asked, overrides))


def _print(asked: Sequence[str], overrides: Sequence[str]) -> int:
    if len(asked) > 1:
        raise config.ConfigError([f"{' '.join(asked)}: ask for one of them at a time."])
    command = COMMANDS[asked[0]] if asked else lambda cfg: page(cfg.run.name, cfg, estimate(cfg))
    if stages.is_asked(overrides):
        print(_of_stages(stages_run.check(stages.parse(overrides), with_weights=False), command if asked else None))
    else:
        print(command(config.load(overrides)))
    return Exit.DONE


def _of_stages(configs: Sequence[DictConfig], command: Callable[[DictConfig], str] | None) -> str:
    """Return what a command says of each stage; without one, the costs of the stages and their sum."""
    if command is not None:
        return "\n\n".join(f"{cfg.run.name}:\n{command(cfg)}" for cfg in configs)
    plans = [(cfg, estimate(cfg)) for cfg in configs]
    rows = [(cfg, chosen_time(cfg, plan)) for cfg, plan in plans]
    head = f"{'stage':<32} {'on':<16} {'steps':>10} {'clips':>16} {'frames':>7} {'hours':>9} {'GPU-hours':>11}"
    lines = [
        f"{cfg.run.name:<32} {_hardware(cfg):<16} {row['steps']:>10,} {row['steps'] * cfg.data.batch_size:>16,}"
        f" {cfg.clip.num_frames:>7} {row['hours']:>9,.1f} {row['gpu_hours']:>11,.1f}"
        for cfg, row in rows
    ]
    hours, gpu_hours = (sum(row[key] for _, row in rows) for key in ("hours", "gpu_hours"))
    steps = sum(row["steps"] for _, row in rows)
    clips = sum(row["steps"] * cfg.data.batch_size for cfg, row in rows)
    total = f"{'in all':<32} {'':<16} {steps:>10,} {clips:>16,} {'':>7} {hours:>9,.1f} {gpu_hours:>11,.1f}"
    return "\n".join([head, *lines, total])


def _hardware(cfg: DictConfig) -> str:
    return f"{cfg.cluster.nodes} x {cfg.cluster.gpus_per_node} {cfg.cluster.gpu}"


def audit(cfg: DictConfig) -> str:
    """Return what is trained and what is not, and the reason, for every parameter."""
    planned = build(cfg)
    lines = [optim.audit(planned.module)]
    names = dict(planned.module.named_parameters())
    for pattern in cfg.optim.freeze:
        matched = fnmatch.filter(names, pattern.removeprefix("!"))
        verb = "trains again" if pattern.startswith("!") else "freezes"
        lines.append(f"optim.freeze '{pattern}' {verb} {len(matched)}: {', '.join(_folded(matched))}")
    layers = adapted(planned.module)
    beside = [f"{layer}.{own}" for layer in layers for own in ("weight", "bias") if f"{layer}.{own}" in names]
    if beside:
        lines.append(f"adapters leave as they are {len(beside)}: {', '.join(_folded(beside))}")
    frozen = [name for name, parameter in names.items() if not parameter.requires_grad]
    trained = [name for name, parameter in names.items() if parameter.requires_grad]
    patterned = {*_by_pattern(cfg, list(names)), *beside}
    other = [name for name in frozen if name not in patterned]
    if other:
        lines.append(f"frozen because nothing that is trained reads them with a gradient: {', '.join(_folded(other))}")
    lines += [f"dropped, used by no objective: {name} ({count:,})" for name, count in planned.dropped.items()]
    for title, found in (("frozen", frozen), ("trained", trained)):
        lines.append(f"{title}: {len(found)} tensors, {sum(names[name].numel() for name in found):,} parameters")
        lines += [f"  {name}" for name in _folded(found)]
    return "\n".join(lines)


def graph(cfg: DictConfig) -> str:
    """Return the plan of a step."""
    planned: Planned = build(cfg)
    system = planned.system
    owners = {**dict(system.model.named_children()), **system.objectives}
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in owners.items()}
    return describe(system.graph, system.wirings, parameters)


def _by_pattern(cfg: DictConfig, names: list[str]) -> set[str]:
    frozen: set[str] = set()
    for pattern in cfg.optim.freeze:
        matched = set(fnmatch.filter(names, pattern.removeprefix("!")))
        frozen = frozen - matched if pattern.startswith("!") else frozen | matched
    return frozen


def _folded(names: Sequence[str]) -> list[str]:
    """Write the layers of a stack as one name: `blocks.*.attn.qkv.weight (24)`."""
    counts: dict[str, int] = {}
    for name in names:
        folded = re.sub(r"\.\d+\.", ".*.", name)
        counts[folded] = counts.get(folded, 0) + 1
    return [name + (f" ({count})" if count > 1 else "") for name, count in counts.items()]


COMMANDS: dict[str, Callable[[DictConfig], str]] = {
    "audit": audit,
    "graph": graph,
    "--json": lambda cfg: json.dumps(estimate(cfg), indent=1),
}
