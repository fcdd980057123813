"""One run from its config to its report: the order of things, and the exit code of each way to end."""

import copy
import datetime
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from vlp import config, dist, sweep
from vlp.data import plan
from vlp.data.datamodule import VideoTextData
from vlp.data.fields import ShardsError
from vlp.data.shard_cache import ShardCache
from vlp.layers.block import blocks_of, checkpoint_blocks
from vlp.report.run import write_report
from vlp.training import (
    checkpoint,
    cluster,
    environment,
    optim,
    prepare,
    run_dir,
    state,
    streams,
    summary,
    sweep_run,
)
from vlp.training.assemble import System, assemble, plain
from vlp.training.callbacks import (
    Bar,
    Commit,
    Counting,
    DataBudgetError,
    Evaluation,
    MetricsLog,
    NonFiniteNotes,
    Saving,
    write_note,
)
from vlp.training.ema import Ema
from vlp.training.evaluation import Evaluator
from vlp.training.exits import Exit, StopRun, reported
from vlp.training.metrics_csv import MetricsCsv
from vlp.training.module import NonFiniteLossError, Pretraining, Recipe
from vlp.training.saver import Saver
from vlp.training.traces import refuse_silent_start


def main(overrides: Sequence[str]) -> int:
    """Train what the command line describes; print one line for each of the user's mistakes; return the exit code."""
    quiet()
    with streams.tolerant():
        if sweep.is_asked(overrides):
            return sweep_run.main(overrides)
        return reported(lambda: train(config.load(overrides)))


def quiet() -> None:
    """Keep the greetings and tips of libraries off the screen; their errors still show."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")


def train(cfg: DictConfig) -> int:
    """Run a checked config and return the exit code; every rank calls this.

    Raises:
        config.ConfigError: the parts do not fit together, or the data cannot serve the config.
        StopRun: the run directory is refused.
    """
    directory = Path(cfg.paths.runs) / cfg.run.name
    run_dir.create(directory)  # before anything that takes long
    torch.manual_seed(cfg.run.seed)  # the initial weights; every step seeds itself
    system = assemble(cfg)
    if cfg.trainer.checkpoint_activations:
        checkpoint_blocks(system.model)
    if cfg.trainer.compile:
        for block in blocks_of(system.model):
            block.compile()
    first = environment.is_first_process()
    with run_dir.locked(directory) if first else nullcontext():
        return Attempt(cfg, system, directory, first=first).run()


def recipe_of(cfg: DictConfig) -> Recipe:
    """Return how the weights move, by the config."""
    return Recipe(
        optimizer={key: cfg.optim[key] for key in ("lr", "betas", "eps", "weight_decay")},
        layer_decay=cfg.optim.layer_decay,
        lr_factors=plain(cfg.optim.lr_factors),
        schedule=config.build(cfg.schedule, "schedule"),
        max_steps=cfg.trainer.max_steps,
        clip_grad_norm=cfg.trainer.clip_grad_norm,
        nan_policy=cfg.trainer.nan_policy,
        max_skipped_steps=cfg.trainer.max_skipped_steps,
        seed=cfg.run.seed,
    )


class Attempt:
    """One attempt at a run: from a fresh start or from its newest checkpoint to its end, whatever that is."""

    def __init__(self, cfg: DictConfig, system: System, directory: Path, *, first: bool) -> None:
        self.cfg, self.system, self.directory, self.first = cfg, system, directory, first
        self.started = time.monotonic()
        self.plugins = cluster.plugins(cfg)
        if cfg.trainer.num_threads is not None:
            torch.set_num_threads(cfg.trainer.num_threads)
        run_dir.refuse_other_config(directory, plain(cfg))
        self.record = run_dir.Record(directory, writes=first)
        self.saver = Saver(
            directory / "checkpoints",
            keep=cfg.trainer.keep_checkpoints,
            background=cfg.trainer.checkpoint_async,
        )
        self.data = self._data()
        self.module = self._module()
        self.evaluator = Evaluator(
            system, plain(cfg.eval.tasks), self.data, batch_size=cfg.eval.batch_size, directory=directory
        )

    def run(self) -> int:
        """Train, evaluate and report; return the exit code."""
        self._restore()
        self._introduce()
        if self.module.cursor >= self.cfg.trainer.max_steps:
            return self._already_done()
        code, status, start = Exit.BUG, "failed", self.module.cursor
        try:
            stopped = self._fit()
            code, status = (Exit.PREEMPTED, "preempted") if stopped else (Exit.DONE, "finished")
        except StopRun as stop:
            code = self._explain(stop.code, stop)
        except NonFiniteLossError as error:
            code = self._explain(Exit.NON_FINITE, error)
            write_note(self.directory, str(error))
        except DataBudgetError as error:
            code = self._explain(Exit.DATA_BUDGET, error)
        except ValueError as error:
            if self.module.cursor == start and _refused_by_a_part(error):
                code = self._explain(Exit.BAD_CONFIG, error)
            else:
                traceback.print_exc()
        except Exception:  # a bug: the traceback is for us, the record is for the report
            traceback.print_exc()
        self._finish(code, status)
        return code

    def evaluate_only(self) -> dict[str, float]:
        """Score the newest checkpoint and rewrite the report.

        Raises:
            StopRun: there is no checkpoint.
        """
        self._restore()
        if not self.module.cursor:
            raise StopRun(Exit.NO_VALID_CHECKPOINT, f"{self.directory} holds no valid checkpoint; train the run first.")
        scores = self.evaluator(self.module)
        write_report(self.directory)
        return scores

    def _data(self) -> VideoTextData:
        cfg = self.cfg
        try:
            sources = prepare.sources(cfg)
        except ShardsError as error:
            raise StopRun(Exit.DATA_BUDGET, str(error)) from None
        weights = {name: float(plain(cfg.data.sources[name]).get("weight", 1.0)) for name in sources}
        folder, max_bytes = cfg.data.cache_dir, int(cfg.data.cache_gib * 2**30)
        try:
            return VideoTextData(
                sources=sources,
                weights=weights,
                batch_size=cfg.data.batch_size,
                accumulate=cfg.trainer.accumulate,
                num_lanes=cfg.data.num_lanes,
                window_shards=cfg.data.window_shards,
                bucket_steps=cfg.data.bucket_steps,
                balance=cfg.data.balance,
                num_workers=cfg.data.num_workers,
                seed=cfg.run.seed,
                sampling_train=config.build(cfg.clip.sampling_train, "clip.sampling_train"),
                sampling_test=config.build(cfg.clip.sampling_test, "clip.sampling_test"),
                transforms_train=[config.build(node, "clip.transforms_train") for node in cfg.clip.transforms_train],
                transforms_test=[config.build(node, "clip.transforms_test") for node in cfg.clip.transforms_test],
                short_side=cfg.clip.short_side,
                more_clips=cfg.clip.more_clips,
                texts=config.build(cfg.texts, "texts"),
                make_tokenizer=lambda captions: prepare.tokenizer(cfg, self.directory, captions),
                index_dir=cfg.data.index_dir,
                cache=ShardCache(folder, max_bytes=max_bytes) if folder else None,
            )
        except ShardsError as error:
            raise StopRun(Exit.DATA_BUDGET, str(error)) from None
        except ValueError as error:
            raise config.ConfigError([str(error)]) from None

    def _module(self) -> Pretraining:
        cfg, system = self.cfg, self.system
        recipe = recipe_of(cfg)
        module = Pretraining(
            model=system.model,
            objectives=system.objectives,
            wirings=system.wirings,
            weights=system.weights,
            graph=system.graph,
            recipe=recipe,
            loader=self._loader,
        )
        try:
            optim.freeze(module, cfg.optim.freeze)
            optim.settings(module, layer_decay=recipe.layer_decay, lr_factors=recipe.lr_factors)
        except ValueError as error:
            raise config.ConfigError([str(error)]) from None
        if cfg.optim.ema_decay is not None:
            module.ema = Ema(module, decay=cfg.optim.ema_decay)
        prepare.fit_parts(module, self.data, self.directory, seed=cfg.run.seed)
        return module

    def _loader(self, start_step: int) -> Any:
        return self.data.train_loader(
            start_step=start_step,
            num_steps=self.cfg.trainer.max_steps - start_step,
            rank=dist.rank(),
            world_size=dist.world_size(),
        )

    def _restore(self) -> None:
        """Continue from the newest valid checkpoint, or refuse rather than start over silently."""
        root = self.directory / "checkpoints"
        stored, refused = checkpoint.newest_valid(root)
        for line in refused:
            print(f"checkpoint refused: {line}", file=sys.stderr)
        if stored is None:
            refuse_silent_start(self.directory, self.record, refused)
            return
        if not self.cfg.run.resume:
            message = f"run '{self.cfg.run.name}' exists; set run.resume=true, or choose another run.name."
            raise StopRun(Exit.RESUME_REFUSED, message)
        facts, path = stored.facts, stored.path
        if refused:
            print(f"continuing from {path.name}; the steps behind it are trained again", file=sys.stderr)
        if facts["plan_version"] != plan.VERSION:
            message = f"{path.name} counts steps of another order of the data; finish it with the vlp that made it."
            raise StopRun(Exit.RESUME_REFUSED, message)
        if facts["fingerprints"] != self.data.fingerprints():
            message = f"the data of run '{self.cfg.run.name}' changed since {path.name}; choose another run.name."
            raise StopRun(Exit.RESUME_REFUSED, message)
        optimizer_tensors = state.restore(self.module, self.module.ema, stored)
        self.module.resume(facts["cursor"], facts["num_skipped"], optimizer_tensors)

    def _introduce(self) -> None:
        """Write what is known before the first step, and print it."""
        if not self.first:
            return
        try:
            self._write_facts()
        except OSError as error:
            message = f"{self.directory} cannot be written ({error.strerror}); make room, or set paths.runs."
            raise StopRun(Exit.CANNOT_CREATE, message) from None
        print(summary.text(self.cfg, self.system, self.module, self.record.values, self.evaluator.skipped), flush=True)

    def _write_facts(self) -> None:
        attempts = self.record.values.get("attempts", 0) + 1
        self.record.update(
            **summary.facts(self.cfg, self.system, self.module, self.data), attempts=attempts, **cluster.facts()
        )
        run_dir.write_json(self.directory / "graph.json", summary.graph(self.system, self.module))
        text = OmegaConf.to_yaml(self.cfg, resolve=True)
        run_dir.write_text(self.directory / "config.yaml", text)

    def _fit(self) -> bool:
        """Train to the last step or until told to stop; return whether it was told to."""
        cfg = self.cfg
        csv = MetricsCsv(self.directory / "metrics.csv", after_step=self.module.cursor) if self.first else None
        log = MetricsLog(csv, every=cfg.trainer.log_every)
        commit = Commit(self._save, every=cfg.trainer.checkpoint_every, stop_after=cfg.run.stop_after)
        self.counting = Counting(
            list(self.data.sources),
            budget=cfg.trainer.bad_sample_budget,
            explain=self.data.explain,
            seen=self.record.values.get("seen", {}),
        )
        evaluation = Evaluation(self.evaluator, every=cfg.eval.every, log=log)
        callbacks: list[Any] = [self.counting, log, NonFiniteNotes(self.directory), evaluation, commit]
        callbacks.append(Saving(self.saver, log.write))
        if cfg.trainer.progress_bar and self.first:
            callbacks.append(Bar(total=cfg.trainer.max_steps))
        trainer = self._trainer(callbacks)
        trainer.fit(self.module)
        if not commit.stopped:
            log.write(trainer, self.module.cursor, self.evaluator(self.module))
        return commit.stopped

    def _trainer(self, callbacks: list[Any]) -> pl.Trainer:
        section = self.cfg.trainer
        return pl.Trainer(
            accelerator="auto",
            devices=section.devices,
            num_nodes=section.num_nodes,
            strategy=section.strategy,
            precision=section.precision,
            max_epochs=1,
            logger=[config.build(node, "logger") for node in self.cfg.logger.values() if node and self.first],
            callbacks=callbacks,
            plugins=self.plugins,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )

    def _save(self, module: Pretraining) -> None:
        """Commit a checkpoint; all ranks write their share."""
        facts = {
            "cursor": module.cursor,
            "num_skipped": module.num_skipped,
            "fingerprints": self.data.fingerprints(),
            "plan_version": plan.VERSION,
            "config": plain(self.cfg),
            "seed": self.cfg.run.seed,
        }
        optimizer: Any = module.optimizers(use_pl_optimizer=False)
        tensors = state.collect(module, optimizer, module.ema, rank=dist.rank(), world_size=dist.world_size())
        note = {"step": module.cursor, "committed": True, "seen": copy.deepcopy(self.counting.seen)}
        saved = checkpoint.State(tensors, facts)
        self.saver.save(module.cursor, saved, then=lambda: self.record.update(**note))

    def _already_done(self) -> int:
        print(
            f"Run '{self.cfg.run.name}' has already reached step {self.module.cursor}. To train on, raise "
            f"trainer.max_steps; for a new run, choose another run.name.\nReport: {write_report(self.directory)}"
        )
        return Exit.DONE

    def _explain(self, code: Exit, error: Exception) -> Exit:
        print(f"stopped: {error.message if isinstance(error, StopRun) else error}", file=sys.stderr)
        return code

    def _finish(self, code: int, status: str) -> None:
        """Record the end and write the report, for failed runs too."""
        self.saver.close()
        if not self.first:
            return
        seconds = self.record.values.get("seconds", 0.0) + time.monotonic() - self.started
        sources = summary.sources(self.data, self.counting) if hasattr(self, "counting") else []
        self.record.update(
            status=status,
            exit_code=int(code),
            step=self.module.cursor,
            seconds=seconds,
            seen=self.counting.seen,
            sources=sources,
            ended=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        try:
            report = write_report(self.directory)
        except OSError as error:
            print(f"warning: the report of {self.directory} cannot be written ({error.strerror}).", file=sys.stderr)
        else:
            print(summary.ending(self.directory, status, self.module.cursor, report))


def _refused_by_a_part(error: ValueError) -> bool:
    """Tell whether a part of ours raised it: only the first batch shows that a pool finds no class token."""
    *_, innermost = traceback.extract_tb(error.__traceback__)
    return Path(innermost.filename).is_relative_to(Path(__file__).parents[1])
