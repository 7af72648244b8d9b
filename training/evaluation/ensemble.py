"""Average the saved logits of several evaluations of the same clips (an ensemble), and score the mean."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from distributed.topology import TopologyError, find_topology
from runtime.exit_codes import EXIT_CONFIG, EXIT_DATA, EXIT_DONE
from training.build.class_names import first_difference
from training.config.schema import EvaluationConfig
from training.errors import ConfigError

from .metrics import ClipLogits, scores_of
from .saved_logits import load_logits


def ensemble(paths: Sequence[Path], weights: Sequence[float]) -> tuple[ClipLogits, list[int] | None]:
    """Return the weighted mean of saved logits, and the classes' order groups. No weights: equal weights.

    Logits are averaged before the softmax, as in the official test code. A clip counts if it was decoded for every file.
    Raises ConfigError for files of different clips or classes.
    """
    parts = [load_logits(path) for path in paths]
    first, origin = parts[0]
    for path, (_, other) in zip(paths, parts, strict=True):
        if other.classes != origin.classes:
            difference = first_difference(other.classes, str(path), origin.classes, str(paths[0]))
            raise ConfigError(
                f"evaluation.ensemble: files of different classes: {difference}. Fix: evaluate both runs on one manifest, which "
                "maps their classes by name"
            )
        if other.manifest_digest != origin.manifest_digest:
            raise ConfigError(
                f"evaluation.ensemble: {path} holds logits of other clips than {paths[0]}: manifest "
                f"{other.manifest_digest[:12]} and {origin.manifest_digest[:12]}. Fix: evaluate both on one manifest"
            )
    share_F = torch.tensor(list(weights) or [1.0] * len(parts), dtype=torch.float64)
    share_F /= share_F.sum()
    logit_FNK = torch.stack([part.logit_NK.double() for part, _ in parts])
    seen_N = torch.stack([part.seen_N for part, _ in parts]).all(0)
    return ClipLogits(torch.einsum("f,fnk->nk", share_F, logit_FNK), first.label_N, seen_N), origin.order_groups


def run_ensemble(composed: Any) -> int:
    """Score the ensemble that `evaluation.ensemble` names, in one process. Returns the exit code (runtime.exit_codes)."""
    try:
        paths, weights = _checked(OmegaConf.merge(OmegaConf.structured(EvaluationConfig), composed.evaluation))
        clip_logits, order_groups = ensemble(paths, weights)
    except (ConfigError, TopologyError) as error:
        print(f"error (ensemble): {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    scores = scores_of(clip_logits, order_groups)
    print(scores.describe(f"ensemble of {len(paths)}, over the clips that all of them decoded"), flush=True)
    fields = {"ensemble": [str(path) for path in paths], "weights": weights, **scores.as_dict()}
    print(json.dumps(fields), flush=True)
    return EXIT_DATA if scores.missing > composed.data.max_bad_clips else EXIT_DONE


def _checked(evaluation: Any) -> tuple[list[Path], list[float]]:
    paths, weights = [Path(name) for name in evaluation.ensemble], list(evaluation.ensemble_weights)
    if find_topology().size > 1:
        raise ConfigError("evaluation.ensemble runs in one process only. Fix: python evaluate.py, without a launcher")
    if weights and (len(weights) != len(paths) or min(weights) < 0 or not 0 < sum(weights) < float("inf")):
        raise ConfigError(
            f"evaluation.ensemble_weights must be {len(paths)} numbers of 0 or more, not all 0, one for each file; got {weights}. "
            "Fix: evaluation.ensemble_weights=[], for equal weights"
        )
    return paths, weights
