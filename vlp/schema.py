"""The sections of a config: their keys, the types of the values, and the units in the names.

A section is a dataclass; a part (`video`, `objective.*`, ...) is an open map whose `_target_` names the class that is
built from it.
"""

import dataclasses
from typing import Annotated, Any

from vlp.hints import Node


class Parts(frozenset[str]):
    """Marks a section of named nodes with `_target_`; holds the keys that a node may have beside its arguments."""


@dataclasses.dataclass
class Run:
    name: str
    seed: int
    tiny: bool  # every part in the small size that its file states; of the scales for tests and laptops
    resume: bool  # continue the run of this name if there is one
    stop_after: int | None  # commit and stop after this many steps of this attempt (exit 75), as a preemption would
    allow: list[str]  # keys that may differ from the attempt before although they change the training
    hold_after: int | None  # failures in a row at one step, after which the run is not started again; null = never


@dataclasses.dataclass
class Zero:
    offload_optimizer: bool  # moments and float32 masters in the memory of the host
    offload_parameters: bool  # the weights too, between their uses; zero3 only
    bucket_elements: int  # most numbers of one reduction or gathering
    persistent_elements: int  # zero3: parameters up to this size stay whole on every rank


@dataclasses.dataclass
class Trainer:
    max_steps: int
    accumulate: int  # micro-batches of an optimizer step
    precision: str
    strategy: str  # auto | ddp | zero1 | zero2 | zero3
    zero: Zero  # read by zero1 to zero3 only
    devices: int | str
    num_nodes: int
    clip_grad_norm: float | None
    nan_policy: str  # stop | skip | rewind: what to do with a step whose gradient is not finite
    max_skipped_steps: int
    max_rewinds: int
    spike_factor: (
        float | None
    )  # a step whose loss or gradient norm is above so many times the median is bad; null = off
    spike_window: int  # steps of that median
    spike_policy: str  # stop | skip | rewind
    timeout_s: float | None  # a rank that makes no progress in a step for so long hangs (exit 80); null = never
    max_time_s: float | None  # commit and stop in time before so many seconds have passed (exit 75)
    check_replicas_every: int | None  # steps between comparisons of the ranks' weights (exit 83); null = never
    ledger: bool  # write what each step read and computed, to the last bit
    bad_sample_budget: float  # share of the slots that may be unusable before the run stops with exit 65
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    checkpoint_async: bool  # write checkpoints in the background, from a copy in CPU memory
    compile: bool  # torch.compile of each transformer block
    checkpoint_activations: bool
    num_threads: int | None
    progress_bar: bool


@dataclasses.dataclass
class Clip:
    modality: str  # what the pictures show; all sources that say what they hold must hold this
    decoder: Node  # bytes of the video part of a sample -> pictures
    num_frames: int
    size: int  # pixels from top to bottom that the model sees
    width: int  # from left to right; `size` but for spectrograms
    short_side: int  # pixels to which the decoder scales the shorter side
    more_clips: int  # other clips of each training sample, out of the same decode
    sampling_train: Node
    sampling_test: Node
    transforms_train: list[Node]
    transforms_test: list[Node]


@dataclasses.dataclass
class Tokenizer:
    name: str | None  # Hugging Face name or local path; null trains one on the captions
    revision: str | None
    vocab_size: int
    max_length: int
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int | None


@dataclasses.dataclass
class Data:
    batch_size: int  # clips of an optimizer step, over all ranks and micro-batches
    num_lanes: int
    window_shards: int
    bucket_steps: int  # steps whose samples are dealt again by size, so that little is padded; 1 = as they come
    balance: bool  # deal the clips of a step by size, so that no rank waits for another
    num_workers: int
    decode_timeout_s: float  # a sample that takes its loader worker longer is given up, after a second try
    outage_s: float  # storage that gives no answer is waited for so long, then the run saves and stops (exit 74)
    worker_memory_gib: float | None  # a sample that takes more is lost, see vlp.data.sandbox; null = no cap
    videos: str | None
    captions: str | None
    holdout: float
    index_dir: str  # where the indexes of remote shards lie
    cache_dir: str | None  # on a local disk, where remote shards are kept; null reads them by range
    cache_gib: float  # the most that it holds
    sources: Annotated[dict[str, Any], Parts({"weight", "modality"})]


@dataclasses.dataclass
class Init:
    run: str | None  # whose weights this run starts with: a run's directory, a checkpoint or a .safetensors file
    skip: list[str]  # patterns of names that are not taken from it, such as objectives.*
    rename: dict[str, str]  # how a name begins there -> how it begins here: a part of it is another part of this run


@dataclasses.dataclass
class Optim:
    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    layer_decay: float | None
    lr_factors: dict[str, float]  # pattern of parameter names -> factor
    freeze: list[str]  # patterns of parameter names
    ema_decay: float | None


@dataclasses.dataclass
class Eval:
    every: int | None  # steps between evaluations; null evaluates at the end only
    batch_size: int
    tasks: Annotated[dict[str, Any], Parts()]


@dataclasses.dataclass
class Paths:
    runs: str
    data: str


@dataclasses.dataclass
class Cluster:
    """What plan.py assumes of machines, data and failures; training reads none of it."""

    nodes: int
    gpus_per_node: int
    gpu: str  # a file of conf/gpu/
    cores_per_node: int
    utilisation: float  # share of the card's dense rate that a step reaches
    launch_us: float  # to start one kernel
    network_gb_s: float | None  # between nodes, a GPU; null takes what is usual for the card
    reserved_gib: float  # of a card's memory, for what is not counted
    num_clips: int
    epochs: float | None  # null takes trainer.max_steps
    stored_as: str  # one of storage_kinds
    storage_kinds: dict[str, dict[str, float]]  # name -> decode_ms, megabytes of a clip
    gpu_mtbf_hours: float  # hours of one GPU between two failures
    save_stall_s: float
    save_write_s: float
    restart_s: float


@dataclasses.dataclass
class Root:
    """Every section of a config; `experiment` and `scale` files only override these."""

    run: Run
    trainer: Trainer
    clip: Clip
    tokenizer: Tokenizer
    texts: Node  # which texts of its record a training sample brings
    data: Data
    video: Node
    connector: Annotated[dict[str, Any], Parts()]  # stages after the video encoder, in order
    text: Node | None
    fusion: Node | None
    decoder: Node | None
    model: Node
    adapter: Annotated[dict[str, Any], Parts()]  # what is put beside layers of the built model, in order
    optim: Optim
    schedule: Node
    eval: Eval
    paths: Paths
    cluster: Cluster
    view: Annotated[dict[str, Any], Parts()]
    objective: Annotated[dict[str, Any], Parts({"weight", "inputs"})]
    init: Init
    logger: Annotated[dict[str, Any], Parts()]
