"""What happens around the steps of a run: log, show, count bad samples, evaluate, commit, stop."""

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tqdm import tqdm

from vlp import dist
from vlp.training.metrics_csv import MetricsCsv
from vlp.training.module import Pretraining
from vlp.training.saver import Saver
from vlp.types import Reason


class DataBudgetError(RuntimeError):
    """More samples were unusable than `trainer.bad_sample_budget` allows."""


class Counting(pl.Callback):
    """Counts slots by reason and source, and stops the run when too many are unusable.

    Args:
        sources: names by source number. budget: share of the slots. explain: (source, sample id, reason) -> record.
        seen: counts of earlier attempts, by source and reason name.
    """

    max_listed = 1000  # unusable samples kept by name for the report

    def __init__(
        self,
        sources: list[str],
        *,
        budget: float,
        explain: Callable[[int, int, Reason], dict],
        seen: Mapping[str, Mapping[str, int]],
    ) -> None:
        self.sources, self.budget, self.explain = sources, budget, explain
        self.seen = {name: dict(seen.get(name, {})) for name in sources}
        self.dropped: dict[str, dict[int, dict]] = {name: {} for name in sources}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the slots of one step, over all ranks."""
        name = self.sources[batch.source]
        status = torch.cat([micro.status for micro in batch.batches])
        by_reason = dist.sum_over_ranks(torch.bincount(status, minlength=len(Reason))).tolist()
        for reason, count in zip(Reason, by_reason, strict=True):
            if count:
                key = reason.name.lower()
                self.seen[name][key] = self.seen[name].get(key, 0) + count
        pl_module.last["lost"] = self.lost()
        if sum(by_reason[2:]):
            self._list_dropped(batch, name)
            self._check_budget()

    def lost(self) -> dict[str, float]:
        """Return how many slots had no sample so far, by source and reason: "data/<source>/<reason>"."""
        return {
            f"data/{name}/{reason}": float(count)
            for name, counts in self.seen.items()
            for reason, count in counts.items()
            if reason not in ("ok", "padding")
        }

    def _list_dropped(self, batch: Any, name: str) -> None:
        listed = self.dropped[name]
        for micro in batch.batches:
            for sample_id, status in zip(micro.sample_id.tolist(), micro.status.tolist(), strict=True):
                if status > Reason.PADDING and sample_id not in listed and len(listed) < self.max_listed:
                    listed[sample_id] = self.explain(batch.source, sample_id, Reason(status))

    def _check_budget(self) -> None:
        slots = [(reason, n) for counts in self.seen.values() for reason, n in counts.items() if reason != "padding"]
        total, bad = sum(n for _, n in slots), sum(n for reason, n in slots if reason != "ok")
        if total >= 100 and bad > self.budget * total:
            reasons = ", ".join(f"{reason}={n}" for reason, n in slots if reason != "ok")
            raise DataBudgetError(
                f"{bad} of {total} samples were unusable ({reasons}), above trainer.bad_sample_budget={self.budget}; "
                "see 'dropped' in run.json, repair the data or raise the budget."
            )


class MetricsLog(pl.Callback):
    """Writes losses, rates and times to metrics.csv and to the config's loggers.

    Losses are means over the global batch, unweighted, with their counts.
    """

    def __init__(self, csv: MetricsCsv | None, *, every: int) -> None:
        self.csv, self.every = csv, every
        self.window: list[tuple[float, float]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Pretraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect times; every `every` steps read the tensors, which waits for the device."""
        last = pl_module.last
        self.window.append((last["step_s"], last["data_wait_s"]))
        last_step = pl_module.cursor >= pl_module.recipe.max_steps
        if pl_module.cursor % self.every and batch_idx and not last_step:
            return
        means = dist.sum_over_ranks(torch.stack(list(last["means"].values())))
        losses = dict(zip(last["means"], means.tolist(), strict=True))
        values = {f"train/{name}": loss for name, loss in losses.items()}
        values["train/loss"] = sum(pl_module.weights[name] * loss for name, loss in losses.items())
        values |= {f"train/{name}_count": float(count) for name, count in last["counts"].items()}
        values["train/grad_norm"] = float(last["grad_norm"])
        values["train/skipped_steps"] = pl_module.num_skipped
        values |= self._rates(trainer, pl_module, batch) | last.get("lost", {})
        last["values"] = values
        self.write(trainer, pl_module.cursor, values)

    def write(self, trainer: pl.Trainer, step: int, values: Mapping[str, float]) -> None:
        """Send one row to the file and to the loggers; only rank 0 writes."""
        if self.csv is None:
            return
        self.csv.append(step, values)
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=step)

    def _rates(self, trainer: pl.Trainer, pl_module: Pretraining, batch: Any) -> dict[str, float]:
        step_s, wait_s = (sum(column) / len(self.window) for column in zip(*self.window, strict=True))
        self.window.clear()
        num_clips = sum(len(micro.valid) for micro in batch.batches) * dist.world_size()
        rate = trainer.optimizers[0].param_groups[0]
        values = {
            "train/lr": rate["lr"] / rate["lr_factor"],
            "time/step_s": step_s,
            "time/data_wait_s": wait_s,
            "time/decode_s": batch.decode_s,
            "data/clips_per_s": num_clips / step_s,
        }
        temperature = getattr(pl_module.model, "temperature", None)
        if temperature is not None:
            values["train/logit_scale"] = float(temperature().detach())
        return values


class Saving(pl.Callback):
    """Looks at a save in flight after every step, and waits for the last one.

    Args:
        saver: of the run. log: (trainer, step, values) -> None, of the seconds that a commit took.
    """

    def __init__(self, saver: Saver, log: Callable[[Any, int, Mapping[str, float]], None]) -> None:
        self.saver, self.write = saver, log

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notice a commit or a failure, on all ranks at the same step."""
        self.saver.poll()
        self._log(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training is not over before its last checkpoint is durable."""
        self.saver.finish()
        self._log(trainer, pl_module)

    def _log(self, trainer: Any, pl_module: Any) -> None:
        times, self.saver.times = self.saver.times, {}
        if times:
            self.write(trainer, pl_module.cursor, times)


class Bar(pl.Callback):
    """One line of progress: loss, clips a second, share of the time spent waiting for data."""

    def __init__(self, *, total: int) -> None:
        self.total = total
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Pretraining) -> None:
        """Open the bar at the step where the run continues."""
        self.bar = tqdm(total=self.total, initial=pl_module.cursor, unit="step", desc="train", mininterval=0.5)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Pretraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance; the figures are those of the last log step."""
        assert self.bar is not None
        values = pl_module.last.pop("values", None)
        if values:
            wait = values["time/data_wait_s"] / values["time/step_s"]
            text = f"loss {values['train/loss']:.3f}, {values['data/clips_per_s']:.1f} clips/s, data wait {wait:.0%}"
            self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the finished bar on the screen."""
        if self.bar is not None:
            self.bar.close()


class Commit(pl.Callback):
    """Saves every `every` steps, at the end, and when the run is told to stop.

    USR1, TERM and INT set a flag; the ranks agree on it at the end of a step, save, and stop.

    Args:
        save: (module) -> None, writes a checkpoint.
        every: steps. stop_after: stop by itself after this many steps of this attempt.
    """

    signals = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(self, save: Callable[[Pretraining], None], *, every: int, stop_after: int | None) -> None:
        self.save, self.every, self.stop_after = save, every, stop_after
        self.flag = False
        self.stopped = False  # told to stop before the last step
        self.old: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Pretraining) -> None:
        """Take over the signals, which Lightning would answer by dying at once."""
        self.old = {number: signal.signal(number, self._set_flag) for number in self.signals}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Pretraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when due; stop on all ranks at the same step."""
        done = pl_module.cursor >= pl_module.recipe.max_steps
        wish = self.flag or (self.stop_after is not None and batch_idx + 1 >= self.stop_after)
        flag = dist.max_over_ranks(torch.tensor(int(wish), device=pl_module.device))
        self.stopped = bool(flag) and not done
        if self.stopped or done or pl_module.cursor % self.every == 0:
            self.save(pl_module)
        if self.stopped:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _set_flag(self, number: int, frame: Any) -> None:
        self.flag = True


class Evaluation(pl.Callback):
    """Runs the evaluation every `every` steps, without the last, which `launch` does after training."""

    def __init__(
        self, run: Callable[[Pretraining], Mapping[str, float]], *, every: int | None, log: MetricsLog
    ) -> None:
        self.run, self.every, self.rows = run, every, log  # Lightning takes the name `log` for itself

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Pretraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate when due; the time does not count as data wait."""
        if self.every is None or pl_module.cursor % self.every or pl_module.cursor >= pl_module.recipe.max_steps:
            return
        self.rows.write(trainer, pl_module.cursor, self.run(pl_module))
        pl_module.on_train_start()


class NonFiniteNotes(pl.Callback):
    """Writes skipped steps and their samples to `non_finite.txt`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Pretraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Append the note of a step that was skipped."""
        message = pl_module.last.pop("non_finite", None)
        if message:
            write_note(self.directory, message)


def write_note(directory: Path, message: str) -> None:
    """Append one line on a non-finite step."""
    with (directory / "non_finite.txt").open("a", encoding="utf-8") as file:
        file.write(message + "\n")
