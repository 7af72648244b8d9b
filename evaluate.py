"""Evaluate a run's newest checkpoint (give the overrides of its training) or weights in a file, on any number of processes.

python evaluate.py experiment=smoke run_id=NAME
python evaluate.py experiment=kinetics_single_node model.init=FILE evaluation=ten_crop
python evaluate.py experiment=smoke run_id=NAME evaluation=ten_crop evaluation.save_logits=true
torchrun --standalone --nproc-per-node 2 evaluate.py experiment=smoke run_id=NAME evaluation.batch=32
python evaluate.py 'evaluation.ensemble=[outputs/A/logits/STEP.safetensors,outputs/B/logits/STEP.safetensors]'

evaluation= chooses a protocol (conf/evaluation). The last command averages logits that evaluation.save_logits=true has written.
"""

import sys

from runtime.gc_freeze import frozen_imports

with frozen_imports():
    import hydra
    from omegaconf import DictConfig

    from training import main
    from training.config.load import from_composed, register
    from training.evaluation import command, ensemble

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def evaluate(composed: DictConfig) -> None:
    if composed.evaluation.ensemble:
        sys.exit(ensemble.run_ensemble(composed))
    sys.exit(main.run(lambda: from_composed(composed), command.evaluate_task))


if __name__ == "__main__":
    evaluate()
