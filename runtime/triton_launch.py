"""The check that Triton can launch kernels on this machine."""

import functools
import importlib.util
import warnings


@functools.cache
def triton_can_launch() -> bool:
    """Return whether Triton is installed and finds a compiler and a driver; warns, with the fix, where it is only installed.

    Triton builds its launcher with a C compiler, once a machine. Importing it takes seconds, so ask this for the first CUDA
    tensor and not before.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        import triton

        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # Triton raises many types, for a missing compiler, headers or driver
        warnings.warn(
            f"Triton cannot launch, so shifts and batch norm over ranks take more kernels ({type(error).__name__}: {error}). "
            "Fix: install a C compiler and Python's headers, with which Triton builds its launcher",
            stacklevel=2,
        )
        return False
    return True
