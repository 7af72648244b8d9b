"""Run a task from its configuration to an exit code, and report every failure on every rank."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import FrameType

from distributed.backends.base import Backend
from distributed.backends.make import make_backend, pick_device
from distributed.health.control_channel import ControlChannel
from distributed.topology import Topology, TopologyError, choose_backend, find_topology
from pipelines.errors import BadClip
from pipelines.loading.worker_loader import HandOverError, WorkerLostError, start_worker_server
from runtime.exit_codes import EXIT_CONFIG, EXIT_DATA, EXIT_DONE, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_REQUEUE
from training.build.numerics import check_device, set_numerics
from training.config.schema import BatchConfig, Config
from training.planning.summary import describe_job
from training.report.html import write_report
from training.runs.restarts import check_progress
from training.telemetry.metrics_log import MetricsLog

from .errors import ConfigError, DataError, DivergedError, NoProgressError
from .job import Job, build_job
from .loop import train
from .recipe import make_execution

Task = Callable[[Config, Backend, ControlChannel], int]

# mpirun kills the remaining ranks one second after SIGTERM.
_VERDICT_S = 0.8


def run(read: Callable[[], Config], task: Task) -> int:
    """Run a task in the world that the launcher made, and return the exit code (runtime.exit_codes).

    Every failure is reported here, on every rank.
    """
    topology: Topology | None = None
    control: ControlChannel | None = None
    try:
        topology = find_topology()
        config = read()
        backend = join_world(config, topology)
        control = ControlChannel(backend, config.distributed.hang_timeout_s)
        signal.signal(signal.SIGTERM, _exit_before_first_step)
        code = task(config, backend, control)
        control.close()
        backend.close()
        return code
    except KeyboardInterrupt:
        message, code = "interrupted by Ctrl-C", EXIT_INTERRUPTED
    except Exception as error:
        message, code = _describe(error)
    where = f"rank {topology.rank} of {topology.size} on {topology.host}" if topology else "start-up"
    if control is not None:
        # A launcher that ends all ranks sends SIGTERM: first get the verdict and print it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        control.log.info(f"failed: {message}")
        verdict = control.report_failure(message, code)
        # The error here was caused by another rank's failure.
        if topology is not None and verdict.rank != topology.rank:
            message = str(verdict)
        code = verdict.exit_code
    print(f"error ({where}): {message}", file=sys.stderr, flush=True)
    return code


def _describe(error: Exception) -> tuple[str, int]:
    """Return message and exit code of an error; the message has a traceback if the error is none that a user can fix."""
    if isinstance(error, (ConfigError, DataError, DivergedError, NoProgressError)):
        return str(error), error.exit_code
    codes = {TopologyError: EXIT_CONFIG, HandOverError: EXIT_CONFIG, WorkerLostError: EXIT_REQUEUE, BadClip: EXIT_DATA}
    for kind, code in codes.items():
        if isinstance(error, kind):
            return str(error), code
    return f"{type(error).__name__}: {error}\n{traceback.format_exc()}", EXIT_FAILURE


def _exit_before_first_step(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM while there is nothing to save: wait for the monitor's verdict, then exit to be requeued."""
    time.sleep(_VERDICT_S)
    os._exit(EXIT_REQUEUE)


def join_world(config: Config, topology: Topology, rank_groups: Sequence[Sequence[int]] | None = None) -> Backend:
    """Start the loader's worker server, then the backend that configuration and launcher agree on.

    `rank_groups`: as in make_backend; None: the BN groups of the configuration.
    """
    distributed = config.distributed
    name = choose_backend(distributed.backend, topology, distributed.world_size)
    if rank_groups is None:
        rank_groups = _batch_norm_groups(config.batch, topology.size)
    device = pick_device(distributed.device, topology)
    check_device(config.numerics, config.evaluation, device)
    # The server imports torch, which takes seconds of a core. Without workers no one needs it.
    if config.pipeline.workers:
        start_worker_server()
    set_numerics(config.numerics, config.seed)
    return make_backend(name, topology, device, distributed.timeout_s, distributed.controller, rank_groups)


def _batch_norm_groups(batch: BatchConfig, size: int) -> list[list[int]]:
    """Return the ranks of each BN group, or none if the batch does not divide: build_job raises that error on all ranks."""
    try:
        return make_execution(batch.global_batch, batch.bn_clips, size, batch.micro_batch).bn_rank_groups()
    except ConfigError:
        return []


def train_task(config: Config, backend: Backend, control: ControlChannel) -> int:
    """Train to the end, or resume an earlier start of the same run. Returns the exit code."""
    if config.evaluation.save_logits or config.evaluation.ensemble:
        raise ConfigError(
            "evaluation.save_logits and evaluation.ensemble are for evaluate.py. Fix: train without them, then evaluate the run"
        )
    job = build_job(config, backend, control)
    writes = backend.topology.rank == 0
    if job.folder.success.exists():
        if writes:
            print(f"{job.folder.path} is finished ({job.folder.success.name} is there): nothing to do", flush=True)
        return EXIT_DONE
    hosts = backend.all_gather_objects(backend.topology.host)
    if writes:
        if not config.checkpoint.allow_no_progress:
            check_progress(job.folder.provenance, job.folder.outcome, job.first_step)
        job.folder.write_config(config)
        job.folder.record_start(backend.topology, hosts, job.first_step)
    control.open_log(job.folder.path)
    log = MetricsLog(config, job.folder, writes, job.first_step, job.recipe.total_steps, control.log)
    code = EXIT_FAILURE
    try:
        _log_start(job, log)
        code = train(job, log)
        log.write("end", job.recipe.total_steps, exit_code=code)
        if writes:
            control.log.write_outcome(code, "done" if code == EXIT_DONE else "stopped in good order")
        # After a stop by a signal only seconds are left. The report is written when the run ends.
        if writes and code == EXIT_DONE:
            _finish(job)
    finally:
        # Last, because it may wait for wandb.
        log.close(code)
    return code


def _log_start(job: Job, log: MetricsLog) -> None:
    """Log the derived numbers, and record what the report needs of them."""
    log.info(describe_job(job))
    recipe, backend = job.recipe, job.backend
    log.write(
        "start",
        job.first_step,
        world_size=backend.topology.size,
        backend=backend.name,
        schedule=asdict(recipe.schedule),
        steps_per_epoch=recipe.steps_per_epoch,
    )


def _finish(job: Job) -> None:
    """Mark the run as finished if all its steps are taken, and write the report."""
    finished = (job.config.max_steps or job.recipe.total_steps) >= job.recipe.total_steps
    if finished:
        job.folder.success.touch()
    write_report(job.folder)
    print(f"{'finished' if finished else 'stopped'}: {job.folder.report}", flush=True)
