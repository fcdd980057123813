"""What happens around the steps of a run: log, show, count bad samples, evaluate, commit, stop."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from tqdm import tqdm

from vlp import dist
from vlp.eval.runner import StoppedError, StorageLostError
from vlp.training import guard, replicas
from vlp.training.exits import Exit, StopRun
from vlp.training.gate import Gate
from vlp.training.metrics_csv import MetricsCsv
from vlp.training.module import Pretraining
from vlp.training.saver import Saver
from vlp.training.stopping import Wish
from vlp.training.trackers import Trackers
from vlp.types import Reason

_SLOW_FACTOR, _SLOW_S = 1.5, 0.05  # a rank is slow that is busy so much longer than the median of the others


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

    def __init__(self, csv: MetricsCsv | None, trackers: Trackers, *, every: int, attempt: int) -> None:
        self.csv, self.trackers, self.every, self.attempt = csv, trackers, every, attempt
        self.window: list[tuple[float, float, float]] = []
        self.waited_s = dist.waited_s
        self.named: set[int] = set()  # slow ranks that have been reported

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Leave what was waited for in the rehearsal out of the first step."""
        if batch_idx == 0:
            self.waited_s = dist.waited_s

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Pretraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect times; every `every` steps read the tensors, which waits for the device."""
        last = pl_module.last
        self.window.append((last["step_s"], last["data_wait_s"], dist.waited_s - self.waited_s))
        self.waited_s = dist.waited_s
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
        """Send one row to the file and to the loggers; only rank 0 writes. Steps done again differ by attempt."""
        if self.csv is None:
            return
        row = {**values, "attempt": self.attempt}
        self.csv.append(step, row)
        self.trackers.put(step, row)

    def _rates(self, trainer: pl.Trainer, pl_module: Pretraining, batch: Any) -> dict[str, float]:
        step_s, wait_s, other_s = (sum(column) / len(self.window) for column in zip(*self.window, strict=True))
        self.window.clear()
        self._report_slow(torch.tensor([[step_s, wait_s, other_s]], device=pl_module.device), pl_module.cursor)
        num_clips = sum(len(micro.valid) for micro in batch.batches) * dist.world_size()
        assert pl_module.update is not None
        rate = pl_module.update.optimizer.param_groups[0]
        values = {
            "train/lr": rate["lr"] / rate["lr_factor"],
            "time/step_s": step_s,
            "time/data_wait_s": wait_s,
            "time/decode_s": batch.decode_s,
            "data/clips_per_s": num_clips / step_s,
        }
        if "logit_scale" in pl_module.last:
            values["train/logit_scale"] = float(pl_module.last["logit_scale"])
        return values

    def _report_slow(self, split: torch.Tensor, step: int) -> None:
        """Name a rank for which the others wait; `split` [1, 3]: seconds of a step, waiting for data, for ranks."""
        rows = dist.gather(split).tolist()  # [W, 3]
        busy = [step_s - for_ranks_s for step_s, _, for_ranks_s in rows]
        slow = busy.index(max(busy))
        usual = statistics.median(busy[:slow] + busy[slow + 1 :]) if len(busy) > 1 else busy[0]
        if busy[slow] < _SLOW_FACTOR * usual or busy[slow] - usual < _SLOW_S or slow in self.named or self.csv is None:
            return
        self.named.add(slow)
        step_s, data_s, for_ranks_s = rows[slow]
        text = f"data {data_s:.2f}, compute {busy[slow] - data_s:.2f}, waiting for other ranks {for_ranks_s:.2f}"
        print(f"rank {slow} is slow at step {step}: {step_s:.2f} s a step ({text}); the others are busy {usual:.2f} s.")


class Saving(pl.Callback):
    """Looks at a save in flight after every step, and waits for the last one.

    Args:
        saver: of the run. log: (trainer, step, values) -> None, of the seconds that a commit took.
        wish: of this rank, which must know how long a save takes.
    """

    def __init__(self, saver: Saver, log: Callable[[Any, int, Mapping[str, float]], None], *, wish: Wish) -> None:
        self.saver, self.write, self.wish = saver, log, wish

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
            self.wish.count_commit(sum(times.values()))
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
    """Saves every `every` steps, at the end, after a rewind, and where the ranks stop.

    They stop at the gate, all before the same step.

    Args:
        save: (module) -> None, writes a checkpoint. every: steps. wish: of this rank. gate: where it meets the others.
        check_replicas_every: steps between comparisons of the ranks' weights; None = never.
        refuse_stranger: raises where the run directory belongs to another process by now.
    """

    def __init__(
        self,
        save: Callable[[Pretraining], None],
        *,
        every: int,
        wish: Wish,
        gate: Gate,
        check_replicas_every: int | None,
        refuse_stranger: Callable[[], None] = lambda: None,
    ) -> None:
        self.save, self.every, self.wish, self.check_every = save, every, wish, check_replicas_every
        self.gate, self.saved = gate, 0  # the step of the newest checkpoint of this attempt, or with which it began
        self.refuse_stranger = refuse_stranger

    def on_train_start(self, trainer: pl.Trainer, pl_module: Pretraining) -> None:
        """Stop before the first step if a rank was told to while it started; there is nothing to save yet."""
        self.saved, wish = pl_module.cursor, self.wish()
        if dist.max_over_ranks(torch.tensor(int(wish is not None), device=pl_module.device)):
            why = wish or "by another rank"
            raise StopRun(Exit.PREEMPTED, f"stopped {why} at step {pl_module.cursor}, before the first one.")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Pretraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when due."""
        self.refuse_stranger()
        self.wish.count_step()
        done = pl_module.cursor >= pl_module.recipe.max_steps
        due = done or pl_module.guard.has_rewound or pl_module.cursor % self.every == 0
        if due or (self.check_every is not None and pl_module.cursor % self.check_every == 0):
            self._check_replicas(pl_module)
        if due:
            self._save(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Pretraining) -> None:
        """Save what was done since the last checkpoint, where the gate was closed before the last step."""
        if self.gate.is_closed and pl_module.cursor > self.saved:
            self._check_replicas(pl_module)
            self._save(pl_module)

    def _check_replicas(self, pl_module: Pretraining) -> None:
        assert pl_module.update is not None
        if self.check_every is not None and not pl_module.update.frozen_sharded:  # ZeRO-3 has no replicas
            replicas.check(pl_module, pl_module.cursor)

    def _save(self, pl_module: Pretraining) -> None:
        began = time.monotonic()
        pl_module.mark("save")
        guard.refuse_non_finite(pl_module.own_values(), pl_module.cursor)
        self.save(pl_module)
        pl_module.guard.has_rewound = False
        self.saved = pl_module.cursor
        pl_module.mark("log")
        self.wish.count_save(time.monotonic() - began)


class Evaluation(pl.Callback):
    """Runs the evaluation every `every` steps and after the last one, while the strategy still holds the model."""

    def __init__(
        self, run: Callable[[Pretraining], Mapping[str, float]], *, every: int | None, log: MetricsLog, gate: Gate
    ) -> None:
        self.run, self.every, self.rows = run, every, log  # Lightning takes the name `log` for itself
        self.gate = gate
        self.broken_off = False  # the last one

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Pretraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate when due; the time does not count as data wait."""
        if self.every is None or pl_module.cursor % self.every or pl_module.cursor >= pl_module.recipe.max_steps:
            return
        pl_module.mark("evaluation")
        try:
            self.rows.write(trainer, pl_module.cursor, self.run(pl_module))
        except StorageLostError as error:
            self.gate.shut(str(error))
        except StoppedError:
            return  # the steps are saved next; scores can be had later
        except OSError as error:  # a full disk: what was trained is worth more than its scores
            print(f"the evaluation at step {pl_module.cursor} was not written ({error}).", file=sys.stderr, flush=True)
        finally:
            pl_module.mark("log")
            pl_module.restart_clock()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Pretraining) -> None:
        """Evaluate what was trained, unless the run was told to stop before, or is told to stop meanwhile."""
        if pl_module.cursor < pl_module.recipe.max_steps:
            return
        pl_module.mark("evaluation")
        try:
            self.rows.write(trainer, pl_module.cursor, self.run(pl_module))
        except StorageLostError as error:
            self.gate.shut(str(error))
        except StoppedError:
            self.broken_off = True


class Rehearsal(pl.Callback):
    """Does the first step of an attempt once in vain where ranks train together; see `Pretraining.rehearse`."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Pretraining, batch: Any, batch_idx: int) -> None:
        """Go through the wrapper that sums the gradients, as a step does."""
        if batch_idx == 0 and isinstance(trainer.strategy.model, torch.nn.parallel.DistributedDataParallel):
            pl_module.rehearse(batch)
            pl_module.restart_clock()


class Marks(pl.Callback):
    """Tells the watchdog the step; stands last in the list of callbacks."""

    def __init__(self, mark: Callable[..., None]) -> None:
        self.mark = mark

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Pretraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """From now on the rank waits for data."""
        self.mark("data", step=pl_module.cursor)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What follows may take as long as it takes."""
        self.mark("end")


class Endings(pl.Callback):
    """Tells the other ranks at once why this one stops, before anything is torn down."""

    def __init__(self, tell: Callable[[BaseException], None]) -> None:
        self.tell = tell

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell."""
        self.tell(exception)
