"""Average the saved logits of several evaluations of the same clips (an ensemble), score the mean, and write its predictions."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from distributed.topology import TopologyError, find_topology
from runtime import run_layout
from runtime.checkout import CHECKOUT
from runtime.exit_codes import EXIT_CONFIG, EXIT_DATA, EXIT_DONE
from training.config.checks import ENSEMBLE_AVERAGES
from training.config.schema import EvaluationConfig
from training.errors import ConfigError

from .join_logits import Joined, Saved, join_logits
from .metrics import ClipLogits, counts_of
from .saved_logits import Origin, load_logits, save_results

# Lines about clips that a file lacks. The JSON file of the results lists them all.
_LINES = 20


@dataclass(frozen=True)
class Ensemble:
    """The mean of several evaluations."""

    clip_logits: ClipLogits
    """float64. Averaged softmax is kept as its logarithm, whose softmax it is."""
    origin: Origin
    absent: list[str]
    """A line for each clip that a file lacks."""


def ensemble(
    paths: Sequence[Path], weights: Sequence[float], average: str = "logits", name: str = "ensemble"
) -> Ensemble:
    """Return the weighted mean of saved logits, or of their softmax. No weights: equal weights. `name`: its run_id.

    A clip counts if it was decoded for every file. Raises ConfigError for files of different clips or classes.
    """
    files = [Saved(path, *load_logits(path)) for path in paths]
    joined = join_logits(files)
    shares = _shares(weights, len(files))
    seen_U = torch.stack([part.seen_N for part in joined.parts]).all(0)
    clip_logits = ClipLogits(_mean(joined.parts, shares, average), joined.parts[0].label_N, seen_U)
    return Ensemble(clip_logits, _origin(files, joined, shares, average, name), joined.absent)


def _shares(weights: Sequence[float], count: int) -> list[float]:
    weights = list(weights) or [1.0] * count
    return [weight / sum(weights) for weight in weights]


def _mean(parts: Sequence[ClipLogits], shares: Sequence[float], average: str) -> Tensor:
    share_F11 = torch.tensor(shares, dtype=torch.float64)[:, None, None]
    logit_FUK = torch.stack([part.logit_NK.double() for part in parts])
    if average == "softmax":
        return (logit_FUK.log_softmax(2) + share_F11.log()).logsumexp(0)
    return (share_F11 * logit_FUK).sum(0)


def _origin(files: Sequence[Saved], joined: Joined, shares: Sequence[float], average: str, name: str) -> Origin:
    first = files[0].origin
    members = [
        {
            "source": file.origin.run_id,
            "step": file.origin.step,
            "protocol": file.origin.protocol,
            "amp": file.origin.amp,
            "recipe": file.origin.recipe,
            "share": share,
        }
        for file, share in zip(files, shares, strict=True)
    ]
    digests = [file.origin.manifest_digest for file in files]
    identity = _digest([members, digests, average])
    # With clips that the first file lacks, the rows are no manifest's.
    same_rows = joined.clip_names is None or len(joined.clip_names) == len(files[0].clip_logits.label_N)
    return Origin(
        manifest_digest=first.manifest_digest if same_rows else _digest(joined.clip_names),
        classes=first.classes,
        order_groups=first.order_groups,
        run_id=name,
        step=0,
        recipe=identity,
        protocol=f"ensemble-{average}-{identity[:8]}",
        split=first.split,
        clip_names=joined.clip_names,
        members=members,
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def run_ensemble(composed: Any) -> int:
    """Score the ensemble that `evaluation.ensemble` names, in one process. Returns the exit code (runtime.exit_codes)."""
    try:
        settings = OmegaConf.merge(OmegaConf.structured(EvaluationConfig), composed.evaluation)
        paths, weights = _checked(settings)
        name = composed.run_id or "ensemble"
        found = ensemble(paths, weights, settings.ensemble_average, name)
    except (ConfigError, TopologyError) as error:
        print(f"error (ensemble): {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    counts = counts_of(found.clip_logits, found.origin.order_groups)
    title = f"ensemble of {len(paths)}, mean of {settings.ensemble_average}, over the clips that all of them decoded"
    print(counts.describe(title), flush=True)
    fields = {"ensemble": [str(path) for path in paths], "weights": weights, "average": settings.ensemble_average}
    print(json.dumps({**fields, "split": found.origin.split, **counts.as_dict()}), flush=True)
    for line in found.absent[:_LINES]:
        print(line, flush=True)
    if len(found.absent) > _LINES:
        print(f"missing: {len(found.absent) - _LINES} more clips that a file lacks", flush=True)
    if settings.save_logits or found.origin.split == "test":
        folder = CHECKOUT / composed.outputs / name / run_layout.LOGITS
        save_results(folder, found.clip_logits, found.origin, counts, composed.data.max_bad_clips)
    return EXIT_DATA if counts.missing > composed.data.max_bad_clips else EXIT_DONE


def _checked(evaluation: Any) -> tuple[list[Path], list[float]]:
    paths, weights = [Path(name) for name in evaluation.ensemble], list(evaluation.ensemble_weights)
    if find_topology().size > 1:
        raise ConfigError("evaluation.ensemble runs in one process only. Fix: python evaluate.py, without a launcher")
    if weights and (len(weights) != len(paths) or min(weights) < 0 or not 0 < sum(weights) < float("inf")):
        raise ConfigError(
            f"evaluation.ensemble_weights must be {len(paths)} numbers of 0 or more, not all 0, one for each file; got {weights}. "
            "Fix: evaluation.ensemble_weights=[], for equal weights"
        )
    if evaluation.ensemble_average not in ENSEMBLE_AVERAGES:
        raise ConfigError(
            f"evaluation.ensemble_average must be one of {', '.join(ENSEMBLE_AVERAGES)}, got {evaluation.ensemble_average!r}. "
            "Fix: evaluation.ensemble_average=logits"
        )
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ConfigError(
            f"evaluation.ensemble names {twice} more than once. Fix: name each file once, with evaluation.ensemble_weights for "
            "one that counts more"
        )
    return paths, weights
