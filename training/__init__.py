"""The job: configuration, recipe, training step and loop, evaluation, records."""

from pathlib import Path

import distributed
from runtime.checkout import CHECKOUT

if distributed.__file__ is None or Path(distributed.__file__).parent.parent != CHECKOUT:
    raise ImportError(
        f"`import distributed` found {distributed.__file__}, probably dask's, instead of the folder in {CHECKOUT}. "
        "Fix: start the entry points from that checkout, as `python train.py`"
    )
