"""Derive the recipe from the configuration."""

from dataclasses import asdict
from typing import Any

from training.config.schema import Config, ModelConfig
from training.errors import ConfigError
from training.recipe import LEFT_OUT_OF_MODEL, Recipe
from training.schedule import Schedule, scaled_rate

from .data import augmentation_of
from .stream import check_stream


def recipe_of(config: Config, num_rows: int, manifest_digest: str, initial_weights: str | None = None) -> Recipe:
    """Derive the recipe: the peak rate by the scaling rule, and lengths in epochs as steps.

    `initial_weights`: the identity of what `model.init` names (init_weights.py), because its content decides the result
    and its path does not.
    """
    batch, optimizer, schedule = config.batch, config.optimizer, config.schedule
    check_stream(config.model, config.pipeline)
    if num_rows < batch.global_batch:
        raise ConfigError(
            f"batch.global_batch={batch.global_batch} is more than the {num_rows} training clips. "
            f"Fix: a batch.global_batch of {num_rows} or less"
        )

    def steps(epochs: float) -> int:
        return round(epochs * num_rows / batch.global_batch)

    total_steps = steps(schedule.epochs)
    if total_steps < 1:
        raise ConfigError(
            f"schedule.epochs={schedule.epochs} of {num_rows} clips is less than a step of {batch.global_batch}. "
            "Fix: more schedule.epochs, or a smaller batch.global_batch"
        )
    return Recipe(
        seed=config.seed,
        global_batch=batch.global_batch,
        bn_group=batch.bn_clips,
        total_steps=total_steps,
        num_rows=num_rows,
        manifest_digest=manifest_digest,
        schedule=Schedule(
            decay=schedule.decay,  # type: ignore[arg-type]
            peak=scaled_rate(optimizer.lr, optimizer.base_batch, batch.global_batch, optimizer.scaling),  # type: ignore[arg-type]
            total_steps=total_steps,
            warmup_steps=steps(schedule.warmup_epochs),
            warmup_start=schedule.warmup_start,
            milestone_steps=tuple(steps(epoch) for epoch in schedule.milestones),
            factor=schedule.factor,
            end=schedule.end,
        ),
        model=_model_recipe(config.model, initial_weights or config.model.init),
        optimizer=_optimizer_recipe(config),
        augmentation=_augmentation_recipe(config),
        numerics={"dtype": config.numerics.dtype, "amp": config.numerics.amp},
    )


def _augmentation_recipe(config: Config) -> dict[str, Any]:
    settings = asdict(augmentation_of(config.model, config.data, config.pipeline))
    # The settings of the network have it.
    del settings["modality"]
    if settings["stream"] is None:
        # Recipes of older checkpoints lack the key, and their fingerprints stay.
        del settings["stream"]
    return settings


def _model_recipe(model: ModelConfig, initial_weights: str) -> dict[str, Any]:
    settings = asdict(model) | {"init": initial_weights}
    del settings["init_sha256"]
    return {key: value for key, value in settings.items() if LEFT_OUT_OF_MODEL.get(key) != value}


def _optimizer_recipe(config: Config) -> dict[str, Any]:
    settings = asdict(config.optimizer)
    if config.model.modality == "rgb":
        # It decides nothing, and recipes of older checkpoints lack it.
        del settings["first_conv_lr_multiplier"]
    return settings
