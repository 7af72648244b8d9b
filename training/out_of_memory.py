"""Advise what to do about a GPU whose memory is exhausted: a smaller micro-batch that gives the same result."""

from training.config.schema import BatchConfig

from .recipe import fitting_worlds, make_execution, micro_batches


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch, cuDNN or NCCL says that a GPU's memory is exhausted."""
    return isinstance(error, RuntimeError) and "out of memory" in str(error)


def out_of_memory_message(
    error: BaseException, batch: BatchConfig, evaluation_batch: int, world: int, phase: str
) -> str:
    """Return the first sentences of the error, what was in the memory, and what to do. `phase`: of hang_detection.PHASES."""
    cause = ". ".join(str(error).split(". ")[:3]).rstrip(".").splitlines()[0]
    if phase != "evaluation":
        present = make_execution(batch.global_batch, batch.bn_clips, world, batch.micro_batch_limit).micro_batch
        return f"{cause} (in a micro-batch of {present} clips). Fix: {micro_batch_advice(batch, world, present)}"
    smaller = evaluation_batch // 2
    advice = (
        f"evaluation.batch={smaller}, same scores" if smaller else "a smaller pipeline.size, or a GPU with more memory"
    )
    return f"{cause} (in an evaluation of {evaluation_batch} views at once). Fix: {advice}"


def micro_batch_advice(batch: BatchConfig, world: int, present: int) -> str:
    """Return the setting that lowers the memory of a training step: the next smaller micro-batch that keeps the BN groups."""
    smaller = next((size for size in micro_batches(batch.global_batch, batch.bn_clips, world) if size < present), None)
    if smaller is not None:
        return f"batch.micro_batch={smaller}, same result"
    more = [size for size in fitting_worlds(batch.global_batch, batch.bn_clips) if size > world]
    if more:
        return (
            f"{more[0]} processes: batch norm groups of {batch.bn_clips} clips allow no smaller micro-batch on {world}"
        )
    return "a smaller pipeline.size, a lower precision (numerics=gpu), or a GPU with more memory"
