"""Export a trained network to a file for another runtime. Each file is run against PyTorch before it is kept.

    python export.py outputs/NAME                                        # ONNX, float32, frame by frame
    python export.py outputs/NAME format=torch precision=fp32 form=clip
    python export.py outputs/NAME/checkpoints/best precision=int8

format=onnx, torch (torch.export), executorch, openvino or litert; precision=fp32, or int8, which needs the run's data set;
form=stream (one frame and caches, of past-only networks) or clip. Writes the model and its card model.json to the run's folder, in
export/FORMAT-PRECISION-FORM. The exit code is 1, and there is no file, if it computes something else than PyTorch. docs/export.md
has more.
"""

import sys

from runtime.environment import start_program
from runtime.gc_freeze import frozen_imports
from runtime.stop_signals import handle_stop_signals


def main() -> int:
    with frozen_imports():
        from training.deploy.export.command import run_export

    return run_export(sys.argv[1:], __doc__ or "")


if __name__ == "__main__":
    handle_stop_signals()
    start_program()
    sys.exit(main())
