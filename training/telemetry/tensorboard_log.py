"""Log to TensorBoard, from torch.utils.tensorboard. It never ends a run."""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from training.errors import ConfigError


def check_tensorboard() -> None:
    """Raise ConfigError if the package is not installed."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "logger.tensorboard=true needs the package tensorboard. Fix: .venv/bin/pip install -c constraints.txt tensorboard, or "
            "logger.tensorboard=false"
        )


class TensorBoardLog:
    """The event file of one start of a run. After the first error nothing more is written, which is logged once."""

    def __init__(self, folder: Path, first_step: int, warn: Callable[[str], None]) -> None:
        self._warn = warn
        # Importing it takes a second.
        from torch.utils.tensorboard import SummaryWriter

        try:
            # Steps that a resumed run repeats replace those of the earlier start.
            self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=first_step)  # type: ignore[no-untyped-call]
        except OSError as error:
            self._give_up(error)

    def log(self, numbers: Iterable[tuple[str, int | float]], step: int) -> None:
        if self._writer is None:
            return
        try:
            for name, value in numbers:
                self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
            self._writer.flush()  # type: ignore[no-untyped-call]
        # TensorBoard raises what its own thread ran into, of any type.
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()  # type: ignore[no-untyped-call]
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        self._warn(f"TensorBoard: cannot write its events: {error}. Training continues; metrics.jsonl has every record")
