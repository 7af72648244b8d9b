"""The evaluate.py command: a trained run, evaluated in several ways, and ensembles of saved logits."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.checkpoint.store import Checkpoint, Snapshot, load_checkpoint, write_snapshot
from pipelines.manifest import Manifest
from tests.helpers.clips import renumber
from tests.helpers.entry_points import Called, entry_points
from tests.helpers.jobs import make_clips
from tests.helpers.worlds import CHECKOUT
from training.build.class_names import digest_of
from training.config.schema import Config, EvaluationConfig
from training.errors import ConfigError
from training.evaluation.saved_logits import load_logits
from training.main import train_task
from training.telemetry.records import read_metrics

pytestmark = pytest.mark.slow

OPTIONS = (
    "experiment=smoke logger=disabled pipeline.decoder=pyav pipeline.workers=0 pipeline.size=32 model.num_frames=4 "
    "batch.global_batch=8 schedule.epochs=1 schedule.warmup_epochs=0 distributed=single run_id=run"
).split()


def call(*words: str) -> Called:
    return entry_points()(" ".join(words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips and a run of five steps."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_clips(folder / "clips")
    done = call("train.py", *OPTIONS, f"data.root={folder / 'clips'}", f"outputs={folder}")
    assert done.exit_code == 0, done.output
    return folder


def evaluate(folder: Path, *overrides: str) -> tuple[int, dict[str, Any], str]:
    """Run evaluate.py; return `(exit code, the record, all output)`."""
    return answer_of(call("evaluate.py", *OPTIONS, f"data.root={folder / 'clips'}", f"outputs={folder}", *overrides))


def evaluate_run(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run `evaluate.py --run`; return `(exit code, the record, all output)`."""
    return answer_of(call("evaluate.py", "--run", *arguments))


def evaluate_run_by_itself(
    *arguments: str, launcher: Sequence[str] = (), cwd: Path = CHECKOUT
) -> tuple[int, dict[str, Any], str]:
    """Run `evaluate.py --run` as a process of its own; return `(exit code, the record, all output)`."""
    command = [sys.executable, *launcher, str(CHECKOUT / "evaluate.py"), "--run", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return answer_of(Called(done.returncode, done.stdout + done.stderr))


def answer_of(called: Called) -> tuple[int, dict[str, Any], str]:
    records = [json.loads(line) for line in called.output.splitlines() if line.startswith("{")]
    return called.exit_code, records[0] if records else {}, called.output


def last_evaluation(run: Path) -> dict[str, Any]:
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "evaluation"][-1]


def test_a_run_is_self_contained(folder: Path, tmp_path: Path) -> None:
    """Evaluate a run with other settings than any experiment's, from another working directory, after its clips have moved."""
    clips = shutil.copytree(folder / "clips", tmp_path / "clips")
    unusual = (
        "pipeline.size=64 pipeline.sampling=dense numerics.dtype=float64 optimizer.ema_decay=0.7 batch.precise_bn_steps=1 "
        f"evaluation.batch=7 evaluation.crops=3 data.root={clips} outputs={tmp_path}"
    ).split()
    done = call("train.py", *OPTIONS, *unusual)
    assert done.exit_code == 0, done.output
    clips.rename(tmp_path / "moved")
    code, record, output = evaluate_run_by_itself(
        "run/", f"data.root={tmp_path / 'moved'}", "pipeline.workers=1", cwd=tmp_path
    )
    assert code == 0, output
    trained = last_evaluation(tmp_path / "run")
    assert record["protocol"] == trained["protocol"] == "4x64-dense_validation-3crop"
    for name in set(record) & set(trained):
        assert record[name] == trained[name], name
    assert "differs" not in output


def test_a_run_is_evaluated_as_while_it_trained(folder: Path) -> None:
    """Repeat the last validation from the saved checkpoint, without a protocol of its own."""
    trained = last_evaluation(folder / "run")
    code, record, output = evaluate(folder)
    assert code == 0, output
    assert record["protocol"] == trained["protocol"] == "4x32-uniform_validation-1crop"
    assert record["amp"] == trained["amp"] == "off"
    # Bit-equal: the same clips in the same batches on the same device.
    for name in set(record) - {"protocol", "source", "split", "amp", "notes", "classes_sha256"}:
        assert record[name] == trained[name], name
    assert record["notes"] == "" and "differs from the run" not in output


def test_any_number_of_processes_and_no_training_clips(folder: Path, tmp_path: Path) -> None:
    """Three processes, which do not divide the training batch, and a data set without its training split."""
    alone = evaluate(folder)[1]
    clips = tmp_path / "clips"
    shutil.copytree(folder / "clips", clips)
    (clips / "train.arrow").unlink()
    # After `--`, because torchrun reads --run as the start of its own --run-path.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "--"]
    # Trained with distributed=single: the launcher decides.
    code, record, output = evaluate_run_by_itself(f"{folder}/run", f"data.root={clips}", launcher=torchrun)
    assert code == 0, output
    assert {name: record[name] for name in ("clips", "missing", "top1_percent")} == {
        name: alone[name] for name in ("clips", "missing", "top1_percent")
    }
    assert record["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_classes_with_other_numbers_are_mapped_by_name(folder: Path, tmp_path: Path) -> None:
    """The same clips score the same, and the result line says what was done. An older checkpoint's names are found too."""
    clips, run = tmp_path / "clips", tmp_path / "run"
    classes = (folder / "run" / "classes.txt").read_text().splitlines()
    renumber(folder / "clips" / "val.arrow", clips / "val.arrow", [*classes[3:], *classes[:3]])
    shutil.copytree(folder / "run", run)
    checkpoint = load_checkpoint(run / "checkpoints" / "best")
    assert checkpoint.state["classes"] == Manifest.open(folder / "clips" / "train.arrow").classes == classes
    older = {key: value for key, value in checkpoint.state.items() if not key.startswith("classes")}
    write_snapshot(run / "checkpoints", Snapshot().take(replace(checkpoint, state=older)), keep=1)
    (expected,) = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "evaluation"]
    code, record, output = evaluate(folder, f"data.root={clips}", f"outputs={tmp_path}")
    assert code == 0, output
    assert record["notes"] == "classes mapped by name"
    assert "(20 clips)  classes mapped by name  differs from the run: validation manifest=" in output.splitlines()[0]
    for name in ("top1_percent", "top5_percent", "mean_class_percent"):
        assert record[name] == expected[name], name
    assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_the_best_of_a_run_or_its_newest(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    checkpoints = tmp_path / "run" / "checkpoints"
    best = load_checkpoint(checkpoints / "best")
    other = {name: tensor.flip(0) if "classifier" in name else tensor for name, tensor in best.network.items()}
    saved = Checkpoint(other, best.optimizer, best.state | {"step": 6})
    write_snapshot(checkpoints, Snapshot().take(saved), keep=1)
    places = [f"data.root={folder / 'clips'}", f"outputs={tmp_path}"]
    steps_and_losses = []
    for which in ("best", "newest"):
        code, record, output = evaluate(folder, *places, f"evaluation.checkpoint={which}")
        assert code == 0, output
        steps_and_losses.append((record["step"], record["loss"]))
    run = evaluate(folder)[1]
    assert steps_and_losses[0] == (5, run["loss"])
    assert steps_and_losses[1][0] == 6 and steps_and_losses[1][1] != run["loss"]
    (checkpoints / "best").unlink()
    code, _, output = evaluate(folder, *places, "evaluation.checkpoint=best")
    assert code == 2 and "Fix: evaluation.checkpoint=newest" in output, output


def test_weights_in_a_file_are_evaluated_without_a_run(folder: Path) -> None:
    run = evaluate(folder)[1]
    code, record, output = evaluate(
        folder, "run_id=null", f"model.init={folder / 'run' / 'checkpoints' / 'step-00000005' / 'network.safetensors'}"
    )
    assert code == 0, output
    assert (record["source"], record["loss"]) == ("network", run["loss"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["run_id=null"], "no weights to evaluate. Fix: --run outputs/NAME"),
        (["run_id=other"], "holds no whole checkpoint. Fix: name the folder of a run that has one"),
        (["model.shift=none"], "run was trained with model.shift=residual, not none. Fix: model.shift=residual"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(folder: Path, overrides: list[str], says: str) -> None:
    code, _, output = evaluate(folder, *overrides)
    assert code == 2, output
    assert says in output


def test_another_protocol_saved_and_averaged(folder: Path) -> None:
    files = []
    for protocol in ("ten_crop", "two_clips_full"):
        code, record, output = evaluate_run(
            f"{folder}/run/checkpoints/best", f"evaluation={protocol}", "evaluation.save_logits=true"
        )
        assert code == 0, output
        assert "differs from the run: evaluation.clips=" in output
        assert {"evaluation.clips", "evaluation.crops"} <= set(record["differs_from_run"])
        assert (record["step"], record["clips"], record["missing"]) == (5, 20, 0)
        files.append(folder / "run" / "logits" / f"step-00000005-{record['protocol']}.safetensors")
        assert load_logits(files[-1])[1].differs_from_run == record["differs_from_run"]
        alone = call("evaluate.py", f"evaluation.ensemble=[{files[-1]}]")
        again = json.loads(alone.last_line)
        assert {name: again[name] for name in again.keys() & record.keys()} == {
            name: record[name] for name in again.keys() & record.keys()
        }
    code, _, output = evaluate_run(f"{folder}/run", f"evaluation.ensemble=[{files[0]},{files[1]}]")
    assert code == 0, output
    assert output.startswith("ensemble of 2")


def test_a_stream_is_recorded_and_drawn(folder: Path) -> None:
    """The record is printed, kept in the run folder and drawn, with the early recognition of another run beside it."""
    options = [*OPTIONS[:-1], "run_id=online", "model.direction=past", f"data.root={folder / 'clips'}", "max_steps=1"]
    done = call("train.py", *options, f"outputs={folder}")
    assert done.exit_code == 0, done.output
    code, record, output = evaluate_run(
        f"{folder}/online", "evaluation=stream", "evaluation.distances=[2,4]", f"evaluation.beside=[{folder}/run]"
    )
    assert code == 0, output
    assert json.loads((folder / "online" / "stream.json").read_text()) == record
    assert "Early recognition" in (folder / "online" / "report.html").read_text()
    assert (record["protocol"], record["clips"], record["missing"]) == ("4x32-stream-1crop", 20, 0)
    manifest = Manifest.open(folder / "clips" / "val.arrow")
    assert (record["classes_sha256"], record["manifest"]) == (digest_of(manifest.classes), manifest.digest)
    assert [row["distance"] for row in record["stream"]] == [2, 4]
    curves = [(curve["source"], curve["step"], curve["network"]) for curve in record["early"]["curves"]]
    assert curves == [("online", 1, "online TSM"), ("run", 5, "TSM")]
    # All of a clip, by the rule of the last validation, which is the test rule for clips of more than four frames.
    assert record["early"]["curves"][1]["top1_percent"][-1] == last_evaluation(folder / "run")["top1_percent"]


def test_half_precision_is_asked_for_and_told(folder: Path) -> None:
    """Half-precision logits are saved in float32, beside those of a float32 evaluation and under another name."""
    whole = evaluate(folder, "evaluation.save_logits=true")[1]
    code, record, output = evaluate(folder, "evaluation.amp=bfloat16", "evaluation.save_logits=true")
    assert code == 0, output
    assert (whole["amp"], record["amp"]) == ("off", "bfloat16")
    assert record["loss"] != whole["loss"]
    assert record["loss"] == pytest.approx(whole["loss"], rel=0.02)
    name = f"step-00000005-{record['protocol']}"
    logits = {
        file: load_logits(folder / "run" / "logits" / f"{file}.safetensors") for file in (name, f"{name}-bfloat16")
    }
    assert [origin.amp for _, origin in logits.values()] == ["off", "bfloat16"]
    assert {clip_logits.logit_NK.dtype for clip_logits, _ in logits.values()} == {torch.float32}


def test_a_missing_clip_is_named_and_ends_with_the_code_of_bad_data(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder / "clips", copy / "clips")
    shutil.copytree(folder / "run", copy / "run")
    victim = copy / "clips" / Manifest.open(copy / "clips" / "val.arrow").row(7).path
    victim.write_bytes(victim.read_bytes()[:300])
    code, record, output = evaluate(copy)
    assert code == 3, output
    assert (record["clips"], record["missing"]) == (19, 1)
    assert f"missing: {victim}" in output
    assert evaluate(copy, "data.max_bad_clips=1")[0] == 0


def test_training_refuses_what_only_an_evaluation_does(folder: Path) -> None:
    done = call(
        "train.py", *OPTIONS, f"data.root={folder / 'clips'}", f"outputs={folder}", "evaluation.save_logits=true"
    )
    assert done.exit_code == 2
    assert "evaluation.save_logits" in done.output and "evaluate.py" in done.output
    unused: Any = None
    with pytest.raises(ConfigError, match=r"evaluation\.split=test is for evaluate\.py.* Fix: evaluation\.split=val"):
        train_task(Config(evaluation=EvaluationConfig(split="test")), unused, unused)
    with pytest.raises(
        ConfigError, match=r"evaluation\.clips=stream is for evaluate\.py.*Fix: train with evaluation=validation"
    ):
        train_task(Config(evaluation=EvaluationConfig(clips="stream")), unused, unused)


def test_a_forgotten_override_is_stated_with_the_scores(folder: Path) -> None:
    """Without the size and the number of frames that the run was trained with, its scores are others."""
    code, record, output = evaluate(folder, "pipeline.size=64", "model.num_frames=8", "seed=3")
    assert code == 0, output
    (line,) = [line for line in output.splitlines() if line.startswith("run step 5")]
    assert line.endswith("differs from the run: model.num_frames=8 (trained: 4), pipeline.size=64 (trained: 32)")
    assert record["differs_from_run"] == {
        "model.num_frames": {"here": 8, "trained": 4},
        "pipeline.size": {"here": 64, "trained": 32},
    }
