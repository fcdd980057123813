"""What a run says about itself: at the start on the screen, in `run.json` and `graph.json`, and at the end."""

import datetime
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vlp.data.datamodule import VideoTextData
from vlp.forward import describe, to_json
from vlp.training import environment, optim
from vlp.training.assemble import System
from vlp.training.callbacks import Counting
from vlp.training.module import Pretraining


def facts(cfg: DictConfig, system: System, module: Pretraining, data: VideoTextData) -> dict[str, Any]:
    """Return the part of `run.json` that is known before the first step."""
    return {
        "name": cfg.run.name,
        "status": "running",
        "exit_code": None,
        "step": module.cursor,
        "max_steps": cfg.trainer.max_steps,
        "experiment": experiment(),
        "command": environment.command(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment.facts() | {"precision": cfg.trainer.precision},
        "parts": parts(system, module),
        "sources": sources(data, None),
    }


def parts(system: System, module: Pretraining) -> list[dict[str, Any]]:
    """Return parameters, and trainable ones, of each part of the model and of each objective."""
    owners = [*system.model.named_children(), *((f"objective {n}", part) for n, part in module.objectives.items())]
    rows = [
        {
            "name": name,
            "parameters": sum(p.numel() for p in part.parameters()),
            "trainable": sum(p.numel() for p in part.parameters() if p.requires_grad),
            "dropped": False,
        }
        for name, part in owners
    ]
    rows = [row for row in rows if row["parameters"]]
    return rows + [
        {"name": name, "parameters": count, "trainable": 0, "dropped": True} for name, count in system.dropped.items()
    ]


def sources(data: VideoTextData, counting: Counting | None) -> list[dict[str, Any]]:
    """Return counts and losses of each source; with `counting`, what training saw of it."""
    rows = []
    fingerprints = data.fingerprints()
    for name in data.sources:
        dropped = data.dropped(name)
        seen = 0
        if counting is not None:
            dropped += [{**each, "stage": "train"} for each in counting.dropped[name].values()]
            seen = counting.seen[name].get("ok", 0)
        rows.append(
            {
                "name": name,
                "train": data.num_clips(name, "train"),
                "test": data.num_clips(name, "test"),
                "fingerprint": fingerprints[name],
                "weight": data.weights[name],
                "seen": seen,
                "test_is_train": data.test_is_train(name),
                "dropped": dropped,
            }
        )
    return rows


def graph(system: System, module: Pretraining) -> dict[str, Any]:
    """Return the plan of the step for `graph.json`."""
    return to_json(system.graph, system.wirings, system.weights, module.trained_parts())


def text(cfg: DictConfig, system: System, module: Pretraining, record: Mapping, skipped: Mapping[str, str]) -> str:
    """Return the start-up summary."""
    env = record["environment"]
    lines = [
        f"vlp {env['vlp']}  run '{cfg.run.name}'  on {env['device']}, {cfg.trainer.precision}",
        f"attention: {env['attention']}",
        optim.audit(module),
        *(f"  {name}: used by no objective, {count:,} parameters dropped" for name, count in system.dropped.items()),
        describe(system.graph, system.wirings, module.trained_parts()),
    ]
    for row in record["sources"]:
        counts = f"{row['train']:,} training clips, {row['test']:,} test clips"
        lines.append(f"data '{row['name']}': {counts}, {_losses(row)}")
        if row["test_is_train"]:
            lines.append("  too few clips to hold any out: the evaluation uses the training clips, and says so")
    lines += [f"evaluation '{name}' is left out: {why}" for name, why in skipped.items()]
    batch, accumulate = cfg.data.batch_size, cfg.trainer.accumulate
    steps = f"steps {module.cursor} to {cfg.trainer.max_steps}, {batch} clips each"
    return "\n".join([*lines, steps + (f" in {accumulate} micro-batches" if accumulate > 1 else "")])


def ending(directory: Path, status: str, step: int, report: Path) -> str:
    """Return the last lines on the screen."""
    return f"{status} at step {step}. Run directory: {directory}\nReport: {report}"


def experiment() -> str | None:
    """Return the experiment named on the command line."""
    return next((word.partition("=")[2] for word in sys.argv if word.lstrip("+").startswith("experiment=")), None)


def _losses(row: Mapping[str, Any]) -> str:
    if not row["dropped"]:
        return "nothing dropped"
    reasons = [each["reason"] for each in row["dropped"]]
    by_reason = ", ".join(f"{reason} {reasons.count(reason)}" for reason in sorted(set(reasons)))
    return f"{len(reasons)} dropped: {by_reason}"
