"""Digests of the code that trained a checkpoint, so that a run does not resume with other code unnoticed."""

import ast
import hashlib
from pathlib import Path
from typing import Any

from distributed.checkpoint.store import Checkpoint
from training.config.schema import Config
from training.errors import ConfigError

from .run_folder import RunFolder, git

DECIDES_RESULTS = (
    "train.py",
    *(f"{folder}/**/*.py" for folder in ("runtime", "distributed", "pipelines", "tsm", "training")),
)
_SHOWN = 8


def code_version(checkout: Path) -> dict[str, Any]:
    """The git commit, where there is one, and a digest of each file that can decide a result, by its path in the checkout.

    Comments, docstrings and layout do not count: the digest is of the syntax tree (of this Python's: another one is other code).
    """
    paths = sorted({path for pattern in DECIDES_RESULTS for path in checkout.glob(pattern)})
    return {
        "commit": git("rev-parse", "HEAD"),
        "files": {str(path.relative_to(checkout)): _digest(path.read_text()) for path in paths},
    }


def check_code(config: Config, now: dict[str, Any], folder: RunFolder, checkpoint: Checkpoint) -> None:
    """On rank 0: refuse to go on from a checkpoint of other code, unless the configuration allows it; says what differs.

    A checkpoint that does not say which code it is of is taken as it is.
    """
    before = checkpoint.state.get("code")
    if before is None:
        return
    names = sorted(before["files"].keys() | now["files"].keys())
    differing = [name for name in names if before["files"].get(name) != now["files"].get(name)]
    if not differing:
        return
    shown = ", ".join(differing[:_SHOWN]) + (f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else "")
    commits = f"commit {before['commit'] or 'unknown'} then, {now['commit'] or 'unknown'} now"
    what = f"other code than its checkpoint of step {checkpoint.state['step']} ({commits}; these files differ: {shown})"
    if not config.checkpoint.allow_code_change:
        raise ConfigError(
            f"{folder.path} would go on by {what}. Fix: go back to the code that it was started with, or choose another run_id, or "
            "go on with checkpoint.allow_code_change=true"
        )
    print(f"going on by {what}", flush=True)


def _digest(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # a string that stands alone does nothing: docstrings, and those under fields
            node.body = [line for line in body if not _is_string(line)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_string(line: ast.AST) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
