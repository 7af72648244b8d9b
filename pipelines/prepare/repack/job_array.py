"""The division of work among the tasks of a Slurm job array, or calls with `--part I/N`."""

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
        """Select this part's items."""
        return items[self.number - 1 :: self.count]


def find_part(option: str | None, environment: Mapping[str, str] = os.environ) -> Part:
    """Return the part that `--part I/N` names, else that of this Slurm array task, else everything."""
    if option is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", option)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise DataSetError(f"--part is {option!r}. Fix: give this part's number and the number of parts, like 1/8")
        return Part(int(match[1]), int(match[2]))
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return Part(1, 1)
    name = "SLURM_ARRAY_TASK_"
    task, count, least, most = (int(environment[name + end]) for end in ("ID", "COUNT", "MIN", "MAX"))
    step = int(environment.get(name + "STEP", "1"))
    if most - least != (count - 1) * step:
        raise DataSetError(
            "the job array's task numbers have gaps. Fix: submit it with --array=1-N, or give --part I/N"
        )
    return Part((task - least) // step + 1, count)


@contextmanager
def part_lock(part: Part, folder: Path) -> Iterator[None]:
    """Hold the lock on a part of the work in `folder`.

    Raises DataSetError while another process holds it, or works with another number of parts.
    """
    with file_lock(folder / f"part-{part.number}-of-{part.count}.lock", wait=False) as ours:
        if not ours:
            raise DataSetError(
                f"another process works on part {part.number}/{part.count} of {folder}. Fix: wait for its end"
            )
        for path in folder.glob("part-*-of-*.lock"):
            if path.name.endswith(f"-of-{part.count}.lock"):
                continue
            with file_lock(path, wait=False) as free:
                if not free:
                    raise DataSetError(
                        f"other processes divide {folder} into another number of parts ({path.name}). Fix: wait for their end"
                    )
        yield
