"""Freeze imports of entry points and loader workers for the cyclic GC, and keep entry points cheap to import."""

import gc
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from pipelines.loading.worker_loader import ClipLoader, start_worker_server
from runtime.gc_freeze import frozen_imports

ROOT = Path(__file__).parents[2]
# Fewer than any torch creates, more than a process without torch has.
TORCH_OBJECTS = 100_000

# Runs an entry point until it composes, as `python train.py` does, and prints the number of objects that the cyclic
# GC scans.
COUNT = """
import gc, runpy, sys
sys.path.insert(0, ".")
from training.config import command_line
command_line.execute = lambda *_: print(gc.get_freeze_count(), len(gc.get_objects()), gc.isenabled())
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""

# Imports an entry point as a worker process does, and prints the packages that this loads.
PACKAGES = """
import runpy, sys
before = set(sys.modules)
sys.path.insert(0, ".")
runpy.run_path(sys.argv.pop(1), run_name="__mp_main__")
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""


@pytest.mark.parametrize("program", ["train.py", "evaluate.py", "plan.py"])
def test_an_entry_points_imports_are_not_looked_at(program: str) -> None:
    said = subprocess.run([sys.executable, "-c", COUNT, program], cwd=ROOT, capture_output=True, text=True, check=True)
    kept, looked_at, enabled = said.stdout.split()
    assert int(kept) > TORCH_OBJECTS > int(looked_at)
    assert enabled == "True"


@pytest.mark.parametrize(
    "program", ["train.py", "evaluate.py", "plan.py", "prepare.py", "predict.py", "stream.py", "export.py"]
)
def test_a_worker_imports_an_entry_point_cheaply(program: str) -> None:
    """Import only the standard library and runtime/ when an entry point is imported as __mp_main__."""
    command = [sys.executable, "-c", PACKAGES, program]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) - set(sys.stdlib_module_names) <= {"runtime"}


class Collector(Dataset[tuple[int, bool, bool]]):
    """A dataset that reports the state of a worker's cyclic GC."""

    def __getitem__(self, item: int) -> tuple[int, bool, bool]:
        preloaded = {"pipelines.loading.worker_server", "pipelines.loading.clips", "torchvision", "av"}
        return gc.get_freeze_count(), gc.isenabled(), preloaded <= sys.modules.keys()


def test_a_workers_imports_are_not_looked_at() -> None:
    start_worker_server()
    ((kept, enabled, forked),) = ClipLoader(Collector(), workers=1, prefetch=2).batches([0])
    assert kept > TORCH_OBJECTS and enabled and forked


def test_what_is_made_later_is_looked_at() -> None:
    kept = gc.get_freeze_count()
    try:
        with frozen_imports():
            lasting: list[list[int]] = [[] for _ in range(100)]
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() >= kept + len(lasting)
        cycle: list[object] = []
        cycle.append(cycle)
        del cycle
        assert gc.collect() >= 1
    finally:
        # Later tests in this process need an unfrozen GC.
        gc.unfreeze()


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    try:
        with pytest.raises(ModuleNotFoundError), frozen_imports():
            importlib.import_module("pipelines.no_such_module")
        assert gc.isenabled()
    finally:
        gc.unfreeze()
