"""Invalid input in real jobs: every rank logs a clear error within seconds, and the job is not requeued."""

import json
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.manifest import Manifest
from pipelines.stream.augmentation import replacement_row
from tests.helpers.jobs import Ended, make_clips, start_training, wait_for_record
from tests.helpers.worlds import World, available

pytestmark = pytest.mark.slow

WORLDS = [World("none", 1), World("local", 2), World("horovodrun", 2)]
RANK_VARIABLE = {"local": "TSM_LOCAL_RANK", "horovodrun": "HOROVOD_RANK"}
# Allows for a slow start on a busy machine; the errors themselves appear within seconds.
LIMIT_S = 120

SMALL = (
    "experiment=smoke logger=disabled logger.every_steps=1 pipeline.size=32 model.num_frames=4 pipeline.decoder=pyav "
    "batch.global_batch=8 schedule.warmup_epochs=0"
).split()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("bad_input") / "clips")


@pytest.fixture(params=WORLDS, ids=lambda world: world.name)
def world(request: pytest.FixtureRequest) -> World:
    return available(request.param)


def train(world: World, folder: Path, clips: Path, *overrides: str, rank_variable: str | None = None) -> Ended:
    arguments = [*SMALL, f"data.root={clips}", f"outputs={folder}", "run_id=bad", *overrides]
    return start_training(world, folder / "log.txt", *arguments, rank_variable=rank_variable).wait(LIMIT_S)


def assert_refused(ended: Ended, world: World, exit_code: int, *words: str) -> None:
    """Assert that ranks log the words, that the exit code does not requeue, and that no process remains.

    torchrun and horovodrun end the other processes as soon as one has failed, so a slower rank may not log anything.
    """
    assert ended.left_running == []
    assert ended.exit_code not in (0, 75), ended.output
    own = world.launcher in ("none", "local")
    if own:
        assert ended.exit_code == exit_code, ended.output
    ranks = [rank for rank in range(world.size) if f"rank {rank} of {world.size}" in ended.output]
    assert len(ranks) == world.size or (ranks and not own), ended.output
    for word in words:
        assert word in ended.output, ended.output


def break_manifest(clips: Path, copy: Path, change: str) -> None:
    """Copy the data set, with an empty training manifest or with a label outside the classes."""
    copy.mkdir()
    for name in ("train", "val"):
        (copy / name).symlink_to(clips / name)
    (copy / "val.arrow").write_bytes((clips / "val.arrow").read_bytes())
    table = pa.ipc.open_file(pa.memory_map(str(clips / "train.arrow"))).read_all()
    if change == "empty":
        table = table.slice(0, 0)
    else:
        labels = table.column("label").to_pylist()
        labels[7] = 10
        table = table.set_column(
            table.schema.get_field_index("label"), table.schema.field("label"), [pa.array(labels, pa.int32())]
        )
    with pa.ipc.new_file(str(copy / "train.arrow"), table.schema) as writer:
        writer.write_table(table)


def test_unknown_key(world: World, tmp_path: Path, clips: Path) -> None:
    ended = train(world, tmp_path, clips, "optimizer.lrr=3")
    assert_refused(ended, world, 2, "optimizer.lrr=3: there is no key", "the nearest known key is optimizer.lr;")


def test_missing_manifest(world: World, tmp_path: Path, clips: Path) -> None:
    ended = train(world, tmp_path, clips, "data.root=nowhere")
    assert_refused(ended, world, 3, "nowhere/train.arrow", "prepare.py shapes")


@pytest.mark.parametrize(("change", "words"), [("empty", ["no rows"]), ("label", ["label is 10", "10 classes"])])
def test_broken_manifest(world: World, tmp_path: Path, clips: Path, change: str, words: list[str]) -> None:
    break_manifest(clips, tmp_path / "copy", change)
    ended = train(world, tmp_path, clips, f"data.root={tmp_path / 'copy'}")
    assert_refused(ended, world, 3, "train.arrow", *words)


def test_truncated_video(world: World, tmp_path: Path, clips: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", clips, copy], check=True)
    victim = copy / Manifest.open(copy / "train.arrow").row(13).path
    victim.write_bytes(victim.read_bytes()[:700])
    ended = train(world, tmp_path, clips, f"data.root={copy}")
    assert_refused(ended, world, 3, victim.name, "truncated", "data.max_bad_clips")


def test_a_tolerated_truncated_video_is_replaced_and_listed(tmp_path: Path, clips: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", clips, copy], check=True)
    row = 13
    victim = copy / Manifest.open(copy / "train.arrow").row(row).path
    victim.write_bytes(victim.read_bytes()[:700])
    world = World("torchrun", 2)
    options = [f"data.root={copy}", "data.max_bad_clips=5", "schedule.epochs=2", "evaluation.every_epochs=9"]
    ended = train(world, tmp_path, clips, *options)
    assert ended.exit_code == 0, ended.output
    listed = [json.loads(line) for line in (tmp_path / "bad" / "bad_clips.jsonl").read_text().splitlines()]
    assert [(clip["row"], clip["epoch"]) for clip in listed] == [(row, 0), (row, 1)]
    assert all("truncated" in clip["reason"] and clip["replaced_by"] != row for clip in listed)


def test_a_video_that_is_replaced_while_the_job_runs(tmp_path: Path, clips: Path) -> None:
    """Another decodable video replaces the file. Its clip is substituted until data.max_bad_clips is exceeded."""
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", clips, copy], check=True)
    manifest = Manifest.open(copy / "train.arrow")
    row = 13
    victim, other = (copy / manifest.row(number).path for number in (row, 20))
    options = [f"data.root={copy}", "data.max_bad_clips=2", "schedule.epochs=4000", "evaluation.every_epochs=9999"]
    arguments = [*SMALL, f"outputs={tmp_path}", "run_id=bad", *options]
    job = start_training(World("torchrun", 2), tmp_path / "log.txt", *arguments)
    wait_for_record(tmp_path / "bad" / "metrics.jsonl", "train", LIMIT_S)
    shutil.copy(other, copy / "aside")
    (copy / "aside").replace(victim)
    ended = job.wait(LIMIT_S)
    assert_refused(ended, World("torchrun", 2), 3, victim.name, "truncated or replaced since", "data.max_bad_clips=2")
    assert json.loads((tmp_path / "bad" / "outcome.json").read_text())["exit_code"] == 3
    listed = [json.loads(line) for line in (tmp_path / "bad" / "bad_clips.jsonl").read_text().splitlines()]
    epochs = [clip["epoch"] for clip in listed]
    assert epochs == list(range(epochs[0], epochs[0] + 3))
    assert {clip["row"] for clip in listed} == {row}
    by_rule = [replacement_row(len(manifest), 0, epoch, row, 0) for epoch in epochs]
    assert [clip["replaced_by"] for clip in listed] == by_rule


def test_a_batch_that_does_not_divide(world: World, tmp_path: Path, clips: Path) -> None:
    ended = train(world, tmp_path, clips, "batch.global_batch=9", "batch.bn_group=9", "batch.micro_batch=4")
    assert_refused(ended, world, 2, "9 clips", "use 3, 9 processes")


def test_ranks_with_different_configurations(world: World, tmp_path: Path, clips: Path) -> None:
    if world.size == 1:
        return
    ended = train(world, tmp_path, clips, rank_variable=RANK_VARIABLE[world.launcher])
    assert_refused(ended, world, 2, "another configuration", "seed")


def test_a_world_that_contradicts_its_launcher(world: World, tmp_path: Path, clips: Path) -> None:
    ended = train(world, tmp_path, clips, "distributed.world_size=3")
    assert_refused(ended, world, 2, "distributed.world_size=3", f"started {world.size} process")


def test_ctrl_c(world: World, tmp_path: Path, clips: Path) -> None:
    """Exit within 10 s with code 130, no process left, and a checkpoint from which the same command resumes.

    Launchers take longer to exit. horovodrun forwards the signal as SIGTERM: the outcome is 75. Its own exit code is 1, or 0 if of
    two of its threads that wait for the same child one loses, and takes the exit code for 0.
    """
    arguments = [*SMALL, f"data.root={clips}", f"outputs={tmp_path}", "run_id=stopped", "schedule.epochs=4000"]
    job = start_training(world, tmp_path / "log.txt", *arguments)
    wait_for_record(tmp_path / "stopped" / "metrics.jsonl", "train", LIMIT_S)
    job.interrupt()
    ended = job.wait(limit_s=10 if world.launcher == "none" else 20)
    assert ended.left_running == []
    outcome = json.loads((tmp_path / "stopped" / "outcome.json").read_text())
    assert outcome["exit_code"] in ((75, 130) if world.launcher == "horovodrun" else (130,))
    assert ended.exit_code in ((1, 0) if world.launcher == "horovodrun" else (130,)), ended.output
    again = start_training(world, tmp_path / "again.txt", *arguments, "max_steps=1").wait(LIMIT_S)
    assert again.exit_code == 0 and "resuming stopped from step" in again.output, again.output
