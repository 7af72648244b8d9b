"""Recognize errors of networks, GPUs and node-local disks: nothing is wrong with the run, and a restart may succeed.

Restarts that make no progress end after three (training/runs/restarts.py), so an error that is taken for transient by mistake
costs two restarts.
"""

import re

import torch.distributed as dist

from runtime.server_faults import SERVER_FAULTS

_NETWORK = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)

# Gloo raises plain RuntimeErrors. Horovod's class cannot be imported where Horovod is not installed.
_GLOO = re.compile(
    r"gloo.*(closed by peer|reset by peer|timed out|broken pipe|connection refused|connect)"
    r"|connection (closed|reset) by peer",
    re.IGNORECASE | re.DOTALL,
)

# CUDA's descriptions of errors that a fault of the device, its link or its driver causes.
_DEVICE = re.compile(
    r"uncorrectable ECC error|NVLink error|hardware stack error|unspecified launch failure|device\(s\) is/are busy or unavailable"
    r"|GPU is lost|fallen off the bus|driver shutting down|system not yet initialized|contained memory error",
    re.IGNORECASE,
)


def is_transient(error: BaseException) -> bool:
    """Return whether a restart, perhaps on other nodes, may succeed after this error."""
    if isinstance(error, _NETWORK) or type(error).__name__ == "HorovodInternalError":
        return True
    if isinstance(error, OSError):
        return error.errno in SERVER_FAULTS
    return isinstance(error, RuntimeError) and bool(_DEVICE.search(str(error)) or _GLOO.search(str(error)))
