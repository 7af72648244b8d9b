"""Log the metrics of a run: to metrics.jsonl, to wandb and TensorBoard if configured, and to the terminal, as lines or a bar."""

import errno
import json
import os
import sys
import time
from io import FileIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distributed.health.rank_log import RankLog
from runtime.exit_codes import EXIT_DONE
from training.config.schema import Config
from training.runs.run_folder import RunFolder

from .charts import chart_numbers
from .eta import duration_text
from .tensorboard_log import TensorBoardLog
from .wandb_log import FINISH_LIMIT_S, STOP_LIMIT_S, WandbLog, wandb_arguments


class MetricsLog:
    """Writes rank 0's records. On other ranks `info` writes to the rank's log, and all other methods do nothing.

    A record is a JSON line `{"kind", "time_s", "step", ...}`; units are in the names.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        writes: bool,
        first_step: int,
        total_steps: int,
        log: RankLog | None = None,
    ) -> None:
        self._writes = writes
        self._log = log
        self._bar: tqdm[Any] | None = None
        self._wandb: WandbLog | None = None
        self._tensorboard: TensorBoardLog | None = None
        if not writes:
            return
        # Unbuffered, so that a kill loses no line.
        self._file = folder.metrics.open("ab", buffering=0)
        self._newest_step = first_step
        # True if the last line did not get to the disk as a whole.
        self._lost_line = False
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)
        if config.logger.wandb != "disabled":
            online = config.logger.wandb == "online"
            self._wandb = WandbLog(online, folder.path, wandb_arguments(config, folder.path.name), self.info)
        if config.logger.tensorboard:
            self._tensorboard = TensorBoardLog(folder.tensorboard, first_step, self.info)

    def info(self, text: str) -> None:
        """Write a line to this rank's log, and on rank 0 to the terminal."""
        if self._log is not None:
            self._log.info(text)
        if not self._writes:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Write a record to metrics.jsonl, wandb and TensorBoard. A value named `time_s` replaces the time of writing."""
        if not self._writes:
            return
        self._put(self._file, {"kind": kind, "time_s": round(time.time(), 3), "step": step} | values)
        if self._tensorboard is not None:
            self._tensorboard.log(chart_numbers(kind, values), step)
        if self._wandb is not None:
            numbers = dict(chart_numbers(kind, values))
            # A checkpoint ends after later records were written, and wandb drops records of earlier steps than its newest.
            self._newest_step = max(step, self._newest_step)
            self._wandb.log(numbers, self._newest_step)

    def train(self, step: int, **values: Any) -> None:
        """Write a training record, and show it on the progress bar or as a line."""
        self.write("train", step, **values)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(loss=f"{values['loss']:.3f}", top1=f"{values['top1_percent']:.1f}%")
        else:
            self.info(
                f"step {step:6d}  loss {values['loss']:.4f}  top-1 {values['top1_percent']:5.1f}%  "
                f"lr {values['learning_rate']:.4g}  {values['clips_per_s']:.1f} clips/s  "
                f"input stall {values['input_wait_percent']:.1f}%  ETA {duration_text(values['eta_s'])} "
                f"(limited by {values['limited_by']})"
            )

    def bad_clip(self, folder: RunFolder, **values: Any) -> None:
        self._append(folder.bad_clips, values)

    def bad_step(self, folder: RunFolder, **values: Any) -> None:
        self._append(folder.bad_steps, values)

    def _append(self, path: Path, values: dict[str, Any]) -> None:
        if self._writes:
            try:
                with path.open("ab", buffering=0) as file:
                    self._put(file, values)
            except OSError as error:
                self.info(f"metrics log: cannot write {path}: {error}; training continues")

    def _put(self, file: FileIO, values: dict[str, Any]) -> None:
        """Write a line. If the disk is full the line is lost, this is logged once, and training continues."""
        line = ("\n" if self._lost_line else "").encode() + json.dumps(values).encode() + b"\n"
        try:
            failed = None if file.write(line) == len(line) else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            failed = error
        if failed is not None and not self._lost_line:
            self.info(f"metrics log: cannot write {file.name}: {failed}; training continues")
        self._lost_line = failed is not None

    def close(self, exit_code: int) -> None:
        if not self._writes:
            return
        if self._wandb is not None:
            self._wandb.finish(exit_code, FINISH_LIMIT_S if exit_code == EXIT_DONE else STOP_LIMIT_S)
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._bar is not None:
            self._bar.close()
        self._file.close()
