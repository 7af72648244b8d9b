"""Start processes on one node that open and use the same manifest, for benchmarks/manifest.py and a test."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.manifest import BLOCK_ROWS, Manifest, ManifestRow, write_manifest
from pipelines.stream.order import StreamOrder

CHECKOUT = Path(__file__).parent.parent
STEPS, CLIPS_A_RANK, RANKS = 20, 8, 1536


@dataclass(frozen=True)
class Seen:
    """Measurements of one process; MiB that opening and using the manifest added."""

    open_s: float
    order_ms: float
    """All positions of a step of RANKS ranks."""
    rows_ms: float
    """One rank's rows of a step."""
    own_mib: float
    shared_mib: float
    peak_mib: float
    """Peak of its own heap while opening."""


def write_large(path: Path, num_rows: int) -> None:
    """Write one block with the project's code and repeat it: 10 million Python objects would take minutes."""
    block = path.with_suffix(".block")
    rows = (
        ManifestRow(f"train/class_{row % 400:03d}/{row * 7919:011d}_000012_000022.mp4", 0, 900_000 + row, row % 400, 300,
                    "h264", 340, 256, 0)
        for row in range(min(BLOCK_ROWS, num_rows))
    )  # fmt: skip
    write_manifest(block, rows, [f"class {label}" for label in range(400)])
    with pa.ipc.open_file(pa.memory_map(str(block))) as file:
        batch = file.get_batch(0)
        with pa.ipc.new_file(str(path), file.schema) as writer:
            left = num_rows
            while left > 0:
                writer.write_batch(batch.slice(0, min(left, batch.num_rows)))
                left -= batch.num_rows
    block.unlink()


# ----------------------------------------------------------------------------------------------------------- in each process


def memory_mib() -> tuple[float, float]:
    """Return (own, shared) memory of this process."""
    fields = {
        line.split(":")[0]: int(line.split()[1])
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    }
    own = fields["Private_Clean"] + fields["Private_Dirty"]
    return own / 1024, (fields["Shared_Clean"] + fields["Shared_Dirty"]) / 1024


def child(path: Path) -> None:
    """Open and use the manifest; continue at each line on stdin, and print the measurements at the end."""
    # Let numpy make its one-time allocations, so that they do not count as the manifest's.
    StreamOrder(10, 0).at(np.arange(10))
    print("ready", flush=True)
    sys.stdin.readline()
    before = memory_mib()
    start_s = time.perf_counter()
    manifest = Manifest.open(path)
    open_s = time.perf_counter() - start_s
    peak_mib = heap_peak_mib()
    order = StreamOrder(len(manifest), 0)
    start_s = time.perf_counter()
    for step in range(STEPS):
        _, row_N = order.at(np.arange(RANKS * CLIPS_A_RANK) + step * RANKS * CLIPS_A_RANK)
    order_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    for row in row_N[: STEPS * CLIPS_A_RANK].tolist():
        manifest.row(row)
    rows_s = time.perf_counter() - start_s
    print("used", flush=True)
    sys.stdin.readline()
    own, shared = (now - then for now, then in zip(memory_mib(), before, strict=True))
    seen = Seen(open_s, 1e3 * order_s / STEPS, 1e3 * rows_s / STEPS, own, shared, peak_mib)
    print(json.dumps(vars(seen)), flush=True)
    sys.stdin.readline()


def heap_peak_mib() -> float:
    """Return the peak of Arrow's memory pool, without the mapped file."""
    return (pa.default_memory_pool().max_memory() or 0) / (1 << 20)


# ---------------------------------------------------------------------------------------------------------------- the parent


def on_a_node(path: Path, processes: int) -> list[Seen]:
    """Start the processes and return their measurements.

    The first one opens and uses the manifest before the others. All are measured while all are alive.
    """
    program = f"from pathlib import Path; from {__name__} import child; child(Path({str(path)!r}))"
    command = [sys.executable, "-c", program]
    children = [
        subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    try:
        for process in children:
            hear(process, "ready")
        for process in children:
            tell(process)
            hear(process, "used")
        seen = []
        for process in children:
            tell(process)
            seen.append(Seen(**json.loads(hear(process))))
        return seen
    finally:
        for process in children:
            with process:
                process.kill()


def tell(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def hear(process: "subprocess.Popen[str]", expected: str = "") -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line or (expected and line != expected):
        raise RuntimeError(f"a process of the benchmark ended, or said {line!r}: its output above says why")
    return line
