"""launch/local.sh: the launch script for one machine without a cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.jobs import make_clips
from tests.helpers.worlds import CHECKOUT, World, available

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("world", "overrides"),
    [(World("local", 2), []), (World("horovodrun", 2), ["distributed=horovod"])],
    ids=lambda value: getattr(value, "name", ""),
)
def test_it_starts_two_processes_where_there_is_no_gpu(world: World, overrides: list[str], tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "clips")
    started = subprocess.run(
        [
            "launch/local.sh", "experiment=smoke", *overrides, "distributed.device=cpu", "max_steps=1", "run_id=here",
            f"outputs={tmp_path}", f"data.root={clips}", "pipeline.size=24", "model.num_frames=4", "pipeline.decoder=pyav",
            "pipeline.workers=0", "batch.global_batch=8", "logger.wandb=disabled",
        ],
        cwd=CHECKOUT, env=available(world).environment | {"TSM_PYTHON": sys.executable, "PROCESSES": _no_gpus()},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert started.returncode == 0, started.stdout + started.stderr
    provenance = json.loads((tmp_path / "here" / "provenance.json").read_text())[0]
    assert (provenance["launcher"], provenance["world_size"]) == (world.launcher, 2)


def _no_gpus() -> str:
    """Value of PROCESSES: "2" on a machine with GPUs, because the script would count them."""
    return "2" if any(Path("/dev").glob("nvidia[0-9]*")) else os.environ.get("PROCESSES", "")
