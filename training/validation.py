"""The evaluations that a run makes of itself while it trains."""

import time
from contextlib import nullcontext

from distributed.batch_norm import average_running_statistics, recompute_running_statistics

from .bad_clips import too_many
from .evaluation import Evaluation, assess
from .job import Job
from .records import Records


def validate(job: Job, records: Records, step: int) -> bool:
    """Score the validation clips and write it down; whether it is the best evaluation of the run so far."""
    started_s = time.monotonic()
    evaluation = score(job, step)
    scores, missing = evaluation.scores, evaluation.missing
    for record in missing:
        records.bad_clip(job.folder, split="val", step=step, **vars(record))
    duration_s = round(time.monotonic() - started_s, 3)
    epoch = round(step / job.recipe.steps_per_epoch, 3)
    protocol = job.validation_clips.protocol.name
    records.write("evaluation", step, epoch=epoch, duration_s=duration_s, protocol=protocol, **scores.as_dict())
    records.say(scores.describe(f"step {step:6d}  validation"))
    if scores.missing > job.config.data.max_bad_clips:
        raise too_many(job, f"{scores.missing} validation clips are missing", missing)
    best = scores.top1_percent > job.best_top1_percent
    job.best_top1_percent = max(job.best_top1_percent, scores.top1_percent)
    return best


def score(job: Job, step: int) -> Evaluation:
    """Evaluate after `step` steps on the validation clips: the weights, or their average, with statistics that all ranks share."""
    trainer = job.trainer
    with trainer.average.in_place_of_weights() if trainer.average else nullcontext():
        if job.config.batch.precise_bn_steps:
            _recompute_statistics(job, step)
        else:
            average_running_statistics(trainer.network, job.backend)
        return assess(
            trainer.network,
            trainer.normalise,
            job.validation_clips,
            job.loader(job.validation_clips),
            job.backend,
            job.config.evaluation.batch,
            progress=lambda _: job.control.progress(step - 1, "evaluation"),
        )


def _recompute_statistics(job: Job, step: int) -> None:
    """Precise batch norm over the clips of the steps that would come next: on any world the same, at the end of the run too.

    They stay: the checkpoint then scores what its evaluation did, and training uses running statistics only to keep them up.
    Clips that cannot be decoded are replaced by rule, and reported when training comes to them.
    """
    plan = job.execution.stream_positions(job.backend.topology.rank, step, step + job.config.batch.precise_bn_steps)
    batches = job.loader(job.training_clips).batches(plan)
    inputs = (job.trainer.normalise(batch.video_NTCHW) for batch in batches)
    recompute_running_statistics(job.trainer.network, job.backend, inputs)
