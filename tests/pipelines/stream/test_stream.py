"""Order the clip stream: counter-based random numbers, clip order, evaluation, and each rank's clips in any world size."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.stream.counter_rng import key_of, mix, mix_array, uniforms, words
from pipelines.stream.order import StreamOrder, evaluation_rows, permute
from training.recipe import Execution, make_execution

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
PUBLISHED_BATCH, PUBLISHED_GROUP, PUBLISHED_CLIPS = 12_288, 8, 239_781

# --- Counter-based random numbers -------------------------------------------------------------------------------------
# Runs were trained with the golden values below: a change to one of them breaks every resumed run.


def test_words_are_those_of_splitmix64() -> None:
    """Match the published generator seeded with 0 (values of its reference implementation)."""
    assert [hex(word) for word in words(0, 3)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@pytest.mark.parametrize(
    ("parts", "key"),
    [
        ((), 0),
        ((0,), 0xE220A8397B1DCDAF),
        ((1, 2, 3), 0x6AE515C1C0AC7E37),
        ((3, 2, 1), 0xD62A7F6E291FEF64),
        ((-1,), 0xE4D971771B652C20),
    ],
)
def test_golden_keys(parts: tuple[int, ...], key: int) -> None:
    assert key_of(*parts) == key


def test_golden_uniforms() -> None:
    golden = [0.1300857085561754, 0.4373184320319292, 0.9549255112847241, 0.27578715582682944]
    assert uniforms(key_of(1, 2, 3), 4).tolist() == golden


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=20))
@settings(max_examples=50)
def test_mix_is_the_same_on_arrays(numbers: list[int]) -> None:
    assert mix_array(np.array(numbers, dtype=np.uint64)).tolist() == [mix(number) for number in numbers]


@given(st.lists(INT64, min_size=2, max_size=4, unique=True))
@settings(max_examples=50)
def test_the_order_of_a_keys_parts_matters(parts: list[int]) -> None:
    keys = {key_of(*order) for order in itertools.permutations(parts)}
    assert len(keys) == len(list(itertools.permutations(parts)))


def test_a_key_with_a_part_more_is_another() -> None:
    assert len({key_of(*[0] * count) for count in range(10)}) == 10


def test_words_are_a_prefix_of_more_words() -> None:
    assert words(key_of(5), 10).tolist() == words(key_of(5), 100)[:10].tolist()


def test_uniforms_are_uniform() -> None:
    numbers = np.stack([uniforms(key_of(1, seed, 0, 0), 1000) for seed in range(200)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean() == pytest.approx(1 / 2, abs=3e-3)
    assert numbers.var() == pytest.approx(1 / 12, abs=1e-3)
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 5 / numbers.size**0.5


# --- Order ------------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 3000), key=st.integers(0, (1 << 64) - 1))
@settings(max_examples=60)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    image = permute(np.arange(size), size, key)
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 1023, 1024, 1025, 4097, PUBLISHED_CLIPS])
def test_permute_is_a_bijection_at_the_edges_of_its_domains(size: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, 7)), np.arange(size))


@given(st.integers(1, 1 << 31), st.integers(0, 1 << 31))
@settings(max_examples=30)
def test_permute_needs_no_list_of_the_rows(size: int, index: int) -> None:
    assert 0 <= permute(np.array([index % size]), size, 3)[0] < size


def test_golden_order() -> None:
    """Keep the order of clips: a change would give every resumed run other clips."""
    assert permute(np.arange(10), 10, key_of(7, 0)).tolist() == [1, 4, 6, 3, 5, 0, 9, 7, 8, 2]
    assert permute(np.arange(16), 16, 5).tolist() == [4, 12, 15, 8, 6, 10, 9, 1, 13, 2, 5, 0, 11, 3, 14, 7]
    positions = np.array([0, 1, 2, 12_287, 12_288, 239_780, 239_781, 23_978_099])
    epoch_N, row_N = StreamOrder(PUBLISHED_CLIPS, seed=42).at(positions)
    assert epoch_N.tolist() == [0, 0, 0, 0, 0, 0, 1, 99]
    assert row_N.tolist() == [68137, 94178, 22699, 156215, 191181, 220533, 23283, 177984]


@given(rows=st.integers(1, 200), seed=INT64, epochs=st.integers(1, 4))
@settings(max_examples=40)
def test_every_epoch_has_every_row_once(rows: int, seed: int, epochs: int) -> None:
    epoch_N, row_N = StreamOrder(rows, seed).at(np.arange(rows * epochs))
    assert epoch_N.tolist() == [position // rows for position in range(rows * epochs)]
    assert (np.sort(row_N.reshape(epochs, rows), axis=1) == np.arange(rows)).all()


@given(positions=st.lists(st.integers(0, 10_000), min_size=1, max_size=30), seed=st.integers(0, 100))
@settings(max_examples=40)
def test_any_position_in_any_company_is_the_same(positions: list[int], seed: int) -> None:
    order = StreamOrder(97, seed)
    together = order.at(np.array(positions))[1].tolist()
    assert together == [order.at(np.array([position]))[1][0] for position in positions]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(StreamOrder(50, seed).at(np.arange(50) + 50 * epoch)[1]) for seed in range(20) for epoch in range(20)
    }
    assert len(orders) == 400


@pytest.mark.parametrize("rows", [7, 10, 32])
def test_every_row_is_as_likely_at_a_position(rows: int) -> None:
    seeds = 100 * rows
    for position in (0, 1, rows - 1):
        seen = [int(permute(np.array([position]), rows, key_of(seed, 0))[0]) for seed in range(seeds)]
        counts = np.bincount(seen, minlength=rows)
        assert ((counts - 100) ** 2 / 100).sum() < rows - 1 + 5 * (2 * (rows - 1)) ** 0.5


def test_neighbours_in_the_manifest_do_not_stay_neighbours() -> None:
    row_N = StreamOrder(20_000, 0).at(np.arange(20_000))[1]
    assert np.mean(np.abs(np.diff(row_N)) == 1) < 1e-3
    assert abs(np.corrcoef(np.arange(20_000), row_N)[0, 1]) < 5 / 20_000**0.5


def test_a_stream_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        StreamOrder(0, 0)


# --- Evaluation -------------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 300), batch=st.integers(1, 40), size=st.integers(1, 40))
@settings(max_examples=80)
def test_evaluation_counts_every_row_once(rows: int, batch: int, size: int) -> None:
    plans = [evaluation_rows(rows, batch, rank, size) for rank in range(size)]
    real = [row for plan in plans for row_N, real_N in plan for row in row_N[real_N]]
    assert sorted(real) == list(range(rows))


@given(rows=st.integers(1, 300), batch=st.integers(1, 40), size=st.integers(1, 40))
@settings(max_examples=80)
def test_evaluation_is_as_long_on_every_rank(rows: int, batch: int, size: int) -> None:
    plans = [evaluation_rows(rows, batch, rank, size) for rank in range(size)]
    fewest = -(-rows // (batch * size))
    for plan in plans:
        assert len(plan) == fewest
        for row_N, real_N in plan:
            assert row_N.shape == real_N.shape == (batch,)
            assert ((row_N >= 0) & (row_N < rows)).all()


@given(rows=st.integers(1, 300), batch=st.integers(1, 40), size=st.integers(1, 40))
@settings(max_examples=40)
def test_ranks_of_an_evaluation_have_as_much_to_do(rows: int, batch: int, size: int) -> None:
    counts = [sum(int(real_N.sum()) for _, real_N in evaluation_rows(rows, batch, rank, size)) for rank in range(size)]
    assert max(counts) - min(counts) <= 1


# --- The same clips for any world size --------------------------------------------------------------------------------


def layouts(global_batch: int, group: int, limit: int | None = None) -> list[Execution]:
    """Return an execution for each world size that fits."""
    fitting = []
    for world in range(1, global_batch + 1):
        if global_batch % world == 0:
            try:
                fitting.append(make_execution(global_batch, group, world, limit))
            except ValueError:
                continue
    return fitting


def check_step_holds_its_clips(execution: Execution, step: int) -> None:
    """Check that ranks and micro-steps together take positions [step * B, (step + 1) * B), each once."""
    positions = np.concatenate(
        [part for rank in range(execution.world) for part in execution.stream_positions(rank, step, step + 1)]
    )
    batch = execution.global_batch
    assert np.array_equal(np.sort(positions), np.arange(step * batch, (step + 1) * batch))


def check_groups_are_together(execution: Execution, group: int) -> None:
    """Check that each batch-norm group lies in one micro-step, on one rank or on exactly one rank group."""
    rank_groups = {tuple(ranks) for ranks in execution.bn_rank_groups()}
    lies_on: dict[int, set[tuple[int, int]]] = {}
    for rank in range(execution.world):
        for micro_step in range(execution.accumulation):
            for number in np.unique(execution.slots(rank, micro_step) // group):
                lies_on.setdefault(int(number), set()).add((micro_step, rank))
    for places in lies_on.values():
        assert len({micro_step for micro_step, _ in places}) == 1
        ranks = tuple(sorted(rank for _, rank in places))
        assert ranks in rank_groups if rank_groups else len(ranks) == 1


def check_ghosts_are_groups(execution: Execution, group: int) -> None:
    """Check that the `bn_ghosts` equal parts of a micro-batch are its groups in order.

    Where ranks share a group, the whole micro-batch belongs to one group.
    """
    for rank in (0, execution.world - 1):
        parts = np.split(execution.slots(rank, execution.accumulation - 1), execution.bn_ghosts)
        assert all(len(set(part // group)) == 1 for part in parts)
        assert len({int(part[0]) // group for part in parts}) == execution.bn_ghosts


def test_the_published_batch_fits_the_worlds_that_divide_it() -> None:
    worlds = [execution.world for execution in layouts(PUBLISHED_BATCH, PUBLISHED_GROUP)]
    assert worlds == [world for world in range(1, PUBLISHED_BATCH + 1) if PUBLISHED_BATCH % world == 0]


@pytest.mark.parametrize("world", [w for w in range(1, 1537) if PUBLISHED_BATCH % w == 0])
@pytest.mark.parametrize("limit", [None, 8, 2])
def test_published_steps_hold_the_same_clips_on_every_world(world: int, limit: int | None) -> None:
    execution = make_execution(PUBLISHED_BATCH, PUBLISHED_GROUP, world, limit if world >= 8 else None)
    for step in (0, 19, 1950):
        check_step_holds_its_clips(execution, step)
    check_groups_are_together(execution, PUBLISHED_GROUP)
    check_ghosts_are_groups(execution, PUBLISHED_GROUP)


def test_the_published_run_is_a_batch_norm_group_a_process() -> None:
    assert make_execution(PUBLISHED_BATCH, PUBLISHED_GROUP, 1536) == Execution(1536, PUBLISHED_BATCH, 8, 1, 1, 1)


@given(
    batch=st.sampled_from([8, 12, 16, 24, 36, 48]),
    group_index=st.integers(0, 9),
    limit=st.sampled_from([None, 1, 2, 3, 4, 6, 8]),
    step=st.integers(0, 5),
)
@settings(max_examples=80)
def test_small_steps_hold_the_same_clips_on_every_world(
    batch: int, group_index: int, limit: int | None, step: int
) -> None:
    groups = [divisor for divisor in range(1, batch + 1) if batch % divisor == 0]
    group = groups[group_index % len(groups)]
    for execution in layouts(batch, group, limit):
        check_step_holds_its_clips(execution, step)
        check_groups_are_together(execution, group)
        check_ghosts_are_groups(execution, group)


def test_a_rank_takes_its_micro_steps_in_order() -> None:
    execution = make_execution(16, 2, world=2, micro_batch_limit=4)
    assert execution.accumulation == 2
    of_rank_1 = [part.tolist() for part in execution.stream_positions(1, 3, 5)]
    assert of_rank_1 == [[52, 53, 54, 55], [60, 61, 62, 63], [68, 69, 70, 71], [76, 77, 78, 79]]
    slots = [execution.slots(1, micro_step).tolist() for micro_step in range(2)]
    assert slots == [[4, 5, 6, 7], [12, 13, 14, 15]]


def test_steps_of_several_epochs_are_one_stream() -> None:
    """Drop no clip where an epoch ends within a step."""
    rows, batch, steps = 10, 4, 5
    execution = make_execution(batch, 2, world=2)
    positions = [part for rank in range(2) for part in execution.stream_positions(rank, 0, steps)]
    _, row_N = StreamOrder(rows, 0).at(np.concatenate(positions))
    assert np.bincount(row_N).tolist() == [steps * batch // rows] * rows
