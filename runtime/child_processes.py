"""End child processes with their parent."""

import multiprocessing
import os
import threading


def exit_with_parent() -> None:
    """Start a thread that kills this multiprocessing child when its parent ends, also in the middle of other work.

    The kernel's own parent-death signal (PR_SET_PDEATHSIG) would follow the fork server, which its workers keep alive. Does
    nothing in a process that multiprocessing did not start.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait_for_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, name="exit-with-parent", daemon=True).start()
