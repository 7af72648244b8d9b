"""What a process imports is never again in the way of its collector: in the entry points and in loader workers."""

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
TORCH_OBJECTS = 100_000  # fewer than any torch makes, more than a process without it has

# Runs an entry point up to where it would start, as `python train.py` does, and says what the collector has to look at.
COUNT = """
import gc, runpy, sys
sys.path.insert(0, ".")
runpy.run_path(sys.argv[1])
print(gc.get_freeze_count(), len(gc.get_objects()), gc.isenabled())
"""


@pytest.mark.parametrize("program", ["train.py", "evaluate.py", "plan.py"])
def test_an_entry_points_imports_are_not_looked_at(program: str) -> None:
    said = subprocess.run([sys.executable, "-c", COUNT, program], cwd=ROOT, capture_output=True, text=True, check=True)
    kept, looked_at, enabled = said.stdout.split()
    assert int(kept) > TORCH_OBJECTS > int(looked_at)
    assert enabled == "True"


class Collector(Dataset[tuple[int, bool, bool]]):
    """A dataset that says what a worker's collector has to look at."""

    def __getitem__(self, item: int) -> tuple[int, bool, bool]:
        return gc.get_freeze_count(), gc.isenabled(), "pipelines.loading.worker_server" in sys.modules


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
        gc.unfreeze()  # in the process of the tests nothing is to last


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    try:
        with pytest.raises(ModuleNotFoundError), frozen_imports():
            importlib.import_module("pipelines.no_such_module")
        assert gc.isenabled()
    finally:
        gc.unfreeze()
