"""The whole plan of a config as plain values: what `python plan.py --json` prints and the page shows."""

from typing import Any

from omegaconf import DictConfig

from vlp import config
from vlp.planning import cluster, goodput, memory
from vlp.planning.system import Planned, build
from vlp.planning.trace import Cost, Peak, costs, peak
from vlp.training.assemble import plain

TRACED = 2  # clips of the micro-batch whose FLOPs are counted


def estimate(cfg: DictConfig) -> dict[str, Any]:
    """Return the plan of a checked config.

    Raises:
        config.ConfigError: parts that do not fit, a batch that the ranks cannot share, names that mean nothing.
    """
    ranks, micro = _shares(cfg)
    card = cluster.gpu(cfg.cluster.gpu)
    planned = build(cfg)
    counts = _sizes(cfg, planned, ranks)
    work = _work(cfg, planned, micro)
    peaks = {kind: _peaks(cfg, micro, checkpointed=kind == "recomputed") for kind in ("kept", "recomputed")}
    used = peaks["recomputed" if cfg.trainer.checkpoint_activations else "kept"][0]
    work["kernels"] = used.kernels * cfg.trainer.accumulate
    room = (card.memory_gib - cfg.cluster.reserved_gib) * memory.GIB
    rows = {
        name: _memory(cfg, make(counts), peaks, micro=micro, room=room, zero=name.startswith("zero"))
        for name, make in memory.STRATEGIES.items()
        if (name == "single") == (ranks == 1)
    }
    return {
        "ranks": ranks,
        "micro_batch": micro,
        "parts": _parts(planned),
        "dropped": planned.dropped,
        "parameters": counts.parameters,
        "trainable": counts.trainable,
        "flops": work,
        "memory": rows,
        "room_bytes": room,
        "times": {name: _time(cfg, name, card, counts, work) for name in rows if "offload" not in name},
        "gpu": card._asdict(),
        "assumed": plain(cfg.cluster),
    }


def _shares(cfg: DictConfig) -> tuple[int, int]:
    """Return the number of ranks and the clips of a micro-batch."""
    ranks = cfg.cluster.nodes * cfg.cluster.gpus_per_node
    parts = ranks * cfg.trainer.accumulate
    micro, left = divmod(cfg.data.batch_size, parts)
    if left or not micro:
        raise config.ConfigError(
            [
                f"data.batch_size: {cfg.data.batch_size} clips cannot be shared by {ranks} GPUs in "
                f"{cfg.trainer.accumulate} micro-batches; set it to a multiple of {parts}, or change cluster.nodes, "
                "cluster.gpus_per_node or trainer.accumulate."
            ]
        )
    if cfg.cluster.stored_as not in cfg.cluster.storage_kinds:
        known = ", ".join(cfg.cluster.storage_kinds)
        raise config.ConfigError([f"cluster.stored_as: '{cfg.cluster.stored_as}' is not known; use one of {known}."])
    return ranks, micro


def _sizes(cfg: DictConfig, planned: Planned, ranks: int) -> memory.Sizes:
    weight_bytes = 2 if cfg.trainer.precision == "bf16-true" else 4
    return memory.sizes(planned.module, weight_bytes=weight_bytes, ema=cfg.optim.ema_decay is not None, ranks=ranks)


def _parts(planned: Planned) -> list[dict[str, Any]]:
    owners = {**dict(planned.system.model.named_children()), **planned.system.objectives}
    counted = [
        {
            "name": name,
            "parameters": sum(p.numel() for p in part.parameters()),
            "trainable": sum(p.numel() for p in part.parameters() if p.requires_grad),
        }
        for name, part in owners.items()
    ]
    return [row for row in counted if row["parameters"]]


def _work(cfg: DictConfig, planned: Planned, micro: int) -> dict[str, Any]:
    """FLOPs of a clip by quantity, and of a rank's step."""
    system, accumulate = planned.system, cfg.trainer.accumulate
    spanning = {name: spans for name, part in system.objectives.items() if (spans := getattr(part, "spans", ()))}
    rows = []
    for cost in costs(planned, TRACED):
        name = cost.name.removeprefix("objective ")
        # Each clip meets all others of the step, or of its micro-batch; the trace had TRACED of them.
        times = cfg.data.batch_size if name in spanning else micro * cfg.cluster.nodes * cfg.cluster.gpus_per_node
        times = times / TRACED if hasattr(system.objectives.get(name), "spans") else 1.0
        rows.append(Cost(cost.name, round(cost.forward * times / TRACED), round(cost.backward * times / TRACED)))
    again = 0
    if accumulate > 1 and spanning:
        nodes = [system.wirings[name][role] for name, spans in spanning.items() for role in spans]
        wanted = {str(step.node) for step in system.graph.plan(nodes)}
        again = sum(row.forward for row in rows if row.name in wanted)
    clip = sum(row.forward + row.backward for row in rows)
    return {
        "by_quantity": [row._asdict() for row in rows],
        "clip": clip,
        "second_pass": again,
        "step": (clip + again) * micro * accumulate,
    }


def _peaks(cfg: DictConfig, micro: int, *, checkpointed: bool) -> tuple[Peak, Peak]:
    """Trace the micro-batch, and one twice as large."""
    planned = build(cfg, checkpointed=checkpointed)
    return peak(planned, micro), peak(planned, 2 * micro)


def _memory(
    cfg: DictConfig, kept: memory.Memory, peaks: dict[str, tuple[Peak, Peak]], *, micro: int, room: float, zero: bool
) -> dict[str, Any]:
    accumulate, clips = cfg.trainer.accumulate, cfg.data.batch_size
    gathered = memory.gathered_bytes(
        clips=clips, width=cfg.model.embed_dim, own=micro * accumulate, accumulate=accumulate
    )
    row: dict[str, Any] = {**kept._asdict(), "contrast": gathered}
    for kind, pair in peaks.items():
        one, two = (memory.micro_bytes(p, grads_are_kept=zero or accumulate > 1) for p in pair)
        fits = memory.largest_micro_batch((micro, one), (2 * micro, two), room - kept.kept - gathered)
        row[kind] = {"activations": one, "total": kept.kept + gathered + one, "largest_micro_batch": fits}
    return row


def _time(cfg: DictConfig, strategy: str, card: cluster.Gpu, counts: memory.Sizes, work: dict) -> dict[str, Any]:
    section, trainer = cfg.cluster, cfg.trainer
    kept = memory.STRATEGIES[strategy](counts)
    step = cluster.step_time(
        card,
        flops=work["step"],
        kernels=work["kernels"],
        half=trainer.precision != "32-true",
        kept_bytes=kept.optimizer + kept.gradients + kept.average,
        exchanged_bytes=cluster.exchanged(
            strategy,
            counts.weight_bytes * counts.trainable,
            counts.weight_bytes * counts.parameters,
            trainer.accumulate,
        ),
        gathered_bytes=2 * cfg.data.batch_size * cfg.model.embed_dim * 4 if counts.ranks > 1 else 0,
        cluster=section,
    )
    steps = round(section.epochs * section.num_clips / cfg.data.batch_size) if section.epochs else trainer.max_steps
    saving = goodput.Saving(section.save_stall_s, max(section.save_write_s, section.save_stall_s), section.restart_s)
    mtbf_s = section.gpu_mtbf_hours * 3600 / counts.ranks
    kind = section.storage_kinds[section.stored_as]
    rate = cfg.data.batch_size / step.total_s
    good = goodput.goodput(saving, mtbf_s)
    hours = steps * step.total_s / 3600 / good
    return {
        **step._asdict(),
        "step_s": step.total_s,
        "clips_per_s": rate,
        "steps": steps,
        "epochs": steps * cfg.data.batch_size / section.num_clips,
        "mtbf_hours": mtbf_s / 3600,
        "save_every_s": goodput.best_interval_s(saving, mtbf_s),
        "goodput": good,
        "hours": hours,
        "gpu_hours": hours * counts.ranks,
        "decode_cores_per_node": cluster.decode_cores(rate / section.nodes, kind),
        "read_mb_s_per_node": rate / section.nodes * kind["megabytes"],
        "data_tb": section.num_clips * kind["megabytes"] / 1e6,
        "checkpoint_gb": (counts.weight_bytes * counts.parameters + (8 + 4 * counts.ema) * counts.trainable) / 1e9,
    }
