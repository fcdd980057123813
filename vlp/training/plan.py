"""What a config would train: parts, parameters, and the plan of its step. No data is opened."""

from collections.abc import Sequence

from torch import nn

from vlp import config
from vlp.forward import describe
from vlp.training import optim
from vlp.training.assemble import assemble
from vlp.training.exits import Exit, reported


def main(overrides: Sequence[str]) -> int:
    """Print the plan of the command line's config; return the exit code."""
    return reported(lambda: _show(overrides))


def _show(overrides: Sequence[str]) -> int:
    cfg = config.load(overrides)
    system = assemble(cfg)
    module = nn.ModuleDict({"model": system.model, "objectives": nn.ModuleDict(system.objectives)})
    try:
        optim.freeze(module, cfg.optim.freeze)
    except ValueError as error:
        raise config.ConfigError([str(error)]) from None
    owners = {**dict(system.model.named_children()), **system.objectives}
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in owners.items()}
    print(optim.audit(module))
    print(describe(system.graph, system.wirings, parameters))
    return Exit.DONE
