"""Evaluate the network while it trains."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

from torch import Tensor

from distributed.batch_norm.running_statistics import (
    average_running_statistics,
    own_running_statistics,
    recompute_running_statistics,
    set_running_statistics,
)
from training.build.numerics import autocast
from training.job import Job
from training.telemetry.bad_clips import too_many_bad_clips
from training.telemetry.metrics_log import MetricsLog

from .evaluate import Evaluation, EvaluationStopped, evaluate, stop_together
from .run_config import short_digest


def validate(job: Job, log: MetricsLog, step: int, stop_wanted: Callable[[], bool]) -> bool:
    """Evaluate on the validation clips after `step` steps and log the scores. Returns True if top-1 is the run's best so far.

    Raises EvaluationStopped on all ranks if `stop_wanted` returns True on any rank before the end; then nothing has changed.
    """
    started_s = time.monotonic()
    evaluation = evaluate_weights(job, step, stop_wanted)
    scores = evaluation.scores
    for record in evaluation.missing:
        log.bad_clip(job.folder, split="val", step=step, **vars(record))
    log.write(
        "evaluation",
        step,
        epoch=round(step / job.recipe.steps_per_epoch, 3),
        duration_s=round(time.monotonic() - started_s, 3),
        protocol=job.validation_clips.protocol.name,
        amp=job.config.evaluation.amp,
        manifest=short_digest(job.validation_clips.source.manifest.digest),
        **scores.as_dict(),
    )
    log.info(scores.describe(f"step {step:6d}  validation"))
    if scores.missing > job.config.data.max_bad_clips:
        raise too_many_bad_clips(job.config.data, f"{scores.missing} validation clips are missing", evaluation.missing)
    is_best = scores.top1_percent > job.best_top1_percent
    job.best_top1_percent = max(job.best_top1_percent, scores.top1_percent)
    return is_best


def evaluate_weights(job: Job, step: int, stop_wanted: Callable[[], bool] = lambda: False) -> Evaluation:
    """Evaluate the weights after `step` steps, or their EMA, on the validation clips, with BN statistics that all ranks share.

    Raises EvaluationStopped as `validate` does.
    """
    trainer, network = job.trainer, job.trainer.network
    own_S = own_running_statistics(network)
    try:
        with trainer.ema.in_place_of_weights() if trainer.ema else nullcontext():
            if job.config.batch.precise_bn_steps:
                _recompute_statistics(job, step, stop_wanted)
            else:
                average_running_statistics(network, job.backend)
            return evaluate(
                network,
                trainer.normalise,
                job.validation_clips,
                job.loader(job.validation_clips),
                job.backend,
                job.config.evaluation,
                progress=lambda _: job.control.progress(step - 1, "evaluation"),
                stop_wanted=stop_wanted,
            )
    except EvaluationStopped:
        # The run that repeats this evaluation must start from the same statistics.
        set_running_statistics(network, own_S)
        raise


def _recompute_statistics(job: Job, step: int, stop_wanted: Callable[[], bool]) -> None:
    """Recompute BN statistics (precise batch norm) over the clips of the next steps, also after the run's last step.

    The result does not depend on the world. The network keeps the statistics, so that its checkpoint gives the scores of this
    evaluation; training itself only updates them. Undecodable clips are replaced by rule, and reported when training needs them.
    """
    positions = job.execution.stream_positions(
        job.backend.topology.rank, step, step + job.config.batch.precise_bn_steps
    )

    def inputs() -> Iterator[Tensor]:
        for batch in job.loader(job.training_clips).batches(positions):
            job.control.progress(step - 1, "evaluation")
            # Ranks may share BN groups here, so no rank can stop by itself.
            stop_together(job.backend, stop_wanted())
            yield job.trainer.normalise(batch.video_NTCHW)

    # The statistics must be those of the activations that the evaluation computes.
    with autocast(job.backend.device, job.config.evaluation.amp):
        network = job.trainer.network
        forward = partial(network, per_frame=True) if job.trainer.stream else network
        recompute_running_statistics(network, job.backend, inputs(), forward)
