"""Work that is dealt out to the tasks of a Slurm array, or to calls by hand."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipelines.prepare.errors import DataSetError
from runtime.file_lock import file_lock

Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """Part `number`, from 1, of `count`."""

    number: int
    count: int

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        return items[self.number - 1 :: self.count]


def find_part(said: str | None, environment: Mapping[str, str] = os.environ) -> Part:
    """What `--part I/N` says, else which task of a Slurm array this is, else everything."""
    if said is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", said)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise DataSetError(f"--part is {said!r}: give the number of this part and how many there are, like 1/8")
        return Part(int(match[1]), int(match[2]))
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return Part(1, 1)
    name = "SLURM_ARRAY_TASK_"
    task, count, least, most = (int(environment[name + end]) for end in ("ID", "COUNT", "MIN", "MAX"))
    step = int(environment.get(name + "STEP", "1"))
    if most - least != (count - 1) * step:
        raise DataSetError("the numbers of this job array have gaps; submit it with --array=1-N, or give --part I/N")
    return Part((task - least) // step + 1, count)


@contextmanager
def alone_on(part: Part, folder: Path) -> Iterator[None]:
    """While it lasts, no other call works on the same part in `folder`, or on parts that are cut in another way."""
    with file_lock(folder / f"part-{part.number}-of-{part.count}.lock", wait=False) as ours:
        if not ours:
            raise DataSetError(f"part {part.number}/{part.count} of {folder} is at work already; wait for its end")
        for path in folder.glob("part-*-of-*.lock"):
            if path.name.endswith(f"-of-{part.count}.lock"):
                continue
            with file_lock(path, wait=False) as free:
                if not free:
                    raise DataSetError(f"{folder} is at work in other parts ({path.name}); wait for their end")
        yield
