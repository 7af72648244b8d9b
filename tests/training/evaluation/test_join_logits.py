"""Ensembles of different manifests match classes and clips by name, by hand-made numbers, and state what is missing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.manifest import UNLABELLED
from training.errors import ConfigError
from training.evaluation.ensemble import ensemble, run_ensemble
from training.evaluation.metrics import ClipLogits, counts_of
from training.evaluation.saved_logits import Origin, load_logits, save_logits

CLASSES = ["a", "b", "c"]


def saved(
    folder: Path,
    logits: dict[str, list[float]],
    labels: dict[str, str] | None,
    classes: list[str] = CLASSES,
    unseen: tuple[str, ...] = (),
    **origin: Any,
) -> Path:
    """Save logits by clip and labels by class name, as an evaluation of a manifest of its own does."""
    names = list(logits)
    label_N = torch.tensor(
        [UNLABELLED if labels is None else classes.index(labels[name[-2:].strip("/")]) for name in names]
    )
    seen_N = torch.tensor([name not in unseen for name in names])
    clip_logits = ClipLogits(torch.tensor(list(logits.values())), label_N, seen_N)
    fields: dict[str, Any] = {"split": "val" if labels else "test", "clip_names": names} | origin
    found = Origin(str(folder), classes, None, folder.name, 7, "recipe", "8x224-uniform-1crop", **fields)
    return save_logits(folder, clip_logits, found, counts_of(clip_logits, None))


RGB = {"1": [1.0, 2.0, 3.0], "2": [0.0, 5.0, 1.0], "30": [2.0, 2.0, 0.0]}
LABELS = {"1": "a", "2": "b", "30": "c"}
# The same clips in another order, and the classes in the order c, a, b.
FLOW = {"30": [9.0, 0.0, 3.0], "1": [1.0, 8.0, 1.0], "2": [3.0, 3.0, 1.0]}
FLOW_CLASSES = ["c", "a", "b"]


def test_classes_and_clips_are_matched_by_name(tmp_path: Path) -> None:
    paths = [saved(tmp_path / "rgb", RGB, LABELS), saved(tmp_path / "flow", FLOW, LABELS, FLOW_CLASSES)]
    both = ensemble(paths, [1, 3])
    assert both.clip_logits.logit_NK.tolist() == [
        [(1 + 3 * 8) / 4, (2 + 3 * 1) / 4, (3 + 3 * 1) / 4],
        [(0 + 3 * 3) / 4, (5 + 3 * 1) / 4, (1 + 3 * 3) / 4],
        [(2 + 3 * 0) / 4, (2 + 3 * 3) / 4, (0 + 3 * 9) / 4],
    ]
    assert both.clip_logits.label_N.tolist() == [0, 1, 2]
    assert both.clip_logits.seen_N.all() and both.absent == []
    assert (both.origin.classes, both.origin.clip_names) == (CLASSES, ["1", "2", "30"])
    assert both.origin.manifest_digest == load_logits(paths[0])[1].manifest_digest
    assert [(each["source"], each["share"]) for each in both.origin.members] == [("rgb", 0.25), ("flow", 0.75)]
    # Starting from the other file gives the same numbers, in its order.
    turned = ensemble(paths[::-1], [3, 1])
    assert turned.origin.clip_names == ["30", "1", "2"]
    assert torch.equal(turned.clip_logits.logit_NK, both.clip_logits.logit_NK[[2, 0, 1]][:, [2, 0, 1]])
    assert turned.clip_logits.label_N.tolist() == [0, 1, 2]


def test_clips_that_a_file_lacks_are_missing(tmp_path: Path) -> None:
    """They count as missing and are named, and so do clips that one network could not decode."""
    flow = {name: FLOW[name] for name in ("30", "1")} | {"4": [1.0, 0.0, 0.0]}
    labels = LABELS | {"4": "a"}
    paths = [
        saved(tmp_path / "rgb", RGB, labels, unseen=("30",)),
        saved(tmp_path / "flow", flow, labels, FLOW_CLASSES),
    ]
    both = ensemble(paths, [])
    assert both.origin.clip_names == ["1", "2", "30", "4"]
    assert both.clip_logits.seen_N.tolist() == [True, False, False, False]
    assert both.clip_logits.label_N.tolist() == [0, 1, 2, 0]
    assert both.absent == [f"missing: 4 is not in {paths[0]}", f"missing: 2 is not in {paths[1]}"]
    counts = counts_of(both.clip_logits, None)
    assert (counts.clips, counts.missing) == (1, 3)
    assert both.origin.manifest_digest != load_logits(paths[0])[1].manifest_digest


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no clip": ({"logits": {f"x/{name}": row for name, row in FLOW.items()}}, r"no clip is in all files\. .*x/30, x/1, x/2"),
    "another label": ({"labels": LABELS | {"2": "c"}}, r"1 clips have other labels in .*flow.*'2': 'c' there, 'b' in"),
    "no labels": ({"labels": None, "split": "val"}, r"rgb.* has labels, .*flow.* has none\. Fix: "),
    "another class": ({"classes": ["c", "a", "d"], "labels": dict.fromkeys(LABELS, "a")}, r"'d' is only in .*flow"),
    "fewer classes": ({"classes": ["c", "a"], "labels": dict.fromkeys(LABELS, "a")}, r"'b' is only in .*rgb.*2 classes in"),
    "two clips of one name": ({"clip_names": ["1", "1", "2"]}, r"1 clips of .*flow.* name of another clip, such as '1'"),
    "no names": ({"clip_names": None}, r"different manifests, and .*flow.* does not say which clips.*Fix: evaluate that run again"),
    "another split": ({"split": "test"}, r"flow.* holds evaluation\.split=test, .*rgb.* val\. Fix: "),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, what: str) -> None:
    changes, says = REFUSED[what]
    rgb = saved(tmp_path / "rgb", RGB, LABELS)
    arguments: dict[str, Any] = {"logits": FLOW, "labels": LABELS, "classes": FLOW_CLASSES} | changes
    if len(arguments["classes"]) == 2:
        arguments["logits"] = {name: row[:2] for name, row in FLOW.items()}
    flow = saved(tmp_path / "flow", **arguments)
    for paths in ([rgb, flow], [flow, rgb]) if what in ("no clip", "no names", "no labels") else ([rgb, flow],):
        with pytest.raises(ConfigError, match=says if paths[0] == rgb else "Fix: ") as caught:
            ensemble(paths, [])
        assert "Fix: " in str(caught.value)


# --- Clips without labels ---------------------------------------------------------------------------------------------


def run(
    capsys: pytest.CaptureFixture[str], outputs: Path, max_bad_clips: int = 0, **evaluation: Any
) -> tuple[int, str]:
    from tests.training.config.test_config import compose

    composed = compose("run_id=entry")
    composed.outputs = str(outputs)
    composed.data.max_bad_clips = max_bad_clips
    for key, value in evaluation.items():
        composed.evaluation[key] = value
    code = run_ensemble(composed)
    return code, capsys.readouterr().out


def test_an_ensemble_without_labels_predicts_and_scores_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rgb = {f"v1/{name}": row for name, row in RGB.items()}
    flow = {f"v1/{name}": row for name, row in FLOW.items()}
    paths = [str(saved(tmp_path / "rgb", rgb, None)), str(saved(tmp_path / "flow", flow, None, FLOW_CLASSES))]
    code, output = run(capsys, tmp_path / "out", ensemble=paths)
    assert code == 0
    assert "no labels, so no accuracy  (3 clips)" in output and "top-1" not in output
    record = json.loads(output.splitlines()[1])
    assert record["clips"] == 3 and not {key for key in record if "percent" in key or key == "loss"}
    (path,) = (tmp_path / "out" / "entry" / "logits").glob("ensemble-logits-*-test.safetensors")
    files = {file.name.removeprefix(path.stem): file.read_text() for file in path.parent.iterdir() if file != path}
    assert files.keys() == {".json", ".predictions.csv", ".leaderboard_class.csv", ".leaderboard_top5.csv"}
    # Sums of the logits in the order a, b, c: 9 3 4; 3 6 4; 2 5 9.
    assert files[".leaderboard_class.csv"] == "1;a\n2;b\n30;c\n"
    assert files[".leaderboard_top5.csv"] == "1;0;2;1\n2;1;2;0\n30;2;1;0\n"
    head, first, *_ = files[".predictions.csv"].splitlines()
    assert head == "clip,class 1,score 1,class 2,score 2,class 3,score 3"
    assert first.startswith("v1/1,a,0.") and ",c,0." in first
    summary = json.loads(files[".json"])
    assert summary["scores"] == {"clips": 3, "missing": 0} and summary["missing_clips"] == []
    # Saved again and joined with nothing, it stays what it is.
    code, output = run(capsys, tmp_path / "again", ensemble=[str(path)])
    assert code == 0
    (other,) = (tmp_path / "again" / "entry" / "logits").glob("*.leaderboard_top5.csv")
    assert other.read_text() == files[".leaderboard_top5.csv"]


def test_a_leaderboard_file_that_lacks_clips_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless data.max_bad_clips allows them. Files of an earlier call do not stay."""
    flow = {name: FLOW[name] for name in ("30", "1")}
    paths = [str(saved(tmp_path / "rgb", RGB, None)), str(saved(tmp_path / "flow", flow, None, FLOW_CLASSES))]
    code, output = run(capsys, tmp_path, 1, ensemble=paths)
    logits = tmp_path / "entry" / "logits"
    assert code == 0 and f"missing: 2 is not in {paths[1]}" in output and "MISSING 1" in output
    (by_class,) = logits.glob("*.leaderboard_class.csv")
    assert by_class.read_text() == "1;a\n30;c\n"
    code, output = run(capsys, tmp_path, 0, ensemble=paths)
    assert code == 3
    assert "not saved: the leaderboard's files, because 1 clips have no prediction. Fix: " in output
    assert "data.max_bad_clips=1" in output and not list(logits.glob("*leaderboard*"))
    (predictions,) = logits.glob("*.predictions.csv")
    assert predictions.read_text().splitlines()[2] == "2"


def test_many_clips_that_a_file_lacks_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rgb = {str(number): [1.0, 0.0, 0.0] for number in range(50)}
    paths = [saved(tmp_path / "rgb", rgb, None), saved(tmp_path / "flow", {"3": [1.0, 0.0, 0.0]}, None)]
    code, output = run(capsys, tmp_path, ensemble=list(map(str, paths)))
    assert code == 3
    assert output.count(f"is not in {paths[1]}") == 20 and "missing: 29 more clips that a file lacks" in output


def test_labelled_ensembles_are_saved_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(saved(tmp_path / "rgb", RGB, LABELS)), str(saved(tmp_path / "flow", FLOW, LABELS, FLOW_CLASSES))]
    run(capsys, tmp_path, ensemble=paths)
    assert not (tmp_path / "entry").exists()
    code, output = run(capsys, tmp_path, ensemble=paths, save_logits=True)
    assert code == 0 and "top-1 100.0%" in output
    names = sorted(file.name.split(".", 1)[1] for file in (tmp_path / "entry" / "logits").iterdir())
    assert names == ["confusion.csv", "json", "predictions.csv", "safetensors"]
    (predictions,) = (tmp_path / "entry" / "logits").glob("*.predictions.csv")
    assert predictions.read_text().splitlines()[0].startswith("clip,label,class 1,score 1,")
    (path,) = (tmp_path / "entry" / "logits").glob("*.safetensors")
    assert load_logits(path)[1].split == "val"
