"""Reading the corpus for a peer that has a format of its own."""

import tarfile
from collections.abc import Iterator


def samples(shards: list[str]) -> Iterator[dict]:
    """Yield {"mp4": bytes, "txt": str} of every sample, in order."""
    for shard in shards:
        found: dict = {}
        with tarfile.open(shard, "r:") as file:
            for member in file:
                extension = member.name.rpartition(".")[2]
                content = file.extractfile(member)
                assert content is not None
                found[extension] = content.read()
                if {"mp4", "txt", "json"} <= found.keys():
                    yield {"mp4": found["mp4"], "txt": found["txt"].decode()}
                    found = {}
