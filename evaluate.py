"""Evaluate the newest checkpoint of a run; give the overrides that it was trained with, on any number of processes.

python evaluate.py experiment=smoke run_id=NAME
torchrun --standalone --nproc-per-node 2 evaluate.py experiment=smoke run_id=NAME evaluation.batch=32
"""

import sys

import hydra
from omegaconf import DictConfig

from training import main, schema

schema.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def evaluate(composed: DictConfig) -> None:
    sys.exit(main.run(composed, main.evaluate_task))


if __name__ == "__main__":
    evaluate()
