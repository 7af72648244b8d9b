"""Launch scripts on a real Slurm of emulated nodes: shapes, three ways to start, and faults while a job runs."""

import json
import math
import os
import re
import shutil
import signal
import sys
import time
import venv
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.jobs import differing, last_checkpoint, make_clips
from tests.helpers.slurm_cluster import SlurmCluster
from tests.helpers.worlds import CHECKOUT, World, available
from training.telemetry.records import read_metrics

pytestmark = pytest.mark.slow

# A network that trains within seconds, in deterministic mode, so that rounding hides no difference.
TINY = (
    "pipeline.size=24 model.num_frames=4 pipeline.decoder=pyav pipeline.workers=0 batch.global_batch=8 batch.bn_group=4 "
    "schedule.warmup_epochs=0 evaluation.batch=4 logger.every_steps=1 logger.wandb=disabled numerics.deterministic=true"
).split()
SMOKE = "model=tsm_resnet18 model.init=random data=shapes pipeline.flip=off distributed.device=cpu batch.micro_batch=null".split()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("slurm_jobs") / "clips")


@dataclass
class Job:
    """Job of a launch script, with its log and its run folder."""

    cluster: SlurmCluster
    number: int
    log: Path
    folder: Path

    def ended(self, limit_s: float = 420) -> dict[str, str]:
        return self.cluster.wait_for_state(self.number, limit_s=limit_s)

    def wait(self, what: Callable[[], bool], limit_s: float = 240) -> None:
        deadline_s = time.monotonic() + limit_s
        while not what():
            state = self.cluster.job(self.number)
            assert time.monotonic() < deadline_s, f"{state}\n{self.log.read_text()[-8000:]}"
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        metrics = self.folder / "metrics.jsonl"
        self.wait(lambda: metrics.exists() and any(record["step"] >= step for record in self.records("train")))

    def restarted(self, times: int, said: str) -> None:
        """Wait until the job runs after this many restarts; its log must give the reason."""

        def runs_again() -> bool:
            state = self.cluster.job(self.number)
            return state["JobState"] == "RUNNING" and int(state["Restarts"]) >= times

        self.wait(runs_again)
        assert said in self.log.read_text()

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        for process in Path("/proc").glob("[0-9]*"):
            # The process ended meanwhile.
            with suppress(OSError):
                environ = (process / "environ").read_bytes().split(b"\0")
                mine = {
                    f"SLURM_JOB_ID={self.number}".encode(),
                    f"SLURM_PROCID={rank}".encode(),
                    b"SLURM_STEP_NUM_TASKS=4",
                }
                if mine <= set(environ) and b"train.py" in (process / "cmdline").read_bytes().split(b"\0"):
                    os.kill(int(process.name), number)
                    return
        raise AssertionError(f"no rank {rank} of job {self.number} is there")

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in read_metrics(self.folder / "metrics.jsonl") if record["kind"] == kind]


class Launch:
    """Submit launch scripts, each into its own run folder."""

    def __init__(self, cluster: SlurmCluster, clips: Path, folder: Path) -> None:
        self.cluster, self._clips, self.folder = cluster, clips, folder
        cluster.environment |= {
            "TSM_SITE": "slurm/sites/emulated.sh",
            "TSM_PREFLIGHT": "off",
            "HOME": str(folder / "home"),
        }
        (folder / "home").mkdir()

    def __call__(self, name: str, script: str, *options: str, overrides: list[str], preflight: str = "off") -> Job:
        self.cluster.environment["TSM_PREFLIGHT"] = preflight
        log = self.folder / f"{name}.log"
        number = self.cluster.sbatch(
            f"--output={log}", *options, f"launch/{script}.sh",
            *TINY, f"data.root={self._clips}", f"outputs={self.folder}", f"run_id={name}", *overrides,
        )  # fmt: skip
        return Job(self.cluster, number, log, self.folder / name)


@pytest.fixture(scope="module")
def launch(slurm_cluster: SlurmCluster, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    # Horovod with MPI.
    available(World("mpirun", 2))
    return Launch(slurm_cluster, clips, tmp_path_factory.mktemp("runs"))


# --- Shapes -----------------------------------------------------------------------------------------------------------

SHAPES = [
    ("-p summit", "kinetics_1536", 256, 6),
    ("-p dgx --nodes=192 --ntasks-per-node=8 --gres=gpu:8", "kinetics_1536", 192, 8),
    ("-p quad --nodes=384 --ntasks-per-node=4 --gres=gpu:4", "kinetics_1536", 384, 4),
    ("-p summit", "kinetics_384", 64, 6),
    ("-p quad --nodes=96 --ntasks-per-node=4 --gres=gpu:4", "kinetics_384", 96, 4),
    ("-p dgx", "kinetics_single_node", 1, 8),
    ("-p dgx", "something_v2_single_node", 1, 8),
    ("-p dgx", "something_v2_64", 8, 8),
    ("-p quad --nodes=16 --ntasks-per-node=4 --gres=gpu:4", "something_v2_64", 16, 4),
    ("", "smoke", 4, 2),
]


@pytest.mark.parametrize(("options", "script", "nodes", "tasks"), SHAPES)
def test_slurm_takes_each_script_in_its_shape(
    options: str, script: str, nodes: int, tasks: int, slurm_cluster: SlurmCluster
) -> None:
    tried = slurm_cluster.run("sbatch", "--test-only", *options.split(), f"launch/{script}.sh")
    assert "to start at" in tried.stderr
    number = slurm_cluster.sbatch("--hold", *options.split(), f"launch/{script}.sh", "optimizer=lars")
    job = slurm_cluster.job(number)
    slurm_cluster.run("scancel", str(number))
    assert (int(job["NumNodes"].split("-")[0]), int(job["NumTasks"])) == (nodes, nodes * tasks)
    gpus = {"smoke": None}.get(script, f"gres:gpu:{tasks}")
    assert job.get("TresPerNode") == gpus
    assert job["Requeue"] == "1"


def test_every_script_has_a_shape() -> None:
    scripts = {path.stem for path in (CHECKOUT / "launch").glob("*.sh")} - {"local", "kinetics_1536_lsf"}
    assert scripts == {script for _, script, _, _ in SHAPES}


@pytest.mark.parametrize(
    "options",
    ["-p nowhere", "-p summit --gres=gpu:8", "-p summit --time=48:00:00", "-p summit --nodes=257", "-p emu"],
)
def test_slurm_refuses_what_a_machine_has_not(options: str, slurm_cluster: SlurmCluster) -> None:
    refused = slurm_cluster.run("sbatch", "--test-only", *options.split(), "launch/kinetics_1536.sh", check=False)
    assert refused.returncode != 0


# --- Three ways to start the same job ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_ways(launch: Launch) -> dict[str, Job]:
    """Run launch/smoke.sh on 4 nodes x 2 ranks in float64, 5 steps, each way in turn."""
    jobs = {}
    for way in ("horovod", "horovod_gloo", "torch"):
        overrides = [f"distributed={way}", "numerics.dtype=float64", "schedule.epochs=1"]
        jobs[way] = launch(way, "smoke", overrides=overrides)
        assert jobs[way].ended()["JobState"] == "COMPLETED", jobs[way].log.read_text()[-6000:]
    return jobs


def test_the_three_ways_train_alike(three_ways: dict[str, Job]) -> None:
    """Equal losses prove equal clips in each step. Weights and accuracy agree too, in float64 to 1e-9."""
    first, *others = three_ways.values()
    reference = last_checkpoint(first.folder, 5)
    for other in others:
        for ours, theirs in zip(first.records("train"), other.records("train"), strict=True):
            assert math.isclose(ours["loss"], theirs["loss"], rel_tol=1e-9)
        for ours, theirs in zip(first.records("evaluation"), other.records("evaluation"), strict=True):
            assert (ours["top1_percent"], ours["clips"]) == (theirs["top1_percent"], theirs["clips"])
        weights = last_checkpoint(other.folder, 5)
        assert weights.keys() == reference.keys()
        for name, x in reference.items():
            torch.testing.assert_close(weights[name], x, rtol=1e-9, atol=1e-9)


def test_each_way_is_what_it_says(three_ways: dict[str, Job]) -> None:
    for way, launcher, backend in (
        ("horovod", "srun --mpi=pmix", "horovod"),
        ("horovod_gloo", "srun", "horovod"),
        ("torch", "srun", "torch"),
    ):
        started = json.loads((three_ways[way].folder / "provenance.json").read_text())[0]
        assert (started["launcher"], started["world_size"]) == (launcher, 8)
        assert started["hosts"] == [f"n{node}" for node in (1, 1, 2, 2, 3, 3, 4, 4)]
        assert three_ways[way].records("start")[0]["backend"] == backend


def test_ranks_write_no_files_of_their_own_on_the_shared_file_system(
    three_ways: dict[str, Job], launch: Launch
) -> None:
    """Rank 0 alone writes the run folder; ranks log to their nodes, and write nothing to the home folder."""
    for job in three_ways.values():
        files = {str(path.relative_to(job.folder)) for path in job.folder.rglob("*") if path.is_file()}
        unexpected = {
            name for name in files
            if not re.fullmatch(r"[a-z_]+\.(json|jsonl|yaml|txt|html)|SUCCESS|checkpoints/step-\d+/\w+\.(json|safetensors)", name)
        }  # fmt: skip
        assert not unexpected
    for node in ("n1", "n2", "n3", "n4"):
        disk = launch.cluster.folder / "nodes" / node / "disk"
        assert len(list(disk.rglob("rank-*.log"))) >= 2
    at_home = {path.name for path in (launch.folder / "home").rglob("*") if path.is_file()}
    assert all(name.startswith("fontlist-") for name in at_home), "rank 0's report draws with matplotlib"


def test_a_complete_run_never_runs_again_and_refuses_another_recipe(three_ways: dict[str, Job], launch: Launch) -> None:
    same = ["distributed=torch", "numerics.dtype=float64", "schedule.epochs=1"]
    again = launch("torch", "smoke", overrides=same)
    assert again.ended()["JobState"] == "COMPLETED", again.log.read_text()
    assert "is complete (SUCCESS is there): nothing to do" in again.log.read_text()
    longer = launch("torch", "smoke", overrides=[*same, "schedule.epochs=2"])
    assert longer.ended()["ExitCode"] == "2:0"
    assert "Fix: choose another run_id, or resume with checkpoint.allow_recipe_change=true" in longer.log.read_text()


# --- Refused before any rank starts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["optimiser.lr=1"], "2:0", "the nearest known key is optimizer.lr;"),
        (["batch.global_batch=9"], "2:0", "divide batch.global_batch=9"),
        (["data.root=/nowhere"], "3:0", "manifest"),
    ],
)
def test_a_wrong_job_ends_at_once_and_is_not_queued_again(
    overrides: list[str], code: str, said: str, launch: Launch
) -> None:
    job = launch(f"wrong-{overrides[0].split('.')[0]}", "smoke", "--nodes=1", overrides=overrides)
    ended = job.ended(60)
    text = job.log.read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", code, "0"), text
    assert said in text and "starting" not in text


def test_ranks_that_mpi_does_not_join_are_refused(launch: Launch, slurm_cluster: SlurmCluster) -> None:
    """A wrong --mpi would start as many worlds of one rank."""
    slurm_cluster.environment["TSM_SRUN_MPI"] = "none"
    try:
        job = launch("wrong-mpi", "smoke", "--nodes=2", overrides=["distributed.controller=mpi"])
        ended = job.ended(90)
    finally:
        del slurm_cluster.environment["TSM_SRUN_MPI"]
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    text = job.log.read_text()
    assert "distributed.controller=mpi, but srun started 4 processes. Fix: start with srun --mpi=pmix" in text
    assert {int(rank) for rank in re.findall(r"error \(rank (\d) of 4", text)} == {0, 1, 2, 3}


# --- The script of the published run, and faults ----------------------------------------------------------------------


def test_the_script_for_1536_runs_on_eight(launch: Launch) -> None:
    """`sbatch --nodes=4 --ntasks-per-node=2 launch/kinetics_1536.sh`, with preflight, and with data staged to the nodes."""
    job = launch(
        "kinetics", "kinetics_1536", "--nodes=4", "--ntasks-per-node=2", "--export=ALL,TSM_STAGE_DATA=on",
        overrides=[*SMOKE, "schedule.epochs=0.8", "schedule.milestones=[]", "evaluation.every_epochs=1"], preflight="on",
    )  # fmt: skip
    ended, text = job.ended(), job.log.read_text()
    assert ended["JobState"] == "COMPLETED", text
    assert (job.folder / "SUCCESS").exists()
    assert job.records("end")[0]["step"] == 4
    started = json.loads((job.folder / "provenance.json").read_text())[0]
    assert (started["launcher"], started["world_size"]) == ("srun --mpi=pmix", 8)
    assert "GPUs of a node: 6" in text
    assert "preflight: all is well on 4 nodes" in text
    assert re.search(r"staged .*clips \(\d+ s\)", text)


def test_what_is_staged_is_whole_or_not_there(
    launch: Launch, clips: Path, slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    """Each node gets the environment, and the data if it has room; no staged files remain after the job."""
    venv.create(tmp_path / "environment", with_pip=False)
    archive = tmp_path / "environment.tar.gz"
    slurm_cluster.run("slurm/pack_environment.sh", str(archive), str(tmp_path / "environment"))
    script = tmp_path / "job.sh"
    script.write_text(f"""#!/usr/bin/env bash
        checkout={CHECKOUT}
        source $checkout/slurm/job.sh
        load_site
        TSM_ENVIRONMENT_ARCHIVE={archive}
        stage_data {clips} # first: it needs packages, and the environment has none
        stage_environment
        show='echo "$(hostname): $("$1" -c "import sys; print(sys.prefix)") $(find "$2" -name "*.mp4" | wc -l)"'
        on_each_node "$show" "$TSM_PYTHON" "$TSM_STAGED_FILES"
        unstage
        on_each_node 'echo "$(hostname) left: $(ls /mnt/local | grep staged)"'
    """)
    filler = slurm_cluster.folder / "nodes" / "n3" / "disk" / "filler"
    # Room only for the environment.
    filler.write_bytes(bytes(shutil.disk_usage(filler.parent).free - 1_000_000))
    files = len(list(clips.rglob("*.mp4")))
    number = slurm_cluster.sbatch("--nodes=4", "--ntasks-per-node=1", f"--output={tmp_path / 'log'}", str(script))
    ended = slurm_cluster.wait_for_state(number, limit_s=120)
    filler.unlink()
    text = (tmp_path / "log").read_text()
    assert ended["JobState"] == "COMPLETED", text
    found = re.search(rf"/mnt/local/tsm-staged-{number}-[0-9a-f]{{16}}(?=/environment)", text)
    assert found, text
    prefix = found[0]
    for node in slurm_cluster.nodes:
        assert f"{node}: {prefix}/environment {files if node != 'n3' else 0}\n" in text, text
        assert f"{node} left: \n" in text
        copied = f"{node}: {clips}: {files if node != 'n3' else 0} files copied to {prefix}/data"
        assert copied in text
    assert f"n3: no room in {prefix}/data for {files} of {files} files of {clips}: reading the shared ones" in text


def test_the_tasks_of_a_job_array_share_the_shards(clips: Path, slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    """Each task writes its part, and the last to finish writes the index."""
    target, logs = tmp_path / "shards", tmp_path / "task-%a"
    command = f"{sys.executable} prepare.py shard --root {clips} --to {target} --shard-size 200KB --workers 1"
    slurm_cluster.sbatch("--array=1-3", "--ntasks=1", f"--output={logs}", f"--wrap={command}")
    deadline_s = time.monotonic() + 60
    while not (target / "shards.json").exists():
        said = "".join(path.read_text() for path in tmp_path.glob("task-*"))
        assert time.monotonic() < deadline_s, said
        time.sleep(0.2)
    slurm_cluster.wait_until_idle()
    written = [int(re.findall(r"(\d+) written in", path.read_text())[0]) for path in sorted(tmp_path.glob("task-*"))]
    names = list(json.loads((target / "shards.json").read_text())["shards"])
    assert sum(written) == len(names) > 3 and min(written) > 0


FAULTY = [
    *SMOKE, "model=tsm_mobilenet_v2", "batch.bn_group=2", "schedule.epochs=20", "schedule.milestones=[]",
    "evaluation.every_epochs=10", "checkpoint.every_steps=5", "checkpoint.every_epochs=20",
]  # fmt: skip
STEPS = 100


def test_a_run_survives_every_fault(launch: Launch, slurm_cluster: SlurmCluster) -> None:
    """Survive a killed rank, a lost node, preemption, a time limit and a broken disk, one after the other.

    The final weights equal those of an undisturbed run bit for bit, and the log names each fault.
    """
    shape = ("--nodes=2", "--ntasks-per-node=2", "--partition=scavenge", "--export=ALL,TSM_PREFLIGHT_ALL_REDUCE=off")
    alone = launch("alone", "kinetics_1536", *shape, overrides=FAULTY)
    assert alone.ended()["JobState"] == "COMPLETED", alone.log.read_text()[-6000:]
    job = launch("befallen", "kinetics_1536", *shape, overrides=FAULTY, preflight="exclude")

    job.wait_for_step(5)
    job.signal_rank(3, signal.SIGKILL)
    job.restarted(1, "rank 3 on n2 is gone")

    job.wait_for_step(12)
    slurm_cluster.emulator("crash", "n2")
    job.restarted(2, "")
    slurm_cluster.emulator("boot", "n2")

    job.wait_for_step(20)
    urgent = slurm_cluster.sbatch("--partition=emu", "--nodes=4", "--exclusive", "--wrap=sleep 1", "--output=/dev/null")
    job.restarted(3, "received SIGUSR1")
    slurm_cluster.wait_for_state(urgent)

    job.wait_for_step(40)
    # Otherwise the run might end first: Slurm checks time limits every 30 s.
    job.signal_rank(1, signal.SIGSTOP)
    hours, minutes, _ = map(int, slurm_cluster.job(job.number)["RunTime"].split(":"))
    slurm_cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={60 * hours + minutes + 2}")
    job.wait(lambda: job.log.read_text().count("received SIGUSR1") == 2)
    job.signal_rank(1, signal.SIGCONT)
    slurm_cluster.wait_for_state(job.number, "PENDING", limit_s=90)
    slurm_cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    with slurm_cluster.changed("n1", disk="full"):
        job.restarted(5, "BAD n1: ")
        assert job.ended()["JobState"] == "COMPLETED", job.log.read_text()[-6000:]
    assert job.records("end")[-1]["step"] == STEPS
    assert differing(alone.folder, job.folder, STEPS) == []
    assert slurm_cluster.job(job.number)["ExcNodeList"] == "n1"


def test_a_job_that_is_cancelled_stays_so(launch: Launch, slurm_cluster: SlurmCluster) -> None:
    """Save a checkpoint on scancel: Slurm signals every process of the step before it kills them."""
    job = launch("cancelled", "smoke", "--nodes=1", overrides=["distributed=torch", "schedule.epochs=60"])
    job.wait_for_step(3)
    slurm_cluster.run("scancel", str(job.number))
    assert job.ended(60)["JobState"] == "CANCELLED"
    job.wait(lambda: "Slurm itself has ended this start" in job.log.read_text())
    assert json.loads((job.folder / "outcome.json").read_text())["exit_code"] == 75
    assert (job.records("checkpoint")[-1]["step"]) >= 3
