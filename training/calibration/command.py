"""The command of plan.py calibrate=NAME: measure this machine, in one process or in all that a launcher started."""

import os
import time
from functools import partial
from statistics import median

import torch

from distributed.backends.base import Backend
from distributed.health.control_channel import ControlChannel
from pipelines.loading.clips import TrainingClips
from pipelines.manifest import Manifest
from runtime.checkout import CHECKOUT
from runtime.exit_codes import EXIT_DONE
from runtime.job_start import job_start_s
from training.build.data import augmentation_of, open_manifest, source_of
from training.build.model import network_of
from training.config.command_line import Read
from training.config.load import from_composed
from training.config.overrides import CONF
from training.config.schema import Config
from training.errors import ConfigError
from training.main import run
from training.planning.simulator.figures import Cluster
from training.planning.simulator.step import STEP_FLOPS
from training.planning.workload import precision_of
from training.telemetry.device import device_name, peak_flops
from tsm.flops import clip_multiply_adds

from .cluster_file import Figures, cluster_path, figure, with_base, write_cluster
from .fit import StepFit, fit_step
from .measure import (
    StepTimes,
    measure_decoding,
    measure_messages,
    measure_reading,
    measure_steps,
    measure_writing,
)

CLUSTERS = CONF / "cluster"
# Of the frames for which decode_*_s count.
_DECODED_FRAMES = 8
_PEAK_OVER_ACHIEVED = 4.0


def run_calibration(read: Read) -> int:
    """Measure the machine with the configured network and data, write conf/cluster/NAME.yaml, and return the exit code."""
    return run(partial(_configured, read), _calibrate)


def _configured(read: Read) -> Config:
    config = from_composed(read())
    cluster_path(CLUSTERS, config.plan.calibrate or "")
    # Clips are decoded in this process, and steps take clips in memory.
    config.pipeline.workers = 0
    return config


def _calibrate(config: Config, backend: Backend, control: ControlChannel) -> int:
    calibrate(config, backend, time.time() - job_start_s(backend.topology.launcher))
    return EXIT_DONE


def calibrate(config: Config, backend: Backend, started_s: float) -> None:
    """Measure, and write the cluster's file on rank 0. `started_s`: the time from the launch until now. Collective."""
    name = config.plan.calibrate or ""
    data = _open(config)
    steps = measure_steps(config, backend)
    if len(steps.by_clips) < 2:
        raise ConfigError(f"calibrate: {steps.ended_by}, and two sizes are needed. Fix: a smaller network")
    fitted = fit_step(steps.by_clips)
    messages = measure_messages(backend) if backend.topology.size > 1 else {}
    places = backend.all_gather_objects([
        backend.topology.host, backend.topology.local_size, sorted(os.sched_getaffinity(0)),
    ])  # fmt: skip
    if backend.topology.rank == 0:
        measured = (
            _device_figures(config, backend, steps, fitted)
            | _node_figures(backend, places, messages, started_s, steps)
            | _storage_figures(config, data)
        )
        figures = with_base(measured, config.cluster.figures)
        path = cluster_path(CLUSTERS, name)
        cluster = write_cluster(path, name, figures, _summary(config, backend))
        _report(str(path), steps, fitted, messages, cluster)
    backend.all_gather_objects(None)


def _open(config: Config) -> Manifest | None:
    """Return the manifest of the training clips; None if there is none, which leaves decoding and reading unmeasured."""
    if not (CHECKOUT / config.data.root / config.data.train).exists():
        return None
    return open_manifest(config.data, "train")


def _summary(config: Config, backend: Backend) -> str:
    return (
        f"{time.strftime('%Y-%m-%d')}, {backend.topology.size} processes ({backend.name}), {config.model.backbone} of "
        f"{config.model.num_frames} frames of {config.pipeline.size} px."
    )


def _precision(config: Config, device: torch.device) -> str:
    precision = precision_of(config.numerics)
    return "float32" if precision == "tf32" and device.type != "cuda" else precision


def _device_figures(config: Config, backend: Backend, steps: StepTimes, fitted: StepFit) -> Figures:
    device, model = backend.device, config.model
    precision, name = _precision(config, device), device_name(device)
    burn_in = config.pipeline.burn_in if config.pipeline.sampling == "stream" else 0
    multiply_adds = clip_multiply_adds(lambda: network_of(model, config.data.num_classes), config.pipeline.size)
    multiply_adds = multiply_adds * (model.num_frames + burn_in) // model.num_frames
    achieved = STEP_FLOPS * multiply_adds / fitted.k_s / 1e12
    peak = peak_flops(name, precision) if device.type == "cuda" else None
    sizes = ", ".join(map(str, steps.by_clips))
    source = f"steps of {sizes} clips; the fit misses none by more than {fitted.worst_error:.1%}"
    if device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
    else:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // backend.topology.local_size
    return {
        "device": figure(name, "torch" if device.type == "cuda" else "/proc/cpuinfo", "measured"),
        "memory_gib": figure(memory_bytes / 2**30, "the device, or the node's memory over its processes", "measured"),
        "peak_tflop_s": {
            precision: figure(_PEAK_OVER_ACHIEVED * achieved, "unknown: four times the achieved rate", "guess")
            if peak is None
            else figure(peak / 1e12, "NVIDIA's data sheet (training/telemetry/device.py)", "published")
        },
        "achieved_tflop_s": {precision: figure(achieved, source, "measured")},
        "c0_s": figure(fitted.c0_s, source, "measured"),
        "host_s": figure(fitted.host_s, f"{source}; 0: no limit was seen", "measured"),
        "c0_tensors": figure(steps.tensors, f"trained tensors of {model.backbone}", "measured"),
        "jitter_s": figure(fitted.jitter_s, "quartiles of these steps on all ranks", "measured"),
        "first_step_s": figure(
            max(0.0, steps.first_step_s - fitted.c0_s - fitted.k_s * min(steps.by_clips)), "the first step", "measured"
        ),
    }


def _node_figures(
    backend: Backend, places: list[list[object]], messages: dict[int, float], started_s: float, steps: StepTimes
) -> Figures:
    topology = backend.topology
    own = [place for place in places if place[0] == topology.host]
    cores = {core for _, _, affinity in own for core in affinity}  # type: ignore[attr-defined]
    per_node = topology.local_size
    if topology.size == 1 and backend.device.type == "cuda":
        per_node = torch.cuda.device_count()
    figures: Figures = {
        "gpus_per_node": figure(per_node, "processes of a node, or its GPUs", "measured"),
        "cores_per_node": figure(len(cores), "cores that the processes of a node may use", "measured"),
        "startup_s": figure(
            [started_s] * 3, f"one start of {topology.size} processes, so without an interval", "measured"
        ),
    }
    if messages:
        # Gloo's all-reduce is a ring; NCCL chooses trees for small messages.
        growth = "tree" if backend.device.type == "cuda" else "ring"
        table = {"ranks": topology.size, "growth": growth, "bytes": list(messages), "seconds": list(messages.values())}
        figures["all_reduce"] = figure(table, f"all-reduces of {topology.size} ranks ({backend.name})", "measured")
    return figures


def _storage_figures(config: Config, manifest: Manifest | None) -> Figures:
    rate = measure_writing(CHECKOUT / config.outputs)
    figures: Figures = {"checkpoint_gb_s": figure(rate, "a durable write of 64 MiB to outputs", "measured")}
    if manifest is None:
        return figures
    augmentation = augmentation_of(config.model, config.data, config.pipeline)
    source = source_of(config.pipeline, manifest, torch.device("cpu"), config.data.retry_s)
    core_s, count = measure_decoding(TrainingClips(source, augmentation, config.seed))
    key = "decode_prepared_s" if config.plan.prepared else "decode_raw_s"
    frames = augmentation.sample_frames
    figures[key] = figure(
        core_s * _DECODED_FRAMES / frames, f"{count} clips of {config.data.name}, {frames} frames each", "measured"
    )
    gb_s, read_bytes = measure_reading(manifest)
    figures["read_gb_s"] = figure(
        gb_s, f"8 threads read {read_bytes / 2**20:.0f} MiB of {config.data.name}", "measured"
    )
    return figures


def _report(path: str, steps: StepTimes, fitted: StepFit, messages: dict[int, float], cluster: Cluster) -> None:
    for clips, times_s in steps.by_clips.items():
        print(
            f"step       {clips:3d} clips {1000 * median(times_s):10.1f} ms, {1000 * fitted.at_s(clips):10.1f} ms by the fit, "
            f"{len(times_s)} steps measured"
        )
    if steps.ended_by:
        print(f"           {steps.ended_by}")
    print(f"fit        c0 {1000 * fitted.c0_s:.2f} ms, k {1000 * fitted.k_s:.2f} ms per clip")
    print(f"           host {1000 * fitted.host_s:.2f} ms at least, jitter {1000 * fitted.jitter_s:.2f} ms")
    for num_bytes, seconds in messages.items():
        print(f"all-reduce {num_bytes // 1024:7d} KiB {1000 * seconds:10.2f} ms")
    guesses = [key for key, value in cluster.figures.items() if value.sure == "guess"]
    print(f"guessed    {', '.join(guesses)}")
    print(f"written    {path}", flush=True)
