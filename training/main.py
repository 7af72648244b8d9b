"""A run from its composed configuration to an exit code; every failure ends here, in words, on every rank."""

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
from pipelines.loading.worker_loader import WorkerLostError, start_worker_server
from runtime.exit_codes import EXIT_CONFIG, EXIT_DATA, EXIT_DONE, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_REQUEUE
from training.build.numerics import check_device, set_numerics
from training.config.schema import Config
from training.planning.summary import describe_plan
from training.report.html import write_report
from training.runs.restarts import check_progress
from training.telemetry.metrics_log import MetricsLog

from .errors import ConfigError, DataError, DivergedError, NoProgressError
from .job import Job, build_job
from .loop import train
from .recipe import make_execution

Task = Callable[[Config, Backend, ControlChannel], int]

_VERDICT_S = 0.8  # mpirun kills what still runs a second after SIGTERM


def run(read: Callable[[], Config], task: Task) -> int:
    """Do a task as the configuration says, in the world that the launcher made; returns the exit code (training.errors)."""
    topology: Topology | None = None
    control: ControlChannel | None = None
    try:
        topology = find_topology()
        config = read()
        backend = join_world(config, topology)
        control = ControlChannel(backend, config.distributed.hang_timeout_s)
        signal.signal(signal.SIGTERM, _leave_before_first_step)
        code = task(config, backend, control)
        control.close()
        backend.close()
        return code
    except KeyboardInterrupt:
        message, code = "interrupted by Ctrl-C", EXIT_INTERRUPTED
    except (ConfigError, TopologyError) as error:
        message, code = str(error), EXIT_CONFIG
    except (DivergedError, NoProgressError) as error:
        message, code = str(error), error.exit_code
    except WorkerLostError as error:
        message, code = str(error), EXIT_REQUEUE
    except (DataError, BadClip) as error:
        message, code = str(error), EXIT_DATA
    except Exception as error:
        message, code = _in_words(error), EXIT_FAILURE
    where = f"rank {topology.rank} of {topology.size} on {topology.host}" if topology else "start-up"
    if control is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a launcher that ends everybody: first hear and say why
        control.log.info(f"failed: {message}")
        verdict = control.report_failure(message, code)
        if topology is not None and verdict.rank != topology.rank:  # what failed here was the echo of another's end
            message = str(verdict)
        code = verdict.exit_code
    print(f"error ({where}): {message}", file=sys.stderr, flush=True)
    return code


def _leave_before_first_step(number: int, frame: FrameType | None) -> None:
    """There is nothing to save yet. A launcher that ends everybody, because one died, leaves time to hear who it was."""
    time.sleep(_VERDICT_S)
    os._exit(EXIT_REQUEUE)


def join_world(config: Config, topology: Topology, rank_groups: Sequence[Sequence[int]] | None = None) -> Backend:
    """The backend that the configuration and the launcher agree on; loader workers' server starts before it.

    `rank_groups`: as make_backend's; None: those of the configuration's batch norm.
    """
    name = choose_backend(config.distributed.backend, topology, config.distributed.world_size)
    if rank_groups is None:
        rank_groups = _batch_norm_groups(config, topology.size)
    device = pick_device(config.distributed.device, topology)
    check_device(config, device)
    if config.pipeline.workers:  # it imports torch: seconds of a core that no one waits for, but that others could use
        start_worker_server()
    set_numerics(config)
    distributed = config.distributed
    return make_backend(name, topology, device, distributed.timeout_s, distributed.controller, rank_groups)


def _batch_norm_groups(config: Config, size: int) -> list[list[int]]:
    """None where the batch does not divide: that is said later, by a rank that can tell the others."""
    batch = config.batch
    try:
        return make_execution(batch.global_batch, batch.bn_clips, size, batch.micro_batch).bn_rank_groups()
    except ConfigError:
        return []


def train_task(config: Config, backend: Backend, control: ControlChannel) -> int:
    """Train to the end, or go on where an earlier start of the same run stopped."""
    if config.evaluation.save_logits or config.evaluation.ensemble:
        raise ConfigError(
            "evaluation.save_logits and evaluation.ensemble are for evaluate.py. Fix: train without them, evaluate the run then"
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
        job.folder.create(config, backend.topology, hosts, job.first_step)
    control.open_log(job.folder.path)
    records = MetricsLog(config, job.folder, writes, job.first_step, job.recipe.total_steps, control.log)
    code = EXIT_FAILURE
    try:
        records.info(describe_plan(job))
        # For the report.
        told = {"schedule": asdict(job.recipe.schedule), "steps_per_epoch": job.recipe.steps_per_epoch}
        records.write("start", job.first_step, world_size=backend.topology.size, backend=backend.name, **told)
        code = train(job, records)
        records.write("end", job.recipe.total_steps, exit_code=code)
    finally:
        records.close(code)
    if writes:
        control.log.write_outcome(code, "done" if code == EXIT_DONE else "stopped in good order")
    if writes and code == EXIT_DONE:  # a stop by a signal has seconds, and the report can wait for the end
        _finish(job)
    return code


def _finish(job: Job) -> None:
    finished = (job.config.max_steps or job.recipe.total_steps) >= job.recipe.total_steps
    if finished:
        job.folder.success.touch()
    write_report(job.folder)
    print(f"{'finished' if finished else 'stopped'}: {job.folder.report}", flush=True)


def _in_words(error: Exception) -> str:
    """The error, with where it came from."""
    return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
