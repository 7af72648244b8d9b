"""Typical mistakes: the exit code, and a last line with cause and fix, without a traceback."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.entry_points import EntryPoints, entry_points
from tests.helpers.jobs import make_clips

pytestmark = pytest.mark.slow

SMALL = (
    "experiment=smoke logger=disabled pipeline.size=32 model.num_frames=4 pipeline.decoder=pyav pipeline.workers=0 "
    "batch.global_batch=8 schedule.epochs=1 schedule.warmup_epochs=0 evaluation.every_epochs=9 "
    "data.root=CLIPS outputs=OUT"
)
WEIGHTS = "OUT/run/checkpoints/step-00000001"


@dataclass(frozen=True)
class Mistake:
    """A command line, and the words of its last line. SMALL, CLIPS and OUT are replaced."""

    line: str
    code: int
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    absent: tuple[str, ...] = ()


MISTAKES = {
    "typo of a key": Mistake("train.py SMALL optimizer.lrr=1", 2, ("optimizer.lrr", "optimizer.lr")),
    "typo of an added key": Mistake("train.py SMALL +model.shfit=none", 2, ("model.shfit", "model.shift")),
    "typo of an experiment": Mistake("plan.py experiment=smok", 2, ("smok", "smoke")),
    "typo of a group's option": Mistake("plan.py SMALL optimizer=larz", 2, ("larz", "lars")),
    "typo of a logger": Mistake("train.py SMALL logger=ofline", 2, ("ofline", "offline")),
    "typo of a value": Mistake("train.py SMALL model.shift=residul", 2, ("residul", "residual")),
    "no number": Mistake("train.py SMALL batch.global_batch=many", 2, ("batch.global_batch", "many")),
    "no experiment": Mistake("train.py", 2, ("batch.global_batch", "experiment=smoke")),
    "a folder that is not there": Mistake("train.py SMALL data.root=/nowhere", 3, ("/nowhere/train.arrow", "prepare.py shapes")),
    "outputs that is a file": Mistake("train.py SMALL outputs=pyproject.toml run_id=x", 2, ("pyproject.toml", "outputs=FOLDER")),
    "another number of classes": Mistake("train.py SMALL data.num_classes=11", 3, ("11", "data.num_classes=10")),
    "a batch that does not divide": Mistake(
        "plan.py SMALL distributed.world_size=3", 2, ("8 clips", "1, 2, 4, 8 processes")
    ),
    "BN groups that do not divide": Mistake("train.py SMALL batch.bn_group=3", 2, ("batch.bn_group=3", "batch.bn_group=")),
    "weights that are not there": Mistake("train.py SMALL model.init=/no/weights.pth", 2, ("/no/weights.pth", "model.init=FILE")),
    "weights with another sha256": Mistake(
        f"plan.py SMALL model.init={WEIGHTS} model.init_sha256={'0' * 64}", 2, ("sha256", "correct model.init_sha256")
    ),
    "no Horovod": Mistake("train.py SMALL distributed.backend=horovod", 2, ("Horovod", "make horovod"), absent=("horovod",)),
    "no DALI": Mistake("train.py SMALL pipeline=dali", 2, ("DALI", "pipeline=torch"), absent=("nvidia",)),
    "no torchcodec": Mistake(
        "train.py SMALL pipeline.decoder=torchcodec", 2, ("torchcodec", "pipeline.decoder=pyav"), absent=("torchcodec",)
    ),
    "no timm": Mistake("train.py SMALL optimizer.name=lamb", 2, ("timm", "pip install"), absent=("timm",)),
    "no GPU": Mistake("train.py SMALL distributed.device=cuda", 2, ("no GPU", "distributed.device=cpu")),
    "a run of another recipe": Mistake("train.py SMALL run_id=run optimizer.lr=1", 2, ("optimizer.lr", "another run_id")),
    "nothing to evaluate": Mistake("evaluate.py SMALL", 2, ("no weights to evaluate", "--run outputs/NAME")),
    "a run that is not there": Mistake("evaluate.py --run OUT/other", 2, ("OUT/other", "Fix: --run OUT/")),
    "a run without a checkpoint": Mistake("evaluate.py --run OUT/empty", 2, ("no whole checkpoint", "Fix: name the folder")),
    "a launcher's leftovers": Mistake("train.py SMALL", 2, ("LOCAL_RANK", "unset"), (("RANK", "0"), ("WORLD_SIZE", "2"))),
    "fewer processes than configured": Mistake("train.py SMALL distributed.world_size=8", 2, ("world_size=8", "start 8 processes")),
    "torch's backend without its launcher": Mistake(
        "train.py SMALL distributed.backend=torch", 2, ("distributed.backend=torch", "torchrun"),
        (("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1"), ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
         ("OMPI_COMM_WORLD_LOCAL_SIZE", "1")),
    ),
    "a plan with a launcher": Mistake(
        "plan.py SMALL", 2, ("one process only", "distributed.world_size=2"),
        (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")),
    ),
    "a root without annotations": Mistake("prepare.py kinetics --root OUT/run", 2, ("OUT/run", "--annotations")),
    "a root without classes": Mistake("prepare.py folder --root OUT/run", 2, ("OUT/run", "--val-fraction 0.1")),
    "a list that is not there": Mistake(
        "prepare.py list --root CLIPS --train no.txt --val no.txt --classes no.txt", 2, ("no.txt", "Fix")
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The process that makes the calls, a data set, and run folders: one with a checkpoint, one without."""

    call: EntryPoints
    clips: Path
    outputs: Path

    def filled(self, line: str) -> str:
        return line.replace("SMALL", SMALL).replace("CLIPS", str(self.clips)).replace("OUT", str(self.outputs))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("mistakes")
    place = Place(entry_points(), make_clips(folder / "clips"), folder / "outputs")
    for run in ("run", "empty"):
        trained = place.call(place.filled(f"train.py SMALL run_id={run} max_steps=1"))
        assert trained.exit_code == 0, trained.output
    for file in (place.outputs / "empty/checkpoints").glob("*/*"):
        file.unlink()
    return place


@pytest.mark.parametrize("name", MISTAKES)
def test_the_last_line_has_cause_and_fix(name: str, place: Place) -> None:
    mistake = MISTAKES[name]
    called = place.call(place.filled(mistake.line), dict(mistake.environment), mistake.absent)
    assert called.exit_code == mistake.code, called.output
    assert "Traceback" not in called.output, called.output
    cause, _, fix = called.last_line.partition("Fix: ")
    assert cause and fix, called.output
    for word in mistake.words:
        assert place.filled(word) in called.last_line, called.output
    # Once.
    assert called.output.count(fix) == 1, called.output


# --- Following the advice ---------------------------------------------------------------------------------------------

ADVICE = {
    "a plan's own process": ("plan.py SMALL plan.write_config=true", "run_id=NAME"),
    "the nearest value": ("plan.py SMALL model.shift=residul", "model.shift=residual"),
    "the nearest option": ("plan.py SMALL logger=ofline", "logger=offline"),
    "the classes of the manifest": ("plan.py SMALL data.num_classes=11", "data.num_classes=10"),
    "a divisor of the batch": ("plan.py SMALL batch.bn_group=3", "batch.bn_group=2"),
    "random weights": ("plan.py SMALL model.init=/no/weights.pth", "model.init=random"),
    "no weights that are needed": ("plan.py SMALL model.init=", "model.init=random"),
    "a precision": ("plan.py SMALL numerics.dtype=float64 numerics.amp=bfloat16", "numerics.amp=off"),
    "no warm-up": ("plan.py SMALL schedule.warmup_epochs=2", "schedule.warmup_epochs=1.0"),
    "plain momentum": ("plan.py SMALL optimizer.nesterov=true optimizer.momentum=0", "optimizer.nesterov=false"),
    "zero gamma": (f"plan.py SMALL model.init={WEIGHTS} model.zero_init_gamma=true", "model.zero_init_gamma=false"),
    "another device": ("train.py SMALL distributed.device=cuda max_steps=1 run_id=device", "distributed.device=cpu"),
    "another name": ("train.py SMALL run_id=run optimizer.lr=1 max_steps=1", "run_id=another"),
    "an allowed change": ("train.py SMALL run_id=run optimizer.lr=1 max_steps=1", "checkpoint.allow_recipe_change=true"),
    "a run to evaluate": ("evaluate.py SMALL", "--run OUT/run"),
}  # fmt: skip
"""A command line that is refused, and what its fix tells to add or to set otherwise."""


@pytest.mark.parametrize("name", ADVICE)
def test_following_the_fix_helps(name: str, place: Place) -> None:
    line, override = map(place.filled, ADVICE[name])
    refused = place.call(line)
    assert refused.exit_code in (2, 3), refused.output
    told = override.split("/")[0] if override.startswith("--run") else override.replace("another", "")
    _, _, fix = refused.last_line.partition("Fix: ")
    assert told in fix or "another run_id" in fix, refused.last_line
    key = override.split("=")[0]
    words = [word for word in line.split() if word.split("=")[0] != key and not override.startswith("--run")]
    followed = place.call(" ".join([*words, override]) if words else f"{line.split()[0]} {override}")
    assert followed.exit_code == 0, followed.output


def test_a_gpu_that_is_too_small_leads_to_the_micro_batch_that_fits(place: Place) -> None:
    """8 clips do not fit, nor do 4: each error names the next smaller number, until one fits."""
    line = place.filled(
        "tests/helpers/small_gpu.py train.py SMALL max_steps=1 evaluation.batch=2 batch.bn_group=2 run_id=small"
    )
    fits = {"TSM_TEST_FITS": "2"}
    for present, advice in ((8, 4), (4, 2)):
        refused = place.call(line, fits)
        assert refused.exit_code == 2, refused.output
        fix = f"batch.micro_batch={advice}"
        assert (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB"
            in refused.last_line
        )
        assert refused.last_line.endswith(f"(in a micro-batch of {present} clips). Fix: {fix}, same result")
        assert "Traceback" not in refused.output
        line = f"{line} {fix}"
    assert place.call(line, fits).exit_code == 0
    log = (place.outputs / "small/log.txt").read_text()
    assert log.count("OutOfMemoryError") >= 2
    evaluated = f"tests/helpers/small_gpu.py evaluate.py --run {place.outputs}/small evaluation.batch=4"
    refused = place.call(evaluated, fits)
    assert refused.exit_code == 2
    assert refused.last_line.endswith("(in an evaluation of 4 views at once). Fix: evaluation.batch=2, same scores")
    assert place.call(f"{evaluated} evaluation.batch=2", fits).exit_code == 0
