"""Score a trained run: on its own tasks, on one of them, or on a benchmark of conf/task.

python evaluate.py run=runs/NAME
python evaluate.py run=runs/NAME task=msrvtt_1ka 'data.sources.msrvtt_1ka.test=[DIR/test-*.tar]'
python evaluate.py run=runs/NAME task=kinetics400 views=4x3
torchrun --nproc-per-node 4 evaluate.py run=runs/NAME task=didemo
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from vlp import config, dist
from vlp.data.fields import ShardsError
from vlp.data.shard_cache import ShardCache
from vlp.data.splits import EvaluationSplits
from vlp.data.storage import OutageError
from vlp.eval.runner import StorageLostError
from vlp.report.run import write_report
from vlp.training import checkpoint, environment, prepare, run_dir, state, stored_config
from vlp.training.assemble import System, assemble
from vlp.training.evaluation import Evaluator
from vlp.training.exits import Exit, StopRun, reported
from vlp.training.launch import quiet

CHANGEABLE = ("eval.", "data.num_workers=", "data.videos=", "data.captions=", "paths.", "trainer.num_threads=")
CHANGEABLE += ("data.decode_timeout_s=", "data.outage_s=", "data.worker_memory_gib=")
CHANGEABLE += ("data.index_dir=", "data.cache_dir=", "data.cache_gib=", "data.sources.", "clip.sampling_test.")
TASKS = config.CONF / "task"
_TASK_KEYS = {"about", "num_clips", "sources", "tasks"}


class Benchmark(NamedTuple):
    """A file of conf/task: which shards, and what is asked of them."""

    sources: dict[str, Any]
    tasks: dict[str, Any]
    num_clips: int | None  # of the published split; another number is marked in the protocol card


class Asked(NamedTuple):
    """What the command line asks for."""

    run: Path
    task: str | None
    views: str | None  # of each clip, "CLIPSxCROPS"
    overrides: list[str]


class Trained(NamedTuple):
    """A run with its newest weights, the averaged ones where there are any."""

    system: System
    module: nn.Module  # model and objectives
    step: int
    subject: dict[str, Any]  # of a protocol card


def main(arguments: Sequence[str]) -> int:
    """Evaluate the run that the command line names; return the exit code."""
    quiet()
    with _processes():
        return reported(lambda: _evaluate(_parse(arguments)))


def trained(cfg: DictConfig, run: Path) -> Trained:
    """Load the newest valid checkpoint of a run.

    Raises:
        StopRun: there is none.
        config.ConfigError: it does not fit the config.
    """
    stored, refused = checkpoint.newest_valid(run / "checkpoints")
    for line in refused:
        print(f"checkpoint refused: {line}", file=sys.stderr)
    if stored is None:
        raise StopRun(Exit.NO_VALID_CHECKPOINT, f"{run} holds no valid checkpoint; train the run first.")
    system, average = assemble(cfg), stored.under("ema")
    module = nn.ModuleDict({"model": system.model, "objectives": nn.ModuleDict(system.objectives)})
    try:
        state.fill(module, stored, averaged=True)
    except ValueError as error:
        raise config.ConfigError([str(error)]) from None
    digest = hashlib.sha256((stored.path / "manifest.json").read_bytes()).hexdigest()
    subject = {"checkpoint": digest, "weights": "averaged" if average else "last"}
    return Trained(system, module.eval(), int(stored.facts["cursor"]), subject)


def benchmark(name: str) -> Benchmark:
    """Read conf/task/NAME.yaml.

    Raises:
        config.ConfigError: a key that it must not have, or lacks.
    """
    content = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not {"sources", "tasks"} <= content.keys() <= _TASK_KEYS:
        raise config.ConfigError(
            [f"conf/task/{name}.yaml: must hold sources and tasks, and else only about, num_clips."]
        )
    return Benchmark(content["sources"], content["tasks"], content.get("num_clips"))


def benchmarks() -> list[str]:
    """Return the names of all benchmarks."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def load_config(run: Path, task: str | None, overrides: Sequence[str]) -> tuple[DictConfig, int | None]:
    """Return the run's config with the task's sources and tasks in it, and how many clips the task should have.

    Raises:
        config.ConfigError: everything that is wrong with it.
    """
    cfg = stored_config.read(run)
    num_clips = None
    if task is not None and task in cfg.eval.tasks:
        cfg.eval.tasks = {task: cfg.eval.tasks[task]}
    elif task is not None and task in benchmarks():
        sources, tasks, num_clips = benchmark(task)
        cfg.data.sources, cfg.eval.tasks = sources, tasks
    elif task is not None:
        known = f"the run has {', '.join(cfg.eval.tasks)}; conf/task has {', '.join(benchmarks())}."
        raise config.ConfigError([f"task={task}: {known}"])
    OmegaConf.set_struct(cfg, True)
    try:
        cfg.merge_with_dotlist(list(overrides))
    except OmegaConfBaseException as error:
        raise config.ConfigError([str(error).splitlines()[0]]) from None
    messages = config.check(cfg)
    if messages:
        raise config.ConfigError(messages)
    return cfg, num_clips


def splits(cfg: DictConfig, run: Path, *, views: str | None = None) -> EvaluationSplits:
    """Open the test splits of a config, each clip seen once or in several `views`. Raises config.ConfigError."""
    folder = cfg.data.cache_dir
    try:
        return EvaluationSplits(
            sources=prepare.sources(cfg),
            tokenizer=prepare.tokenizer(cfg, run, ()),
            sampling=config.build(cfg.clip.sampling_test, "clip.sampling_test"),
            transforms=[config.build(node, "clip.transforms_test") for node in cfg.clip.transforms_test],
            short_side=cfg.clip.short_side,
            decoder=config.build(cfg.clip.decoder, "clip.decoder"),
            num_workers=cfg.data.num_workers,
            decode_timeout_s=cfg.data.decode_timeout_s,
            outage_s=cfg.data.outage_s,
            worker_memory_gib=cfg.data.worker_memory_gib,
            index_dir=cfg.data.index_dir,
            cache=ShardCache(folder, max_bytes=int(cfg.data.cache_gib * 2**30)) if folder else None,
            views=views,
        )
    except config.ConfigError:
        raise
    except ShardsError as error:
        raise StopRun(Exit.DATA_BUDGET, str(error)) from None
    except OutageError as error:
        raise StopRun(Exit.STORAGE, f"{error}; run the same command again when it is back.") from None
    except ValueError as error:
        raise config.ConfigError([str(error)]) from None


def _parse(arguments: Sequence[str]) -> Asked:
    own = ("run=", "task=", "views=")
    named = dict(word.split("=", 1) for word in arguments if word.startswith(own))
    overrides = [word for word in arguments if not word.startswith(own)]
    messages = [
        f"{word}: an evaluation cannot change this; allowed are {', '.join(CHANGEABLE)}"
        for word in overrides
        if not word.startswith(CHANGEABLE) or "=" not in word
    ]
    if "run" not in named:
        messages.append("run: name the run's directory, for example run=runs/demo.")
    elif not (Path(named["run"]) / "config.yaml").exists():
        messages.append(f"run={named['run']}: there is no run here (no config.yaml).")
    if messages:
        raise config.ConfigError(messages)
    return Asked(Path(named["run"]), named.get("task"), named.get("views"), overrides)


def _evaluate(asked: Asked) -> int:
    run, views = asked.run, asked.views
    cfg, num_clips = load_config(run, asked.task, asked.overrides)
    if cfg.trainer.num_threads is not None:
        torch.set_num_threads(cfg.trainer.num_threads)
    first = environment.is_first_process()
    with run_dir.locked(run) if first else nullcontext():
        found = trained(cfg, run)
        data = splits(cfg, run, views=views)
        device = _device()
        found.module.to(device)
        evaluator = Evaluator(found.system, cfg, data, directory=run, subject=found.subject, views=views)
        evaluator.marks = _marks(data, num_clips)
        if not evaluator.tasks:
            raise config.ConfigError([f"task {name}: left out, {why}" for name, why in evaluator.skipped.items()])
        try:
            scores = evaluator.evaluate(found.system.model, step=found.step, device=device)
        except StorageLostError as error:
            raise StopRun(Exit.STORAGE, f"{error}; run the same command again when it is back.") from None
        if first:
            write_report(run)
    if dist.rank() == 0:
        _show(scores, {**evaluator.skipped, **evaluator.marks})
    return Exit.DONE


def _marks(data: EvaluationSplits, num_clips: int | None) -> dict[str, str]:
    """Return what sets a score apart from the published protocol: clips that are gone are a number, never silent."""
    return {
        name: f"{len(data.reader(name, 'test'))} clips, and the published split has {num_clips}"
        for name in data.sources
        if num_clips is not None and len(data.reader(name, "test")) != num_clips
    }


def _show(scores: Mapping[str, float], notes: Mapping[str, str]) -> None:
    for name, value in scores.items():
        print(f"{name:<40} {value:8.2f}")
    for name, why in notes.items():
        print(f"note, {name}: {why}")


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def _processes() -> Iterator[None]:
    """Let the processes that torchrun started know each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch_dist.is_initialized():
        yield
        return
    torch_dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(_device())
    try:
        yield
    finally:
        torch_dist.destroy_process_group()
