"""A sweep's directory as it looks when most cells are done, one failed, one was stopped and one has not begun.

`python tests/fake_sweep.py DIRECTORY` writes one to look at.
"""

import json
import sys
from pathlib import Path

import numpy as np
from fake_run import write_metrics

from vlp.report.cells import CellFile, SweepFile, write_sweep

WEIGHTS, SEEDS, MAX_STEPS = ("0", "0.5", "1"), (0, 1, 2), 400
COMMAND = (
    "python train.py -m +experiment=quickstart objective.contrastive.weight=0,0.5,1 run.seed=0,1,2 run.name=weights"
)
R1 = {"0": (2.0, 2.5, 1.5), "0.5": (80.0, 82.0, 81.5), "1": (85.0, 86.0, 85.5)}  # by seed


def write_sweep_dir(directory: Path, *, broken: bool = True) -> Path:
    """Write the directory and return it; with `broken`, cells of the last two weights are not done."""
    cells = [_cell(weight, seed) for weight in WEIGHTS for seed in SEEDS]
    (directory / "_logs").mkdir(parents=True)
    keys = {"contrastive.weight": "objective.contrastive.weight"}
    write_sweep(directory, SweepFile("weights", COMMAND, "contrastive.weight=0.5", keys, tuple(cells)))
    for cell, ending in zip(cells, _endings(broken), strict=True):
        _run(directory, cell, ending)
    return directory


def _endings(broken: bool) -> list[str]:
    return ["finished"] * 5 + (["failed", "finished", "preempted", "waiting"] if broken else ["finished"] * 4)


def _cell(weight: str, seed: int) -> CellFile:
    group = f"contrastive.weight={weight}"
    changes = {"contrastive.weight": weight}
    overrides = ("+experiment=quickstart", f"objective.contrastive.weight={weight}", f"run.seed={seed}")
    return CellFile(f"{group},seed={seed}", group, str(seed), changes, overrides)


def _run(directory: Path, cell: CellFile, ending: str) -> None:
    if ending == "waiting":
        return
    place, code = directory / cell.name, {"finished": 0, "failed": 79, "preempted": 75}[ending]
    step = MAX_STEPS if ending == "finished" else MAX_STEPS * 3 // 4
    record = {"name": cell.name, "status": ending, "exit_code": code, "step": step, "max_steps": MAX_STEPS}
    record |= {"experiment": "quickstart", "command": "python train.py", "started": "2026-11-24T10:00:00+00:00"}
    record |= {"seconds": 412.0, "attempts": 1, "environment": {}, "parts": [], "sources": []}
    (place / "eval").mkdir(parents=True)
    (place / "run.json").write_text(json.dumps(record))
    for name, content in (("graph.json", "{}"), ("config.yaml", "a: 1\n"), ("report.html", "<p>a run</p>")):
        (place / name).write_text(content)
    rng = np.random.default_rng(int(cell.seed or 0))
    write_metrics(place / "metrics.csv", rng, step)
    for at in range(100, step + 1, 100):
        (place / "eval" / f"step-{at:06d}.world.json").write_text(json.dumps(_evaluation(cell, at)))
    lines = "stopped: step 300: the gradient is not finite: contrastive=nan\nReport: report.html\n"
    (directory / "_logs" / f"{cell.name}.log").write_text(lines if ending == "failed" else "finished\n")
    (directory / "_logs" / f"{cell.name}.exit").write_text(f"{code}\n")


def _evaluation(cell: CellFile, step: int) -> dict:
    done = (step / MAX_STEPS) ** 0.5
    r1 = R1[cell.changes["contrastive.weight"]][int(cell.seed or 0)] * done
    rows = [_row("t2v_r1", "text-to-video R@1", r1, 0.5), _row("v2t_r1", "video-to-text R@1", r1 * 0.9, 0.5)]
    rows.append(_row("t2v_medr", "median rank", 100 / (r1 + 1), 100.0) | {"unit": "", "higher_is_better": False})
    probe = [_row("temporal", "accuracy by cosine", 50 + r1 * 0.4, 50.0)]
    head = {"step": step, "source": "world", "split": "test", "num_clips": 200, "trained_on_these": False}
    tasks = {"retrieval": {"title": "Text-video retrieval", "rows": rows, "examples": []}}
    tasks["temporal_probe"] = {"title": "Order in time", "rows": probe, "examples": []}
    return {**head, "tasks": tasks}


def _row(key: str, metric: str, raw: float, chance: float) -> dict:
    return {
        "metric": metric,
        "key": key,
        "raw": round(raw, 2),
        "dual_softmax": None,
        "chance": chance,
        "unit": "%",
        "higher_is_better": True,
        "num": 200,
    }


if __name__ == "__main__":
    print(write_sweep_dir(Path(sys.argv[1])))
