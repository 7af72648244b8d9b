"""Run prepare.py as a command: its documentation, the data groups of the configuration, its output."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import prepare
from pipelines.stream.mirror_labels import mirrored_labels
from tests.helpers.clips import plain_video, write_mp4
from training.config.load import register

CHECKOUT = Path(__file__).resolve().parents[3]
NUM_CLASSES = {
    "kinetics400": 400, "kinetics600": 600, "kinetics700": 700, "something_v1": 174, "something_v2": 174, "jester": 27,
    "ucf101": 101, "hmdb51": 51,
}  # fmt: skip


def documented() -> list[str]:
    """Return every command of prepare.py that a document or a configuration gives."""
    files = [
        *CHECKOUT.glob("*.md"),
        *CHECKOUT.glob("docs/*.md"),
        *CHECKOUT.glob("conf/data/*.yaml"),
        CHECKOUT / "prepare.py",
    ]
    lines = [line for path in files for line in path.read_text().splitlines()]
    found = [match[1] for line in lines if (match := re.search(r"(?:^|\s|`)python prepare\.py ([^`]*)", line))]
    return sorted({command.partition("#")[0].partition("|")[0].strip() for command in found})


def test_documented_commands_are_found() -> None:
    assert {command.split()[0] for command in documented()} >= {
        "shapes", "kinetics", "something-v1", "something-v2", "jester", "ucf101", "hmdb51", "folder", "list", "frames",
        "transcode", "shard", "verify", "stage",
    }  # fmt: skip


@pytest.mark.parametrize("command", documented())
def test_documented_commands_are_understood(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command.endswith("--help"):
        with pytest.raises(SystemExit) as done:
            prepare.make_parser().parse_args(shlex.split(command))
        assert done.value.code == 0 and "--workers" in capsys.readouterr().out
    else:
        assert prepare.make_parser().parse_args(shlex.split(command)).run


@pytest.mark.parametrize("name", NUM_CLASSES)
def test_data_groups(name: str) -> None:
    register()
    with initialize_config_dir(str(CHECKOUT / "conf"), version_base="1.3"):
        data = compose("config", overrides=[f"data={name}"]).data
    assert (data.name, data.root, data.num_classes) == (name, f"data/{name}", NUM_CLASSES[name])
    args = prepare.make_parser().parse_args(shlex.split(data.prepare)[2:])
    assert args.root == Path(data.root)


def test_gestures_that_a_mirror_exchanges() -> None:
    from omegaconf import OmegaConf

    words = OmegaConf.load(CHECKOUT / "conf/data/jester.yaml").mirrored_words
    classes = ["Sliding Two Fingers Left", "Sliding Two Fingers Right", "Stop Sign"]
    classes += ["Turning Hand Clockwise", "Turning Hand Counterclockwise"]
    assert mirrored_labels(classes, words) == [1, 0, 2, 4, 3]


def test_the_report_in_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Print the example of docs/data.md exactly, except for the time."""
    monkeypatch.chdir(tmp_path)
    root = Path("data/kinetics400")
    (root / "annotations").mkdir(parents=True)
    for split, clips in (("train", "abcde"), ("val", "fg")):
        lines = ["label,youtube_id,time_start,time_end,split"]
        for number, clip in enumerate(clips):
            name = ("archery", "bowling", "curling hair")[number % 3]
            lines.append(f"{name},{clip * 11},1,11,{split}")
            if clip != "b":
                write_mp4(root / "videos" / split / name / f"{clip * 11}_000001_000011.mp4", plain_video(3))
        (root / "annotations" / f"{split}.csv").write_text("\n".join(lines))
    cut = root / "videos" / "train" / "curling hair" / "ccccccccccc_000001_000011.mp4"
    cut.write_bytes(cut.read_bytes()[:300])
    assert prepare.main(shlex.split("kinetics --root data/kinetics400 --max-bad 0.2 --workers 0")) == 0
    said = re.sub(r"; [\d.]+ s", "; 0.5 s", capsys.readouterr().out)
    assert f"```\n{said}```" in (CHECKOUT / "docs" / "data.md").read_text()


def test_the_entry_point_is_short() -> None:
    assert len((CHECKOUT / "prepare.py").read_text().splitlines()) < 80
