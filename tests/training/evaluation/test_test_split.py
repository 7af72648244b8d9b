"""Evaluate a test split: without labels it gives predictions and no accuracy, with labels the scores of validation clips."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.manifest import UNLABELLED, Manifest, write_manifest
from tests.helpers.clips import smooth_video, write_clips
from tests.helpers.tiny_run import evaluate_here, write_run
from training.errors import ConfigError, DataError
from training.evaluation.ensemble import ensemble
from training.evaluation.saved_logits import load_logits

CLASSES = ["a", "b", "c"]
CLIPS = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and five clips three times: with labels as val.arrow and labelled.arrow, without as test.arrow."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "clips").mkdir()
    val = folder / "clips" / "val.arrow"
    write_clips(val, [smooth_video(8, seed=seed) for seed in range(CLIPS)])
    rows = [Manifest.open(val).row(row) for row in range(CLIPS)]
    write_manifest(val.with_name("labelled.arrow"), rows, CLASSES, split="test")
    unlabelled = [replace(row, label=UNLABELLED) for row in rows]
    write_manifest(val.with_name("test.arrow"), unlabelled, CLASSES, split="test")
    write_run(folder / "run", CLASSES, f"data.root={folder / 'clips'}", f"outputs={folder}")
    return folder


def evaluate(made: Path, *overrides: str) -> int:
    return evaluate_here(made / "run", *overrides)


def test_predictions_without_labels(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The logits are those of the same clips with labels, and nothing that needs labels appears anywhere."""
    assert evaluate(made, "evaluation.save_logits=true") == 0
    capsys.readouterr()
    assert evaluate(made, "evaluation.split=test") == 0
    line, record, *paths = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "run step 5  4x32-uniform_validation-1crop  test split  no labels, so no accuracy  (5 clips)"
    )
    assert "differs from the run" not in line
    fields = json.loads(record)
    assert (fields["split"], fields["clips"], fields["missing"]) == ("test", CLIPS, 0)
    assert not {key for key in fields if "percent" in key or key == "loss"}
    stem = "step-00000005-4x32-uniform_validation-1crop"
    logits = made / "run" / "logits"
    kinds = ("safetensors", "leaderboard_class.csv", "leaderboard_top5.csv")
    assert paths == [f"saved: {logits / stem}-test.{kind}" for kind in kinds]
    validated, _ = load_logits(logits / f"{stem}.safetensors")
    found, origin = load_logits(logits / f"{stem}-test.safetensors")
    assert torch.equal(found.logit_NK, validated.logit_NK) and not found.labelled
    assert (origin.split, origin.clip_names) == ("test", [str(clip) for clip in range(CLIPS)])
    best = found.logit_NK.argsort(dim=1, descending=True, stable=True).tolist()
    assert (logits / f"{stem}-test.leaderboard_class.csv").read_text().splitlines() == [
        f"{clip};{CLASSES[order[0]]}" for clip, order in enumerate(best)
    ]
    assert (logits / f"{stem}-test.leaderboard_top5.csv").read_text().splitlines() == [
        ";".join(map(str, [clip, *order])) for clip, order in enumerate(best)
    ]
    names = {path.name.removeprefix(stem) for path in logits.iterdir()}
    assert "-test.predictions.csv" in names and ".predictions.csv" in names
    assert ".confusion.csv" in names and "-test.confusion.csv" not in names
    assert json.loads((logits / f"{stem}-test.json").read_text())["scores"] == {"clips": CLIPS, "missing": 0}
    assert ensemble([logits / f"{stem}-test.safetensors"], []).origin.split == "test"


def test_a_test_split_with_labels_has_scores(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(made) == 0
    validated = json.loads(capsys.readouterr().out.splitlines()[1])
    assert evaluate(made, "evaluation.split=test", "data.test=labelled.arrow") == 0
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[1]) == validated | {"split": "test"}
    assert "leaderboard_class.csv" in output


@pytest.mark.parametrize(
    ("overrides", "kind", "says"),
    [
        (["data.val=test.arrow"], DataError, r"clips without labels.* Fix: data\.val=FILE"),
        (["evaluation.split=test", "data.test=gone.arrow"], DataError, r"gone\.arrow: no such manifest.*data\.test=FILE"),
        (["evaluation.split=test", "evaluation.explain=2"], ConfigError, r"--explain compares answers with labels.* Fix: "),
        (["evaluation.split=test", "evaluation=stream"], ConfigError, r"evaluation=stream compares answers.* Fix: "),
        (["evaluation.split=test", "data.test=shards.arrow"], ConfigError, r"does not name its clips.* Fix: run that prepare"),
    ],
)  # fmt: skip
def test_what_needs_labels_or_names_is_refused(
    made: Path, overrides: list[str], kind: type[Exception], says: str
) -> None:
    row = Manifest.open(made / "clips" / "test.arrow").row(0)
    write_manifest(made / "clips" / "shards.arrow", [replace(row, path="test-000000.tar")], CLASSES)
    with pytest.raises(kind, match=says):
        evaluate(made, *overrides)
