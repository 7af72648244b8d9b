"""Name what a trained network sees in videos. Needs the run folder only: the data that it was trained on may be gone.

    python predict.py outputs/NAME a.mp4 b.mp4
    python predict.py outputs/NAME FOLDER --top 1 --format csv
    python predict.py outputs/NAME/checkpoints/best FOLDER --format json evaluation=ten_crop
    python predict.py outputs/NAME/export/onnx-fp32-stream FOLDER

A folder stands for all videos and folders of JPEG frames in it. Overrides are those of evaluate.py --run. A video that
prepare.py would leave out gets a line on standard error, and the exit code is 3 at the end. docs/predict.md has more.

In Python:

    from predict import load

    predict = load("outputs/NAME")
    print(predict("a.mp4").class_name)
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.environment import start_program
from runtime.gc_freeze import frozen_imports
from runtime.stop_signals import handle_stop_signals

if TYPE_CHECKING:
    from training.deploy.predict import Predictor


def load(run: str | Path, *overrides: str) -> "Predictor":
    """Load a run or an ONNX export, to call with a video. `overrides`: as on the command line.

    Raises training.errors.ConfigError.
    """
    # Late, so that importing this file takes no time.
    from training.deploy.exported import load_run_or_export
    from training.deploy.predict import Predictor

    return Predictor(load_run_or_export(str(run), overrides))


def main() -> int:
    with frozen_imports():
        from training.deploy.predict_command import run_predict

    return run_predict(sys.argv[1:], __doc__ or "")


if __name__ == "__main__":
    handle_stop_signals()
    start_program()
    sys.exit(main())
