"""Saved logits and ensembles of one manifest: the round trip, scores, and refused files."""

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
    assert "missing_clips" not in summary


def two_files(folder: Path) -> tuple[list[Path], ClipLogits, ClipLogits]:
    one, other = random_logits(1, 3), random_logits(2, 5)
    return [saved(folder / "a", one), saved(folder / "b", other, replace(ORIGIN, recipe="another"))], one, other


def test_an_ensemble_is_the_mean_of_logits(tmp_path: Path) -> None:
    paths, one, other = two_files(tmp_path)
    both = ensemble(paths, [])
    torch.testing.assert_close(both.clip_logits.logit_NK, (one.logit_NK + other.logit_NK).double() / 2)
    assert both.origin.order_groups == [0, 0, 1]
    answers = (one.logit_NK + other.logit_NK).argmax(1) == one.label_N
    kept_N = torch.tensor([row not in (3, 5) for row in range(40)])
    scores = scores_of(both.clip_logits, [0, 0, 1])
    assert scores.top1_percent == pytest.approx(100 * answers[kept_N].double().mean().item())
    assert scores.top1_percent not in (scores_of(one, None).top1_percent, scores_of(other, None).top1_percent)


def test_an_ensemble_is_the_mean_of_softmax_if_asked(tmp_path: Path) -> None:
    paths, one, other = two_files(tmp_path)
    expected = 0.2 * one.logit_NK.double().softmax(1) + 0.8 * other.logit_NK.double().softmax(1)
    found = ensemble(paths, [1.0, 4.0], "softmax").clip_logits.logit_NK
    torch.testing.assert_close(found.softmax(1), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.exp(), expected, rtol=1e-12, atol=0)
    # A softmax that float64 rounds to 0 gives no infinite loss, and a weight of 0 leaves the other file alone.
    sure = replace(one, logit_NK=1e4 * one.logit_NK)
    paths = [saved(tmp_path / "sure", sure), paths[1]]
    assert ensemble(paths, [1.0, 0.0], "softmax").clip_logits.logit_NK.isfinite().all()


def test_an_ensemble_counts_clips_that_all_have_seen(tmp_path: Path) -> None:
    paths, _, _ = two_files(tmp_path)
    both = ensemble(paths, []).clip_logits
    assert (~both.seen_N).nonzero().flatten().tolist() == [3, 5]
    assert (scores_of(both, None).clips, scores_of(both, None).missing) == (38, 2)


def test_weights(tmp_path: Path) -> None:
    """Weights are relative: 6 to 2 equals 3 to 1, and 1 to 0 leaves only the first."""
    paths, one, other = two_files(tmp_path)
    both = ensemble(paths, [6.0, 2.0]).clip_logits
    torch.testing.assert_close(both.logit_NK, (0.75 * one.logit_NK + 0.25 * other.logit_NK).double())
    first = ensemble(paths, [1.0, 0.0]).clip_logits
    torch.testing.assert_close(first.logit_NK, one.logit_NK.double())


def test_an_ensemble_of_one_is_that_file(tmp_path: Path) -> None:
    one = random_logits(1, 3)
    path = saved(tmp_path, one)
    alone = ensemble([path], [7.0]).clip_logits
    assert torch.equal(alone.logit_NK, one.logit_NK.double())
    assert torch.equal(alone.label_N, one.label_N) and torch.equal(alone.seen_N, one.seen_N)
    assert scores_of(alone, [0, 0, 1]) == scores_of(one, [0, 0, 1])
    torch.testing.assert_close(
        ensemble([path], [], "softmax").clip_logits.logit_NK, one.logit_NK.double().log_softmax(1)
    )


def test_an_ensemble_of_ensembles(tmp_path: Path) -> None:
    """Weighted again, the mean of three files is the mean of one and of the mean of two."""
    paths, _, _ = two_files(tmp_path)
    third = saved(tmp_path / "c", random_logits(3))
    two = ensemble(paths, [])
    path = saved(tmp_path / "two", two.clip_logits, two.origin)
    assert path.name.startswith("ensemble-logits-") and load_logits(path)[1] == two.origin
    nested, flat = ensemble([path, third], [2, 1]), ensemble([*paths, third], [])
    torch.testing.assert_close(nested.clip_logits.logit_NK, flat.clip_logits.logit_NK, rtol=1e-12, atol=1e-12)
    assert torch.equal(nested.clip_logits.seen_N, flat.clip_logits.seen_N)


def test_a_file_of_an_older_version(tmp_path: Path) -> None:
    """It names neither its clips nor its split. It still joins files of the same manifest."""
    one, other = random_logits(1), random_logits(2)
    older = {key: value for key, value in vars(ORIGIN).items() if key not in ("split", "clip_names", "members")}
    path = tmp_path / "older.safetensors"
    save_file(vars(one), path, {"tsm_logits": json.dumps(older)})
    assert load_logits(path)[1] == ORIGIN
    newer = saved(tmp_path, other, replace(ORIGIN, clip_names=[str(number) for number in range(40)]))
    both = ensemble([path, newer], [])
    torch.testing.assert_close(both.clip_logits.logit_NK, (one.logit_NK + other.logit_NK).double() / 2)
    assert both.origin.clip_names == load_logits(newer)[1].clip_names
    elsewhere = saved(tmp_path / "b", other, replace(ORIGIN, manifest_digest="another", clip_names=["x"] * 40))
    with pytest.raises(
        ConfigError, match=r"different manifests, and .*older\.safetensors does not say.* Fix: evaluate that run again"
    ):
        ensemble([path, elsewhere], [])


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
    assert line.startswith("ensemble of 2, mean of logits")
    scores = scores_of(ensemble([Path(path) for path in paths], [3, 1]).clip_logits, [0, 0, 1])
    settings = {"ensemble": paths, "weights": [3.0, 1.0], "average": "logits", "split": "val"}
    assert json.loads(record) == settings | scores.as_dict()


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


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ensemble_average": "mean"}, "evaluation.ensemble_average must be one of logits, softmax, got 'mean'. Fix: "),
        ({"ensemble": ["a", "b", "a"]}, "evaluation.ensemble names a more than once. Fix: "),
    ],
)
def test_what_is_no_ensemble_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], says: str
) -> None:
    paths = [str(path) for path in two_files(tmp_path)[0]]
    code, output, errors = command(capsys, **{"ensemble": paths} | settings)
    assert (code, output) == (2, "")
    assert says in errors


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
