"""Check the values of a configuration."""

import math
import re
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, NoReturn

from runtime.run_names import why_no_folder_name
from training.errors import ConfigError

from .horovod_variables import check_horovod
from .keys import KEYS, default_of, is_optional, nearest
from .modality import check_modality
from .schema import Config, EvaluationConfig, ModelConfig, OptimizerConfig, PipelineConfig
from .wandb_names import check_wandb_names

ENSEMBLE_AVERAGES = ("logits", "softmax")
"""Values of evaluation.ensemble_average."""

_BACKBONES = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
    "wide_resnet50_2", "wide_resnet101_2", "mobilenet_v2",
)  # fmt: skip

_CHOICES: dict[str, tuple[str | int, ...]] = {
    "model.backbone": _BACKBONES,
    "model.modality": ("rgb", "flow"),
    "model.shift": ("residual", "block", "none"),
    "model.direction": ("both", "past"),
    "pipeline.loader": ("torch", "dali"),
    "pipeline.decoder": ("auto", "torchcodec", "pyav"),
    "pipeline.sampling": ("uniform", "dense", "stream"),
    "pipeline.flip": ("off", "on", "relabel"),
    "evaluation.split": ("val", "test"),
    "evaluation.clips": ("validation", "uniform", "twice", "dense", "stream"),
    "evaluation.crops": (1, 3, 5, 10),
    "evaluation.ensemble_average": ENSEMBLE_AVERAGES,
    "optimizer.name": ("sgd", "lars", "lamb"),
    "optimizer.scaling": ("none", "linear", "sqrt"),
    "schedule.decay": ("constant", "step", "cosine", "poly2"),
    "numerics.dtype": ("float32", "float64"),
    "numerics.amp": ("off", "bfloat16", "float16"),
    "evaluation.amp": ("off", "bfloat16", "float16"),
    "distributed.backend": ("auto", "single", "torch", "horovod"),
    "distributed.controller": ("auto", "mpi", "gloo"),
    "distributed.device": ("auto", "cuda", "cpu"),
    "distributed.gradient_dtype": ("float32", "float16"),
    "logger.wandb": ("offline", "online", "disabled"),
}

_POSITIVE = (
    "model.num_frames", "data.num_classes", "pipeline.prefetch", "pipeline.size", "pipeline.loss_from",
    "batch.global_batch", "optimizer.lr", "optimizer.base_batch", "numerics.max_bad_steps_in_a_row",
    "optimizer.bias_lr_multiplier", "optimizer.classifier_lr_multiplier", "optimizer.first_conv_lr_multiplier",
    "optimizer.trust_coefficient",
    "schedule.epochs", "distributed.timeout_s",
    "logger.every_steps", "checkpoint.every_epochs", "checkpoint.keep", "evaluation.every_epochs", "evaluation.batch",
)  # fmt: skip

_NOT_NEGATIVE = (
    "pipeline.workers", "pipeline.burn_in", "data.max_bad_clips", "data.retry_s", "batch.precise_bn_steps",
    "optimizer.weight_decay", "optimizer.eps", "checkpoint.last_retry_s", "evaluation.explain",
    "schedule.warmup_epochs", "schedule.warmup_start", "schedule.factor", "schedule.end",
)  # fmt: skip

_NULLABLE_POSITIVE = (
    "batch.bn_group", "optimizer.clip_norm", "distributed.world_size",
    "data.train_clips", "data.frame_rate", "distributed.hang_timeout_s", "plan.world_size", "plan.step_s",
    "plan.experience", "cluster.price_per_gpu_h", "distributed.horovod_cycle_ms",
    "checkpoint.every_steps", "checkpoint.every_minutes", "pipeline.dali_threads", "max_steps",
)  # fmt: skip

_NULLABLE_NOT_NEGATIVE = ("distributed.horovod_fusion_mib", "distributed.horovod_cache")

_BELOW_ONE = ("model.dropout", "optimizer.momentum", "optimizer.beta2", "optimizer.label_smoothing")


def check(config: Config) -> None:
    """Raise ConfigError, with the dotted key, for values that no run could use."""
    _check_ranges(config)
    folds = 2 if config.model.direction == "both" else 1
    if config.model.fold_div < folds:
        _refuse(
            "model.fold_div", f"{folds} or more with model.direction={config.model.direction}", config.model.fold_div
        )
    milestones = config.schedule.milestones
    if any(not milestone >= 0 for milestone in milestones):
        raise ConfigError(f"schedule.milestones must be 0 or more, got {milestones}. Fix: epochs, such as [20,40]")
    if not re.fullmatch(r"None|auto|[1-9]\d{0,8}", str(config.batch.micro_batch)):
        raise ConfigError(
            f"batch.micro_batch must be more than 0, auto or null, got {config.batch.micro_batch}. Fix: batch.micro_batch=auto"
        )
    _check_initial_weights(config.model)
    check_modality(config)
    _check_optimizer(config.optimizer)
    _check_crops(config.pipeline)
    _check_stream(config.pipeline, config.model.num_frames)
    for key, rule in (("pipeline.sampling", config.pipeline.sampling), ("evaluation.clips", config.evaluation.clips)):
        _check_sampling(key, rule, config.model.num_frames)
    _check_mirror(config.data.mirrored_words, config.pipeline.flip)
    _check_continuous(config.evaluation)
    warmup, epochs = config.schedule.warmup_epochs, config.schedule.epochs
    if warmup > epochs:
        raise ConfigError(
            f"schedule.warmup_epochs={warmup} is longer than schedule.epochs={epochs}. Fix: schedule.warmup_epochs={epochs} or less"
        )
    for key, amp in (("numerics.amp", config.numerics.amp), ("evaluation.amp", config.evaluation.amp)):
        if config.numerics.dtype == "float64" and amp != "off":
            raise ConfigError(f"{key}={amp} lowers precision and numerics.dtype=float64 raises it. Fix: {key}=off")
    if not re.fullmatch(r"newest|best|step-\d{8}", config.evaluation.checkpoint):
        raise ConfigError(
            f"evaluation.checkpoint must be newest, best or a name such as step-00001200, got {config.evaluation.checkpoint!r}. "
            "Fix: evaluation.checkpoint=newest"
        )
    if not -(2**63) <= config.seed < 2**63:
        raise ConfigError(f"seed must fit into 64 bits, got {config.seed}. Fix: seed=0")
    if any(world < 1 for world in config.plan.sweep):
        raise ConfigError(
            f"plan.sweep must be world sizes of 1 or more, got {config.plan.sweep}. Fix: plan.sweep=[8,64]"
        )
    _check_names(config)
    _check_profile(config.logger.profile_steps)
    check_horovod(config.distributed, config.distributed.backend)
    check_wandb_names(config)


def check_training(config: Config) -> None:
    """Raise ConfigError for settings that only an evaluation can use."""
    evaluation = config.evaluation
    if evaluation.save_logits or evaluation.ensemble or evaluation.explain:
        raise ConfigError(
            "evaluation.save_logits, evaluation.explain and evaluation.ensemble are for evaluate.py. "
            "Fix: train without them, then evaluate the run"
        )
    if evaluation.clips == "stream":
        raise ConfigError(
            "evaluation.clips=stream is for evaluate.py. Fix: train with evaluation=validation, then evaluate the run with "
            "evaluation=stream"
        )
    if evaluation.split != "val":
        raise ConfigError(
            f"evaluation.split={evaluation.split} is for evaluate.py: training evaluates on data.val. Fix: evaluation.split=val, "
            "then evaluate the run"
        )


def _check_names(config: Config) -> None:
    """Check what becomes the name of a run folder."""
    if config.run_id is not None and (why := why_no_folder_name(config.run_id)):
        raise ConfigError(f"run_id must be a plain folder name, got {config.run_id!r}: {why}. Fix: run_id=NAME")
    # A new run is called by name and time.
    if config.run_id is None and (why := why_no_folder_name(config.name, most=100)):
        raise ConfigError(
            f"name must be part of a folder name, got {config.name!r}: {why}. Fix: name=NAME, or run_id=NAME"
        )


def _check_ranges(settings: object) -> None:
    """Check each value that has a fixed range, whatever the others are."""

    def value(key: str) -> Any:
        return attrgetter(key)(settings)

    for key, choices in _CHOICES.items():
        if value(key) not in choices:
            known = [str(choice) for choice in choices]
            # YAML reads a bare off as false.
            found = "off" if value(key) == "False" and "off" in known else nearest(str(value(key)), known)
            raise ConfigError(f"{key} must be one of {', '.join(known)}, got {value(key)!r}. Fix: {key}={found}")
    for key in KEYS:
        numbers = value(key) if isinstance(value(key), list) else [value(key)]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            _refuse(key, "finite", value(key))
    _check_each(_POSITIVE, "more than 0", lambda number: number > 0, value)
    _check_each(_NOT_NEGATIVE, "0 or more", lambda number: number >= 0, value)
    _check_each(_BELOW_ONE, "in [0, 1)", lambda number: 0 <= number < 1, value)
    _check_each(_NULLABLE_NOT_NEGATIVE, "0 or more, or null", lambda number: number is None or number >= 0, value)
    _check_each(_NULLABLE_POSITIVE, "more than 0, or null", lambda number: number is None or number > 0, value)


def _check_each(keys: Iterable[str], rule: str, allowed: Callable[[Any], bool], value: Callable[[str], Any]) -> None:
    for key in keys:
        if not allowed(value(key)):
            _refuse(key, rule, value(key))


def _refuse(key: str, rule: str, value: object) -> NoReturn:
    default = default_of(key)
    fix = default if default is not None else "null" if is_optional(key) else "VALUE"
    raise ConfigError(f"{key} must be {rule}, got {value}. Fix: {key}={fix}")


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    if optimizer.ema_decay is not None and not 0 < optimizer.ema_decay < 1:
        raise ConfigError(
            f"optimizer.ema_decay must be in (0, 1), or null, got {optimizer.ema_decay}. Fix: optimizer.ema_decay=null"
        )
    if optimizer.nesterov and (optimizer.name != "sgd" or not optimizer.momentum):
        raise ConfigError(
            f"optimizer.nesterov=true needs optimizer.name=sgd and momentum, got {optimizer.name}, {optimizer.momentum}. "
            "Fix: optimizer.nesterov=false"
        )


def _check_crops(pipeline: PipelineConfig) -> None:
    scales = pipeline.crop_scales
    if not scales or not all(0 < scale <= 1 for scale in scales):
        raise ConfigError(
            f"pipeline.crop_scales must be numbers in (0, 1], got {scales}. Fix: pipeline.crop_scales=[1.0,0.875,0.75,0.66]"
        )


def _check_stream(pipeline: PipelineConfig, num_frames: int) -> None:
    """Check the numbers of stream sampling. Whether the network can be trained so: training/build/stream.py."""
    distances = pipeline.distances
    if not distances or min(distances) < 1:
        raise ConfigError(
            f"pipeline.distances must be numbers of frames, each 1 or more, got {distances}. Fix: pipeline.distances=[1,2,3,4,5]"
        )
    if pipeline.sampling == "stream" and pipeline.loss_from > num_frames:
        raise ConfigError(
            f"pipeline.loss_from={pipeline.loss_from} leaves no frame of a clip of model.num_frames={num_frames} to the loss. "
            f"Fix: pipeline.loss_from={num_frames} or less"
        )
    if pipeline.sampling == "stream" and pipeline.score_burn_in and pipeline.loss_from > pipeline.burn_in:
        raise ConfigError(
            f"pipeline.score_burn_in=true, but pipeline.loss_from={pipeline.loss_from} leaves no frame of a burn-in of "
            f"pipeline.burn_in={pipeline.burn_in} to the loss. Fix: pipeline.score_burn_in=false, or more pipeline.burn_in"
        )


def _check_initial_weights(model: ModelConfig) -> None:
    if not model.init:
        raise ConfigError(
            "model.init is empty: this recipe starts from trained weights. Fix: model.init=FILE, such as the checkpoint folder of "
            "a run on Kinetics or the authors' .pth; or model.init=random"
        )
    if model.zero_init_gamma and model.init != "random":
        raise ConfigError(
            f"model.zero_init_gamma=true is for random weights, and model.init={model.init}. Fix: model.zero_init_gamma=false"
        )
    if model.init_sha256 is None:
        return
    if re.fullmatch("[0-9a-f]{64}", model.init_sha256) is None:
        raise ConfigError(
            f"model.init_sha256 must be 64 digits of 0-9a-f (sha256sum FILE), got {model.init_sha256!r}. "
            "Fix: model.init_sha256=null"
        )
    if model.init == "random":
        raise ConfigError("model.init_sha256 is set, but model.init=random reads no file. Fix: model.init=FILE")


def _check_sampling(key: str, rule: str, num_frames: int) -> None:
    """Check dense sampling, which spreads the frames over a window of 64."""
    if rule == "dense" and num_frames > 64:
        raise ConfigError(
            f"{key}=dense takes at most 64 frames of a clip, but model.num_frames={num_frames}. Fix: model.num_frames=64 or less"
        )


def _check_continuous(evaluation: EvaluationConfig) -> None:
    """Check the settings of evaluation=stream."""
    distances = evaluation.distances
    if not distances or min(distances) < 1 or len(set(distances)) < len(distances):
        raise ConfigError(
            f"evaluation.distances must be different numbers of 1 or more, got {distances}. Fix: evaluation.distances=[1,2,3,4,5]"
        )
    if evaluation.clips != "stream":
        if evaluation.beside:
            raise ConfigError(
                f"evaluation.beside={evaluation.beside} is only for evaluation=stream. Fix: evaluation=stream, or leave it out"
            )
        return
    if evaluation.crops != 1:
        raise ConfigError(
            f"evaluation=stream has one view, got evaluation.crops={evaluation.crops}. Fix: evaluation.crops=1"
        )
    if evaluation.save_logits:
        raise ConfigError(
            "evaluation.save_logits=true has no meaning for evaluation=stream, where a clip has logits for each frame. "
            "Fix: evaluation.save_logits=false; stream.json of the run folder has all accuracies"
        )


def _check_profile(steps: list[int]) -> None:
    if steps and not (len(steps) == 2 and 0 <= steps[0] <= steps[1]):
        raise ConfigError(
            f"logger.profile_steps must be a first and a last step, from 0, got {steps}. Fix: logger.profile_steps=[20,22]"
        )


def _check_mirror(pairs: list[list[str]], flip: str) -> None:
    """Check that mirrored clips get the right labels."""
    words = [word.lower() for pair in pairs for word in pair]
    if any(len(pair) != 2 for pair in pairs) or "" in words or len(set(words)) != len(words):
        raise ConfigError(
            f"data.mirrored_words must be pairs of words, each word in one pair, got {pairs}. "
            "Fix: data.mirrored_words=[[left,right]]"
        )
    if flip == "relabel" and not pairs:
        raise ConfigError(
            "pipeline.flip=relabel needs the words that mirroring swaps in class names. "
            "Fix: data.mirrored_words=[[left,right]], or pipeline.flip=on where no class depends on left and right"
        )
    if flip == "on" and pairs:
        raise ConfigError(
            f"pipeline.flip=on would give mirrored clips wrong labels: data.mirrored_words={pairs} tell classes apart. "
            "Fix: pipeline.flip=relabel or off"
        )
