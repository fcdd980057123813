"""megatron-energon: the corpus as it is, with energon's own metadata beside links to the shards."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from measure import batch_rate, clip, sample_rate
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator


def prepare(shards: list[str], folder: str) -> None:
    """Write the metadata that `energon prepare` writes."""
    described = Path(folder, ".nv-meta", "dataset.yaml")
    if described.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir(parents=True)
    names = [Path(shard).name for shard in shards]
    for shard, name in zip(shards, names, strict=True):
        os.link(shard, Path(folder, name))
    parts = [("train", 1.0), ("val", 0.0), ("test", 0.0)]
    WebdatasetPreparator.prepare_dataset(folder, names, split_parts_ratio=parts, workers=1)
    described.write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


class Pairs(DefaultTaskEncoder):
    """Samples as they lie in the shards, one at a time."""

    decoder = None

    def batch(self, samples: list[Any]) -> Any:
        return samples[0]


class Clips(DefaultTaskEncoder):
    """Decodes while it cooks, as its users do."""

    decoder = None

    def batch(self, samples: list[Any]) -> Any:
        return torch.stack([sample["frames"] for sample in samples]), [sample["txt"] for sample in samples]


@stateless
def _pair(sample: dict[str, Any]) -> Any:
    return {**basic_sample_keys(sample), "mp4": sample["mp4"], "txt": sample["txt"]}


def _clip(how: list) -> Any:
    @stateless
    def cook(sample: dict[str, Any]) -> Any:
        frames = clip(sample["mp4"], *how)
        return {**basic_sample_keys(sample), "frames": frames, "txt": sample["txt"]}

    return cook


def samples(folder: str, count: int, touch: bool) -> float:
    """Return samples a second, through a shuffle buffer."""
    loader = _loader(folder, Pairs, _pair, batch_size=1, shuffle=64, workers=0)
    return sample_rate(((s["mp4"], s["txt"]) for s in loader), count=count, touch=touch)


def batches(folder: str, how: list, workers: int, skip: int, count: int) -> float:
    """Return clips a second."""
    loader = _loader(folder, Clips, _clip(how), batch_size=8, shuffle=None, workers=workers)
    return batch_rate(loader, skip=skip, count=count)


def _loader(folder: str, encoder: type, cook: Any, *, batch_size: int, shuffle: int | None, workers: int) -> Any:
    made = type(encoder.__name__, (encoder,), {"cookers": [Cooker(cook)]})()
    dataset = get_train_dataset(
        folder,
        batch_size=batch_size,
        shuffle_buffer_size=shuffle,
        max_samples_per_sequence=None,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        task_encoder=made,
    )
    return get_loader(dataset)
