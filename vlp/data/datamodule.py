"""All data of a run: its sources, their mix, the tokenizer, and the loaders that a trainer asks for by step."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from vlp.data.balance import Balanced
from vlp.data.bucket import Bucketed, Order
from vlp.data.columns import IndexFileError
from vlp.data.decode import Pictures
from vlp.data.fields import ClipReader, Clips, Decoder, Sampling, ShardsError, Source, Transform
from vlp.data.loader import Gate, MicroBatches, Part, SplitBatches, SplitLoader, StepLoader, workers_for
from vlp.data.mix import Schedule
from vlp.data.outage import OUTAGE_S, Waiting
from vlp.data.plan import Plan, check_layout
from vlp.data.rng import mix
from vlp.data.shard_cache import ShardCache
from vlp.data.storage import OutageError, StorageError
from vlp.data.text import Tokenizer
from vlp.data.texts import TextChoice
from vlp.data.workers import DECODE_S
from vlp.types import Reason, SampleError

SPLITS = ("train", "test")

_MAX_CAPTIONED = 200_000  # samples whose captions may train a tokenizer
_MAX_LISTED = 1000  # samples of a source that its index calls unusable and that are listed by name


class VideoTextData:
    """Sources that have been prepared, checked and ready to be read from any step on.

    Args:
        sources: name -> source; their order numbers them. weights: name -> share of the steps; 0 = not trained on.
        batch_size: clips of an optimizer step, over all ranks and micro-batches. accumulate: micro-batches of a step.
        num_lanes, window_shards: see `vlp.data.plan`. bucket_steps: see `vlp.data.bucket`; 1 = as planned.
        balance: deal the clips of a step to ranks and micro-batches by size, see `vlp.data.balance`.
        num_workers: reading processes of each rank. decode_timeout_s: the most that a sample may take to decode.
        outage_s: how long a sample waits for storage that gives no answer.
        worker_memory_gib: what each reading process may take beyond what it begins with; None = no cap.
        seed: of the run.
        sampling_train, sampling_test, transforms_train, transforms_test, short_side, decoder: see
            `vlp.data.fields.Clips`; the frames of the video where no decoder is given.
        more_clips: other clips of each training sample. texts: chooses its texts, see `vlp.data.texts`.
        make_tokenizer: gets the training captions, which it may ignore.
        index_dir: where the indexes of remote shards lie. cache: keeps remote shards on this machine.

    Raises:
        ShardsError: shards are gone, damaged or without an index; names all of them.
        ValueError: a source is too small or has no usable sample, the batch does not divide, an index is missing.
        OutageError: storage gives no answer.
    """

    def __init__(
        self,
        *,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        batch_size: int,
        accumulate: int,
        num_lanes: int,
        window_shards: int,
        bucket_steps: int,
        num_workers: int,
        seed: int,
        sampling_train: Sampling,
        sampling_test: Sampling,
        transforms_train: Sequence[Transform],
        transforms_test: Sequence[Transform],
        short_side: int | None,
        make_tokenizer: Callable[[Iterable[str]], Tokenizer],
        texts: TextChoice | None = None,
        index_dir: str | None = None,
        cache: ShardCache | None = None,
        balance: bool = False,
        more_clips: int = 0,
        decode_timeout_s: float = DECODE_S,
        outage_s: float = OUTAGE_S,
        worker_memory_gib: float | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        check_layout(global_batch=batch_size, num_lanes=num_lanes, world_size=1, accumulate=accumulate)
        self.sources, self.weights = dict(sources), {name: float(weights[name]) for name in sources}
        self.batch_size, self.accumulate = batch_size, accumulate
        self.num_lanes, self.window_shards, self.bucket_steps, self.seed = num_lanes, window_shards, bucket_steps, seed
        self.balance = balance
        self._schedule = Schedule(list(self.weights.values()), seed=seed)
        self._index_dir, self._cache, self._texts, self._outage_s = index_dir, cache, texts, outage_s
        clips = {
            "train": Clips(sampling_train, transforms_train, short_side, more_clips, decoder=decoder or Pictures()),
            "test": Clips(sampling_test, transforms_test, short_side, decoder=decoder or Pictures()),
        }
        self._readers = {
            (name, split): self._open(name, split, clips[split]) for name in self.sources for split in SPLITS
        }
        self._parts = {
            number: self._part(number, name) for number, name in enumerate(self.sources) if self.weights[name] > 0
        }
        limits = {"decode_s": decode_timeout_s, "outage_s": outage_s, "memory_gib": worker_memory_gib}
        self._workers = workers_for(self._readers.values(), num_workers=num_workers, **limits)
        self.tokenizer = make_tokenizer(self._captions())

    def train_loader(
        self, *, start_step: int, num_steps: int, rank: int, world_size: int, gate: Gate | None = None
    ) -> StepLoader:
        """Return this rank's StepBatches of steps start_step to start_step + num_steps; an epoch's end is not seen.

        The ranks meet at the `gate` before each step.

        Raises ValueError if `world_size` does not divide the lanes or the micro-batches.
        """
        check_layout(
            global_batch=self.batch_size, num_lanes=self.num_lanes, world_size=world_size, accumulate=self.accumulate
        )
        work = MicroBatches(
            self._parts,
            schedule=self._schedule,
            tokenizer=self.tokenizer,
            accumulate=self.accumulate,
            rank=rank,
            world_size=world_size,
        )
        return StepLoader(work, start_step=start_step, num_steps=num_steps, workers=self._workers, gate=gate)

    def test_loader(
        self, source: str, *, batch_size: int, rank: int, world_size: int, waiting: Waiting | None = None
    ) -> SplitLoader:
        """Return this rank's batches of the test split: ids rank, rank + world_size, ..., each once, none repeated.

        The last batch may be shorter, and a rank may have one batch less than another. `waiting` is told while the
        next one is not there.
        """
        reader = self.reader(source, "test")
        work = SplitBatches(reader, tokenizer=self.tokenizer, batch_size=batch_size, rank=rank, world_size=world_size)
        return SplitLoader(work, workers=self._workers, waiting=waiting)

    def reader(self, source: str, split: str) -> ClipReader:
        """Return the samples of a split by id: `meta`, `key_of` and `shard_of`."""
        return self._readers[source, split]

    def num_clips(self, source: str, split: str) -> int:
        """Return the number of samples, unusable ones included."""
        return len(self.reader(source, split))

    def steps_per_epoch(self, source: str) -> int:
        """Return how many steps read a source once; 0 if it is not trained on."""
        number = list(self.sources).index(source)
        return self._parts[number].plan.num_steps if number in self._parts else 0

    def fingerprints(self) -> dict[str, str]:
        """Return the identity of each source: a digest over names, counts, sizes and digests of all its shards."""
        both = {name: [self.reader(name, split).fingerprint for split in SPLITS] for name in self.sources}
        return {name: hashlib.sha256(" ".join(digests).encode()).hexdigest() for name, digests in both.items()}

    def test_is_train(self, source: str) -> bool:
        """Return whether the test split holds training samples."""
        return self.sources[source].test_is_train()

    def dropped(self, source: str) -> list[dict[str, str]]:
        """Return what was lost before training: by the source ("stage": "prepare"), and by the index, up to a limit."""
        listed = [{**each, "stage": "prepare"} for each in self.sources[source].dropped()]
        splits = SPLITS[:1] if self.test_is_train(source) else SPLITS
        return listed + [{**each, "stage": "index"} for split in splits for each in self._unusable(source, split)]

    def explain(self, source: int, sample_id: int, reason: Reason) -> dict[str, str]:
        """Return "key", "where", "reason" and "detail" of a training sample that became a tombstone."""
        reader = self.reader(list(self.sources)[source], "train")
        return _record(reader, sample_id, reason)

    def _open(self, name: str, split: str, clips: Clips) -> ClipReader:
        number = list(self.sources).index(name)
        try:
            shards = self.sources[name].shards(split)
            reader = ClipReader(
                shards,
                clips=clips,
                seed=self.seed,
                source=number,
                train=split == "train",
                texts=self._texts,
                index_dir=self._index_dir,
                cache=self._cache,
                outage_s=self._outage_s,
            )
        except OutageError:
            raise
        except (IndexFileError, StorageError) as error:
            raise ShardsError(f"source {name!r}: {error}") from error
        if len(reader) and Reason.OK not in reader.by_reason:
            counts = ", ".join(f"{reason.name.lower()}={n}" for reason, n in reader.by_reason.items())
            raise ValueError(
                f"source {name!r}: none of its {len(reader)} {split} samples can be used ({counts}); "
                f"look at one: {_record(reader, 0, next(iter(reader.by_reason)))}."
            )
        return reader

    def _part(self, number: int, name: str) -> Part:
        reader = self.reader(name, "train")
        plan = Plan(
            reader.counts,
            seed=mix(self.seed, number),
            num_lanes=self.num_lanes,
            window_shards=self.window_shards,
            global_batch=self.batch_size,
            name=name,
        )
        order: Order = plan
        if self.bucket_steps > 1:
            order = Bucketed(order, sizes=reader.sizes, block_steps=self.bucket_steps, seed=plan.seed)
        if self.balance:
            order = Balanced(order, sizes=reader.sizes, accumulate=self.accumulate)
        return Part(reader, order)

    def _captions(self) -> Iterator[str]:
        for part in self._parts.values():
            yield from part.reader.captions(_MAX_CAPTIONED // len(self._parts))

    def _unusable(self, source: str, split: str) -> list[dict[str, Any]]:
        reader = self.reader(source, split)
        return [_record(reader, sample_id, reason) for sample_id, reason in reader.unusable(_MAX_LISTED)]


def _record(reader: ClipReader, sample_id: int, reason: Reason) -> dict[str, str]:
    record = {"where": reader.shard_of(sample_id), "reason": reason.name.lower()}
    try:
        return {"key": reader.key_of(sample_id), **record, "detail": reader.detail_of(sample_id)}
    except SampleError as error:  # its index has gone since
        return {"key": error.key, **record, "detail": error.detail}
    except OutageError as error:  # away for now: a sample is not waited for to be named
        return {"key": f"sample {sample_id}", **record, "detail": str(error)}
