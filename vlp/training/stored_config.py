"""The config that a run kept, made whole where the vlp that wrote it knew fewer keys than this one."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from vlp import config, schema


def read(run: Path) -> DictConfig:
    """Return the config of a run; keys of sections that are missing get their defaults. It is not checked.

    Raises:
        OSError, yaml.YAMLError: it cannot be read.
    """
    cfg = DictConfig(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    missing = list(_missing(cfg, schema.Root, ""))
    known = config.load([]) if missing else cfg
    for path in missing:
        OmegaConf.update(cfg, path, OmegaConf.select(known, path), force_add=True)
    return cfg


def _missing(section: Any, kind: Any, path: str) -> Iterator[str]:
    """Yield the keys of the schema that a section, and sections inside it, lack."""
    for field in dataclasses.fields(kind) if isinstance(section, DictConfig) else ():
        here = f"{path}.{field.name}".lstrip(".")
        if field.name not in section:
            yield here
        elif dataclasses.is_dataclass(field.type):
            yield from _missing(section[field.name], field.type, here)
