"""One hash of each experiment's resolved config, so that a changed default shows which experiments it changes.

`python -m vlp.training.lock` compares with conf/experiments.lock (exit 1 if they differ); `--write` renews it.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from vlp import config


def experiments(conf: Path = config.CONF) -> list[str]:
    """Return the names of all experiments, folders included ("violet", "ablations/no_rolling")."""
    root = conf / "experiment"
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def digest(name: str) -> str:
    """Return the sha256 of an experiment's resolved config; values that the user must give stay `???`."""
    cfg = config.load([f"+experiment={name}"])
    return hashlib.sha256(OmegaConf.to_yaml(cfg, resolve=True, sort_keys=True).encode()).hexdigest()


def current() -> str:
    """Return what conf/experiments.lock should hold."""
    return "".join(f"{name} {digest(name)}\n" for name in experiments())


def main(arguments: Sequence[str]) -> int:
    """Compare or renew the lock; return the exit code."""
    path = config.CONF / "experiments.lock"
    new = current()
    if "--write" in arguments:
        path.write_text(new, encoding="utf-8")
        return 0
    old = set(path.read_text(encoding="utf-8").splitlines())
    changed = sorted({line.split()[0] for line in old ^ set(new.splitlines())})
    for name in changed:
        print(f"{name}: its resolved config changed; look at why, then run python -m vlp.training.lock --write")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
