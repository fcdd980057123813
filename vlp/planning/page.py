"""The plan as a page of text."""

from collections.abc import Iterator, Mapping
from typing import Any

from vlp.planning.memory import GIB

Values = Mapping[str, Any]


def page(name: str, cfg: Any, plan: Values) -> str:
    """Return the plan of a config, section by section."""
    sections = (
        _head(name, cfg, plan),
        _parts(plan),
        _flops(plan),
        _memory(cfg, plan),
        _time(cfg, plan),
        _assumed(plan),
    )
    return "\n".join(line for section in sections for line in section)


def _head(name: str, cfg: Any, plan: Values) -> Iterator[str]:
    cluster, trainer = cfg.cluster, cfg.trainer
    yield f"Plan of '{name}' on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}, {trainer.precision}"
    yield (
        f"  a step: {cfg.data.batch_size:,} clips of {_frames(cfg.clip.num_frames)} of {cfg.clip.size} pixels, "
        f"{plan['micro_batch']} a GPU" + (f", in {trainer.accumulate} micro-batches" if trainer.accumulate > 1 else "")
    )


def _frames(number: int) -> str:
    return "1 frame" if number == 1 else f"{number} frames"


def _parts(plan: Values) -> Iterator[str]:
    yield "\nParameters                                 all      trainable"
    for row in plan["parts"]:
        yield f"  {row['name']:<28} {row['parameters']:>14,} {row['trainable']:>14,}"
    share = plan["trainable"] / plan["parameters"]
    yield f"  {'in all':<28} {plan['parameters']:>14,} {plan['trainable']:>14,}  ({share:.1%} trainable)"
    for name, count in plan["dropped"].items():
        yield f"  {name}: used by no objective, {count:,} parameters dropped"


def _flops(plan: Values) -> Iterator[str]:
    work = plan["flops"]
    yield "\nGFLOPs a clip                          forward       backward"
    for row in work["by_quantity"]:
        yield f"  {row['name']:<32} {row['forward'] / 1e9:>11,.4g} {row['backward'] / 1e9:>14,.4g}"
    if work["second_pass"]:
        yield f"  {'embeddings before the step':<32} {work['second_pass'] / 1e9:>11,.4g} {0:>14}   (whole_step)"
    yield f"  a GPU's step: {work['step'] / 1e12:,.4g} TFLOPs in {work['kernels']:,} kernels"


def _memory(cfg: Any, plan: Values) -> Iterator[str]:
    used = "recomputed" if cfg.trainer.checkpoint_activations else "kept"
    room = plan["room_bytes"] / GIB
    yield f"\nMemory a GPU in GiB, of {room:.1f} (micro-batch {plan['micro_batch']}; this config: activations {used})"
    yield (
        "                    weights  grads  optim.    EMA  comm.  contrast "
        "| activations      total  largest micro-batch"
    )
    yield "                                                               | kept  recomp.  kept  recomp.  kept  recomp."
    for name, row in plan["memory"].items():
        kept = [row[key] / GIB for key in ("weights", "gradients", "optimizer", "average", "buckets", "contrast")]
        cells = "".join(f"{value:>8.2f}" for value in kept)
        kinds = [row["kept"], row["recomputed"]]
        active = "".join(f"{kind['activations'] / GIB:>8.2f}" for kind in kinds)
        total = "".join(f"{kind['total'] / GIB:>8.2f}" for kind in kinds)
        fits = "".join(f"{kind['largest_micro_batch']:>7,}" for kind in kinds)
        host = f"  + {row['host'] / GIB:.1f} on the host" if row["host"] else ""
        yield f"  {name:<17}{cells} |{active}{total}{fits}{host}"
    chosen = _chosen(cfg, plan)
    total = plan["memory"][chosen][used]["total"] / GIB
    verdict = "fits" if total <= room else f"does NOT fit{_what_fits(cfg, plan['micro_batch'], plan['memory'][chosen])}"
    yield f"  {chosen} with activations {used}: {total:.1f} GiB of {room:.1f}: {verdict}"


def _what_fits(cfg: Any, micro_batch: int, row: Values) -> str:
    """Return what makes the same batch fit on the same GPUs: the fewest micro-batches, with activations kept or not."""
    ways = []
    for kind in ("kept", "recomputed"):
        largest = row[kind]["largest_micro_batch"]
        parts = next((n for n in range(1, micro_batch + 1) if micro_batch % n == 0 and micro_batch // n <= largest), 0)
        words = [f"trainer.accumulate={cfg.trainer.accumulate * parts}"] if parts > 1 else []
        words += ["trainer.checkpoint_activations=true"] if kind == "recomputed" else []
        ways += [" ".join(words)] if parts else []
    return f"; what would: {', or '.join(ways)}" if ways else "; neither does a micro-batch of 1"


def chosen_time(cfg: Any, plan: Values) -> Values:
    """Return the times under the strategy that the config names."""
    return plan["times"][_chosen(cfg, plan)]


def _time(cfg: Any, plan: Values) -> Iterator[str]:
    yield (
        "\nTime              step s   compute  optimizer  gather  exchange (exposed)   clips/s   goodput    hours"
        "   GPU-hours"
    )
    for name, row in plan["times"].items():
        yield (
            f"  {name:<14} {row['step_s']:>8.3f}  {row['compute_s']:>8.3f}   {row['optimizer_s']:>8.3f} "
            f"{row['gather_s']:>7.3f}  {row['exchange_s']:>8.3f} ({row['exposed_s']:.3f})  {row['clips_per_s']:>9,.0f}"
            f"  {row['goodput']:>7.1%} {row['hours']:>8,.1f}  {row['gpu_hours']:>10,.0f}"
        )
    row, cluster = chosen_time(cfg, plan), cfg.cluster
    yield f"  {row['steps']:,} steps are {row['epochs']:.2f} epochs of {cluster.num_clips:,} clips"
    yield (
        f"  failures: one in {row['mtbf_hours']:,.1f} h on {plan['ranks']} GPUs; save every "
        f"{row['save_every_s'] / 60:.0f} min ({round(row['save_every_s'] / row['step_s']):,} steps)"
    )
    share = row["decode_cores_per_node"] / cluster.cores_per_node
    enough = "enough" if share <= 1 else f"NOT ENOUGH: clips will be waited for, {share:.1f} times the hours above"
    each = cluster.storage_kinds[cluster.stored_as]["decode_ms"]
    yield "\nData and storage"
    yield (
        f"  decoding ({cluster.stored_as}, {each:g} ms a clip, as measured for 8 frames of 10 s): "
        f"{row['decode_cores_per_node']:,.1f} cores a node of {cluster.cores_per_node}: {enough}"
    )
    yield f"  reading: {row['read_mb_s_per_node']:,.0f} MB/s a node; the data set: {row['data_tb']:,.2f} TB"
    yield f"  a checkpoint: {row['checkpoint_gb']:.2f} GB; {cfg.trainer.keep_checkpoints} are kept"


def _assumed(plan: Values) -> Iterator[str]:
    assumed, card = plan["assumed"], plan["gpu"]
    network = assumed["network_gb_s"] or card["network_gb_s"]
    yield "\nAssumed (change with cluster.KEY=VALUE; the card's figures are in conf/gpu/)"
    yield (
        f"  {assumed['gpu']}: {card['memory_gib']} GiB of which {assumed['reserved_gib']} are set aside, "
        f"{card['bf16_tflops']:g} TFLOP/s in 16 bits, {card['fp32_tflops']:g} in 32, {card['hbm_gb_s']:g} GB/s"
    )
    yield f"  {card['link_gb_s']:g} GB/s between GPUs of a node, {network:g} GB/s a GPU between nodes"
    yield (
        f"  utilisation {assumed['utilisation']:.0%} of that rate, over all operations that run, recomputed ones too,"
    )
    yield (
        f"  and at least {assumed['launch_us']:g} us a kernel; gradients are exchanged during the backward pass, "
        "two thirds of the computing"
    )
    yield "  clips and captions are full: clip.num_frames frames, tokenizer.max_length tokens; data never waits"
    yield (
        f"  a save stalls {assumed['save_stall_s']} s and is durable after {assumed['save_write_s']} s, a restart "
        f"takes {assumed['restart_s']} s, a GPU fails once in {assumed['gpu_mtbf_hours']:,} h"
    )


def _chosen(cfg: Any, plan: Values) -> str:
    """The strategy of the config, where the plan has it."""
    return cfg.trainer.strategy if cfg.trainer.strategy in plan["memory"] else next(iter(plan["memory"]))
