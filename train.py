"""Train a TSM. The configuration is Hydra's: `conf/`, steered by overrides on the command line.

python train.py experiment=smoke                                            one process
torchrun --standalone --nproc-per-node 2 train.py experiment=smoke          two, over torch.distributed
horovodrun --gloo -np 2 python train.py experiment=smoke                    two, over Horovod
"""

import sys

import hydra
from omegaconf import DictConfig

from training import main, schema

schema.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def train(composed: DictConfig) -> None:
    sys.exit(main.run(composed, main.train_task))


if __name__ == "__main__":
    train()
