"""Record the code that trains a run in its checkpoints, and check it when the run resumes."""

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distributed.checkpoint.store import Checkpoint
from training.config.schema import CheckpointConfig
from training.errors import ConfigError

from .run_folder import RunFolder, git

RECORDED = (
    "train.py",
    *(f"{folder}/**/*.py" for folder in ("runtime", "distributed", "pipelines", "tsm", "training")),
)
"""Patterns of the files whose digests a checkpoint holds."""

DECIDES_NUMBERS = (
    "tsm",
    "runtime/triton_launch.py",
    # Collectives, and batch norm over ranks.
    "distributed/backends",
    "distributed/batch_norm",
    # The clip stream: what is sampled, decoded and batched. The scan's results are in the manifest, whose digest is compared.
    "pipelines/manifest.py",
    "pipelines/stream",
    "pipelines/decoding",
    "pipelines/loading",
    # The recipe, the network, the step, and the scores.
    "training/build",
    "training/optim",
    "training/evaluation",
    "training/recipe.py",
    "training/schedule.py",
    "training/job.py",
    "training/step.py",
    "training/loss.py",
    "training/loop.py",
)
"""Files and folders that decide weights or scores: resuming refuses a change in them, and warns of any other."""

_SCHEME = 2
"""Of a record. The first had no number, and another layout of the tree."""

_SHOWN = 8


def code_version(checkout: Path) -> dict[str, Any]:
    """The git commit, if any, and a digest of each recorded file, by its path in the checkout.

    Comments, docstrings and layout do not count: the digest is of the syntax tree. It depends on the version of Python.
    """
    paths = sorted({path for pattern in RECORDED for path in checkout.glob(pattern)})
    return {
        "scheme": _SCHEME,
        "commit": git("rev-parse", "HEAD"),
        "files": {str(path.relative_to(checkout)): _digest(path.read_text()) for path in paths},
        "decides_numbers": list(DECIDES_NUMBERS),
    }


def check_code(
    settings: CheckpointConfig, deterministic: bool, now: dict[str, Any], folder: RunFolder, checkpoint: Checkpoint
) -> None:
    """On rank 0: compare the code with the checkpoint's. Raise ConfigError or warn, and name the files that differ.

    Refused unless checkpoint.allow_code_change: a change in files that decide numbers and, in deterministic mode, any change.
    Only records of the same scheme can be compared. A checkpoint without a record is accepted.
    """
    before, step = checkpoint.state.get("code"), checkpoint.state["step"]
    if before is None:
        return
    commits = f"commit {before['commit'] or 'unknown'} then, {now['commit'] or 'unknown'} now"
    if before.get("scheme") != _SCHEME:
        _warn(
            f"the checkpoint of step {step} has an older record of its code, which cannot be compared with this code ({commits}): "
            "files have moved since. Resuming without that check: the numbers may differ from those of the code that ran before"
        )
        return
    names = sorted(before["files"].keys() | now["files"].keys())
    differing = [name for name in names if before["files"].get(name) != now["files"].get(name)]
    if not differing:
        return
    # A file may have decided numbers then and be gone now.
    deciding = decides_numbers(differing, {*before["decides_numbers"], *now["decides_numbers"]})
    refused = differing if deterministic else deciding
    if refused and not settings.allow_code_change:
        why = "in deterministic mode any change counts" if len(refused) > len(deciding) else "they decide numbers"
        raise ConfigError(
            f"{folder.path} would resume with other code than its checkpoint of step {step} ({commits}; these files differ, and "
            f"{why}: {_first(refused)}). Fix: go back to the code that the run was started with, or choose another run_id, or "
            "accept the change with checkpoint.allow_code_change=true"
        )
    effect = "these files decide numbers" if deciding else "none of these files decides numbers"
    _warn(
        f"resuming with other code than the checkpoint of step {step} ({commits}); {effect}: {_first(deciding or differing)}"
    )


def decides_numbers(names: Iterable[str], entries: Iterable[str] = DECIDES_NUMBERS) -> list[str]:
    """The names that are one of the entries, or lie in one."""
    entries = tuple(entries)
    return [name for name in names if any(name == entry or name.startswith(f"{entry}/") for entry in entries)]


def _warn(text: str) -> None:
    print(f"code: WARNING: {text}", flush=True)


def _first(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _digest(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # A string that stands alone does nothing: docstrings, and those under fields.
            node.body = [line for line in body if not _is_string(line)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_string(line: ast.AST) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
