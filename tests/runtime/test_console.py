"""A program whose standard streams fail, or are closed, continues and ends with its own code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.checkout import CHECKOUT

START = """
from runtime.stop_signals import handle_stop_signals
from runtime.environment import start_program
from runtime.console import ignore_write_errors
handle_stop_signals(); start_program(); ignore_write_errors()
"""

PROGRAM = f"""{START}
import os, sys, time
def write(text):
    for stream in (sys.stdout, sys.stderr):
        for _ in range(1000):
            print(text, file=stream)
        print(text, file=stream, flush=True)
        stream.write("without a newline"); stream.isatty(); stream.fileno()
write("first \\u624b \\udcff")
time.sleep(0.1)
write("x" * 100_000)
open("proof", "w").write("to its end")
sys.exit(int(sys.argv[1]))
"""


def run(redirection: str, folder: Path, program: str = PROGRAM, code: int = 0) -> "subprocess.CompletedProcess[str]":
    """Run a program with a shell's redirections."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$@" {redirection}', "bash", sys.executable, "-c", program, str(code)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("redirection", "code"),
    [(">/dev/full 2>&1", 0), (">/dev/full", 75), ("2>&1 | head -n 2", 0), (">&- 2>&-", 0), ("> >(exit 0) 2>&1", 75)],
)
def test_streams_that_fail_change_neither_the_work_nor_the_code(redirection: str, code: int, tmp_path: Path) -> None:
    ended = run(redirection, tmp_path, code=code)
    assert ended.returncode == code, ended.stderr
    assert (tmp_path / "proof").read_text() == "to its end"


def test_closed_streams_are_streams(tmp_path: Path) -> None:
    """None, which Python has in their place, is no file to write to."""
    program = (
        "import csv, sys; from runtime.stop_signals import handle_stop_signals; handle_stop_signals(); "
        "csv.writer(sys.stdout).writerow('ab'); sys.stdout.flush(); sys.stderr.write(sys.stdin.read()); "
        "open('proof', 'w').write('x'); sys.exit(int(sys.argv[1]))"
    )
    ended = run("<&- >&- 2>&-", tmp_path, program, code=3)
    assert ended.returncode == 3 and (tmp_path / "proof").read_text() == "x"


def test_text_arrives_at_once_where_streams_work(tmp_path: Path) -> None:
    program = f"{START}\nimport os, sys\nprint('a \\u624b', flush=True); print('b', file=sys.stderr); os._exit(int(sys.argv[1]))"
    ended = run("", tmp_path, program, code=3)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "a \u624b\n", "b\n")


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    program = f"{START}\nfile = open('x', 'w'); import os; os.write(1, b'stray'); file.write(str(file.fileno() > 2))"
    assert run("<&- >&- 2>&-", tmp_path, program).returncode == 0
    assert (tmp_path / "x").read_text() == "True"
