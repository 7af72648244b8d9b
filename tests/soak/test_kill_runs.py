"""Kill runs six times at random moments, with torch and Horovod; each run must end bit-equal to an uninterrupted one."""

import random
from pathlib import Path

import pytest

from tests.helpers.jobs import differing, make_clips
from tests.helpers.worlds import World, available

from .kill_runs import STEPS, Kill, killed_and_resumed, undisturbed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("kill_runs") / "clips")


@pytest.mark.parametrize("world", [World("torchrun", 2), World("horovodrun", 2)], ids=lambda world: world.name)
def test_a_run_that_is_killed_three_times_ends_as_if_it_had_not(world: World, clips: Path, tmp_path: Path) -> None:
    alone = undisturbed(available(world), tmp_path / f"alone-{world.name}", clips)
    kills: list[Kill] = []
    run = killed_and_resumed(world, tmp_path / f"killed-{world.name}", clips, 3, random.Random(5), kills.append)
    assert differing(alone.folder, run.folder, STEPS) == [], kills
    assert kills, "the run was done before any kill"
    assert all(kill.ended_s <= 30 for kill in kills), kills
