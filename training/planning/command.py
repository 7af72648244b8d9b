"""The command of plan.py."""

import json
import sys
from pathlib import Path

from distributed.topology import find_topology
from runtime.checkout import CHECKOUT
from runtime.exit_codes import EXIT_CONFIG
from training.config.command_line import Read
from training.config.load import from_composed
from training.errors import ConfigError
from training.report.charts import schedule_figure
from training.runs.run_folder import RunFolder
from training.runs.run_lock import lock_run

from .output import as_dict, as_text
from .plan import Plan, make_plan
from .sweep_page import write_page


def run_plan(read: Read) -> int:
    """Print the plan of the configuration that `read` composes, write what `plan.*` names, and return the exit code.

    The exit code is 0, or train.py's: 2 for problems of the configuration, 3 if all problems are of the data.
    """
    try:
        plan = make_plan(from_composed(read()))
        print(as_text(plan), flush=True)
        _write(plan)
    except ConfigError as error:
        print(f"error (plan): {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    for warning in plan.warnings:
        print(f"warning (plan): {warning}", file=sys.stderr, flush=True)
    for problem in plan.problems:
        print(f"error (plan): {problem}", file=sys.stderr, flush=True)
    return plan.exit_code


def _write(plan: Plan) -> None:
    config, recipe = plan.config, plan.recipe
    if config.plan.write_config:
        if config.run_id is None:
            raise ConfigError("plan.write_config=true needs the name of the run. Fix: run_id=NAME")
        if not plan.problems and not plan.complete:
            folder = RunFolder(CHECKOUT / config.outputs / config.run_id)
            release = lock_run(folder, find_topology().job_id)
            try:
                folder.write_config(config)
                # Of an earlier end: the batch script leaves a run that has the marker alone.
                folder.success.unlink(missing_ok=True)
            finally:
                release()
    try:
        if config.plan.json is not None:
            Path(config.plan.json).write_text(json.dumps(as_dict(plan), indent=1) + "\n")
        if config.plan.html is not None and plan.points and plan.on_cluster is not None:
            write_page(Path(config.plan.html), plan.config.name, plan.on_cluster, plan.points)
        if config.plan.plot is not None and recipe is not None:
            schedule_figure(recipe.schedule, recipe.steps_per_epoch).savefig(config.plan.plot)
    # matplotlib raises ValueError for an unknown ending.
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot write the file of plan.json, plan.html or plan.plot: {error}. Fix: another path"
        ) from error
