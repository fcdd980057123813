"""One run from its config to its report: the order of things, and the exit code of each way to end."""

import copy
import datetime
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from omegaconf import DictConfig
from pytorch_lightning.strategies.launchers import subprocess_script

from vlp import config, dist, stages, sweep
from vlp.data import plan
from vlp.data.datamodule import VideoTextData
from vlp.data.fields import ShardsError
from vlp.data.shard_cache import ShardCache
from vlp.data.storage import OutageError
from vlp.layers.block import blocks_of, checkpoint_blocks
from vlp.report.run import write_report
from vlp.training import (
    checkpoint,
    cluster,
    endings,
    environment,
    history,
    init,
    optim,
    prepare,
    redact,
    run_dir,
    signals,
    stages_run,
    state,
    streams,
    summary,
    sweep_run,
)
from vlp.training.assemble import System, assemble, plain
from vlp.training.callbacks import Bar, Commit, Counting, Endings, Evaluation, Marks, MetricsLog, Rehearsal, Saving
from vlp.training.evaluation import Evaluator
from vlp.training.exits import Exit, StopRun, reported
from vlp.training.gate import Gate
from vlp.training.guard import Guard, Limits
from vlp.training.lease import Lease
from vlp.training.ledger import Ledger
from vlp.training.metrics_csv import MetricsCsv
from vlp.training.module import Pretraining, Recipe
from vlp.training.precision import PRECISIONS
from vlp.training.saver import Saver
from vlp.training.stopping import Wish
from vlp.training.strategy import STRATEGIES, Needs
from vlp.training.traces import refuse_silent_start
from vlp.training.trackers import Trackers, public_facts
from vlp.training.watchdog import Ending, Watchdog

_AGAIN = "run the same command again when it is back"
_COLLECTIVE_TIMEOUT_S = 1800.0  # of gloo and NCCL: they stand behind the watchdog, and evaluations may be uneven


def main(overrides: Sequence[str]) -> int:
    """Train what the command line describes; print one line for each of the user's mistakes; return the exit code."""
    if sweep.is_asked(overrides):
        quiet()
        with streams.tolerant():
            return sweep_run.main(overrides)
    if stages.is_asked(overrides):
        return reported(lambda: stages_run.main(overrides, run))
    return run(lambda: config.load(overrides))


def run(load: Callable[[], DictConfig]) -> int:
    """Train the config that is loaded inside; return the exit code."""
    quiet()
    with streams.tolerant(), signals.listening():
        return reported(lambda: train(load()))


def quiet() -> None:
    """Keep the greetings and tips of libraries off the screen; their errors still show."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    # Lightning would kill rank 0 before it can say why another rank has ended.
    subprocess_script._launch_process_observer = lambda processes: None  # pyright: ignore[reportPrivateImportUsage]


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
    ranks = environment.ranks(devices=cfg.trainer.devices, num_nodes=cfg.trainer.num_nodes)
    _refuse_layout(cfg, ranks.world_size)
    first = environment.is_first_process()
    with run_dir.locked(directory) if first else nullcontext() as lease:
        return Attempt(cfg, system, directory, first=first, ranks=ranks, lease=lease).run()


def _refuse_layout(cfg: DictConfig, world_size: int) -> None:
    """Find before any group forms that a number of ranks cannot share the batch; the message lists those that can."""
    data = cfg.data
    try:
        plan.check_layout(
            global_batch=data.batch_size,
            num_lanes=data.num_lanes,
            world_size=world_size,
            accumulate=cfg.trainer.accumulate,
        )
    except ValueError as error:
        raise config.ConfigError([str(error)]) from None


def recipe_of(cfg: DictConfig) -> Recipe:
    """Return how the weights move, by the config."""
    return Recipe(
        optimizer={key: cfg.optim[key] for key in ("lr", "betas", "eps", "weight_decay")},
        layer_decay=cfg.optim.layer_decay,
        lr_factors=plain(cfg.optim.lr_factors),
        schedule=config.build(cfg.schedule, "schedule"),
        max_steps=cfg.trainer.max_steps,
        clip_grad_norm=cfg.trainer.clip_grad_norm,
        precision=PRECISIONS[cfg.trainer.precision],
        ema_decay=cfg.optim.ema_decay,
        seed=cfg.run.seed,
    )


class Attempt:
    """One attempt at a run: from a fresh start or from its newest checkpoint to its end, whatever that is."""

    def __init__(
        self,
        cfg: DictConfig,
        system: System,
        directory: Path,
        *,
        first: bool,
        ranks: environment.Ranks,
        lease: Lease | None,
    ) -> None:
        self.cfg, self.system, self.directory, self.first = cfg, system, directory, first
        self.plain = redact.tree(plain(cfg))  # what may be written down
        self.ranks, self.lease = ranks, lease
        self.started = time.monotonic()
        self.plugins = cluster.plugins(cfg)
        if cfg.trainer.num_threads is not None:
            torch.set_num_threads(cfg.trainer.num_threads)
        self.record = run_dir.Record(directory, writes=first)
        self.saver = Saver(
            directory / "checkpoints",
            keep=cfg.trainer.keep_checkpoints,
            background=cfg.trainer.checkpoint_async,
            refuse_stranger=lease.check if lease else lambda: None,
        )
        self.watchdog = Watchdog(
            directory,
            session=ranks.session,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout_s=cfg.trainer.timeout_s,
            at_end=self._end_by_watchdog,
            launcher=ranks.launcher,
        )
        self.code: Exit | None = None  # once it is known why this attempt ends early
        self.wish = Wish(steps=cfg.run.stop_after, seconds=self._seconds_left())

    def run(self) -> int:
        """Train, evaluate and report; return the exit code."""
        with self.watchdog:
            try:
                self._begin()
            except (config.ConfigError, StopRun) as error:
                self._tell(error, quietly=True)
                raise
            if self._is_done():
                return self._already_done()
            self._introduce()
            code, status = Exit.BUG, "failed"
            try:
                stopped = self._fit()
                code, status = (Exit.PREEMPTED, "preempted") if stopped else (Exit.DONE, "finished")
            except Exception as error:  # whatever it was, the record and the report say so
                self._tell(error)
                assert self.code is not None
                code, status = self.code, "preempted" if self.code == Exit.PREEMPTED else "failed"
            self._finish(code, status)
            return code

    def _begin(self) -> None:
        """Open everything and continue from the newest checkpoint; a signal stops it at the next line."""
        if self.first:
            run_dir.clear_sessions(self.directory, keep=self.ranks.session)
            history.refuse_crash_loop(self.record.values, self.directory, hold_after=self.cfg.run.hold_after)
            for line in run_dir.changes(self.directory, self.plain, allow=list(self.cfg.run.allow)):
                print(line, flush=True)
        for do in (self._open, self._restore, lambda: None):
            if (why := self.wish()) is not None:
                raise StopRun(Exit.PREEMPTED, f"stopped {why} before the first step of this attempt.")
            do()

    def _open(self) -> None:
        try:
            self.data = self._data()
            self.module = self._module()
        except OutageError as error:  # nothing is lost by ending, and a wrong host looks like this too
            message = f"{error}; nothing was trained in this attempt, {_AGAIN}."
            raise StopRun(Exit.STORAGE, message) from None
        self.evaluator = Evaluator(self.system, self.cfg, self.data, directory=self.directory)
        self.evaluator.is_stopping = self.wish

    def _is_done(self) -> bool:
        """A run that was stopped in its last evaluation is not done."""
        reached = self.module.cursor >= self.cfg.trainer.max_steps
        return reached and self.record.values.get("status") == "finished"

    def _seconds_left(self) -> float | None:
        """Return how long this job may still run, by the config and by the scheduler."""
        end = environment.end_of_job()
        known = [self.cfg.trainer.max_time_s, None if end is None else end - time.time()]
        return min((seconds for seconds in known if seconds is not None), default=None)

    def _data(self) -> VideoTextData:
        try:
            return self._data_of(prepare.sources(self.cfg))
        except ShardsError as error:
            raise StopRun(Exit.DATA_BUDGET, str(error)) from None

    def _data_of(self, sources: dict[str, Any]) -> VideoTextData:
        cfg = self.cfg
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
                decode_timeout_s=cfg.data.decode_timeout_s,
                outage_s=cfg.data.outage_s,
                worker_memory_gib=cfg.data.worker_memory_gib,
                seed=cfg.run.seed,
                sampling_train=config.build(cfg.clip.sampling_train, "clip.sampling_train"),
                sampling_test=config.build(cfg.clip.sampling_test, "clip.sampling_test"),
                transforms_train=[config.build(node, "clip.transforms_train") for node in cfg.clip.transforms_train],
                transforms_test=[config.build(node, "clip.transforms_test") for node in cfg.clip.transforms_test],
                short_side=cfg.clip.short_side,
                decoder=config.build(cfg.clip.decoder, "clip.decoder"),
                more_clips=cfg.clip.more_clips,
                texts=config.build(cfg.texts, "texts"),
                make_tokenizer=lambda captions: prepare.tokenizer(cfg, self.directory, captions),
                index_dir=cfg.data.index_dir,
                cache=ShardCache(folder, max_bytes=max_bytes) if folder else None,
            )
        except ShardsError:
            raise
        except ValueError as error:
            raise config.ConfigError([str(error)]) from None

    def _module(self) -> Pretraining:
        cfg, system = self.cfg, self.system
        recipe = recipe_of(cfg)
        module = Pretraining(system, recipe=recipe, loader=self._loader, guard=self._guard())
        module.mark = self.watchdog.mark
        self._start_from(module)
        try:
            optim.freeze(module, cfg.optim.freeze)
            optim.settings(module, layer_decay=recipe.layer_decay, lr_factors=recipe.lr_factors)
        except ValueError as error:
            raise config.ConfigError([str(error)]) from None
        prepare.fit_parts(module, self.data, self.directory, seed=cfg.run.seed)
        recipe.precision.convert(module)  # before any strategy takes hold of the parameters
        return module

    def _guard(self) -> Guard:
        def name_sample(source: int, sample: int) -> dict[str, str]:
            reader = self.data.reader(list(self.data.sources)[source], "train")
            return {"key": reader.key_of(sample), "shard": redact.text(reader.shard_of(sample))}

        limits = Limits(**{key: self.cfg.trainer[key] for key in Limits._fields})
        path = self.directory / "bad_steps.jsonl"
        return Guard(limits, path=path, rewind=self._rewind, name_sample=name_sample)

    def _rewind(self) -> Mapping[str, Any] | None:
        """Put weights, optimizer and average back to the newest checkpoint."""
        self.saver.settle()
        module = self.module
        stored, _ = checkpoint.newest_valid(self.directory / "checkpoints")
        if stored is None or module.update is None:
            return None
        state.restore(module, module.update, module.ema, stored)
        return stored.facts

    def _start_from(self, module: Pretraining) -> None:
        """Take the weights of an earlier run, unless this run has weights of its own already."""
        section = self.cfg.init
        if section.run is None or checkpoint.all_steps(self.directory / "checkpoints"):
            return
        report = init.start_from(module, Path(section.run), skip=section.skip, rename=plain(section.rename))
        if self.first:
            init.save(report, self.directory)
            print(report.text(), flush=True)

    def _loader(self, start_step: int) -> Any:
        return self.data.train_loader(
            start_step=start_step,
            num_steps=self.cfg.trainer.max_steps - start_step,
            rank=dist.rank(),
            world_size=dist.world_size(),
            gate=self.gate,
        )

    def _restore(self) -> None:
        """Continue from the newest valid checkpoint, or refuse rather than start over silently."""
        root = self.directory / "checkpoints"
        known = self.record.values.get("step") if self.record.values.get("committed") else None
        stored, refused = checkpoint.newest_valid(root, known=known)
        for line in refused:
            print(f"checkpoint refused: {line}", file=sys.stderr)
        if stored is None:
            if self.first:  # the others may look while the first one already writes what is looked for
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
        self.module.resume(facts["cursor"], stored, facts["loss_scale"])
        self.module.guard.memory.load(facts["guard"])

    def _introduce(self) -> None:
        """Write what is known before the first step, and print it."""
        if not self.first:
            return
        reached = max((entry["to"] for entry in history.closed(self.record.values, self.directory)), default=0)
        try:
            self._write_facts()
        except OSError as error:
            message = f"{self.directory} cannot be written ({error.strerror}); make room, or set paths.runs."
            raise StopRun(Exit.CANNOT_CREATE, message) from None
        print(summary.text(self.cfg, self.system, self.module, self.record.values, self.evaluator.skipped), flush=True)
        if reached > self.module.cursor:
            lost = reached - self.module.cursor
            print(f"continuing at step {self.module.cursor}: {lost} later steps were not saved and are done again")

    def _write_facts(self) -> None:
        self.attempt = history.begin(
            self.record,
            self.directory,
            session=self.ranks.session,
            step=self.module.cursor,
            world_size=self.ranks.world_size,
        )
        facts = summary.facts(self.cfg, self.system, self.module, self.data)
        self.record.update(**redact.tree({**facts, **cluster.facts()}))
        run_dir.write_json(self.directory / "graph.json", summary.graph(self.system, self.module))
        text = yaml.safe_dump(self.plain, sort_keys=False, allow_unicode=True)
        run_dir.write_text(self.directory / "config.yaml", text)

    def _fit(self) -> bool:
        """Train to the last step or until told to stop; return whether it was told to."""
        cfg = self.cfg
        attempt = self.attempt if self.first else 0
        csv = MetricsCsv(self.directory / "metrics.csv", after_step=self.module.cursor) if self.first else None
        self.trackers = Trackers(plain(cfg.logger) if self.first else {}, public_facts(self.plain))
        self.gate = Gate(self.module, wish=self.wish)
        log = MetricsLog(csv, self.trackers, every=cfg.trainer.log_every, attempt=attempt)
        commit = Commit(
            self._save,
            every=cfg.trainer.checkpoint_every,
            wish=self.wish,
            gate=self.gate,
            check_replicas_every=cfg.trainer.check_replicas_every,
            refuse_stranger=self.lease.check_seen if self.lease else lambda: None,
        )
        self.counting = Counting(
            list(self.data.sources),
            budget=cfg.trainer.bad_sample_budget,
            explain=self.data.explain,
            seen=self.record.values.get("seen", {}),
        )
        evaluation = Evaluation(self.evaluator, every=cfg.eval.every, log=log, gate=self.gate)
        self.ledger = Ledger(self.directory / "ledger.jsonl", attempt=attempt, world_size=self.ranks.world_size)
        callbacks: list[Any] = [Endings(self._tell), Rehearsal(), self.counting, log, evaluation, commit]
        if cfg.trainer.ledger:
            callbacks.insert(-2, self.ledger)
        callbacks.append(Saving(self.saver, log.write, wish=self.wish))
        if cfg.trainer.progress_bar and self.first:
            callbacks.append(Bar(total=cfg.trainer.max_steps))
        self._trainer([*callbacks, Marks(self.watchdog.mark)]).fit(self.module)
        if self.gate.loss:
            done = f"step {self.module.cursor} is saved" if self.module.cursor else "no step was done"
            raise StopRun(Exit.STORAGE, f"{self.gate.loss}; {done}, {_AGAIN}.")
        return self.gate.is_closed or evaluation.broken_off

    def _trainer(self, callbacks: list[Any]) -> pl.Trainer:
        section, recipe = self.cfg.trainer, self.module.recipe
        timeout_s = section.timeout_s or 0.0
        # In an evaluation a rank may wait for the record of a clip while the others are in a collective.
        patience_s = max(_COLLECTIVE_TIMEOUT_S, 2 * timeout_s, self.cfg.data.outage_s + timeout_s)
        needs = Needs(
            precision=recipe.precision,
            max_norm=recipe.clip_grad_norm,
            num_devices=self.ranks.world_size,
            patience=datetime.timedelta(seconds=patience_s),
            zero=plain(section.zero),
        )
        trainer = pl.Trainer(
            accelerator="auto",
            devices=section.devices,
            num_nodes=section.num_nodes,
            strategy=STRATEGIES[section.strategy](needs),
            max_epochs=1,
            logger=False,  # ours are fed by threads of their own
            callbacks=callbacks,
            plugins=self.plugins,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        # Lightning would answer a signal with a collective inside the handler, and a requeue of its own.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer

    def _save(self, module: Pretraining) -> None:
        """Commit a checkpoint; every rank writes the tensors that it owns."""
        assert module.update is not None
        tensors = state.collect(module, module.update, module.ema)
        facts = {
            "cursor": module.cursor,
            "guard": module.guard.memory.to_json(),
            "loss_scale": module.update.scale.state() if module.update.scale is not None else None,
            "fence": self.lease.number if self.lease is not None else None,
            "fingerprints": self.data.fingerprints(),
            "plan_version": plan.VERSION,
            "config": self.plain,
            "seed": self.cfg.run.seed,
        }
        note = {"step": module.cursor, "committed": True, "seen": copy.deepcopy(self.counting.seen)}
        saved = checkpoint.State(tensors, facts)
        self.saver.save(module.cursor, saved, then=lambda: self._note_commit(note))

    def _note_commit(self, note: Mapping[str, Any]) -> None:
        self.record.update(**note)
        if self.cfg.trainer.ledger:
            self.ledger.committed(note["step"])

    def _already_done(self) -> int:
        print(
            f"Run '{self.cfg.run.name}' has already reached step {self.module.cursor}. To train on, raise "
            f"trainer.max_steps; for a new run, choose another run.name.\nReport: {write_report(self.directory)}"
        )
        return Exit.DONE

    def _tell(self, error: BaseException, *, quietly: bool = False) -> None:
        """Tell the other ranks why this one stops; does nothing if it has been told."""
        if self.code is None:
            at_first_step = not self.wish.num_done
            self.code = endings.end_by(
                error, self.watchdog, rank=self.ranks.rank, at_first_step=at_first_step, quietly=quietly
            )
            self.reason = str(error)

    def _end_by_watchdog(self, ending: Ending) -> None:
        """Write the record when the watchdog ends this process; in its thread."""
        self.reason = ending.message
        self._finish(ending.code, "preempted" if ending.code == Exit.PREEMPTED else "failed")

    def _finish(self, code: int, status: str) -> None:
        """Record the end and write the report, for failed runs too."""
        if threading.current_thread() is threading.main_thread():
            self.saver.close()
        if not self.first or not hasattr(self, "attempt") or (self.lease is not None and self.lease.is_lost):
            return  # what is written here belongs to the first rank of the run's owner
        if threading.current_thread() is threading.main_thread():
            self.trackers.close()
        seconds = self.record.values.get("seconds", 0.0) + time.monotonic() - self.started
        reason = redact.text(getattr(self, "reason", "")) or None
        history.end(self.record, step=self.module.cursor, code=code, reason=reason)
        if hasattr(self, "counting"):
            sources = redact.tree(summary.sources(self.data, self.counting))
            self.record.update(seen=self.counting.seen, sources=sources)
        self.record.update(
            status=status,
            exit_code=int(code),
            step=self.module.cursor,
            seconds=seconds,
            ended=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        try:
            report = write_report(self.directory)
        except OSError as error:
            print(f"warning: the report of {self.directory} cannot be written ({error.strerror}).", file=sys.stderr)
        else:
            print(summary.ending(self.directory, status, self.module.cursor, report))
