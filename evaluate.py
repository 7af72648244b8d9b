"""Evaluate a run's newest checkpoint (give the overrides it was trained with) or a weights file, on any number of processes.

python evaluate.py experiment=smoke run_id=NAME
python evaluate.py experiment=kinetics_single_node model.init=FILE evaluation=ten_crop
python evaluate.py experiment=smoke run_id=NAME evaluation=ten_crop evaluation.save_logits=true
torchrun --standalone --nproc-per-node 2 evaluate.py experiment=smoke run_id=NAME evaluation.batch=32
python evaluate.py 'evaluation.ensemble=[outputs/A/logits/STEP.safetensors,outputs/B/logits/STEP.safetensors]'

evaluation= selects a protocol (conf/evaluation). The last command averages logits saved with evaluation.save_logits=true.
"""

import sys
from contextlib import suppress

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
        from training.main import run

    def start(read: Read) -> int:
        # run() reports the error.
        with suppress(ConfigError):
            if read().evaluation.ensemble:
                return run_ensemble(read())
        return run(lambda: from_composed(read()), evaluate_task)

    sys.exit(execute("evaluate", sys.argv[1:], start))


if __name__ == "__main__":
    handle_stop_signals()
    main()
