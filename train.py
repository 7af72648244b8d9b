"""Train a TSM. Hydra composes the configuration from `conf/` and the overrides on the command line.

python train.py experiment=smoke                                            one process
torchrun --standalone --nproc-per-node 2 train.py experiment=smoke          two, over torch.distributed
horovodrun --gloo -np 2 python train.py experiment=smoke                    two, over Horovod
srun --mpi=pmix python train.py --run outputs/NAME                          Slurm tasks; reads the run folder's config.yaml

With --run the ranks compose nothing: the batch script does so once, before they start (plan.py plan.write_config=true).
"""

import sys
from pathlib import Path

from runtime.gc_freeze import frozen_imports
from runtime.stop_signals import handle_stop_signals


def main() -> None:
    # Inside main, because each loader worker imports this file again, as __mp_main__.
    with frozen_imports():
        import hydra
        from omegaconf import DictConfig

        from training.config.load import from_composed, read_config, register
        from training.main import run, train_task

    register()

    @hydra.main(version_base="1.3", config_path="conf", config_name="config")
    def train(composed: DictConfig) -> None:
        # Success raises no SystemExit, so that --multirun continues with the next job.
        if code := run(lambda: from_composed(composed), train_task):
            sys.exit(code)

    if sys.argv[1:2] == ["--run"] and len(sys.argv) == 3:
        sys.exit(run(lambda: read_config(Path(sys.argv[2])), train_task))
    train()


if __name__ == "__main__":
    handle_stop_signals()
    main()
