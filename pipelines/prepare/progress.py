"""Progress of a long loop: a bar on a terminal, a line every tenth elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], total: int, what: str, unit: str = "clip") -> Iterator[Item]:
    """Yield the items, and report on standard error how many of `total` are done."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what, unit=unit)
        return
    for count, item in enumerate(items, start=1):
        yield item
        if count * 10 // total > (count - 1) * 10 // total:
            print(f"{what}: {count} of {total} {unit}s", file=sys.stderr, flush=True)
