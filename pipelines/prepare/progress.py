"""Progress of a long loop: a bar on a terminal, a line every tenth elsewhere."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(
    items: Iterable[Item], total: int, what: str, unit: str = "clip", note: Callable[[], str] = str
) -> Iterator[Item]:
    """Yield the items, and report on standard error how many of `total` are done, with a note on them."""
    if sys.stderr.isatty():
        with tqdm(items, total=total, desc=what, unit=unit) as bar:
            for item in bar:
                yield item
                bar.set_postfix_str(note(), refresh=False)
        return
    for count, item in enumerate(items, start=1):
        yield item
        if count * 10 // total > (count - 1) * 10 // total:
            text = ", ".join(filter(None, [f"{what}: {count} of {total} {unit}s", note()]))
            print(text, file=sys.stderr, flush=True)
