"""Model one training step on a cluster: compute, jitter, exposed communication, batch norm over ranks, and input."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log

from training.errors import ConfigError

from .all_reduce import all_reduce_of
from .figures import Cluster, Figure
from .overlap import (
    BACKWARD_SHARE,
    HOROVOD_CYCLE_S,
    Gradient,
    Message,
    ddp_messages,
    exposed_s,
    horovod_messages,
    ready_times,
)

# 2 per multiply-add; backward costs twice forward.
STEP_FLOPS = 6
_EULER = 0.5772156649
# decode_*_s are for clips of 8 frames.
_DECODED_FRAMES = 8


@dataclass(frozen=True)
class Workload:
    """What is trained, whatever it runs on."""

    clip_multiply_adds: int
    """Of a forward pass, frames of a burn-in included."""
    gradients_P: tuple[Gradient, ...]
    """In the order in which backward makes them."""
    precision: str
    """Key of a cluster's rates: float32, tf32, float16, bfloat16 or float64."""
    global_batch: int
    total_steps: int
    bn_messages: int = 0
    """All-reduces of batch norm per micro-step, if its groups span ranks."""
    bn_message_bytes: int = 0
    """Bytes of all of them together."""
    frames: int = 8
    evaluations: int = 0
    evaluation_clips: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    stored_clip_bytes: float | None = None
    """Mean size of a stored clip; None: unknown."""
    prepared: bool = True
    """Clips are stored for fast decoding (key frame every 16), not as downloaded."""
    fp32_ratio: float = 1.0
    """Bytes of the parameters over bytes sent in the all-reduce."""
    backend: str = "torch"
    """torch (DDP) or horovod: whose rules fuse gradients."""


@dataclass(frozen=True)
class Layout:
    """How the global batch lies on the ranks."""

    world: int
    micro_batch: int
    accumulation: int = 1
    bn_ranks: int = 1


@dataclass(frozen=True)
class Part:
    """A part of a step or of a run, with the figures that it follows from."""

    seconds: float
    source: str
    sure: str


@dataclass(frozen=True)
class Step:
    """A step's parts, before the experience factor."""

    parts: Mapping[str, Part]
    input_s: float
    """Time in which the input of a step is ready; the step takes at least this long."""
    input_limit: str
    """Part of the input that takes longest: decoding or reading."""

    @property
    def busy_s(self) -> float:
        """Step time if input is no limit."""
        return sum(part.seconds for part in self.parts.values())


def rates_of(cluster: Cluster, precision: str) -> tuple[float, float]:
    """Return peak and achieved TFLOP/s in a precision. Raises ConfigError if the device has none."""
    if precision not in cluster.achieved_tflop_s or precision not in cluster.peak_tflop_s:
        fix = "numerics=gpu_fp16" if precision == "bfloat16" else "numerics=reference"
        raise ConfigError(f"cluster {cluster.name} has no figure for {precision} on {cluster['device']}. Fix: {fix}")
    return cluster.peak_tflop_s[precision], cluster.achieved_tflop_s[precision]


def clip_s(cluster: Cluster, workload: Workload) -> float:
    """Return k, the seconds that a clip adds to a step."""
    achieved = rates_of(cluster, workload.precision)[1]
    return STEP_FLOPS * workload.clip_multiply_adds / (achieved * 1e12)


def fixed_s(cluster: Cluster, workload: Workload, micro_batch: int) -> float:
    """Return the seconds of a micro-step besides its clips: c0, or what the host needs longer than the device.

    Launches grow with the layers, so with the tensors.
    """
    tensors = len(workload.gradients_P) / cluster["c0_tensors"]
    return float(max(cluster["c0_s"] * tensors, cluster["host_s"] * tensors - clip_s(cluster, workload) * micro_batch))


def expected_slowest_s(mean_s: float, ranks: int) -> float:
    """Return the mean of the largest of `ranks` independent exponential delays: `mean_s` times the harmonic number."""
    harmonic = sum(1 / rank for rank in range(1, ranks + 1)) if ranks < 100 else log(ranks) + _EULER + 0.5 / ranks
    return mean_s * harmonic


def messages_of(workload: Workload, backward_s: float) -> list[Message]:
    """Return the fused all-reduces of a step, from the start of the last micro-step's backward."""
    ready_P = ready_times(workload.gradients_P, backward_s)
    if workload.backend == "horovod":
        return horovod_messages(workload.gradients_P, ready_P)
    return ddp_messages(workload.gradients_P, ready_P, workload.fp32_ratio)


def model_step(cluster: Cluster, workload: Workload, layout: Layout) -> Step:
    """Return the parts of a step. Raises ConfigError for a precision that the device lacks."""
    c0_s = fixed_s(cluster, workload, layout.micro_batch)
    clips_s = clip_s(cluster, workload) * layout.micro_batch
    parts = {
        "clips": _part(cluster, clips_s * layout.accumulation, f"achieved_tflop_s.{workload.precision}"),
        "c0": _part(cluster, c0_s * layout.accumulation, _fixed_key(cluster, workload, c0_s)),
        "jitter": _part(cluster, expected_slowest_s(cluster["jitter_s"], layout.world), "jitter_s"),
    }
    network = network_figure(cluster)
    all_reduce = all_reduce_of(cluster, layout.world)
    backward_s = BACKWARD_SHARE * clips_s
    # A response is negotiated by a message of a few bytes to rank 0 and back, which costs about a small all-reduce.
    negotiation_s = all_reduce(64) if workload.backend == "horovod" else 0.0
    exposed = exposed_s(messages_of(workload, backward_s), backward_s, all_reduce, negotiation_s)
    parts["gradients"] = Part(exposed if layout.world > 1 else 0.0, network.source, network.sure)
    bn_s = _batch_norm_s(cluster, workload, layout)
    parts["batch norm"] = Part(bn_s, network.source, network.sure)
    return Step(parts, *_input(cluster, workload, layout))


def network_figure(cluster: Cluster) -> Figure:
    """Return the figure that the times of all-reduces follow from."""
    return cluster.figures["all_reduce" if cluster.all_reduce is not None else "network_gb_s"]


def _fixed_key(cluster: Cluster, workload: Workload, seconds: float) -> str:
    """Return the figure that the constant part of a step follows from."""
    is_device = seconds <= cluster["c0_s"] * len(workload.gradients_P) / cluster["c0_tensors"]
    return "c0_s" if is_device else "host_s"


def _part(cluster: Cluster, seconds: float, key: str) -> Part:
    figure = cluster.figures[key]
    return Part(seconds, figure.source, figure.sure)


def _batch_norm_s(cluster: Cluster, workload: Workload, layout: Layout) -> float:
    """Return the seconds of batch norm's messages. Each layer waits for its message, so nothing hides them."""
    if layout.bn_ranks == 1 or workload.bn_messages == 0:
        return 0.0
    reduce = all_reduce_of(cluster, layout.bn_ranks)
    # Horovod sends at the next of its cycles.
    wait_s = HOROVOD_CYCLE_S if workload.backend == "horovod" else 0.0
    message_s = reduce(workload.bn_message_bytes / workload.bn_messages) + wait_s
    return layout.accumulation * workload.bn_messages * message_s


def _input(cluster: Cluster, workload: Workload, layout: Layout) -> tuple[float, str]:
    """Return the seconds in which a node decodes or reads the clips of its ranks for a step, and which of them takes longer."""
    on_node = min(layout.world, cluster["gpus_per_node"])
    clips = on_node * layout.micro_batch * layout.accumulation
    core_s = cluster["decode_prepared_s" if workload.prepared else "decode_raw_s"] * workload.frames / _DECODED_FRAMES
    decoding_s = clips * core_s / cluster["cores_per_node"]
    stored_bytes = workload.stored_clip_bytes or 0.0
    reading_s = clips * stored_bytes / (cluster["read_gb_s"] * 1e9)
    return max((decoding_s, "decoding"), (reading_s, "reading"))
