"""Rehearse what each rank of a job does before it imports torch: topology, configuration, layout, manifest, its first clips.

Replaces train.py in a launch script: TSM_RANK_PROGRAM='-m tools.slurm_emulator.rehearse'.

python -m tools.slurm_emulator.rehearse RUN_FOLDER

Prints one line of JSON for benchmarks/slurm_scale.py: duration of each part, memory, and sums over the rows of the first steps.
"""

import json
import os
import sys
import time
from pathlib import Path

from distributed.topology import choose_backend, find_topology
from runtime import run_layout

STEPS = 3


def main(folder: Path) -> None:
    """Run each part once and print its duration."""
    started_s = time.perf_counter()
    topology = find_topology()
    choose_backend("horovod", topology, int(os.environ["SLURM_NTASKS"]))
    placed_s = time.perf_counter()

    import numpy as np
    import yaml

    from pipelines.manifest import Manifest
    from pipelines.stream.order import StreamOrder
    from training.recipe import make_execution

    imported_s = time.perf_counter()
    config = yaml.safe_load((folder / run_layout.CONFIG).read_text())
    batch = config["batch"]
    limit = None if batch["micro_batch"] in (None, "auto") else int(batch["micro_batch"])
    execution = make_execution(batch["global_batch"], batch["bn_group"], topology.size, limit)
    configured_s = time.perf_counter()
    manifest = Manifest.open(Path(config["data"]["root"]) / config["data"]["train"])
    opened_s = time.perf_counter()
    positions = np.concatenate(list(execution.stream_positions(topology.rank, 0, STEPS)))
    _, row_N = StreamOrder(len(manifest), config["seed"]).at(positions)
    clips = [manifest.row(int(row)) for row in row_N]
    ordered_s = time.perf_counter()
    fields = {
        "rehearsal": topology.rank,
        "node": topology.node,
        "place_s": placed_s - started_s,
        "import_s": imported_s - placed_s,
        "config_s": configured_s - imported_s,
        "manifest_s": opened_s - configured_s,
        "order_s": ordered_s - opened_s,
        "cpu_s": time.process_time(),
        "private_mib": _private_mib(),
        "steps": STEPS,
        "clips": len(clips),
        "position_sum": int(positions.sum()),
        "row_sum": int(row_N.sum()),
    }
    print(json.dumps({name: round(value, 5) if isinstance(value, float) else value for name, value in fields.items()}))
    # The batch script reads the job's outcome from this file.
    if topology.rank == 0:
        (folder / run_layout.OUTCOME).write_text('{"exit_code": 0, "reason": "rehearsed", "time_s": 0}\n')


def _private_mib() -> float:
    """Memory of this process that it shares with no other, in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]))
