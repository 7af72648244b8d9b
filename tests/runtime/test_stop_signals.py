"""Stop signals in each phase of a process: their codes, a last line that says so, and within seconds."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime import stop_signals
from runtime.stop_signals import EXIT_CODES
from tests.helpers.worlds import CHECKOUT

LIMIT_S = 60

DEADLOCK_IN_C = """
import ctypes
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex)
print("now", flush=True)
lock(mutex)
"""
"""No signal interrupts the second call, so Python's own handlers, which run in the main thread, never run."""


Process = subprocess.Popen[str]


def _restore_signals() -> None:
    """Undo what nohup, or a shell that runs the tests in the background, has made this process ignore."""
    for number in stop_signals.NUMBERS:
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Start Python with these arguments. The process is killed when the test ends."""
    processes: list[Process] = []

    def run(*command: str) -> Process:
        pipe, command_line = subprocess.PIPE, [sys.executable, *command]
        processes.append(
            subprocess.Popen(
                command_line, cwd=CHECKOUT, text=True, stdout=pipe, stderr=pipe, preexec_fn=_restore_signals
            )
        )
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def run_script(start: Callable[..., Process]) -> Callable[[str], Process]:
    """Start a script that handles stop signals; return when it has printed "now"."""

    def run(text: str) -> Process:
        process = start("-c", f"from runtime import stop_signals\nstop_signals.handle_stop_signals()\n{text}")
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        return process

    return run


def wait_for_handler(pid: int, number: int) -> None:
    """Wait until the process catches the signal, by the kernel's mask of caught signals."""
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1]
        if int(caught, 16) >> (number - 1) & 1:
            return
        time.sleep(0.002)
    raise AssertionError(f"no handler after {LIMIT_S} s")


@pytest.mark.parametrize("name", EXIT_CODES)
def test_a_signal_ends_a_process_that_waits_in_a_library(run_script: Callable[[str], Process], name: str) -> None:
    process = run_script(DEADLOCK_IN_C)
    process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == EXIT_CODES[name]
    assert errors == f"error (start-up): stopped by {name} before anything was done. Fix: run the same command again\n"


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "TSM_LOCAL_RANK"])
def test_a_rank_is_stopped_when_its_launcher_is_killed(start: Callable[..., Process], variable: str) -> None:
    launcher = start(
        "-c",
        f"""
import os, subprocess, sys
text = "import time; from runtime.stop_signals import handle_stop_signals; handle_stop_signals();"
rank = [sys.executable, "-c", text + "print('now', flush=True); time.sleep(300)"]
subprocess.run(rank, env=os.environ | {{"{variable}": "0"}})
""",
    )
    assert launcher.stdout is not None and launcher.stdout.readline() == "now\n"
    launcher.kill()
    # Returns when the rank has ended too, because it has the same pipes.
    _, errors = launcher.communicate(timeout=LIMIT_S)
    assert errors.startswith("error (start-up): stopped by SIGTERM")


@pytest.mark.parametrize("name", EXIT_CODES)
@pytest.mark.parametrize("program", ["train.py", "evaluate.py", "plan.py"])
def test_a_signal_while_an_entry_point_imports(start: Callable[..., Process], program: str, name: str) -> None:
    process = start(program, "experiment=smoke")
    wait_for_handler(process.pid, stop_signals.NUMBERS[-1])
    process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == EXIT_CODES[name], errors
    assert errors.splitlines()[-1].startswith(f"error (start-up): stopped by {name}")
    assert "Traceback" not in errors


def test_a_signal_while_torch_is_loaded(start: Callable[..., Process]) -> None:
    process = start("train.py", "experiment=smoke")
    maps, deadline_s = Path(f"/proc/{process.pid}/maps"), time.monotonic() + LIMIT_S
    while "libtorch" not in maps.read_text():
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.002)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1].startswith("error (start-up): stopped by SIGUSR1")


def test_a_second_ctrl_c_exits_at_once(run_script: Callable[[str], Process]) -> None:
    process = run_script("""
import time
stop_signals.set_action(None)
print("now", flush=True)
while stop_signals.received() != "SIGINT": time.sleep(0.01)
print("noted", flush=True)
time.sleep(300)
""")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "noted\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT_S) == 130


def test_a_burst_of_signals_is_one_stop(run_script: Callable[[str], Process]) -> None:
    """Which of them counts as the newest is open: Python runs a handler within another one."""
    process = run_script("""
import sys, time
stop_signals.set_action(None)
print("now", flush=True)
while stop_signals.received() is None: time.sleep(0.01)
time.sleep(0.5)
sys.exit(stop_signals.received() not in ("SIGUSR1", "SIGTERM"))
""")
    for _ in range(200):
        process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (0, "")


def test_a_second_ctrl_c_is_reported_even_if_the_main_thread_holds_a_lock_that_the_report_needs(
    run_script: Callable[[str], Process],
) -> None:
    """As the control channel's lock: the report then has to be given up."""
    text = """
import os, signal, threading, time
from training.signals import StopSignal
lock = threading.Lock()
def report():
    os.write(2, b"reporting ")
    with lock:
        os.write(2, b"reported")
stop_signals.set_before_exit(report)
print("now", flush=True)
with StopSignal():
    {}os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(300)
"""
    for held, errors in (("", "reporting reported"), ("lock.acquire(); ", "reporting ")):
        process = run_script(text.format(held))
        assert (process.communicate(timeout=LIMIT_S)[1], process.returncode) == (errors, 130)


@pytest.mark.slow
def test_a_second_ctrl_c_is_the_outcome_of_a_job_and_no_crash(start: Callable[..., Process], tmp_path: Path) -> None:
    text = f"""
import os, signal, sys, time
from functools import partial
from pathlib import Path
from distributed.backends.single import SingleBackend
from distributed.health.control_channel import ControlChannel
from distributed.topology import find_topology
from training.main import _report_interrupt
from training.signals import StopSignal
control = ControlChannel(SingleBackend(find_topology(), "cpu"))
control.open_log(Path({str(tmp_path)!r}))
stop_signals.set_before_exit(partial(_report_interrupt, control))
print("now", control._monitor.pid, flush=True)
with StopSignal():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(300)
"""
    process = start("-c", f"from runtime import stop_signals\nstop_signals.handle_stop_signals()\n{text}")
    # Importing torch takes a minute on a busy machine.
    output, errors = process.communicate(timeout=4 * LIMIT_S)
    assert process.returncode == 130, errors
    monitor = Path("/proc") / output.split()[1]
    deadline_s = time.monotonic() + LIMIT_S
    while monitor.exists() and "(zombie)" not in (monitor / "status").read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["exit_code"] == 130 and "stopped by a second Ctrl-C" in outcome["reason"]


def test_a_process_under_nohup_ignores_the_end_of_its_terminal(start: Callable[..., Process]) -> None:
    text = """
import signal, subprocess, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
program = '''
import os, signal
from runtime import stop_signals
stop_signals.handle_stop_signals()
os.kill(os.getpid(), signal.SIGHUP)
from training.signals import StopSignal
with StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.received is None and stop_signals.received() is None
    os.kill(os.getpid(), signal.SIGXCPU)
    assert stop.received == "SIGXCPU"
'''
sys.exit(subprocess.call([sys.executable, "-c", program]))
"""
    process = start("-c", text)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (0, "")


def test_the_loop_takes_over_and_counts_a_signal_that_came_just_before(run_script: Callable[[str], Process]) -> None:
    text = """
import os, signal, sys
from training.signals import StopSignal
stop_signals.set_action(None)
print("now", flush=True)
os.kill(os.getpid(), signal.SIGUSR1)
with StopSignal() as stop:
    print(stop.received, file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop.received, file=sys.stderr)
os.kill(os.getpid(), signal.SIGUSR1)
print("over", file=sys.stderr)
"""
    process = run_script(text)
    # Standard output may have been read further than "now".
    _, errors = process.communicate(timeout=LIMIT_S)
    assert (errors.split(), process.returncode) == (["SIGUSR1", "SIGTERM", "over"], 0)


def test_an_error_waits_for_the_action_that_ends_the_process(run_script: Callable[[str], Process]) -> None:
    """The action's own code and line come last, although the main thread fails meanwhile."""
    text = """
import os, signal, time
def act(name):
    time.sleep(0.3)
    os.write(2, b"acted\\n")
    os._exit(75)
stop_signals.set_action(act)
print("now", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
stop_signals.wait_for_action()
os._exit(1)
"""
    process = run_script(text)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (75, "acted\n")


def test_children_do_not_get_the_signals_and_this_process_loses_none(run_script: Callable[[str], Process]) -> None:
    """As with the fork server and the monitor: both start while signals may come."""
    text = """
import os, signal, subprocess, sys, time
stop_signals.set_action(lambda name: None)
child = [sys.executable, "-c", "import time; print('now', flush=True); time.sleep(300)"]
with stop_signals.hidden_from_children():
    process = subprocess.Popen(child)
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop_signals.received(): time.sleep(0.01)
process.send_signal(signal.SIGUSR1)
time.sleep(0.3)
os.write(2, str(process.poll()).encode())
process.kill()
"""
    process = run_script(text)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert errors == "None"
