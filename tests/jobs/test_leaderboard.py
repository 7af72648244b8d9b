"""The leaderboard entry on a tiny Something-Something in its real formats: from frames to the files for the site.

The commands are those of docs/leaderboard.md, with small networks and few clips.
"""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.manifest import Manifest
from pipelines.prepare.shapes.moving_textures import draw_clip
from tests.helpers.clips import Video, write_frames, write_video
from tests.helpers.entry_points import entry_points

pytestmark = pytest.mark.slow

SMALL = (
    "logger=disabled distributed=single model=tsm_resnet18 model.num_frames=4 model.init=random data.num_classes=2 "
    "pipeline.size=32 pipeline.workers=0 pipeline.decoder=pyav batch.global_batch=4 batch.bn_group=4 schedule.epochs=1 "
    "schedule.milestones=[]"
)
CLASSES = ["Pushing something from left to right", "Pushing something from right to left"]
CLIPS = {"train": range(101, 105), "validation": range(7, 10), "test": range(1, 4)}


def clip_of(number: int) -> tuple[str, Video]:
    """Return the class and the frames of a clip."""
    return CLASSES[number % 2], draw_clip("train", 0, 8 * number + number % 2, 48, (12,))


def write_v1(root: Path) -> None:
    """Write folders of frames, and lists of `ID;class`."""
    name = root / "annotations" / "something-something-v1-"
    name.parent.mkdir(parents=True)
    Path(f"{name}labels.csv").write_text("".join(f"{each}\n" for each in CLASSES[::-1]))
    for split, numbers in CLIPS.items():
        for number in numbers:
            write_frames(root / "20bn-something-something-v1" / str(number), clip_of(number)[1])
        lines = [f"{number};{clip_of(number)[0]}" if split != "test" else str(number) for number in numbers]
        Path(f"{name}{split}.csv").write_text("".join(f"{line}\n" for line in lines))


def write_v2(root: Path) -> None:
    """Write VP9 videos, and lists as JSON with the templates of labels."""
    name = root / "annotations" / "something-something-v2-"
    name.parent.mkdir(parents=True)
    Path(f"{name}labels.json").write_text(json.dumps({each: str(label) for label, each in enumerate(CLASSES)}))
    for split, numbers in CLIPS.items():
        for number in numbers:
            path = root / "20bn-something-something-v2" / f"{number}.webm"
            write_video(path, clip_of(number)[1], "libvpx-vp9", options={"cpu-used": "8"})
        items = [
            {"id": str(number)}
            if split == "test"
            else {"id": str(number), "template": clip_of(number)[0].replace("something", "[something]")}
            for number in numbers
        ]
        Path(f"{name}{split}.json").write_text(json.dumps(items))


def call(line: str) -> str:
    called = entry_points()(line)
    assert called.exit_code == 0, f"{line}\n{called.output}"
    return called.output


@pytest.fixture(scope="module", autouse=True)
def opencv() -> None:
    pytest.importorskip("cv2", reason="OpenCV is of the extra flow: make dev installs it")


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def train_both(name: str, frames: Path, flow: Path, outputs: Path) -> None:
    call(f"train.py experiment={name} {SMALL} data.root={frames} outputs={outputs} run_id=rgb")
    call(f"train.py experiment={name}_flow {SMALL} data.root={flow} outputs={outputs} run_id=flow")


def save_and_join(outputs: Path, split: str) -> tuple[list[Path], Path, str]:
    """Save the logits of both runs, and their ensemble: the files, that of the ensemble, and its output."""
    files = []
    for run in ("rgb", "flow"):
        settings = "evaluation=two_clips_full evaluation.save_logits=true"
        call(f"evaluate.py --run {outputs / run} {settings} evaluation.split={split}")
        paths = (outputs / run / "logits").glob("*.safetensors")
        files += [path for path in paths if ("-test" in path.stem) == (split == "test")]
    assert len(files) == 2
    names = ",".join(map(str, files))
    said = call(
        f"evaluate.py evaluation.ensemble=[{names}] evaluation.save_logits=true outputs={outputs} run_id=entry-{split}"
    )
    return files, only(outputs / f"entry-{split}" / "logits", "*.safetensors"), said


def mean_of(files: list[Path]) -> torch.Tensor:
    return torch.stack([load_file(file)["logit_NK"].double() for file in files]).mean(0)


def check_test_files(entry: Path, classes: list[str], files: list[Path]) -> None:
    """Compare the lines for the sites with the mean of both networks' logits."""
    logits_NK = mean_of(files)
    folder = entry.parent
    ids = [str(number) for number in CLIPS["test"]]
    best = [classes[label] for label in logits_NK.argmax(1).tolist()]
    lines = only(folder, "*.leaderboard_class.csv").read_text().splitlines()
    assert lines == [f"{clip};{name}" for clip, name in zip(ids, best, strict=True)]
    assert len(only(folder, "*.leaderboard_top5.csv").read_text().splitlines()) == len(ids)
    with only(folder, "*.predictions.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(ids)


def test_v1_from_frames_to_the_two_streams(tmp_path: Path) -> None:
    frames, flow, outputs = tmp_path / "something_v1", tmp_path / "something_v1_flow", tmp_path / "outputs"
    write_v1(frames)
    call(f"prepare.py something-v1 --root {frames} --workers 0")
    assert "33 pairs" in call(f"prepare.py flow --root {frames} --to {flow} --workers 0")
    manifests = [Manifest.open(root / "val.arrow") for root in (frames, flow)]
    assert manifests[0].labels().tolist() == manifests[1].labels().tolist() == [1, 0, 1]
    train_both("something_v1", frames, flow, outputs)

    files, entry, said = save_and_join(outputs, "val")
    mean_NK = mean_of(files)
    assert torch.allclose(load_file(entry)["logit_NK"], mean_NK, atol=1e-12)
    labels_N = torch.tensor(manifests[0].labels())
    (record,) = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    right_N = mean_NK.argmax(1) == labels_N
    assert (record["clips"], record["top1_percent"]) == (3, pytest.approx(100 * right_N.double().mean().item()))

    files, entry, said = save_and_join(outputs, "test")
    assert "no accuracy" in said
    check_test_files(entry, manifests[0].classes, files)


def test_v2_from_videos_to_the_files_for_the_site(tmp_path: Path) -> None:
    """Keep the flow in shards, as for a file system that should not hold millions of files."""
    videos, tars, flow = (tmp_path / f"something_v2{ending}" for ending in ("", "_flow_tars", "_flow"))
    write_v2(videos)
    call(f"prepare.py something-v2 --root {videos} --workers 0")
    call(f"prepare.py flow --tar --root {videos} --to {tars} --workers 0")
    call(f"prepare.py shard --root {tars} --to {flow} --workers 0")
    train_both("something_v2", videos, flow, tmp_path / "outputs")
    files, entry, said = save_and_join(tmp_path / "outputs", "test")
    assert "no accuracy" in said
    check_test_files(entry, CLASSES, files)
