"""Run a task from its configuration to an exit code, and report every failure on every rank."""

import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

from distributed.backends.base import Backend
from distributed.backends.make import make_backend, pick_device
from distributed.health.control_channel import ControlChannel
from distributed.topology import Topology, TopologyError, choose_backend, find_topology
from pipelines.errors import BadClip, StorageFault
from pipelines.loading.worker_loader import HandOverError, WorkerLostError, start_worker_server
from runtime.environment import EnvironmentFault, explain
from runtime.error_report import report_error, tell_torchrun
from runtime.exit_codes import EXIT_CONFIG, EXIT_DATA, EXIT_DONE, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_REQUEUE
from runtime.job_start import job_start_s
from runtime.stop_signals import EXIT_CODES, set_action, set_before_exit, wait_for_action
from training.build.numerics import check_device, set_numerics
from training.config.checks import check_training
from training.config.horovod_variables import check_horovod, horovod_variables
from training.config.schema import BatchConfig, Config
from training.planning.summary import describe_job
from training.report.html import write_report
from training.runs.restarts import check_progress
from training.runs.run_folder import provenance
from training.runs.run_lock import run_locked
from training.runs.success import is_complete, write_success
from training.telemetry.device import device_name, precision_of
from training.telemetry.metrics_log import MetricsLog
from training.telemetry.tensorboard_log import check_tensorboard

from .environment import prepare_environment
from .errors import ConfigError, DataError, DivergedError, NoProgressError, StorageError
from .job import Job, build_job, run_folder_of
from .loop import train
from .out_of_memory import is_out_of_memory, out_of_memory_message
from .recipe import make_execution
from .transient_errors import is_transient

Task = Callable[[Config, Backend, ControlChannel], int]

# mpirun kills the remaining ranks one second after SIGTERM.
_VERDICT_S = 0.8

# After the last step of a run, from a stop signal to the end. Until then the process finishes its report.
_FINISH_S = 5.0


def run(read: Callable[[], Config], task: Task) -> int:
    """Run a task in the world that the launcher made, and return the exit code (runtime.exit_codes).

    Every failure is reported here, on every rank.
    """
    config: Config | None = None
    topology: Topology | None = None
    control: ControlChannel | None = None
    try:
        topology = find_topology()
        config = read()
        notes = prepare_environment(config, topology)
        backend = join_world(config, topology)
        control = ControlChannel(backend, config.distributed.hang_timeout_s)
        set_action(partial(_stop, control, 0.0))
        set_before_exit(partial(_report_interrupt, control))
        for note in notes:
            # One line on the terminal, not one per rank.
            (control.log.warning if topology.rank == 0 else control.log.info)(note)
        code = task(config, backend, control)
        control.close()
        backend.close()
        return code
    except Exception as error:
        wait_for_action()
        # A launcher that ends all ranks sends SIGTERM: first get the verdict and print it.
        set_action(None)
        if config is not None and control is not None and is_out_of_memory(error):
            control.log.info(traceback.format_exc())
            phase = control.phase if task is train_task else "evaluation"
            message = out_of_memory_message(error, config.batch, config.evaluation.batch, control.world_size, phase)
            return _report(message, EXIT_CONFIG, topology, control)
        return _report(*describe_error(error, control), topology, control)


def _report(message: str, code: int, topology: Topology | None, control: ControlChannel | None) -> int:
    """Report a failure to the log, to the other ranks and as the last line; return the exit code that the job ends with."""
    if control is None or topology is None:
        where = f"rank {topology.rank} of {topology.size} on {topology.host}" if topology else "start-up"
        report_error(where, message)
        return code
    control.log.info(f"failed: {message}")
    verdict = control.report_failure(f"failed: {message}", code)
    # The error here was caused by another rank's failure.
    report_error(control.where, message if verdict.rank == topology.rank else str(verdict))
    return verdict.exit_code


def describe_error(error: Exception, control: ControlChannel | None = None) -> tuple[str, int]:
    """Return message and exit code of an error. If no user can fix it, log its traceback, and say where that is."""
    if isinstance(error, (ConfigError, DataError, DivergedError, NoProgressError, StorageError)):
        return str(error), error.exit_code
    codes = {
        EnvironmentFault: EXIT_CONFIG,
        TopologyError: EXIT_CONFIG,
        HandOverError: EXIT_CONFIG,
        WorkerLostError: EXIT_REQUEUE,
        StorageFault: EXIT_REQUEUE,
        BadClip: EXIT_DATA,
    }
    for kind, code in codes.items():
        if isinstance(error, kind):
            return str(error), code
    if explanation := explain(error):
        return explanation, EXIT_CONFIG
    trace = traceback.format_exc()
    if control is not None and control.log.path is not None:
        control.log.info(trace)
        place = f"in {control.log.path}"
    else:
        print(trace, file=sys.stderr, flush=True)
        place = "above"
    # An error of a loader worker has its whole traceback as message.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shown = " ... ".join(lines if len(lines) < 3 else (lines[0], lines[-1]))
    if is_transient(error):
        return f"{type(error).__name__}: {shown}. A restart may succeed (traceback {place})", EXIT_REQUEUE
    return f"{type(error).__name__}: {shown} (traceback {place})", EXIT_FAILURE


def _stop(control: ControlChannel, wait_s: float, name: str) -> None:
    """End this process for a stop signal outside the training loop, after `wait_s`: there is nothing to save.

    Runs in the thread of runtime.stop_signals, because the main thread may wait in a library. The other ranks end too.
    """
    time.sleep(wait_s)
    message = f"stopped by {name} with nothing to save. Fix: run the same command again"
    verdict = control.report_failure(message, EXIT_CODES[name], _VERDICT_S)
    report_error(control.where, message if verdict.rank == control.rank else str(verdict))
    # The monitor does so too, a moment after this process has ended.
    if control.rank == 0:
        control.log.write_outcome(verdict.exit_code, str(verdict))
    control.at_exit()
    os._exit(verdict.exit_code)


def _report_interrupt(control: ControlChannel) -> None:
    """Report the end by a second Ctrl-C, which a process that just disappears would look like a crash."""
    reason = "stopped by a second Ctrl-C, without a checkpoint of the newest steps"
    verdict = control.report_failure(reason, EXIT_INTERRUPTED, 0.0)
    if control.rank == 0:
        control.log.write_outcome(verdict.exit_code, str(verdict))
    control.at_exit()


def join_world(config: Config, topology: Topology, rank_groups: Sequence[Sequence[int]] | None = None) -> Backend:
    """Start the loader's worker server, then the backend that configuration and launcher agree on.

    `rank_groups`: as in make_backend; None: the BN groups of the configuration.
    """
    distributed = config.distributed
    name = choose_backend(distributed.backend, topology, distributed.world_size)
    if rank_groups is None:
        rank_groups = _batch_norm_groups(config.batch, topology.size)
    check_horovod(distributed, name)
    os.environ |= horovod_variables(distributed)
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
        return make_execution(batch.global_batch, batch.bn_clips, size, batch.micro_batch_limit).bn_rank_groups()
    except ConfigError:
        return []


def train_task(config: Config, backend: Backend, control: ControlChannel) -> int:
    """Train to the end, or resume an earlier start of the same run. Returns the exit code."""
    check_training(config)
    if config.logger.tensorboard:
        check_tensorboard()
    with run_locked(run_folder_of(config, backend), backend, control):
        return _train(config, backend, control)


def _train(config: Config, backend: Backend, control: ControlChannel) -> int:
    job = build_job(config, backend, control)
    writes = backend.topology.rank == 0
    if backend.broadcast_object(_is_complete(job) if writes else None):
        return EXIT_DONE
    hosts = backend.all_gather_objects(backend.topology.host)
    if writes:
        if not config.checkpoint.allow_no_progress:
            check_progress(job.folder.provenance, job.folder.outcome, job.first_step)
        # Asks git and the packages first, so that the folder has a log, for its outcome, as soon as it has a configuration.
        start = provenance(backend.topology, hosts, job.first_step)
        job.folder.write_config(config)
        job.folder.write_classes(job.training_clips.source.manifest.classes)
        job.folder.record_start(start)
    control.open_log(job.folder.path)
    if config.batch.is_auto:
        # config.yaml keeps auto: a later start may have other GPUs.
        config.batch.micro_batch = str(job.execution.micro_batch)
        control.log.info(f"batch.micro_batch=auto: micro-batches of {config.batch.micro_batch} clips")
    log = MetricsLog(config, job.folder, writes, job.first_step, job.recipe.total_steps, control.log)
    code = EXIT_FAILURE
    try:
        _log_start(job, hosts, log)
        code = train(job, log)
        log.write("end", job.recipe.total_steps, exit_code=code)
        set_action(partial(_stop, control, _FINISH_S))
        outcome = "done" if code == EXIT_DONE else "stopped in good order"
        if writes:
            control.log.write_outcome(code, outcome)
        if code != EXIT_DONE:
            tell_torchrun(f"{control.where}: {outcome} (exit code {code})")
        # After a stop by a signal only seconds are left. The report is written when the run ends.
        if writes and code == EXIT_DONE:
            _finish(job)
    finally:
        # Last, because it may wait for wandb.
        log.close(code)
    return code


def _is_complete(job: Job) -> bool:
    """On rank 0: return whether there is nothing to do, and say so. A complete run that is to be longer loses its marker."""
    folder = job.folder
    if is_complete(folder.success, job.recipe, job.first_step or None):
        print(f"{folder.path} is finished ({folder.success.name} is there): nothing to do", flush=True)
        return True
    if folder.success.exists():
        print(f"{folder.path} was finished: training on to step {job.recipe.total_steps}", flush=True)
        folder.success.unlink()
    return False


def _log_start(job: Job, hosts: list[str], log: MetricsLog) -> None:
    """Log the derived numbers, and record when the job started, on what, and what the report needs of the recipe."""
    log.info(describe_job(job))
    recipe, topology = job.recipe, job.backend.topology
    log.write("job_start", job.first_step, time_s=round(job_start_s(topology.launcher), 3))
    log.write(
        "start",
        job.first_step,
        world_size=topology.size,
        backend=job.backend.name,
        launcher=topology.launcher,
        hosts=list(dict.fromkeys(hosts)),
        ranks_per_host=list(Counter(hosts).values()),
        device=device_name(job.backend.device),
        precision=precision_of(job.config.numerics) if job.backend.device.type == "cuda" else job.config.numerics.dtype,
        schedule=asdict(recipe.schedule),
        steps_per_epoch=recipe.steps_per_epoch,
    )


def _finish(job: Job) -> None:
    """Mark the run as finished if all its steps are taken, and write the report."""
    finished = (job.config.max_steps or job.recipe.total_steps) >= job.recipe.total_steps
    if finished:
        write_success(job.folder.success, job.recipe)
    write_report(job.folder.path)
    print(f"{'finished' if finished else 'stopped'}: {job.folder.report}", flush=True)
