"""A run directory as the trainer leaves it, made without training: real JPEG strips, random walks for the curves.

`python tests/fake_run.py DIRECTORY` writes one to look at.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": "#d8433b", "green": "#3aa655", "blue": "#3b6fd8", "yellow": "#e3b52f", "purple": "#8b4bc0"}
SHAPES = ("circle", "square", "triangle")
MOTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1), "grows": (0, 0)}
METRICS = (("t2v", "text-to-video"), ("v2t", "video-to-text"))
LOSSES = {"contrastive": (3.4, 0.6), "matching": (0.72, 0.2), "masked_words": (6.1, 1.4), "captioning": (6.3, 1.1)}


def draw_strip(path: Path, colour: str, shape: str, motion: str, size: int = 112, num_frames: int = 8) -> None:
    """Draw a clip of a moving shape as a strip of square frames."""
    strip = Image.new("RGB", (size * num_frames, size), "#20242c")
    draw = ImageDraw.Draw(strip)
    (dx, dy), middle = MOTIONS[motion], size / 2
    for frame in range(num_frames):
        at = (frame / (num_frames - 1) - 0.5) * 0.6 * size
        radius = size * (0.08 + 0.03 * frame) if motion == "grows" else size * 0.17
        x, y = size * frame + middle + dx * at, middle + dy * at
        draw.rectangle((size * frame, 0, size * frame + size - 1, size), fill=("#2a303b", "#262b35")[frame % 2])
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            draw.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            draw.rectangle(box, fill=COLOURS[colour])
        else:
            draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=COLOURS[colour])
    path.parent.mkdir(parents=True, exist_ok=True)
    strip.save(path, quality=85)


def draw_strips(directory: Path, rng: np.random.Generator, number: int) -> list[tuple[str, str]]:
    """Return captions and paths of `number` strips."""
    strips = []
    for index in range(number):
        colour, shape, motion = (rng.choice(list(names)) for names in (COLOURS, SHAPES, MOTIONS))
        name = f"eval/media/clip-{index:03d}.jpg"
        draw_strip(directory / name, colour, shape, motion)
        strips.append((f"a {colour} {shape} {motion}, then stops", name))
    return strips


def write_metrics(path: Path, rng: np.random.Generator, steps: int) -> None:
    """Write metrics.csv: falling losses with noise, a warm-up and a cosine, data waits now and then."""
    names = [f"train/{name}{end}" for name in LOSSES for end in ("", "_count")]
    header = ["step", "train/loss", *names, "train/lr", "train/logit_scale", "train/grad_norm"]
    header += ["time/step_s", "time/data_wait_s", "data/clips_per_s"]
    lines = [",".join(header)]
    for step in range(1, steps + 1):
        done = step / steps
        losses = [low + (high - low) * math.exp(-4 * done) for high, low in LOSSES.values()]
        losses = [loss * (1 + 0.09 * rng.standard_normal()) for loss in losses]
        counts = [32, 64, int(rng.integers(60, 90)), int(rng.integers(300, 400))]
        rate = 5e-4 * (min(1, 10 * done) if done < 0.1 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9))
        wait = 0.004 + 0.01 * rng.random() + (0.12 if rng.random() < 0.02 else 0)
        step_s = 0.41 + 0.03 * rng.random() + wait
        pairs = [cell for loss, number in zip(losses, counts, strict=True) for cell in (f"{loss:.5f}", str(number))]
        cells = [step, f"{sum(losses):.5f}", *pairs, f"{rate:.3e}", f"{14.3 + 16 * done:.4f}"]
        cells += [f"{1.8 - done + 0.3 * rng.random():.4f}", f"{step_s:.4f}", f"{wait:.4f}", f"{32 / step_s:.2f}"]
        lines.append(",".join(map(str, cells)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows(done: float, rng: np.random.Generator) -> list[dict]:
    """Return the metrics of a retrieval task after a share of the training."""
    found = []
    for key, name in METRICS:
        for k, best in ((1, 41.0), (5, 73.5), (10, 86.0)):
            raw = round(0.5 * k + (best - 0.5 * k) * done**0.7 + rng.normal(), 1)
            values = {"raw": raw, "dual_softmax": round(raw + 3 * done, 1), "chance": 0.5 * k, "unit": "%", "num": 200}
            found.append({"metric": f"{name} R@{k}", "key": f"{key}_r{k}", "higher_is_better": True, **values})
        rank = {"raw": round(100 - 98 * done**0.5), "dual_softmax": None, "chance": 100.5, "unit": ""}
        found.append({"metric": f"{name} median rank", "key": f"{key}_medr", "higher_is_better": False, **rank})
    return found


def retrieval_examples(strips: list[tuple[str, str]], rng: np.random.Generator) -> list[dict]:
    """Return queries of which every other one is answered rightly."""
    examples = []
    for index in range(8):
        rank = 1 if index % 2 == 0 else int(rng.integers(2, 9))
        scores = sorted(rng.uniform(0.4, 0.9, 5).tolist(), reverse=True)
        results = []
        for place, score in enumerate(scores, 1):
            correct = place == rank
            caption, strip = strips[index] if correct else strips[(index * 5 + place + 9) % len(strips)]
            results.append(
                {"key": f"w{place:04d}", "caption": caption, "score": score, "correct": correct, "strip": strip}
            )
        examples.append({"kind": "retrieval", "query": strips[index][0], "rank": rank, "results": results})
    return examples


def choice_examples(strips: list[tuple[str, str]]) -> list[dict]:
    """Return true captions against the same events in another order."""
    examples = []
    for index, (caption, strip) in enumerate(strips[:6]):
        first, then = caption.split(", then ")
        correct = index % 3 != 2
        score, negative = (0.71, 0.38) if correct else (0.44, 0.52)
        texts = {"caption": f"{first}, then it {then}", "negative": f"it {then}, then {first}"}
        scores = {"score": score, "negative_score": negative, "correct": correct}
        examples.append({"kind": "choice", "strip": strip, **texts, **scores})
    return examples


def write_evaluation(directory: Path, step: int, done: float, strips: list, rng: np.random.Generator) -> None:
    """Write eval/step-NNNNNN.json with three tasks."""
    probe = {"metric": "order chosen rightly", "key": "accuracy", "raw": round(50 + 33 * done + rng.normal(), 1)}
    probe |= {"dual_softmax": None, "chance": 50.0, "unit": "%", "higher_is_better": True}
    captions = [
        {
            "kind": "caption",
            "generated": text.replace("then", "and then"),
            "references": [text, text[2:]],
            "strip": strip,
        }
        for text, strip in strips[6:10]
    ]
    overlap = {"metric": "BLEU-4", "key": "bleu4", "raw": round(58 * done, 1), "dual_softmax": None, "chance": None}
    overlap |= {"unit": "%", "higher_is_better": True}
    tasks = {
        "retrieval": {
            "title": "Text-video retrieval",
            "rows": rows(done, rng),
            "examples": retrieval_examples(strips, rng),
        },
        "temporal_probe": {"title": "Order in time", "rows": [probe], "examples": choice_examples(strips)},
        "captions": {"title": "Captioning", "rows": [overlap], "examples": captions},
    }
    head = {"step": step, "source": "world", "split": "test", "num_clips": 200, "trained_on_these": False}
    path = directory / "eval" / f"step-{step:06d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, "tasks": tasks}), encoding="utf-8")


def graph() -> dict:
    """Return graph.json of a two-tower system with fusion, decoder and four objectives."""
    words = "masked_words"
    nodes = [
        ("pixels", "", ["frames"], [], 0),
        ("video", "", ["pixels", "frame_mask"], ["video_encoder"], 5_526_528),
        ("text", "", ["text_ids", "text_mask"], ["text_encoder"], 3_100_672),
        ("video_embed", "", ["video"], ["video_pool", "video_projection"], 49_408),
        ("text_embed", "", ["text"], ["text_pool", "text_projection"], 49_152),
        ("logit_scale", "", [], ["temperature"], 1),
        ("text", words, [f"text_ids:{words}", "text_mask"], ["text_encoder"], 3_100_672),
        ("fused", words, ["video", f"text:{words}"], ["fusion"], 2_370_000),
        ("fused_text", words, [f"fused:{words}"], [], 0),
        ("fused", "wrong_text", ["video", "text:wrong_text"], ["fusion"], 2_370_000),
        ("fused_text", "wrong_text", ["fused:wrong_text"], [], 0),
        ("fused", "", ["video", "text"], ["fusion"], 2_370_000),
        ("fused_text", "", ["fused"], [], 0),
        ("caption_logits", "", ["video", "text_ids", "text_mask"], ["decoder"], 3_420_000),
    ]
    views = [
        {"name": words, "reads": ["text_ids", "word_ids", "key"], "writes": ["text_ids", "labels"]},
        {
            "name": "wrong_text",
            "reads": ["text", "text_embed", "video_embed", "key"],
            "writes": ["text", "has_wrong_text"],
        },
    ]
    wiring = {
        "contrastive": {"video": "video_embed", "text": "text_embed", "scale": "logit_scale", "valid": "valid"},
        "matching": {"right": "fused_text", "wrong": "fused_text:wrong_text", "has": "has_wrong_text:wrong_text"},
        "masked_words": {"tokens": f"fused_text:{words}", "labels": f"labels:{words}"},
        "captioning": {"logits": "caption_logits", "ids": ["text_ids", "text_mask"]},
    }
    keys = ("name", "view", "needs", "parts", "parameters")
    return {
        "fields": ["frames", "frame_mask", "times_s", "text_ids", "text_mask", "word_ids", "valid", "key"],
        "nodes": [{**dict(zip(keys, node, strict=True)), "calls": 1} for node in nodes],
        "views": views,
        "objectives": [{"name": name, "weight": 1.0, "inputs": inputs} for name, inputs in wiring.items()],
    }


def run_json(status: str, step: int, max_steps: int) -> dict:
    """Return run.json of a run with two sources, of which one dropped samples."""
    parts = [("video_encoder", 5_526_528, 5_526_528), ("text_encoder", 3_100_672, 0), ("fusion", 2_370_000, 2_370_000)]
    parts += [("decoder", 3_420_000, 3_420_000), ("video_projection", 49_152, 49_152), ("temperature", 1, 1)]
    reasons = [("video_broken", "index", "no decodable frame"), ("caption_missing", "prepare", "")]
    reasons += [
        ("video_truncated", "train", "ends at 1.92 s, wanted 2.40 s"),
        ("video_broken", "index", "no container"),
    ]
    dropped = [
        {"key": f"clip_{n:05d}", "where": f"my_videos-{n % 3:06d}.tar", "reason": r, "stage": s, "detail": d}
        for n in range(5)
        for r, s, d in reasons[: 4 - n % 3]
    ]
    source = {"train": 4000, "test": 200, "fingerprint": "9f3ac1d2" * 8, "weight": 1.0, "seen": 32 * step}
    other = {"train": 612, "test": 40, "fingerprint": "07be44aa" * 8, "weight": 0.25, "seen": 8 * step}
    machine = {"device": "2 x CPU, x86-64", "attention": "sdpa", "precision": "bf16-mixed"}
    return {
        "name": "world_two_tower",
        "status": status,
        "exit_code": {"finished": 0, "failed": 79, "preempted": 75}.get(status),
        "step": step,
        "max_steps": max_steps,
        "experiment": "two_tower",
        "command": "python train.py +experiment=two_tower data=world trainer.max_steps=600 objective.matching.weight=1",
        "started": "2026-11-23T00:47:12+00:00",
        "seconds": 743.4,
        "attempts": 2,
        "environment": {"python": "3.11.9", "torch": "2.14.0", **machine, "commit": "4be1f02c9a"},
        "parts": [{"name": n, "parameters": p, "trainable": t, "dropped": n == "decoder"} for n, p, t in parts],
        "sources": [
            {"name": "world", "test_is_train": False, "dropped": [], **source},
            {"name": "my_videos", "test_is_train": False, "dropped": dropped, **other},
        ],
    }


def write_run(directory: Path, *, status: str = "finished", step: int = 600, max_steps: int = 600) -> Path:
    """Write a whole run directory and return it."""
    rng = np.random.default_rng(5)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.json").write_text(json.dumps(run_json(status, step, max_steps)), encoding="utf-8")
    (directory / "graph.json").write_text(json.dumps(graph()), encoding="utf-8")
    (directory / "config.yaml").write_text("clip:\n  num_frames: 8\n  size: 112\ntrainer:\n  max_steps: 600\n")
    write_metrics(directory / "metrics.csv", rng, step)
    strips = draw_strips(directory, rng, 24)
    for at in range(max(1, step // 4), step + 1, max(1, step // 4)):
        write_evaluation(directory, at, at / max_steps, strips, rng)
    return directory


if __name__ == "__main__":
    print(write_run(Path(sys.argv[1])))
