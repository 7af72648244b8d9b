"""Everything that can be said of a run before it starts: recipe, layout, memory, messages, bytes; and what would stop it.

python plan.py experiment=kinetics_1536                                   on 1,536 processes, which the experiment is meant for
python plan.py experiment=kinetics_1536 distributed.world_size=64         on another world, or which worlds fit
python plan.py experiment=kinetics_1536 plan.json=plan.json plan.plot=rate.png

Seconds on one process, with no GPU and no data. Exits as train.py would: 0, 2 (configuration) or 3 (data).
"""

import sys

from runtime.gc_freeze import frozen_imports

with frozen_imports():
    import hydra
    from omegaconf import DictConfig

    from training.config.load import register
    from training.planning import dry_run

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def plan(composed: DictConfig) -> None:
    sys.exit(dry_run.run_plan(composed))


if __name__ == "__main__":
    plan()
