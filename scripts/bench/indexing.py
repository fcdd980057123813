"""How fast shards are indexed, in MB of shard a second of CPU: whole (sha256, a crc32 a part, every video probed), by
headers alone, and checked; against the sha256 of the same bytes, which any check of a shard needs.
"""

import hashlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus import corpus

from vlp.data.index import build_headers_index, build_index, check_shard

REPEATS = 3


def main(*, quick: bool = False, peers: bool = True) -> dict[str, Any]:
    """Return megabytes a second, medians of turns; `peers` changes nothing."""
    small = {"num_samples": 64, "num_frames": 60}
    data = corpus("270p", 12, **small) if quick else corpus("256", 12, num_samples=512)
    ways: dict[str, Callable[[str], object]] = {
        "index": build_index,
        "index, headers only": build_headers_index,
        "check": check_shard,
        "sha256 alone": lambda shard: hashlib.sha256(Path(shard).read_bytes()),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(1 if quick else REPEATS):
        for way, function in ways.items():
            began = time.process_time()
            for shard in data.shards:
                function(shard)
            rates[way].append(data.num_bytes / 1e6 / (time.process_time() - began))
        print(f"indexing: turn {turn + 1}, {', '.join(f'{way} {rates[way][-1]:.0f} MB/s' for way in ways)}", flush=True)
    medians = {way: statistics.median(found) for way, found in rates.items()}
    return {
        "shards": f"{len(data.shards)} with {data.num_samples} clips, {data.num_bytes / 1e6:.0f} MB",
        **{f"MB/s, {way}": f"{rate:,.0f}" for way, rate in medians.items()},
        "samples/s, index": f"{medians['index'] * 1e6 * data.num_samples / data.num_bytes:,.0f}",
        "index to sha256 alone": medians["index"] / medians["sha256 alone"],
    }


if __name__ == "__main__":
    print(main())
