"""Compare the configuration of an evaluation with that of the run whose weights it evaluates.

One rule for `evaluate.py --run FOLDER` and for `evaluate.py experiment=... run_id=NAME`. Every key of the schema has a kind:

- identity: what the weights mean. Another value is refused.
- view: what the network sees, and in which precision it computes. Another value is allowed and stated next to the scores.
- free: where the evaluation runs, how fast, and which of the run's weights it takes.
- unread: only training reads the key, so another value changes no score. With --run it is refused, because it has no effect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Any

from training.build.init_weights import saved_state
from training.config.keys import KEYS
from training.config.schema import Config
from training.errors import ConfigError
from training.recipe import LEFT_OUT_OF_MODEL
from training.telemetry.records import read_metrics


class Kind(Enum):
    IDENTITY = "identity"
    VIEW = "view"
    FREE = "free"
    UNREAD = "unread"


_KEYS = {
    Kind.IDENTITY: """
        model.backbone model.modality model.shift model.direction model.fold_div model.temporal_pool model.non_local
        data.num_classes optimizer.ema_decay
    """,
    # model.num_frames is no identity: the authors evaluate networks with more frames than they were trained with.
    # pipeline.loader: DALI's pixels differ by about a grey level (docs/data.md).
    Kind.VIEW: """
        model.num_frames data.val data.mirrored_words pipeline.loader pipeline.size pipeline.sampling
        numerics.dtype numerics.channels_last numerics.tf32 numerics.cudnn_benchmark numerics.deterministic
        evaluation.amp evaluation.clips evaluation.crops evaluation.full_resolution evaluation.portrait_bug
    """,
    # data.train: of a run without class names an evaluation reads those of its training clips.
    # evaluation.split: a run has no scores of its own on test clips, and every result names the split.
    Kind.FREE: """
        data.name data.root data.train data.test data.train_clips data.frame_rate data.prepare data.max_bad_clips data.retry_s
        pipeline.dali_threads pipeline.decoder pipeline.workers pipeline.prefetch
        distributed.backend distributed.controller distributed.device distributed.world_size distributed.gradient_dtype
        distributed.timeout_s distributed.hang_timeout_s
        distributed.horovod_cycle_ms distributed.horovod_fusion_mib distributed.horovod_cache distributed.horovod_hierarchical
        distributed.horovod_timeline
        logger.wandb logger.project logger.group logger.tags logger.every_steps logger.diagnostics
        logger.tensorboard logger.profile_steps
        evaluation.batch evaluation.checkpoint evaluation.save_logits evaluation.explain evaluation.distances evaluation.beside
        evaluation.split evaluation.ensemble evaluation.ensemble_weights evaluation.ensemble_average outputs run_id
    """,
    Kind.UNREAD: """
        model.dropout model.partial_bn model.zero_init_gamma model.init model.init_sha256
        pipeline.crop_scales pipeline.flip pipeline.burn_in pipeline.distances pipeline.loss_from
        pipeline.score_burn_in
        batch.global_batch batch.bn_group batch.micro_batch batch.precise_bn_steps
        optimizer.name optimizer.lr optimizer.base_batch optimizer.scaling optimizer.momentum optimizer.beta2
        optimizer.trust_coefficient optimizer.eps optimizer.weight_decay optimizer.nesterov optimizer.bias_lr_multiplier
        optimizer.classifier_lr_multiplier optimizer.first_conv_lr_multiplier optimizer.clip_norm
        optimizer.label_smoothing
        schedule.epochs schedule.decay schedule.warmup_epochs schedule.warmup_start schedule.milestones schedule.factor
        schedule.end numerics.amp numerics.max_bad_steps_in_a_row
        checkpoint.every_epochs checkpoint.every_steps checkpoint.every_minutes checkpoint.keep checkpoint.keep_best
        checkpoint.last_retry_s checkpoint.second_place
        checkpoint.allow_recipe_change checkpoint.allow_code_change checkpoint.allow_restart checkpoint.allow_no_progress
        evaluation.every_epochs
        plan.world_size plan.step_s plan.experience plan.prepared plan.sweep plan.html plan.json plan.write_config
        plan.calibrate plan.plot
        cluster.name cluster.price_per_gpu_h cluster.figures
        name seed max_steps
    """,
}

KINDS = {key: kind for kind, keys in _KEYS.items() for key in keys.split()}
"""Kind of each key of the schema, by its dotted name."""


@dataclass(frozen=True)
class Difference:
    """A key whose value in this evaluation is not the run's."""

    key: str
    here: Any
    trained: Any

    def __str__(self) -> str:
        return f"{self.key}={_shown(self.here)} (trained: {_shown(self.trained)})"


def by_key(differing: Sequence[Difference]) -> dict[str, Any]:
    """Return differences as JSON records hold them."""
    return {each.key: {"here": each.here, "trained": each.trained} for each in differing}


def differences(trained: Mapping[str, Any], config: Config, *kinds: Kind) -> list[Difference]:
    """List the keys of these kinds whose value is known of the run and another one in `config`, in the order of the table."""
    here = flat(config)
    return [
        Difference(key, here[key], trained[key])
        for key, kind in KINDS.items()
        if kind in kinds and key in trained and trained[key] != here[key]
    ]


def differing_views(run: str, trained: Mapping[str, Any], config: Config) -> list[Difference]:
    """Return what to state next to the scores. Raises ConfigError if `config` gives the run's weights another meaning."""
    refused = differences(trained, config, Kind.IDENTITY)
    if refused:
        told = ", ".join(f"{each.key}={_shown(each.trained)}, not {_shown(each.here)}" for each in refused)
        remedy = " ".join(f"{each.key}={_shown(each.trained)}" for each in refused)
        raise ConfigError(
            f"{run} was trained with {told}. Fix: {remedy}; or evaluate.py --run FOLDER, which reads the run's"
        )
    return differences(trained, config, Kind.VIEW)


def differing_from_checkpoint(weights: Path, config: Config) -> list[Difference]:
    """Compare with the recipe of the checkpoint that a file or folder of weights (`model.init`) belongs to, if it does.

    Such weights are never the EMA, so that is stated if the run has one. Raises ConfigError as `differing_views` does.
    """
    state = saved_state(weights)
    if state is None or "recipe" not in state:
        return []
    trained = settings_of(state["recipe"])
    ema_decay = trained.pop("optimizer.ema_decay", None)
    without_ema = [] if ema_decay is None else [Difference("optimizer.ema_decay", None, ema_decay)]
    return differing_views(str(weights), trained, config) + without_ema


def differing_clips(metrics: Path, digest: str) -> list[Difference]:
    """Compare the manifest's digest with that of the run's last evaluation, if its records (metrics.jsonl) have it."""
    records = read_metrics(metrics) if metrics.exists() else []
    digests = [record["manifest"] for record in records if record["kind"] == "evaluation" and "manifest" in record]
    here = short_digest(digest)
    return [Difference("validation manifest", here, digests[-1])] if digests and digests[-1] != here else []


def short_digest(digest: str) -> str:
    """Return as much of a digest as records hold."""
    return digest[:12]


def settings_of(recipe: Mapping[str, Any], run: Config | None = None) -> dict[str, Any]:
    """Return the settings of a run by dotted key, from its configuration and the recipe in its checkpoint.

    The recipe is what trained these weights, so it counts where the two differ. Recipes of old checkpoints lack some keys,
    and a checkpoint may have been copied without the run's config.yaml.
    """
    settings = {} if run is None else flat(run)
    model, augmentation = recipe.get("model", {}), recipe.get("augmentation", {})
    settings |= {f"model.{key}": value for key, value in (LEFT_OUT_OF_MODEL | model).items() if key != "init"}
    settings |= {f"pipeline.{key}": augmentation[key] for key in ("size", "sampling") if key in augmentation}
    for group, key in (("numerics", "dtype"), ("optimizer", "ema_decay")):
        if key in recipe.get(group, {}):
            settings[f"{group}.{key}"] = recipe[group][key]
    return settings


def flat(config: Config) -> dict[str, Any]:
    """Return every setting by its dotted key."""
    return {key: attrgetter(key)(config) for key in KEYS}


def _shown(value: Any) -> str:
    """Return a value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
