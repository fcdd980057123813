"""The test splits of sources, for an evaluation that needs no training data: any shards, any way to make clips."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlp.data.columns import IndexFileError
from vlp.data.fields import ClipReader, Clips, Decoder, Sampling, Source, Transform
from vlp.data.loader import SplitBatches, SplitLoader, workers_for
from vlp.data.many_views import parse
from vlp.data.outage import OUTAGE_S, Waiting
from vlp.data.shard_cache import ShardCache
from vlp.data.storage import OutageError, StorageError
from vlp.data.text import Tokenizer
from vlp.data.workers import DECODE_S
from vlp.types import Reason


class EvaluationSplits:
    """What `vlp.data.datamodule.VideoTextData` offers to an evaluation, without its training part.

    Args:
        sources: name -> source, prepared. tokenizer: of the model.
        sampling, transforms, short_side, decoder: see `vlp.data.fields.Clips`.
        num_workers: reading processes of each rank. decode_timeout_s: the most that a sample may take to decode.
        outage_s: how long a sample waits for storage that gives no answer.
        worker_memory_gib: what each reading process may take beyond what it begins with; None = no cap.
        index_dir, cache: for remote shards.
        views: "CLIPSxCROPS", see `vlp.data.many_views`; None looks once.

    Raises:
        ValueError: a source has no test sample that can be used, an index is missing, or the views make no sense.
        OutageError: storage gives no answer.
    """

    def __init__(
        self,
        *,
        sources: Mapping[str, Source],
        tokenizer: Tokenizer,
        sampling: Sampling,
        transforms: Sequence[Transform],
        short_side: int | None,
        decoder: Decoder,
        num_workers: int,
        index_dir: str | None,
        cache: ShardCache | None,
        decode_timeout_s: float = DECODE_S,
        outage_s: float = OUTAGE_S,
        worker_memory_gib: float | None = None,
        views: str | None = None,
    ) -> None:
        self.sources, self.tokenizer = dict(sources), tokenizer
        self._index_dir, self._cache, self._outage_s = index_dir, cache, outage_s
        looks = parse(views, transforms) if views else ()
        clips = Clips(sampling, transforms, short_side, views=looks, decoder=decoder)
        self._readers = {name: self._open(number, name, clips) for number, name in enumerate(self.sources)}
        limits = {"decode_s": decode_timeout_s, "outage_s": outage_s, "memory_gib": worker_memory_gib}
        self._workers = workers_for(self._readers.values(), num_workers=num_workers, **limits)

    def reader(self, source: str, split: str) -> ClipReader:
        """Return the samples of the split "test"."""
        assert split == "test", "there is no other"
        return self._readers[source]

    def test_loader(
        self, source: str, *, batch_size: int, rank: int, world_size: int, waiting: Waiting | None = None
    ) -> SplitLoader:
        """Return this rank's batches: ids rank, rank + world_size, ..., each once, none repeated."""
        reader = self._readers[source]
        work = SplitBatches(reader, tokenizer=self.tokenizer, batch_size=batch_size, rank=rank, world_size=world_size)
        return SplitLoader(work, workers=self._workers, waiting=waiting)

    def test_is_train(self, source: str) -> bool:
        """Return whether the test split holds training samples of the same source."""
        return self.sources[source].test_is_train()

    def _open(self, number: int, name: str, clips: Clips) -> ClipReader:
        options: dict[str, Any] = {"index_dir": self._index_dir, "cache": self._cache, "outage_s": self._outage_s}
        try:
            shards = self.sources[name].shards("test")
            reader = ClipReader(shards, clips=clips, seed=0, source=number, train=False, **options)
        except OutageError:
            raise
        except (IndexFileError, StorageError) as error:
            raise ValueError(f"source {name!r}: {error}") from error
        if Reason.OK not in reader.by_reason:
            counts = ", ".join(f"{reason.name.lower()}={n}" for reason, n in reader.by_reason.items())
            raise ValueError(
                f"source {name!r}: no test sample can be used ({counts or 'there is none'}); "
                f"set data.sources.{name}.test to its shards."
            )
        return reader
