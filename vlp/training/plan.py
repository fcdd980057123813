"""What a config would train: parts, parameters, and the plan of its step. No data is opened."""

import sys
from collections.abc import Sequence

from torch import nn

from vlp import config
from vlp.forward import describe
from vlp.training import optim
from vlp.training.assemble import assemble
from vlp.training.exits import Exit


def main(overrides: Sequence[str]) -> int:
    """Print the plan of the command line's config; return the exit code."""
    try:
        cfg = config.load(overrides)
        system = assemble(cfg)
    except config.ConfigError as error:
        print("\n".join(f"config: {line}" for line in error.messages), file=sys.stderr)
        return Exit.BAD_CONFIG
    module = nn.ModuleDict({"model": system.model, "objectives": nn.ModuleDict(system.objectives)})
    try:
        optim.freeze(module, cfg.optim.freeze)
    except ValueError as error:
        print(f"config: {error}", file=sys.stderr)
        return Exit.BAD_CONFIG
    owners = {**dict(system.model.named_children()), **system.objectives}
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in owners.items()}
    print(optim.audit(module))
    print(describe(system.graph, system.wirings, parameters))
    return Exit.DONE
