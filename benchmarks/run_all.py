"""Run every program in benchmarks/ and put the results on one page: `make bench`.

python benchmarks/run_all.py                              into outputs/benchmarks: index.html, results.json, NAME.json, NAME.log
python benchmarks/run_all.py --quick                      show that all work; the numbers say little
python benchmarks/run_all.py --only step shift            only these
python benchmarks/run_all.py --page                       only the page, from the NAME.json that are there

A program that fails does not stop the others. The exit code is 1 if one failed or a target was missed.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

from benchmarks.page import Result, as_html, as_json, lines_of
from runtime.atomic_write import write_text
from runtime.checkout import CHECKOUT

_FOLDER = CHECKOUT / "benchmarks"

# Needs a model that must be exported first: docs/edge.md has its command.
_NEEDS_ARGUMENTS = ("browser",)


def programs() -> list[str]:
    """Return the names of the programs in benchmarks/, without this one."""
    # All of them have its options, and no other file in the folder does.
    found = [file.stem for file in sorted(_FOLDER.glob("*.py")) if "common.argument_parser(" in file.read_text()]
    return [name for name in found if name not in (*_NEEDS_ARGUMENTS, Path(__file__).stem)]


def run(name: str, output: Path, arguments: Sequence[str]) -> Result:
    """Run a program; its output goes to the terminal and to NAME.log."""
    rows, log = output / f"{name}.json", output / f"{name}.log"
    rows.unlink(missing_ok=True)
    command = ["python", f"benchmarks/{name}.py", *arguments]
    print(f"== {shlex.join(command)}", flush=True)
    started_s = time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, *command[1:], "--json", str(rows)], cwd=CHECKOUT, stdout=file, stderr=subprocess.STDOUT
        )
    text = log.read_text(errors="replace")
    print(text, flush=True)
    result = Result(
        name,
        shlex.join(command),
        done.returncode,
        time.monotonic() - started_s,
        json.loads(rows.read_text()) if rows.exists() else [],
        (text.strip().splitlines() or [""])[-1],
    )
    write_text(
        output / f"{name}.run.json", json.dumps([result.command, result.exit_code, result.duration_s, result.last_line])
    )
    return result


def read(name: str, output: Path) -> Result | None:
    """Return the result of an earlier run; None if there is none."""
    rows, ran = output / f"{name}.json", output / f"{name}.run.json"
    if not rows.exists() and not ran.exists():
        return None
    recorded: tuple[str, int, float, str] = ("(not recorded)", 0, 0.0, "")
    if ran.exists():
        recorded = tuple(json.loads(ran.read_text()))
    command, code, duration_s, last = recorded
    return Result(name, command, code, duration_s, json.loads(rows.read_text()) if rows.exists() else [], last)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every program in benchmarks/, and put the results on one page.")
    parser.add_argument("--output", type=Path, default=CHECKOUT / "outputs/benchmarks", metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=programs(), metavar="NAME", help="only these programs")
    parser.add_argument("--quick", action="store_true", help="show that all work; the numbers say little")
    parser.add_argument("--page", action="store_true", help="run nothing: only write the page again")
    options = parser.parse_args()
    output: Path = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    if not options.page:
        for name in options.only or programs():
            run(name, output, ["--quick"] if options.quick else [])
    results = [result for name in programs() if (result := read(name, output)) is not None]
    write_text(output / "index.html", as_html(results))
    write_text(output / "results.json", json.dumps(as_json(results), indent=1) + "\n")
    missed = [line for result in results for line in lines_of(result.name, result.rows) if line.verdict == "MISSED"]
    failed = [result.name for result in results if result.exit_code != 0]
    for line in missed:
        print(f"MISSED: {line.label}: {line.key} {line.figure.show()}, target {line.target_text}")
    for name in failed:
        print(f"NOT RUN: {name}: see {output / name}.log")
    print(f"page: {output / 'index.html'}")
    return int(bool(missed or failed))


if __name__ == "__main__":
    sys.exit(main())
