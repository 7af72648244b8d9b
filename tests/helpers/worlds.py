"""Worlds of real processes for tests: one launch per (backend, size) runs every test body, each test then reads its result.

`python tests/helpers/worlds.py FOLDER` is what each process of a launch runs; bodies are in tests/world_cases/bodies.py.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
LAUNCH_LIMIT_S = 600


@dataclass(frozen=True)
class World:
    """A launch: `launcher` is none, torchrun, horovodrun or mpirun."""

    launcher: str
    size: int

    @property
    def name(self) -> str:
        return f"{self.launcher}-{self.size}"

    @property
    def missing(self) -> str | None:
        """Why this machine cannot launch it."""
        if self.launcher in ("horovodrun", "mpirun") and not _horovod_is_built():
            return "Horovod is not built here (make horovod)"
        if self.launcher == "mpirun" and shutil.which("mpirun") is None:
            return "no mpirun here (apt-get install openmpi-bin libopenmpi-dev, then make horovod)"
        return None

    def command(self, *program: str) -> list[str]:
        """The command line that runs a Python program with its arguments in this world."""
        python = sys.executable
        size = str(self.size)
        return {
            "none": [python, *program],
            "torchrun": [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size, *program],
            "horovodrun": [str(Path(python).parent / "horovodrun"), "--gloo", "-np", size, python, *program],
            "mpirun": ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", size, python, *program],
        }[self.launcher]

    @property
    def environment(self) -> dict[str, str]:
        """Few threads and patient waiting: the machine has fewer cores than the world has processes."""
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
    """The world, or a skipped test, with the reason, where this machine cannot launch it."""
    if world.missing:
        pytest.skip(world.missing)
    return world


@cache
def _horovod_is_built() -> bool:
    probe = "import horovod.torch as hvd; hvd.init"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


@dataclass(frozen=True)
class Results:
    """What the bodies of a launch returned, by body and rank."""

    folder: Path
    by_rank: list[dict[str, Any]]

    def of(self, body: str) -> list[Any]:
        """A body's result on each rank; fails with the body's own traceback where it raised."""
        for rank, results in enumerate(self.by_rank):
            outcome = results.get(body, {"error": f"did not run: an earlier body failed ({list(results)[-1:]})"})
            if "error" in outcome:
                raise AssertionError(f"{body} on rank {rank}:\n{outcome['error']}")
        return [results[body]["result"] for results in self.by_rank]


def launch(world: World, folder: Path) -> Results:
    """Run all bodies in a world. Raises AssertionError with the launch's output when it leaves results out."""
    folder.mkdir(parents=True, exist_ok=True)
    command = world.command(str(Path(__file__)), str(folder))
    log = folder / "launch.log"
    with log.open("w") as output:
        try:
            subprocess.run(
                command, cwd=CHECKOUT, env=world.environment, stdout=output, stderr=output, timeout=LAUNCH_LIMIT_S
            )
        except subprocess.TimeoutExpired:
            output.write(f"\nended after {LAUNCH_LIMIT_S} s\n")
    paths = [folder / f"rank-{rank}.json" for rank in range(world.size)]
    if not all(path.exists() for path in paths):
        raise AssertionError(f"{world.name} left no results:\n{log.read_text()[-6000:]}")
    return Results(folder, [json.loads(path.read_text()) for path in paths])


def main(folder: Path) -> int:
    """Run every body on this rank; the first that raises ends the launch, since the ranks are out of step then."""
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
            context.control.report_failure(f"{body.__name__} raised", 1)
            os._exit(1)
    context.control.close()
    context.backend.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
