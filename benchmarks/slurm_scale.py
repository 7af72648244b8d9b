"""Measure how a job's startup time grows with its ranks: the real launch script on a real Slurm, all nodes on one machine.

python benchmarks/slurm_scale.py --json FILE          needs root and Slurm; 1,536 ranks: --nodes 256

launch/kinetics_1536.sh runs unchanged. Preflight checks all nodes, without its all-reduce, which needs torch. Instead of train.py,
tools/slurm_emulator/rehearse.py runs: topology, configuration, layout, a manifest of 239,975 clips, the rows of each rank's first
steps. The rows of all ranks together must equal those of a single process. Wall times are those of 1,536 ranks on a machine with
two cores; only CPU time and memory per rank are valid for a cluster.
"""

# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

from benchmarks import common
from pipelines.manifest import Manifest, write_manifest
from pipelines.stream.order import StreamOrder

CHECKOUT = Path(__file__).parent.parent
EMULATOR = CHECKOUT / "tools" / "slurm_emulator" / "cluster.sh"
CLIPS = 239_975  # Kinetics-400, as published
TASKS_PER_NODE = 6
LIMIT_S = 1800.0


def make_manifests(shapes: Path, folder: Path) -> None:
    """Write manifests as long as those of Kinetics that repeat the rows of the shapes data set."""
    folder.mkdir()
    for split, clips in (("train", CLIPS), ("val", 1000)):
        few = Manifest.open(shapes / f"{split}.arrow")
        rows = (few.row(index % len(few)) for index in range(clips))
        absolute = (type(row)(**{**vars(row), "path": str(few.root / row.path)}) for row in rows)
        write_manifest(folder / f"{split}.arrow", absolute, few.classes, split=split)


def rehearse(nodes: int, data: Path, folder: Path) -> dict[str, Any]:
    """Run one job on `nodes` nodes and return the results from its log."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environ |= {"TSM_CLUSTER": str(folder / f"cluster-{nodes}")}

    def call(*command: str) -> str:
        return subprocess.run(command, env=environ, cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout

    started_s = time.monotonic()
    call(str(EMULATOR), "up", str(nodes), "--host")
    up_s = time.monotonic() - started_s
    environ |= {
        "SLURM_CONF": str(folder / f"cluster-{nodes}" / "etc" / "slurm.conf"),
        "TSM_SITE": "slurm/sites/emulated.sh",
        "TSM_NETWORK_INTERFACE": "lo",
        # All nodes are this machine, which cannot resolve their names.
        "MASTER_ADDR": "127.0.0.1",
        "TSM_LOCAL_DISK": str(folder),
        "TSM_PREFLIGHT_ALL_REDUCE": "off",
        "TSM_PREFLIGHT_LIMIT_S": "900",
        "TSM_PYTHON": str(EMULATOR.with_name("seated_python.sh")),
        # Only a few ranks run at a time, so the last one ends long after the first.
        "TSM_SRUN_ARGUMENTS": f"--wait={LIMIT_S:.0f}",
        "TSM_RANK_PROGRAM": "-m tools.slurm_emulator.rehearse",
        "TSM_SRUN_MPI": "none",
    }
    log = folder / f"{nodes}.log"
    try:
        global_batch = 8 * nodes * TASKS_PER_NODE
        call(
            "sbatch", "--wait", "--partition=emu", f"--nodes={nodes}", f"--output={log}", "launch/kinetics_1536.sh",
            "data=shapes", f"data.root={data}", "pipeline.flip=off", "distributed.device=cpu", "model.init=random",
            f"batch.global_batch={global_batch}", f"outputs={folder}", f"run_id=rehearsal-{nodes}",
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        said = log.read_text() if log.exists() else ""
        sys.exit(f"the job failed: {error.stderr}\n{said[:4000]}\n...\n{said[-4000:]}")
    finally:
        call(str(EMULATOR), "down")
    return read_log(nodes, log, global_batch) | {"up_s": up_s}


def read_log(nodes: int, log: Path, global_batch: int) -> dict[str, Any]:
    """Return the times between the batch script's log lines, medians over ranks, and `right`: the ranks' rows are correct."""
    text = log.read_text()
    ranks = [json.loads(line) for line in text.splitlines() if line.startswith('{"rehearsal"')]
    size = nodes * TASKS_PER_NODE
    steps = ranks[0]["steps"] if ranks else 0
    order = StreamOrder(CLIPS, 0).at(np.arange(steps * global_batch))[1]
    right = (
        sorted(rank["rehearsal"] for rank in ranks) == list(range(size))
        and sum(rank["row_sum"] for rank in ranks) == int(order.sum())
        and all(rank["clips"] == steps * 8 for rank in ranks)
    )

    def at(mark: str) -> float:
        found = re.search(rf"\[(\S+) \S+\] .*{mark}", text)
        assert found, f"no {mark!r} in {text[-3000:]}"
        return time.mktime(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S"))

    middle = {
        name: common.median_interval([rank[name] for rank in ranks])
        for name in ("place_s", "import_s", "config_s", "manifest_s", "order_s", "cpu_s", "private_mib")
    }
    return {
        "nodes": nodes,
        "ranks": size,
        "right": right,
        "compose_and_preflight_s": at("starting") - at("job "),
        "ranks_s": at("this start ended") - at("starting"),
        **middle,
    }


def main() -> int:
    parser = common.argument_parser("The start of a job, by its ranks.")
    parser.add_argument("--nodes", type=int, nargs="+", default=[11, 64], help="of 6 ranks each")
    options = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("slurmctld") is None:
        print("SKIPPED: needs root and Slurm. Fix: tools/install_system_packages.sh, as root")
        return 0
    facts = common.machine_facts(1)
    nodes = [2, 4] if options.quick else options.nodes
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
        folder = Path(name)
        make_manifests(CHECKOUT / "data" / "shapes", folder / "data")
        rows = [rehearse(count, folder / "data", folder) for count in nodes]
    titles = ("", *(f"{row['ranks']} ranks" for row in rows))
    lines = [
        ["slurmds up [s]", *(f"{row['up_s']:.0f}" for row in rows)],
        ["compose, preflight of all nodes [s]", *(f"{row['compose_and_preflight_s']:.0f}" for row in rows)],
        ["srun of all ranks [s]", *(f"{row['ranks_s']:.0f}" for row in rows)],
        *(
            [f"a rank: {what}", *(row[key].show(scale, digits) for row in rows)]
            for what, key, scale, digits in (
                ("place in the world [ms]", "place_s", 1000, 2),
                ("imports [ms]", "import_s", 1000, 0),
                ("configuration, layout [ms]", "config_s", 1000, 0),
                ("manifest [ms]", "manifest_s", 1000, 1),
                ("order and rows of 3 steps [ms]", "order_s", 1000, 1),
                ("CPU time [s]", "cpu_s", 1, 2),
                ("memory of its own [MiB]", "private_mib", 1, 0),
            )
        ),
        ["rows of all ranks are one process' rows", *("yes" if row["right"] else "NO" for row in rows)],
    ]
    print(
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load']}; {facts['date']}\nmedian over ranks [its 95% interval]\n"
    )
    common.print_table(titles, lines)
    if options.json:
        common.write_rows(options.json, rows, facts)
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
