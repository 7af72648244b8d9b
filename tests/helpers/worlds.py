"""Worlds of real processes: one launch per (backend, size) runs all test bodies, and each test reads its result.

Each process of a launch runs `python tests/helpers/worlds.py FOLDER`; the bodies are in tests/world_cases/bodies.py.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
MARK = "TSM_TEST_JOB"
"""A variable that a test gives to the job that it starts, and that all processes of the job inherit."""

LAUNCH_LIMIT_S = 600


@dataclass(frozen=True)
class World:
    """A launcher (none, local, torchrun, horovodrun or mpirun) and a world size."""

    launcher: str
    size: int

    @property
    def name(self) -> str:
        return f"{self.launcher}-{self.size}"

    @property
    def missing(self) -> str | None:
        """Return why this machine cannot launch the world, or None."""
        if self.launcher in ("horovodrun", "mpirun") and not _horovod_is_built():
            return "Horovod is not built here (make horovod)"
        if self.launcher == "mpirun" and shutil.which("mpirun") is None:
            return "no mpirun here (apt-get install openmpi-bin libopenmpi-dev, then make horovod)"
        return None

    def command(self, *program: str) -> list[str]:
        """Return the command line that runs a Python program with its arguments in this world."""
        python = sys.executable
        size = str(self.size)
        return {
            "none": [python, *program],
            "local": [python, str(CHECKOUT / "launch" / "local.py"), "--processes", size, *program],
            "torchrun": [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size, *program],
            "horovodrun": [str(Path(python).parent / "horovodrun"), "--gloo", "-np", size, python, *program],
            "mpirun": ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", size, python, *program],
        }[self.launcher]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a launch: few threads, and MPI that yields, because a machine has fewer cores than processes."""
        return os.environ | {
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "PYTHONUNBUFFERED": "1",
        }


WORLDS = [
    World("none", 1),
    World("torchrun", 2),
    World("torchrun", 4),
    World("horovodrun", 2),
    World("horovodrun", 4),
    World("mpirun", 2),
    World("mpirun", 4),
]


def available(world: World) -> World:
    """Return the world, or skip the test with the reason why this machine cannot launch it."""
    if world.missing:
        pytest.skip(world.missing)
    return world


@cache
def _horovod_is_built() -> bool:
    probe = "import horovod.torch as hvd; hvd.init"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


@dataclass(frozen=True)
class Results:
    """The results that the bodies of a launch returned, by body and rank."""

    folder: Path
    by_rank: list[dict[str, Any]]

    def of(self, body: str) -> list[Any]:
        """Return a body's result on each rank; fail with the body's own traceback if it raised."""
        for rank, results in enumerate(self.by_rank):
            outcome = results.get(body, {"error": f"did not run: an earlier body failed ({list(results)[-1:]})"})
            if "error" in outcome:
                raise AssertionError(f"{body} on rank {rank}:\n{outcome['error']}")
        return [results[body]["result"] for results in self.by_rank]


def launch(world: World, folder: Path) -> Results:
    """Run all bodies in a world; raise AssertionError with the launch's output if results are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    command = world.command(str(Path(__file__)), str(folder))
    log = folder / "launch.log"
    environment = world.environment | {MARK: uuid.uuid4().hex}
    with log.open("w") as output:
        try:
            subprocess.run(command, cwd=CHECKOUT, env=environment, stdout=output, stderr=output, timeout=LAUNCH_LIMIT_S)
        except subprocess.TimeoutExpired:
            output.write(f"\nended after {LAUNCH_LIMIT_S} s\n")
    paths = [folder / f"rank-{rank}.json" for rank in range(world.size)]
    if not all(path.exists() for path in paths):
        raise AssertionError(f"{world.name} left no results:\n{log.read_text()[-6000:]}")
    return Results(folder, [json.loads(path.read_text()) for path in paths])


def main(folder: Path) -> int:
    """Run every body on this rank; the first exception ends the launch, because ranks are then at different calls."""
    sys.path.insert(0, str(CHECKOUT))
    from runtime.gc_freeze import frozen_imports

    with frozen_imports():
        from tests.world_cases.bodies import BODIES, start

    context = start(folder)
    results: dict[str, Any] = {}
    for body in BODIES:
        started_s = time.monotonic()
        try:
            results[body.__name__] = {"result": body(context)}
        except Exception:
            results[body.__name__] = {"error": traceback.format_exc()}
        print(f"{body.__name__}: {time.monotonic() - started_s:.1f} s", flush=True)
        (folder / f"rank-{context.backend.topology.rank}.json").write_text(json.dumps(results))
        if "error" in results[body.__name__]:
            print(results[body.__name__]["error"], file=sys.stderr, flush=True)
            context.control.report_failure(f"failed: {body.__name__} raised", 1)
            os._exit(1)
    context.control.close()
    context.backend.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
