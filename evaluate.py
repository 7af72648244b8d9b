"""Evaluate a run's newest checkpoint (give the overrides of its training) or weights in a file, on any number of processes.

python evaluate.py experiment=smoke run_id=NAME
python evaluate.py experiment=kinetics_single_node model.init=FILE evaluation=ten_crop
python evaluate.py experiment=smoke run_id=NAME evaluation=ten_crop evaluation.save_logits=true
torchrun --standalone --nproc-per-node 2 evaluate.py experiment=smoke run_id=NAME evaluation.batch=32
python evaluate.py 'evaluation.ensemble=[outputs/A/logits/STEP.safetensors,outputs/B/logits/STEP.safetensors]'

evaluation= chooses a protocol (conf/evaluation). The last command averages logits that evaluation.save_logits=true has written.
"""

import sys

from pipelines.lasting import lasting_objects

with lasting_objects():
    import hydra
    from omegaconf import DictConfig

    from training import assess, ensemble, main, schema

schema.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def evaluate(composed: DictConfig) -> None:
    if composed.evaluation.ensemble:
        sys.exit(ensemble.run_ensemble(composed))
    sys.exit(main.run(lambda: schema.from_composed(composed), assess.evaluate_task))


if __name__ == "__main__":
    evaluate()
