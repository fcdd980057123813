"""The command line of all recipes: annotations and videos in, shards with indexes and an audit out.

    plan --already done?--> (looks, duplicates) --> one job a shard, in processes --> audit.json, dropped.jsonl

A run that is killed continues with the same command: whole shards stay, others are made again. The bytes of a shard
depend on nothing but its items, their files and the options, so neither kills nor the number of workers change them.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from glob import escape, glob
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from data_recipes import audit
from data_recipes.items import Dropped, Recipe
from data_recipes.looks import duplicates
from data_recipes.plan import Plan, make_plan
from data_recipes.shard_jobs import LOOKS, RECORDS, Job, Record, make_looks, make_shard, record_of
from vlp.data import storage
from vlp.data.index import index_url

EXIT_OK, EXIT_NOTHING, EXIT_BUG, EXIT_UNWRITABLE, EXIT_USAGE, EXIT_INTERRUPTED = 0, 65, 70, 73, 78, 130

_PLAN = "plan.json"
_Result = TypeVar("_Result")


def main(recipe: Recipe, arguments: Sequence[str] | None = None) -> int:
    """Run a recipe; return 0, 65 nothing is usable, 70 a worker died, 73 cannot be written, 78 bad arguments.

    Args:
        recipe: of the corpus.
        arguments: of the command line; None: those of this process.
    """
    try:
        options = _parsed(recipe, arguments)
        plan = make_plan(recipe, options)
        if not options.dry_run:
            _claim(options.out, plan, overwrite=options.overwrite)
    except SystemExit:
        return EXIT_OK  # --help
    except ValueError as error:
        return _failed(EXIT_USAGE, str(error))
    except OSError as error:
        return _failed(EXIT_UNWRITABLE, f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        return _failed(EXIT_INTERRUPTED, "stopped before anything was written.")
    try:
        return _preview(plan) if options.dry_run else _build(plan, options)
    except OSError as error:
        return _failed(
            EXIT_UNWRITABLE, f"{error.filename or options.out}: {error.strerror}; the same command continues."
        )
    except BrokenProcessPool:
        hint = "out of memory, or a video that crashes the decoder"
        return _failed(
            EXIT_BUG, f"a worker died ({hint}); the same command continues, with --workers 1 it tells where."
        )
    except KeyboardInterrupt:
        return _failed(EXIT_INTERRUPTED, "stopped; the same command continues.")


def _failed(code: int, message: str) -> int:
    print(message, file=sys.stderr)
    return code


def _parsed(recipe: Recipe, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m data_recipes.{recipe.name}", description=recipe.about, allow_abbrev=False
    )
    parser.error = _refuse  # one line and exit code 78, not the usage and 2
    text = f"FILE or SPLIT=FILE; splits: {', '.join(recipe.splits)}"
    required = recipe.flag == "--annotations"
    parser.add_argument("--videos", required=True, metavar="DIR", help="the downloaded files, in any folders below")
    parser.add_argument(
        recipe.flag, dest="annotations", nargs="+", default=[], required=required, metavar="FILE", help=text
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="for shards, indexes and the audit")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these")
    parser.add_argument("--max-items", type=_positive, metavar="N", help="of each split, the first ones")
    parser.add_argument("--clips-per-shard", type=_positive, default=256, metavar="N", help="default: 256")
    parser.add_argument("--short-side", type=_positive, metavar="PIXELS", help="encode again, not larger than this")
    parser.add_argument("--gop", type=_positive, metavar="FRAMES", help="encode again, a key frame every so many")
    parser.add_argument("--tune", choices=("fastdecode",), help="encode again so that decoding is cheaper")
    parser.add_argument("--store", choices=("video", "frames"), default="video", help="frames: JPEGs, see --frames")
    parser.add_argument("--frames", type=_positive, metavar="N", help="with --store frames: of each video, evenly")
    parser.add_argument("--fps", type=_rate, metavar="RATE", help="encode again, not faster than this")
    parser.add_argument("--audio", choices=("keep", "drop"), default="keep", help="sound tracks (default: keep)")
    parser.add_argument("--dedupe", action="store_true", help="drop training clips that look like an earlier clip")
    parser.add_argument("--workers", type=_positive, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="remove what another run of a recipe left in --out")
    if recipe.arguments:
        recipe.arguments(parser)
    return parser.parse_args(arguments)


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}; --help tells all options.")


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def _rate(text: str) -> float:
    if not 0 < float(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1000 frames a second")
    return float(text)


def _claim(out: str, plan: Plan, *, overwrite: bool) -> None:
    """Make the folder and note what it is for.

    Raises:
        ValueError: it holds shards of something else.
        OSError: it cannot be written.
    """
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, _PLAN)
    if overwrite:
        _clear(out)
    try:
        with open(path, encoding="utf-8") as file:
            differences = _differences(json.load(file), plan.identity)
    except FileNotFoundError:
        foreign = glob(os.path.join(escape(out), "*.tar"))
        differences = [f"{os.path.basename(foreign[0])} was not made by a recipe"] if foreign else []
    except (ValueError, KeyError, TypeError, AttributeError):
        differences = [f"its {_PLAN} cannot be read"]
    if differences:
        rule = "give another --out, or --overwrite to remove what a recipe made there"
        raise ValueError(f"--out {out!r} is of another run: {'; '.join(differences)}; {rule}.")
    os.makedirs(os.path.join(out, RECORDS), exist_ok=True)
    with storage.replacing(path) as file:
        file.write(json.dumps(plan.identity, indent=1).encode())


def _differences(known: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return what two identities differ in; splits may be added."""
    found = [f"recipe {known['recipe']}"] if known["recipe"] != wanted["recipe"] else []
    old, new = known["options"], wanted["options"]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != json.loads(json.dumps(new.get(name))):
            found.append(f"--{name.replace('_', '-')} was {old.get(name)}, now {new.get(name)}")
    for split, digest in known["splits"].items():
        if split not in wanted["splits"]:
            found.append(f"it has the split {split} too: name its annotations as well")
        elif wanted["splits"][split] != digest:
            found.append(f"the annotations of {split} have changed")
    return found


def _clear(out: str) -> None:
    records = [
        os.path.splitext(os.path.basename(path))[0] for path in glob(os.path.join(escape(out), RECORDS, "*.json"))
    ]
    shards = [path for prefix in records for path in glob(os.path.join(escape(out), f"{prefix}-*.tar"))]
    names = (_PLAN, audit.AUDIT, audit.DROPPED)
    for path in [*shards, *map(index_url, shards), *(os.path.join(out, name) for name in names)]:
        with suppress(FileNotFoundError):
            os.unlink(path)
    for folder in (RECORDS, LOOKS):
        shutil.rmtree(os.path.join(out, folder), ignore_errors=True)


def _preview(plan: Plan) -> int:
    print("\n".join(audit.preview(plan)))
    usable = any(job.work for jobs in plan.jobs.values() for job in jobs)
    return EXIT_OK if usable else _failed(EXIT_NOTHING, "nothing is usable.")


def _build(plan: Plan, options: argparse.Namespace) -> int:
    with storage.locked(os.path.join(options.out, f".{_PLAN}.lock")):
        jobs, repeated, alike = _without_duplicates(plan, options) if options.dedupe else (plan.jobs, [], [])
        records = _make_all(jobs, options.workers)
        dropped = [*plan.dropped, *repeated, *(item for made in records.values() for r in made for item in r.dropped)]
        report = audit.make_audit(plan, records, dropped, alike)
        audit.save(options.out, report, dropped)
        for name, lines in plan.lists.items():
            with storage.replacing(os.path.join(options.out, name)) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
    print("\n".join(audit.page(report)))
    if not any(split["written"] for split in report["splits"].values()):
        return _failed(EXIT_NOTHING, f"nothing is usable; {os.path.join(options.out, audit.DROPPED)} says why.")
    print(f"audit: {os.path.join(options.out, audit.AUDIT)}")
    return EXIT_OK


def _without_duplicates(
    plan: Plan, options: argparse.Namespace
) -> tuple[dict[str, list[Job]], list[Dropped], list[tuple[str, str]]]:
    """Return the jobs without training clips that look like an earlier clip, what is dropped, and all pairs.

    Splits to test on come first and lose nothing: else results could not be compared with those of others.
    """
    jobs = [job for split in sorted(plan.jobs, key=lambda split: split == "train") for job in plan.jobs[split]]
    looks = dict(_in_processes(make_looks, jobs, options.workers, desc="looking"))
    work = [(job.prefix, each) for job in jobs for each in job.work]
    pairs = list(duplicates([look for job in jobs for look in looks[job.prefix]]))
    names = [f"{each.item.split}/{each.item.key}" for _, each in work]
    alike = [(names[later], names[first]) for later, first in pairs]
    repeated, gone = [], set()
    for later, first in pairs:
        prefix, each = work[later]
        if each.item.split == "train":
            gone.add((prefix, each.key))
            repeated.append(Dropped(each.item.key, each.file.path, "duplicate", f"looks like {names[first]}", "train"))
    kept = {
        split: [job._replace(work=[each for each in job.work if (job.prefix, each.key) not in gone]) for job in group]
        for split, group in plan.jobs.items()
    }
    return kept, repeated, alike


def _make_all(jobs: dict[str, list[Job]], workers: int) -> dict[str, list[Record]]:
    known = {job.prefix: record_of(job) for group in jobs.values() for job in group}
    missing = [job for group in jobs.values() for job in group if known[job.prefix] is None]
    if len(missing) < len(known):
        print(f"{len(known) - len(missing)} of {len(known)} shards are there already")
    known |= dict(_in_processes(make_shard, missing, workers, desc="writing"))
    return {split: [record for job in group if (record := known[job.prefix])] for split, group in jobs.items()}


def _in_processes(
    function: Callable[[Job], _Result], jobs: Iterable[Job], workers: int, *, desc: str
) -> Iterator[tuple[str, _Result]]:
    """Yield (prefix, result) of each job, as they are done."""
    jobs = list(jobs)
    with tqdm(total=sum(len(job.work) for job in jobs), desc=desc, unit="clip", disable=None) as bar:
        for job, result in _alone(function, jobs) if workers == 1 else _pooled(function, jobs, workers):
            bar.update(len(job.work))
            yield job.prefix, result


def _alone(function: Callable[[Job], _Result], jobs: list[Job]) -> Iterator[tuple[Job, _Result]]:
    return ((job, function(job)) for job in jobs)


def _pooled(function: Callable[[Job], _Result], jobs: list[Job], workers: int) -> Iterator[tuple[Job, _Result]]:
    # Spawned and not forked: a fork of a process whose threads hold locks can hang.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, max(1, len(jobs))), mp_context=spawn, initializer=_end_with_parent)
    try:
        started = {pool.submit(function, job): job for job in jobs}
        for done in as_completed(started):
            yield started[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this worker when the process that started it is killed; it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are started by another process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
