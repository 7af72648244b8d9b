"""Measure the cost of a manifest to the processes of a node: time to open it, private and shared memory, clip order.

python benchmarks/manifest.py                    1 and 10 million rows, 1 to 8 processes
python benchmarks/manifest.py --quick --json FILE

A process's own memory is its USS (private pages), which the kernel frees when the process ends. All processes of the node share
the pages of the mapped file, and the kernel may drop them.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

from benchmarks import common
from benchmarks.manifest_node import CLIPS_A_RANK, RANKS, on_a_node, write_large

TARGET = "target: less than 5 MB of its own for each further process at 10 million rows"


def main() -> int:
    parser = common.argument_parser(__doc__.splitlines()[0])
    options = parser.parse_args()
    facts = common.machine_facts(threads=1)
    rows: list[dict[str, Any]] = []
    for num_rows in [100_000] if options.quick else [1_000_000, 10_000_000]:
        with tempfile.TemporaryDirectory(prefix="manifest-") as folder:
            path = Path(folder) / "train.arrow"
            write_large(path, num_rows)
            file_mib = path.stat().st_size / (1 << 20)
            for processes in [2] if options.quick else [1, 2, 4, 8]:
                seen = on_a_node(path, processes)
                rows += [
                    {"rows": num_rows, "file_mib": file_mib, "processes": processes, "number": number, **vars(one)}
                    for number, one in enumerate(seen)
                ]
    titles = (
        "rows",
        "processes",
        "which",
        "open ms",
        "own MiB",
        "shared MiB",
        "peak of Arrow MiB",
        "order ms",
        "rows ms",
    )
    common.print_table(
        titles,
        [
            (
                f"{row['rows']:,} ({row['file_mib']:.0f} MiB)",
                str(row["processes"]),
                "first" if row["number"] == 0 else "last",
                f"{1e3 * row['open_s']:.1f}",
                f"{row['own_mib']:.1f}",
                f"{row['shared_mib']:.1f}",
                f"{row['peak_mib']:.2f}",
                f"{row['order_ms']:.2f}",
                f"{row['rows_ms']:.2f}",
            )
            for row in rows
            if row["number"] in (0, row["processes"] - 1)
        ],
    )
    print(f"order: all {RANKS * CLIPS_A_RANK} positions of a step of {RANKS} ranks; rows: one rank's {CLIPS_A_RANK}")
    print(TARGET)
    if options.json:
        common.write_rows(options.json, rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
