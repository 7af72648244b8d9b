"""Saved logits and ensembles: the round trip, scores, and refused files."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from training.build.class_names import digest_of
from training.errors import ConfigError
from training.evaluation.ensemble import ensemble, run_ensemble
from training.evaluation.metrics import ClipLogits, confusion_matrix, scores_of
from training.evaluation.saved_logits import Origin, load_logits, save_logits

CLASSES = ["move left", "move right", 'a "quoted", class']
ORIGIN = Origin("digest", CLASSES, [0, 0, 1], "run", 360, "recipe", "8x224-uniform-1crop")


def random_logits(seed: int, *missing: int, dtype: torch.dtype = torch.float32) -> ClipLogits:
    """Logits of forty clips, some of them missing."""
    generator = torch.Generator().manual_seed(seed)
    logit_NK = 2 * torch.randn(40, 3, generator=generator, dtype=dtype)
    seen_N = torch.ones(40, dtype=torch.bool)
    seen_N[list(missing)] = False
    return ClipLogits(logit_NK, torch.arange(40) % 3, seen_N)


def saved(folder: Path, clip_logits: ClipLogits, origin: Origin = ORIGIN) -> Path:
    return save_logits(folder, clip_logits, origin, scores_of(clip_logits, origin.order_groups))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_saved_comes_back_and_scores_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    clip_logits = random_logits(0, 3, 17, dtype=dtype)
    path = saved(tmp_path / "logits", clip_logits)
    assert path == tmp_path / "logits" / "step-00000360-8x224-uniform-1crop.safetensors"
    loaded, origin = load_logits(path)
    for name, tensor in vars(clip_logits).items():
        assert torch.equal(getattr(loaded, name), tensor), name
        assert getattr(loaded, name).dtype == tensor.dtype
    assert origin == ORIGIN
    assert scores_of(loaded, origin.order_groups) == scores_of(clip_logits, [0, 0, 1])


def test_the_files_for_people(tmp_path: Path) -> None:
    clip_logits = random_logits(0, 3, 17)
    path = saved(tmp_path, clip_logits)
    summary = json.loads(path.with_suffix(".json").read_text())
    assert summary["scores"] == scores_of(clip_logits, [0, 0, 1]).as_dict()
    assert summary["missing_rows"] == [3, 17]
    assert (summary["step"], summary["protocol"], summary["manifest_digest"]) == (360, ORIGIN.protocol, "digest")
    assert summary["classes_sha256"] == digest_of(CLASSES)
    head, *rows = csv.reader(path.with_suffix(".confusion.csv").read_text().splitlines())
    assert head[1:] == [row[0] for row in rows] == CLASSES
    counts = [[int(number) for number in row[1:]] for row in rows]
    assert counts == confusion_matrix(clip_logits).tolist()
    assert sum(map(sum, counts)) == 38
    assert sorted(tmp_path.iterdir()) == sorted([path, path.with_suffix(".json"), path.with_suffix(".confusion.csv")])


def two_files(folder: Path) -> tuple[list[Path], ClipLogits, ClipLogits]:
    one, other = random_logits(1, 3), random_logits(2, 5)
    return [saved(folder / "a", one), saved(folder / "b", other, replace(ORIGIN, recipe="another"))], one, other


def test_an_ensemble_is_the_mean_of_logits(tmp_path: Path) -> None:
    paths, one, other = two_files(tmp_path)
    both, groups = ensemble(paths, [])
    torch.testing.assert_close(both.logit_NK, (one.logit_NK + other.logit_NK).double() / 2)
    assert groups == [0, 0, 1]
    answers = (one.logit_NK + other.logit_NK).argmax(1) == one.label_N
    kept_N = torch.tensor([row not in (3, 5) for row in range(40)])
    scores = scores_of(both, groups)
    assert scores.top1_percent == pytest.approx(100 * answers[kept_N].double().mean().item())
    assert scores.top1_percent not in (scores_of(one, None).top1_percent, scores_of(other, None).top1_percent)


def test_an_ensemble_counts_clips_that_all_have_seen(tmp_path: Path) -> None:
    paths, _, _ = two_files(tmp_path)
    both, groups = ensemble(paths, [])
    assert (~both.seen_N).nonzero().flatten().tolist() == [3, 5]
    assert (scores_of(both, groups).clips, scores_of(both, groups).missing) == (38, 2)


def test_weights(tmp_path: Path) -> None:
    """Weights are relative: 6 to 2 equals 3 to 1, and 1 to 0 leaves only the first."""
    paths, one, other = two_files(tmp_path)
    both, _ = ensemble(paths, [6.0, 2.0])
    torch.testing.assert_close(both.logit_NK, (0.75 * one.logit_NK + 0.25 * other.logit_NK).double())
    first, _ = ensemble(paths, [1.0, 0.0])
    torch.testing.assert_close(first.logit_NK, one.logit_NK.double())


def test_an_ensemble_of_one_scores_as_it_did(tmp_path: Path) -> None:
    one = random_logits(1, 3)
    alone, groups = ensemble([saved(tmp_path, one)], [])
    assert scores_of(alone, groups) == scores_of(one, [0, 0, 1])


def test_logits_of_other_clips_are_refused(tmp_path: Path) -> None:
    one = saved(tmp_path / "a", random_logits(1))
    other = saved(tmp_path / "b", random_logits(2), replace(ORIGIN, manifest_digest="another digest"))
    with pytest.raises(
        ConfigError, match=r"evaluation\.ensemble: .*/b/.*other clips than .*/a/.*another dige and digest"
    ):
        ensemble([one, other], [])


def test_logits_of_classes_with_other_numbers_are_refused(tmp_path: Path) -> None:
    """Name the class also if the digests, wrongly, agree."""
    one = saved(tmp_path / "a", random_logits(1))
    turned = replace(ORIGIN, classes=[CLASSES[1], CLASSES[0], CLASSES[2]])
    for number, origin in enumerate((turned, replace(turned, manifest_digest="another digest"))):
        other = saved(tmp_path / str(number), random_logits(2), origin)
        with pytest.raises(
            ConfigError, match=r"class 0 is 'move right' in .*, 'move left' in .*/a/.* Fix: evaluate both"
        ):
            ensemble([one, other], [])


def test_files_without_logits_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "network.safetensors"
    save_file({"conv1.weight": torch.zeros(2)}, weights)
    (tmp_path / "text").write_text("not at all")
    whole = saved(tmp_path / "logits", random_logits(1))
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-8])
    for name in ("network.safetensors", "text", "cut", "."):
        with pytest.raises(ConfigError, match=r"evaluation\.ensemble: .* does not hold saved logits.*save_logits=true"):
            load_logits(tmp_path / name)
    with pytest.raises(ConfigError, match=r"evaluation\.ensemble: .*nowhere: no such file"):
        load_logits(tmp_path / "nowhere")


# --- The command ------------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], max_bad_clips: int = 0, **evaluation: Any) -> tuple[int, str, str]:
    """Run evaluate.py with these keys; return `(exit code, output, errors)`."""
    from tests.training.config.test_config import compose

    composed = compose()
    composed.data.max_bad_clips = max_bad_clips
    for key, value in evaluation.items():
        composed.evaluation[key] = value
    code = run_ensemble(composed)
    return code, *capsys.readouterr()


def test_the_command_prints_the_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command needs only the files: no run and no data set."""
    paths = [str(saved(tmp_path / name, random_logits(seed))) for seed, name in enumerate("ab")]
    code, output, _ = command(capsys, ensemble=paths, ensemble_weights=[3, 1])
    assert code == 0
    line, record = output.splitlines()
    assert line.startswith("ensemble of 2")
    scores = scores_of(*ensemble([Path(path) for path in paths], [3, 1]))
    assert json.loads(record) == {"ensemble": paths, "weights": [3.0, 1.0], **scores.as_dict()}


def test_missing_clips_decide_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in two_files(tmp_path)[0]]
    code, output, _ = command(capsys, ensemble=paths)
    assert code == 3
    assert "MISSING 2" in output
    assert command(capsys, ensemble=paths, max_bad_clips=2)[0] == 0


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_weights_that_make_no_mean_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: list[float]
) -> None:
    paths = [str(path) for path in two_files(tmp_path)[0]]
    code, output, errors = command(capsys, ensemble=paths, ensemble_weights=weights)
    assert (code, output) == (2, "")
    assert "evaluation.ensemble_weights must be 2 numbers" in errors


def test_many_processes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    code, _, errors = command(capsys, ensemble=[str(saved(tmp_path, random_logits(1)))])
    assert code == 2
    assert "one process" in errors
