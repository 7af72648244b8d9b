"""Print a run's plan before it starts (recipe, layout, memory, messages, time on a cluster), and what would stop the run.

python plan.py experiment=kinetics_1536                                   on the experiment's own 1,536 processes
python plan.py experiment=kinetics_1536 distributed.world_size=64         at another world size, or which world sizes fit
python plan.py experiment=kinetics_1536 plan.json=plan.json plan.plot=rate.png
python plan.py experiment=kinetics_1536 cluster=summit                    how long it takes there, and why
python plan.py experiment=kinetics_1536 cluster=summit plan.sweep=[96,384,1536] plan.html=sweep.html
python plan.py experiment=kinetics_1536 cluster=summit --sweep            at 8 to 4,096 processes
python plan.py calibrate=NAME experiment=kinetics_1536                    measure this machine, for cluster=NAME
srun --nodes=2 --ntasks-per-node=8 .venv/bin/python plan.py calibrate=NAME experiment=kinetics_1536 cluster=summit

A plan takes seconds in one process, and needs no GPU and no data; calibrate takes up to two minutes. Exits as train.py would: 0,
2 (configuration) or 3 (data).
"""

import sys

from runtime.environment import start_program
from runtime.gc_freeze import frozen_imports
from runtime.stop_signals import handle_stop_signals


def main() -> None:
    arguments = [f"plan.{text}" if text.startswith("calibrate=") else text for text in sys.argv[1:]]
    # Inside main, as in train.py: this file is cheap to import.
    with frozen_imports():
        from training.config.command_line import execute

        if any(text.startswith("plan.calibrate=") for text in arguments):
            from training.calibration.command import run_calibration as start
        else:
            from training.planning.command import run_plan as start

    sys.exit(execute("plan", arguments, start))


if __name__ == "__main__":
    handle_stop_signals()
    start_program()
    main()
