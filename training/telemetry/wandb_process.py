"""Log to wandb, in a process apart from training: records come in on stdin, as JSON lines. Started by wandb_log.

The first line has the arguments of `wandb.init` and the summaries of charts. The last line has the run's exit code; without one,
training was killed.
"""

import json
import os
import signal
import sys
import threading
from typing import Any

_KILLED_LIMIT_S = 10.0
"""Time to write wandb's files after training was killed."""


def main() -> None:
    # Signals are for the ranks. wandb's service, which this process starts, inherits this.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    _move_replies_from_stdout()
    start = json.loads(sys.stdin.readline())
    # wandb records the command line.
    sys.argv = start["argv"]
    try:
        import wandb
    except Exception as error:
        _reply(failed=f"cannot import wandb ({error})", installed=False)
        return
    try:
        run = wandb.init(**start["init"], settings=_settings(wandb))
        for name, summary in start["summaries"].items():
            run.define_metric(name, summary=summary)
        _reply(ready=True)
        exit_code = _log_records(run)
        if exit_code is None:
            threading.Timer(_KILLED_LIMIT_S, os._exit, (1,)).start()
        run.finish(exit_code=1 if exit_code is None else exit_code)
        # Wait for wandb's service, which may write an offline run only now.
        wandb.teardown()
        _reply(finished=True)
    except Exception as error:
        _reply(failed=_first_line(error), installed=True)
    # wandb's own exit hook may wait for its server.
    os._exit(0)


def _settings(wandb: Any) -> Any:
    settings = wandb.Settings(silent=True, console="off")
    # The process whose CPU and memory wandb shows. Older versions cannot be told.
    if hasattr(settings, "x_stats_pid"):
        settings.x_stats_pid = os.getppid()
    return settings


def _log_records(run: Any) -> int | None:
    """Log records until the run ends, and return its exit code; None: stdin ended before."""
    for line in sys.stdin:
        record = json.loads(line)
        if "exit_code" in record:
            return int(record["exit_code"])
        run.log(record["numbers"], step=record["step"])
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _move_replies_from_stdout() -> None:
    """Keep stdout for replies only: what wandb prints goes to /dev/null."""
    global _replies
    _replies = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _reply(**fields: Any) -> None:
    os.write(_replies, json.dumps(fields).encode() + b"\n")


_replies = 1

if __name__ == "__main__":
    main()
