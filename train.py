"""Train a TSM. The configuration is Hydra's: `conf/`, steered by overrides on the command line.

python train.py experiment=smoke                                            one process
torchrun --standalone --nproc-per-node 2 train.py experiment=smoke          two, over torch.distributed
horovodrun --gloo -np 2 python train.py experiment=smoke                    two, over Horovod
srun --mpi=pmix python train.py --run outputs/NAME                          Slurm's tasks, by a run folder's config.yaml

The last form composes nothing: batch scripts do that once, before ranks start (plan.py plan.write_config=true).
"""

import sys
from pathlib import Path

from runtime.gc_freeze import frozen_imports

with frozen_imports():
    import hydra
    from omegaconf import DictConfig

    from training import main
    from training.config.load import from_composed, read_config, register

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def train(composed: DictConfig) -> None:
    if code := main.run(lambda: from_composed(composed), main.train_task):
        sys.exit(code)  # and no exception where all is well: --multirun goes on with the next


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"] and len(sys.argv) == 3:
        sys.exit(main.run(lambda: read_config(Path(sys.argv[2])), main.train_task))
    train()
