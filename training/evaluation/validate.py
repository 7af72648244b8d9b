"""The evaluations that a run makes of itself while it trains."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

from torch import Tensor

from distributed.batch_norm.running_statistics import (
    average_running_statistics,
    own_running_statistics,
    recompute_running_statistics,
    set_running_statistics,
)
from training.build.numerics import autocast
from training.job import Job
from training.telemetry.bad_clips import too_many
from training.telemetry.metrics_log import MetricsLog

from .evaluate import Evaluation, EvaluationStopped, assess, leave_together


def validate(job: Job, records: MetricsLog, step: int, unwanted: Callable[[], bool]) -> bool:
    """Score the validation clips and write it down; whether it is the best evaluation of the run so far.

    Raises EvaluationStopped on all ranks when one of them finds the evaluation `unwanted` before its end; nothing has changed then.
    """
    started_s = time.monotonic()
    evaluation = score(job, step, unwanted)
    scores, missing = evaluation.scores, evaluation.missing
    for record in missing:
        records.bad_clip(job.folder, split="val", step=step, **vars(record))
    duration_s = round(time.monotonic() - started_s, 3)
    epoch = round(step / job.recipe.steps_per_epoch, 3)
    protocol = job.validation_clips.protocol.name
    how = {"protocol": protocol, "amp": job.config.evaluation.amp}
    records.write("evaluation", step, epoch=epoch, duration_s=duration_s, **how, **scores.as_dict())
    records.info(scores.describe(f"step {step:6d}  validation"))
    if scores.missing > job.config.data.max_bad_clips:
        raise too_many(job, f"{scores.missing} validation clips are missing", missing)
    best = scores.top1_percent > job.best_top1_percent
    job.best_top1_percent = max(job.best_top1_percent, scores.top1_percent)
    return best


def score(job: Job, step: int, unwanted: Callable[[], bool] = lambda: False) -> Evaluation:
    """Evaluate after `step` steps on the validation clips: the weights, or their average, with statistics that all ranks share.

    Raises EvaluationStopped as `validate` does.
    """
    trainer, network = job.trainer, job.trainer.network
    own_S = own_running_statistics(network)
    try:
        with trainer.average.in_place_of_weights() if trainer.average else nullcontext():
            if job.config.batch.precise_bn_steps:
                _recompute_statistics(job, step, unwanted)
            else:
                average_running_statistics(network, job.backend)
            return assess(
                network,
                trainer.normalise,
                job.validation_clips,
                job.loader(job.validation_clips),
                job.backend,
                job.config.evaluation.batch,
                job.config.evaluation.amp,
                progress=lambda _: job.control.progress(step - 1, "evaluation"),
                unwanted=unwanted,
            )
    except EvaluationStopped:
        set_running_statistics(network, own_S)  # whoever makes this evaluation anew begins with the same
        raise


def _recompute_statistics(job: Job, step: int, unwanted: Callable[[], bool]) -> None:
    """Precise batch norm over the clips of the steps that would come next: on any world the same, at the end of the run too.

    They stay: the checkpoint then scores what its evaluation did, and training uses running statistics only to keep them up.
    Clips that cannot be decoded are replaced by rule, and reported when training comes to them.
    """
    plan = job.execution.stream_positions(job.backend.topology.rank, step, step + job.config.batch.precise_bn_steps)

    def inputs() -> Iterator[Tensor]:
        for batch in job.loader(job.training_clips).batches(plan):
            job.control.progress(step - 1, "evaluation")
            leave_together(job.backend, unwanted())  # ranks may share batch-norm groups here: none can leave alone
            yield job.trainer.normalise(batch.video_NTCHW)

    # The statistics of the activations that the evaluation will see.
    with autocast(job.backend.device, job.config.evaluation.amp):
        recompute_running_statistics(job.trainer.network, job.backend, inputs())
