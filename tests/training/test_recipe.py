"""Recipe and execution: layouts of the global batch, derived numbers, and the fingerprint."""

import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.build.recipe import recipe_of
from training.config.schema import BatchConfig, Config, DataConfig, OptimizerConfig, ScheduleConfig
from training.errors import ConfigError
from training.recipe import Execution, Recipe, make_execution
from training.schedule import Schedule

KINETICS_CLIPS = 239_781


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "seed": 0,
        "global_batch": 16,
        "bn_group": 8,
        "total_steps": 100,
        "num_rows": 100,
        "manifest_digest": "d",
        "schedule": Schedule("cosine", peak=0.1, total_steps=100),
        "model": {"backbone": "resnet18"},
        "optimizer": {"lr": 0.02},
        "augmentation": {"size": 56},
        "numerics": {"dtype": "float32"},
    }
    return Recipe(**values | changes)


# --- Execution --------------------------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 96),
    group=st.integers(1, 96),
    world=st.integers(1, 24),
    limit=st.one_of(st.none(), st.integers(1, 12)),
)
@settings(max_examples=300)
def test_a_layout_holds_the_whole_batch_or_is_refused(batch: int, group: int, world: int, limit: int | None) -> None:
    try:
        execution = make_execution(batch, group, world, limit)
    except ConfigError:
        return
    assert execution.world == world
    assert execution.world * execution.micro_batch * execution.accumulation == execution.global_batch == batch
    assert limit is None or execution.micro_batch <= limit
    assert execution.bn_ghosts * group == execution.micro_batch * execution.bn_ranks
    assert 1 in (execution.bn_ghosts, execution.bn_ranks)
    assert world % execution.bn_ranks == 0


@given(batch=st.integers(1, 96), group=st.integers(1, 96), world=st.integers(1, 24), limit=st.integers(1, 12))
@settings(max_examples=200)
def test_nothing_that_fits_is_refused(batch: int, group: int, world: int, limit: int) -> None:
    """Compare with a search over all numbers of micro-steps; the layout uses the fewest."""
    fitting = [
        accumulation
        for accumulation in range(1, batch + 1)
        if batch % group == 0 and batch % (world * accumulation) == 0
        for micro in [batch // (world * accumulation)]
        if micro <= limit and (micro % group == 0 or (group % micro == 0 and world * micro % group == 0))
    ]
    try:
        assert make_execution(batch, group, world, limit).accumulation == min(fitting)
    except ConfigError:
        assert fitting == []


@pytest.mark.parametrize(
    ("arguments", "execution"),
    [
        ((16, 8, 1), Execution(1, 16, 16, 1, bn_ghosts=2, bn_ranks=1)),
        ((16, 8, 2), Execution(2, 16, 8, 1, bn_ghosts=1, bn_ranks=1)),
        ((16, 8, 4), Execution(4, 16, 4, 1, bn_ghosts=1, bn_ranks=2)),
        ((16, 16, 4), Execution(4, 16, 4, 1, bn_ghosts=1, bn_ranks=4)),
        ((16, 8, 1, 8), Execution(1, 16, 8, 2, bn_ghosts=1, bn_ranks=1)),
        ((16, 2, 2, 4), Execution(2, 16, 4, 2, bn_ghosts=2, bn_ranks=1)),
        ((16, 8, 4, 2), Execution(4, 16, 2, 2, bn_ghosts=1, bn_ranks=4)),
        ((12_288, 8, 1536), Execution(1536, 12_288, 8, 1, bn_ghosts=1, bn_ranks=1)),
        ((12_288, 8, 6, 64), Execution(6, 12_288, 64, 32, bn_ghosts=8, bn_ranks=1)),
    ],
)
def test_layouts(arguments: tuple[int, ...], execution: Execution) -> None:
    assert make_execution(*arguments) == execution


def test_rank_groups_are_neighbours_that_cover_the_world() -> None:
    assert make_execution(16, 8, 8).bn_rank_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert make_execution(16, 16, 4).bn_rank_groups() == [[0, 1, 2, 3]]
    assert make_execution(16, 8, 2).bn_rank_groups() == []


def test_batch_norm_over_the_whole_batch_cannot_accumulate() -> None:
    with pytest.raises(ConfigError, match="batch-norm groups of 16 and at most 4 clips"):
        make_execution(16, 16, world=2, micro_batch_limit=4)
    assert make_execution(16, 16, world=4, micro_batch_limit=4).accumulation == 1


@pytest.mark.parametrize(("limit", "accumulation"), [(None, 1), (8, 1), (7, 2), (4, 2), (3, 4), (1, 8)])
def test_a_smaller_micro_batch_accumulates(limit: int | None, accumulation: int) -> None:
    assert make_execution(16, 1, world=2, micro_batch_limit=limit).accumulation == accumulation


@pytest.mark.parametrize(
    ("batch", "group", "world", "limit"), [(16, 8, 3, None), (24, 8, 5, 2), (12_288, 8, 100, None)]
)
def test_the_error_says_which_worlds_fit(batch: int, group: int, world: int, limit: int | None) -> None:
    with pytest.raises(ConfigError, match=rf"does not divide over {world} processes\. Fix: use ") as caught:
        make_execution(batch, group, world, limit)
    named = re.search(r"use ([\d, ]+)", str(caught.value))
    assert named is not None
    worlds = [int(number) for number in named[1].replace(",", " ").split()]
    for fitting in worlds:
        make_execution(batch, group, fitting, limit)
    # A longer list is truncated in the message.
    if len(worlds) < 24:
        for missing in set(range(1, batch + 1)) - set(worlds):
            with pytest.raises(ConfigError):
                make_execution(batch, group, missing, limit)


def test_a_group_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch\.bn_group=5 does not divide batch\.global_batch=16"):
        make_execution(16, 5, 1)


@pytest.mark.parametrize(("batch", "group", "key"), [(0, 1, "batch.global_batch"), (8, 0, "batch.bn_group")])
def test_sizes_below_one_are_refused(batch: int, group: int, key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{key} must be 1 or more, got 0")):
        make_execution(batch, group, 1)


# --- Recipe -----------------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 200), batch=st.integers(1, 50), epochs=st.integers(1, 8))
@settings(max_examples=100)
def test_an_epoch_ends_with_the_step_that_takes_its_last_clip(rows: int, batch: int, epochs: int) -> None:
    total = -(-rows * epochs // batch)
    a_recipe = recipe(num_rows=rows, global_batch=batch, total_steps=total)
    for epoch in range(1, epochs + 1):
        step = a_recipe.epoch_end_step(epoch)
        assert step * batch >= epoch * rows > (step - 1) * batch


def test_the_last_epoch_ends_with_the_run() -> None:
    # 12 steps; two epochs are 12.5 steps.
    a_recipe = recipe(num_rows=100, global_batch=16, total_steps=round(2 * 100 / 16))
    assert [a_recipe.epoch_end_step(epoch) for epoch in (1, 2, 3)] == [7, 12, 12]


def test_epochs_and_steps_per_epoch() -> None:
    a_recipe = recipe(num_rows=100, global_batch=16, total_steps=25)
    assert (a_recipe.epochs, a_recipe.steps_per_epoch) == (4.0, 6.25)


OTHER: dict[str, Any] = {
    "seed": 1,
    "global_batch": 32,
    "bn_group": 4,
    "total_steps": 101,
    "num_rows": 99,
    "manifest_digest": "e",
    "schedule": Schedule("cosine", peak=0.2, total_steps=100),
    "model": {"backbone": "resnet50"},
    "optimizer": {"lr": 0.03},
    "augmentation": {"size": 64},
    "numerics": {"dtype": "float64"},
}


@pytest.mark.parametrize("field", [field.name for field in fields(Recipe)])
def test_every_field_changes_the_fingerprint(field: str) -> None:
    assert replace(recipe(), **{field: OTHER[field]}).fingerprint != recipe().fingerprint


@pytest.mark.parametrize("field", [field.name for field in fields(Schedule)])
def test_every_field_of_the_schedule_changes_the_fingerprint(field: str) -> None:
    changed: dict[str, Any] = {"decay": "poly2", "peak": 0.2, "total_steps": 101, "warmup_steps": 5, "warmup_start": 0.01,
               "milestone_steps": (3,), "factor": 0.5, "end": 0.001}  # fmt: skip
    schedule = replace(recipe().schedule, **{field: changed[field]})
    assert recipe(schedule=schedule).fingerprint != recipe().fingerprint


def test_equal_recipes_have_one_fingerprint_in_any_order_of_their_settings() -> None:
    first, second = recipe(model={"a": 1, "b": 2}), recipe(model={"b": 2, "a": 1})
    assert first.fingerprint == second.fingerprint


def test_as_dict_is_plain_json_with_the_schedule_in_it() -> None:
    plain = recipe(schedule=Schedule("step", 0.1, 100, milestone_steps=(40, 80))).as_dict()
    assert plain["schedule"]["milestone_steps"] == [40, 80]
    assert plain.keys() == {field.name for field in fields(Recipe)}


# --- Derived from a configuration -------------------------------------------------------------------------------------


def published() -> Config:
    """Configuration of the 1,536-GPU run."""
    return Config(
        data=DataConfig("kinetics", "data/kinetics", num_classes=400),
        batch=BatchConfig(global_batch=12_288, bn_group=8),
        optimizer=OptimizerConfig(lr=0.02, base_batch=128),
        schedule=ScheduleConfig(epochs=100, decay="step", milestones=[40, 80], warmup_epochs=5),
    )


def test_the_published_runs_numbers() -> None:
    derived = recipe_of(published(), KINETICS_CLIPS, "digest")
    assert derived.schedule.peak == pytest.approx(1.92)
    assert derived.steps_per_epoch == pytest.approx(19.51, abs=0.005)
    assert derived.total_steps == derived.schedule.total_steps == 1951
    assert derived.schedule.warmup_steps == 98
    assert derived.schedule.milestone_steps == (
        round(40 * KINETICS_CLIPS / 12_288),
        round(80 * KINETICS_CLIPS / 12_288),
    )
    assert derived.bn_group == 8
    assert derived.epochs == pytest.approx(100, abs=0.03)


def test_the_published_runs_rate_at_its_ends() -> None:
    schedule = recipe_of(published(), KINETICS_CLIPS, "digest").schedule
    assert schedule.learning_rate(0) == pytest.approx(1.92 / 99)
    assert schedule.learning_rate(98) == pytest.approx(1.92)
    assert schedule.learning_rate(1950) == pytest.approx(0.0192)


def test_a_recipe_holds_the_clips_and_what_decides_the_result() -> None:
    config = published()
    config.seed, config.model.num_frames, config.pipeline.size = 7, 16, 112
    derived = recipe_of(config, KINETICS_CLIPS, "digest")
    assert (derived.seed, derived.num_rows, derived.manifest_digest) == (7, KINETICS_CLIPS, "digest")
    assert derived.model["num_frames"] == derived.augmentation["num_frames"] == 16
    assert derived.augmentation["size"] == 112
    assert derived.optimizer["momentum"] == 0.9


def test_no_group_is_the_whole_batch() -> None:
    config = published()
    config.batch.bn_group = None
    assert recipe_of(config, KINETICS_CLIPS, "digest").bn_group == 12_288


def test_where_a_run_lies_does_not_change_its_recipe() -> None:
    config = published()
    config.batch.micro_batch, config.pipeline.workers, config.distributed.backend = "4", 9, "horovod"
    config.outputs, config.name, config.logger.wandb = "elsewhere", "other", "disabled"
    config.distributed.gradient_dtype, config.distributed.hang_timeout_s = "float16", None
    same = recipe_of(published(), KINETICS_CLIPS, "digest").fingerprint
    assert recipe_of(config, KINETICS_CLIPS, "digest").fingerprint == same


RECIPE_KEYS = """
    augmentation.crop_scales augmentation.flip augmentation.mirrored_words augmentation.num_frames augmentation.sampling
    augmentation.size bn_group global_batch manifest_digest model.backbone model.direction model.dropout model.fold_div
    model.init model.non_local model.num_frames model.partial_bn model.shift model.temporal_pool model.zero_init_gamma
    num_rows numerics.amp numerics.dtype optimizer.base_batch optimizer.beta2 optimizer.bias_lr_multiplier
    optimizer.classifier_lr_multiplier optimizer.clip_norm optimizer.ema_decay optimizer.eps optimizer.label_smoothing
    optimizer.lr optimizer.momentum optimizer.name optimizer.nesterov optimizer.scaling optimizer.trust_coefficient
    optimizer.weight_decay schedule.decay schedule.end schedule.factor schedule.milestone_steps schedule.peak
    schedule.total_steps schedule.warmup_start schedule.warmup_steps seed total_steps
"""


def test_a_recipe_has_the_keys_of_checkpoints_written_before() -> None:
    """Renaming a key would make every older run refuse to resume."""
    recipe = recipe_of(published(), KINETICS_CLIPS, "digest").as_dict()
    parts = [[f"{key}.{name}" for name in value] if isinstance(value, dict) else [key] for key, value in recipe.items()]
    assert sorted(key for part in parts for key in part) == RECIPE_KEYS.split()


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch\.global_batch=12288 is more than the 100 training clips"):
        recipe_of(published(), 100, "digest")


def test_less_than_a_step_is_refused() -> None:
    config = published()
    config.schedule.epochs = 0.01
    with pytest.raises(ConfigError, match=r"schedule\.epochs=0\.01"):
        recipe_of(config, KINETICS_CLIPS, "digest")
