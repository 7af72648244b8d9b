"""Lock a run folder, so that one job at a time trains there. Evaluations and reports need no lock.

The lock is a lease file, also where flock works: some file systems lock within one node only.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from distributed.backends.base import Backend
from distributed.health.control_channel import ControlChannel
from runtime.exit_codes import EXIT_CONFIG
from runtime.lease import STALE_AFTER_S, LockHeld, other_holder, take_lease
from training.errors import ConfigError

from .run_folder import RunFolder

_ENDING_S = 5.0
"""Time that a job may take to end before a new start of the same run is refused."""

_POLL_S = 0.5


def print_now(text: str) -> None:
    """Print a line that also a pipe shows at once."""
    print(text, flush=True)


@contextmanager
def run_locked(folder: RunFolder, backend: Backend, control: ControlChannel) -> Iterator[None]:
    """Hold the lock on rank 0 while the block runs. Collective; raises ConfigError on all ranks if another job holds it."""
    release, refused = None, None
    if backend.topology.rank == 0:

        def note(text: str) -> None:
            control.log.info(text)
            print_now(text)

        def waiting() -> None:
            # A job that waits does not hang.
            control.progress(0, "start")

        def lost(holder: str) -> None:
            control.abort(f"{folder.path} was taken over by {holder}, as if this job had ended", EXIT_CONFIG)

        try:
            release = lock_run(folder, backend.topology.job_id, note, waiting, lost)
        except ConfigError as error:
            refused = str(error)
    refused = backend.broadcast_object(refused)
    if refused is not None:
        raise ConfigError(refused)
    if release is None:
        yield
        return

    def check() -> None:
        # A job that was suspended may write before the lease's thread looks again.
        holder = other_holder(folder.lock, control.run_lock)
        if holder is not None:
            lost(holder)

    control.at_exit, control.check_run_lock = release, check
    try:
        control.run_lock = folder.lock.read_text(encoding="utf-8")
        yield
    finally:
        release()


def lock_run(
    folder: RunFolder,
    job: str | None = None,
    note: Callable[[str], None] = print_now,
    waiting: Callable[[], None] = lambda: None,
    lost: Callable[[str], None] = lambda holder: None,
) -> Callable[[], None]:
    """Make the run folder if it is missing, and lock it; returns the function that releases it.

    Raises ConfigError, which names the holder, if another job holds it. A lock whose holder is gone is taken over: at once if
    it ran on this machine, else after watching for a minute that it is not renewed. `note` logs either, and `waiting` is
    called meanwhile. `lost` is called, from a thread, if another job takes the lock over.
    """
    noted: set[str] = set()

    def watching(holder: str) -> None:
        if holder not in noted:
            note(
                f"run folder: {folder.path} was not released by {holder}. Watching for up to {STALE_AFTER_S:.0f} s whether "
                "that process is alive"
            )
        noted.add(holder)
        waiting()

    def taken_over(holder: str) -> None:
        note(f"run folder: took over {folder.path} from {holder}, which is gone")

    give_up_s = time.monotonic() + _ENDING_S
    while True:
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            release_lease = take_lease(folder.lock, False, job, watching, taken_over, lost)
            break
        except LockHeld as error:
            if time.monotonic() > give_up_s:
                cancel = f"scancel {error.job}" if error.job else "stop it"
                raise ConfigError(
                    f"{folder.path} is in use by {error.holder}. Fix: wait for its end, {cancel}, or run_id=ANOTHER"
                ) from error
        except OSError as error:
            raise ConfigError(
                f"cannot create the run folder {folder.path}: {error.strerror}. Fix: outputs=FOLDER"
            ) from error
        waiting()
        time.sleep(_POLL_S)

    def release() -> None:
        # A start that failed before it wrote anything leaves no folder.
        with suppress(OSError):
            release_lease()
            folder.path.rmdir()

    return release
