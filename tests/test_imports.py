"""The import table: which part of vlp may know which other. Read from the source, also inside functions."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "vlp"
FILES = sorted(ROOT.rglob("*.py"))

# Part (a file or folder of vlp) -> the parts that it may import, itself aside.
TABLE = {
    "__init__": {"inference"},
    "types": set(),
    "ops": {"types"},
    "dist": set(),
    "hints": set(),
    "process": set(),
    "schema": {"hints"},
    "config": {"hints", "schema"},
    "sweep": {"config"},
    "stages": {"config", "sweep"},
    "forward": {"types", "ops"},
    "views": {"types", "ops", "dist"},
    "layers": {"types", "ops"},
    "encoders": {"types", "ops", "layers"},
    "connectors": {"types", "ops", "layers"},
    "fusion": {"types", "ops", "layers"},
    "models": {"types", "ops", "layers", "encoders", "connectors", "fusion", "forward"},
    "objectives": {"types", "ops", "dist", "layers"},
    "data": {"types"},
    "eval": {"types", "ops", "dist", "models", "forward"},
    "report": {"types", "process"},
}
TABLE["training"] = TABLE.keys() - {"__init__", "inference"}
TABLE["inference"] = TABLE.keys() - {"__init__", "inference"}
TABLE["report.search"] = {"inference", "eval", "report"}  # a program of its own: nothing imports it
PROGRAMS = {"vlp.report.search": "report.search"}
TABLE["planning"] = {"types", "config", "stages", "layers", "forward", "objectives", "training"}

# Packages from outside that only these parts may import: each is heavy, or opens what the rest must not.
ONLY_IN = {
    "pytorch_lightning": {"training"},
    "lightning_fabric": {"training"},
    "hydra": {"config", "sweep"},
    "omegaconf": {"config", "training", "inference", "planning"},
    "timm": {"encoders"},
    "transformers": {"encoders", "data"},
    "av": {"data", "eval", "report", "training"},
    "webdataset": {"data"},
    "deepspeed": {"training"},
    "wandb": {"training"},
}


def part_of(module: str) -> str:
    """Return "data" for "vlp.data.tar", "__init__" for "vlp" itself, and a program's own name."""
    return PROGRAMS.get(module) or [*module.split("."), "__init__"][1]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)


@functools.cache
def imports(path: Path) -> list[tuple[int, str]]:
    """Line and full name of everything that a file imports, relative imports too; `if TYPE_CHECKING` counts."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name_of(path).split(".")[: -node.level] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def test_every_part_of_vlp_is_in_the_table():
    assert {part_of(name_of(path)) for path in FILES} <= TABLE.keys()


@pytest.mark.parametrize("part", TABLE)
def test_a_part_imports_only_what_the_table_allows(part):
    files = [path for path in FILES if part_of(name_of(path)) == part]
    wrong = [
        f"{path.relative_to(ROOT.parent)}:{line} imports {name}"
        for path in files
        for line, name in imports(path)
        if name.split(".")[0] == "vlp" and part_of(name) not in TABLE[part] | {part}
    ]
    assert not wrong, f"{part} may import {sorted(TABLE[part]) or 'nothing of vlp'}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("package", ONLY_IN)
def test_heavy_packages_are_imported_in_their_parts_only(package):
    wrong = [
        f"{path.relative_to(ROOT.parent)}:{line} imports {name}"
        for path in FILES
        for line, name in imports(path)
        if name.split(".")[0] == package and part_of(name_of(path)) not in ONLY_IN[package]
    ]
    assert not wrong, "\n".join(wrong)


def test_recipes_know_data_only_and_nothing_of_vlp_knows_them():
    recipes = sorted((ROOT.parent / "data_recipes").glob("*.py"))
    wrong = [name for path in FILES for _, name in imports(path) if name.split(".")[0] == "data_recipes"]
    known = {part_of(name) for path in recipes for _, name in imports(path) if name.split(".")[0] == "vlp"}
    assert not wrong and known <= {"data", "types"}


def test_the_table_has_no_circles():
    def reach(part: str, path: tuple[str, ...] = ()) -> None:
        assert part not in path, " <- ".join([*path, part])
        for other in TABLE[part]:
            reach(other, (*path, part))

    for part in TABLE:
        reach(part)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import vlp.eval.runner", "vlp.eval.runner"),
        ("from vlp import dist as d", "vlp.dist"),
        ("def f():\n    from vlp.report import run", "vlp.report.run"),
        ("if TYPE_CHECKING:\n    from vlp.training.ema import Ema", "vlp.training.ema.Ema"),
        ("from ..eval import runner", "vlp.eval.runner"),
        ("from .rng import mix", "vlp.data.rng.mix"),
    ],
)
def test_every_way_to_import_is_seen(source, name, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path / "vlp")
    path = tmp_path / "vlp" / "data" / "tar.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert [found for _, found in imports(path)] == [name]
