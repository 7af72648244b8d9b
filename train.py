"""Train a TSM. Hydra composes the configuration from `conf/` and the overrides on the command line.

python train.py experiment=smoke                                            one process
torchrun --standalone --nproc-per-node 2 train.py experiment=smoke          two, over torch.distributed
horovodrun --gloo -np 2 python train.py experiment=smoke                    two, over Horovod
srun --mpi=pmix python train.py --run outputs/NAME                          Slurm tasks; reads the run folder's config.yaml

With --run the ranks compose nothing: the batch script does so once, before they start (plan.py plan.write_config=true).
"""

import sys

from runtime.console import ignore_write_errors
from runtime.environment import start_program
from runtime.gc_freeze import frozen_imports
from runtime.stop_signals import handle_stop_signals


def main() -> None:
    # Inside main, because each loader worker imports this file again, as __mp_main__.
    with frozen_imports():
        from training.config.command_line import Read, execute
        from training.config.load import from_composed
        from training.main import run, train_task

    def start(read: Read) -> int:
        return run(lambda: from_composed(read()), train_task)

    sys.exit(execute("train", sys.argv[1:], start))


if __name__ == "__main__":
    handle_stop_signals()
    start_program()
    ignore_write_errors()
    main()
