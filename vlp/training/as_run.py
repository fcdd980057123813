"""A run directory of weights that were not trained here, so that evaluation, search page and `vlp.load` take them.

config + .safetensors --init.start_from--> every parameter must be filled --> config.yaml, checkpoints/step-00000000
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from vlp import config
from vlp.training import checkpoint, init, prepare, redact, run_dir, state
from vlp.training.assemble import assemble, plain


def make_run(source: Path, overrides: Sequence[str]) -> tuple[Path, init.Report]:
    """Make the run of a config whose weights are those of a file, a checkpoint or another run.

    Parameters that `source` lacks are refused, unless `init.skip` names them: a score of random weights is none.

    Raises:
        config.ConfigError: the config is wrong, the weights do not fit or fill it, or the tokenizer is missing.
        StopRun: the directory is refused.
    """
    cfg = config.load([*overrides, f"init.run={source}"])
    directory = Path(cfg.paths.runs) / cfg.run.name
    torch.manual_seed(cfg.run.seed)
    system = assemble(cfg)
    module = nn.ModuleDict({"model": system.model, "objectives": nn.ModuleDict(system.objectives)})
    report = init.start_from(module, source, skip=cfg.init.skip)
    if report.missing:
        names = ", ".join(report.missing[:3])
        what = f"{source}: {len(report.missing)} tensors are missing, such as {names}"
        raise config.ConfigError([f"{what}; if no score needs them, name them in init.skip."])
    run_dir.create(directory)
    with run_dir.locked(directory):
        if checkpoint.all_steps(directory / "checkpoints"):
            raise config.ConfigError([f"{directory} holds a run already; choose another run.name."])
        prepare.tokenizer(cfg, directory, ())
        text = yaml.safe_dump(redact.tree(plain(cfg)), sort_keys=False, allow_unicode=True)
        run_dir.write_text(directory / "config.yaml", text)
        init.save(report, directory)
        tensors = {f"model/{name}": tensor for name, tensor in state.once(module).items()}
        facts = {"cursor": 0, "plan_version": None}  # no plan: it is never continued
        checkpoint.save(directory / "checkpoints", step=0, state=checkpoint.State(tensors, facts), keep=1)
        record = run_dir.Record(directory, writes=True)
        command = redact.text(" ".join(["python scripts/convert.py run", str(source), *overrides]))
        named = [word.partition("=")[2] for word in overrides if word.startswith("+experiment=")]
        facts = {"command": command, "experiment": named[0] if named else "", "parts": _parts(system.model)}
        record.update(name=cfg.run.name, status="imported", step=0, max_steps=0, **facts)
    return directory, report


def _parts(model: nn.Module) -> list[dict[str, Any]]:
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    return [{"name": n, "parameters": count, "trainable": 0, "dropped": False} for n, count in counts.items() if count]
