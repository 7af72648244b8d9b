"""Run train.py with delays in its first step, each batch and each fsync, to emulate a slow machine.

Run `python tests/helpers/slow_machine.py OVERRIDES` in place of `python train.py OVERRIDES`.
"""

import itertools
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FIRST_STEP_S = 12.0
BATCH_S = 1.0
# Per file or folder.
SYNC_S = 2.0


def delayed(function: Callable[..., Any], *delays_s: float) -> Callable[..., Any]:
    """Return a function with delays: one per call in this order, then the last delay for every further call."""
    waits_s = itertools.chain(delays_s, itertools.repeat(delays_s[-1]))

    def call(*arguments: Any, **options: Any) -> Any:
        time.sleep(next(waits_s))
        return function(*arguments, **options)

    return call


if __name__ == "__main__":
    checkout = Path(__file__).parents[2]
    sys.path[0] = str(checkout)
    from training.build.normalise import Normaliser
    from training.step import Trainer

    Trainer.step = delayed(Trainer.step, FIRST_STEP_S, 0.0)  # type: ignore[method-assign]
    Normaliser.__call__ = delayed(Normaliser.__call__, BATCH_S)  # type: ignore[method-assign]
    os.fsync = delayed(os.fsync, SYNC_S)
    sys.argv[0] = str(checkout / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
