"""Evaluate a run as it was trained, or by another protocol; or a weights file; on any number of processes.

python evaluate.py --run outputs/NAME
python evaluate.py --run outputs/NAME data.root=FOLDER evaluation=ten_crop evaluation.save_logits=true
python evaluate.py --run outputs/NAME/checkpoints/step-00001200
python evaluate.py --run outputs/NAME --explain
python evaluate.py --run outputs/NAME evaluation.split=test
torchrun --standalone --nproc-per-node 2 -- evaluate.py --run outputs/NAME evaluation.batch=32
python evaluate.py experiment=kinetics_single_node model.init=FILE evaluation=ten_crop
python evaluate.py 'evaluation.ensemble=[outputs/A/logits/STEP.safetensors,outputs/B/logits/STEP.safetensors]'

With --run the run's config.yaml is the base of the overrides. What differs from the run is refused or stated with the scores, also
with experiment=... run_id=NAME (docs/operating.md). evaluation= selects a protocol (conf/evaluation). --explain also writes a page
with clips and their logits for other orders of the frames (docs/predict.md). evaluation.split=test predicts test clips, also
without labels. The last command averages logits saved with evaluation.save_logits=true (docs/evaluation.md).
"""

import sys
from contextlib import suppress

from runtime.environment import start_program
from runtime.gc_freeze import frozen_imports
from runtime.stop_signals import handle_stop_signals


def main() -> None:
    # Inside main, because each loader worker imports this file again, as __mp_main__.
    with frozen_imports():
        from training.config.command_line import Read, execute
        from training.config.load import from_composed
        from training.errors import ConfigError
        from training.evaluation.command import evaluate_task
        from training.evaluation.ensemble import run_ensemble
        from training.evaluation.run_argument import config_of_run
        from training.main import run

    def start(read: Read) -> int:
        # run() reports the error.
        with suppress(ConfigError):
            if read().evaluation.ensemble:
                return run_ensemble(read())
        return run(lambda: from_composed(read()), evaluate_task)

    sys.exit(execute("evaluate", sys.argv[1:], start, config_of_run))


if __name__ == "__main__":
    handle_stop_signals()
    start_program()
    main()
