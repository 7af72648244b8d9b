"""Print a run's plan before it starts (recipe, layout, memory, messages, time on a cluster), and what would stop the run.

python plan.py experiment=kinetics_1536                                   on the experiment's own 1,536 processes
python plan.py experiment=kinetics_1536 distributed.world_size=64         at another world size, or which world sizes fit
python plan.py experiment=kinetics_1536 plan.json=plan.json plan.plot=rate.png
python plan.py experiment=kinetics_1536 cluster=summit                    how long it takes there, and why
python plan.py experiment=kinetics_1536 cluster=summit plan.sweep=[96,384,1536] plan.html=sweep.html

Takes seconds in one process; needs no GPU and no data. Exits as train.py would: 0, 2 (configuration) or 3 (data).
"""

import sys

from runtime.environment import start_program
from runtime.gc_freeze import frozen_imports
from runtime.stop_signals import handle_stop_signals


def main() -> None:
    # Inside main, as in train.py: this file is cheap to import.
    with frozen_imports():
        from training.config.command_line import execute
        from training.planning.command import run_plan

    sys.exit(execute("plan", sys.argv[1:], run_plan))


if __name__ == "__main__":
    handle_stop_signals()
    start_program()
    main()
