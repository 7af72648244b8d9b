"""report.html shows the right numbers of any run folder, is self-contained, and runs no code from a run's records."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from training.report.history import History
from training.report.html import write_report
from training.report.status import Status, read_status
from training.runs.run_folder import RunFolder
from training.schedule import Schedule

_VOID = {"meta", "br", "img", "link", "input", "hr"}
_LINKS = {"href", "src", "srcset", "action", "data", "poster", "xlink:href"}


class Page(HTMLParser):
    """Texts that a page shows, and the resources and code that a browser would load from it."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in _LINKS]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> opens nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "title") and data.strip():
            self.texts.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def card(self, label: str) -> str:
        """Number above a label of the summary."""
        found = [index for index, text in enumerate(self.texts) if text.startswith(label)]
        return self.texts[found[0] - 1]


class Run:
    """Write the records of a run folder, one second apart."""

    def __init__(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        self.folder = RunFolder(path)
        self.time_s = 1_000.0

    def write(self, kind: str, step: int, **values: Any) -> None:
        with self.folder.metrics.open("a") as file:
            file.write(json.dumps({"kind": kind, "time_s": self.time_s, "step": step, **values}) + "\n")
        self.time_s += 1.0

    def start(self, step: int = 0, **values: Any) -> None:
        self.write("start", step, **({"world_size": 2, "backend": "torch"} | values))

    def train(self, step: int, **values: Any) -> None:
        usual = {"epoch": step / 10, "loss": 2.0, "top1_percent": 30.0, "learning_rate": 0.02, "step_s": 0.5}
        self.write("train", step, **(usual | {"clips_per_s": 32.0, "input_wait_percent": 1.5} | values))

    def evaluation(self, step: int, top1_percent: float, **values: Any) -> None:
        usual = {"epoch": step / 10, "duration_s": 3.0, "clips": 500, "missing": 0, "loss": 1.25, "top5_percent": 91.4}
        self.write("evaluation", step, top1_percent=top1_percent, **(usual | {"mean_class_percent": 61.2} | values))

    def status(self) -> Status:
        return read_status(self.folder.path, History.read(self.folder.path))

    def page(self) -> Page:
        """Write the report, and check that it is complete, is one file, and loads and runs nothing."""
        write_report(self.folder.path)
        source = self.folder.report.read_text()
        page = Page(source)
        assert source.startswith("<!DOCTYPE html>")
        assert "script" not in page.tags
        assert page.handlers == []
        assert [link for link in page.links if not link.startswith("#")] == []
        assert re.findall(r"url\((?!#)", source) == []
        assert "http:" not in source
        assert "https:" not in source
        assert "@import" not in source
        assert list(self.folder.path.glob("*.tmp")) == []
        return page


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "smoke-20260102-030405")


def test_full_run(run: Run) -> None:
    run.start()
    for step, clips_per_s in ((10, 30.0), (20, 50.0), (30, 31.0), (40, 33.0)):
        run.train(step, clips_per_s=clips_per_s)
        if step in (20, 30, 40):
            run.evaluation(step, {20: 55.5, 30: 77.7, 40: 66.6}[step], order_group_percent=98.2)
    run.write("checkpoint", 40, duration_s=0.3)
    run.write("end", 40, exit_code=0)
    page = run.page()

    assert page.texts[0] == "smoke-20260102-030405"
    assert "finished after 40 of 40 steps" in page.text
    assert page.card("final validation top-1") == "66.6%"
    assert page.card("final validation top-5") == "91.4%"
    assert page.card("final right order-pair") == "98.2%"
    assert page.card("best validation top-1, at step 30") == "77.7%"
    # 40 steps of 0.5 s and (30 + 50 + 31 + 33) / 4 clips/s, 1.5% of it input stall. The records' times are shorter: 9 s.
    assert page.card("clips/s, whole job") == "36.0"
    assert page.card("clips/s, training") == "36.0"
    assert page.card("clips/s, compute") == "36.5"
    assert page.card("total time") == "9.0 s"
    assert page.card("world size") == "2"
    assert page.card("backend") == "torch"
    assert page.tags.count("svg") == 5
    assert "validation right order-pair" in page.text


def test_the_schedule_is_drawn_beside_the_rates_that_were_taken(run: Run) -> None:
    """The planned schedule is that of the newest start, because an older start may have had another."""
    for milestones in ([333], [16, 777]):
        schedule = Schedule("step", 1.92, 1_000, 98, milestone_steps=tuple(milestones))
        run.start(schedule=asdict(schedule), steps_per_epoch=10.0)
    run.train(10)
    texts = run.page().texts
    assert {"epoch", "planned", "taken", "98", "777", "16"} <= set(texts)
    assert "333" not in texts


def test_resumed_run_counts_each_step_once(run: Run) -> None:
    run.start()
    for step in (10, 20, 30):
        run.train(step, loss=9.0, clips_per_s=1.0)
    run.evaluation(20, 11.1)
    # After the checkpoint of step 20, so the kill discarded it.
    run.evaluation(30, 99.9)
    with run.folder.metrics.open("a") as file:
        # The kill truncated this line.
        file.write('{"kind": "train", "time_s": 10')
        file.write("\n")
    # Time in the queue.
    run.time_s += 3_600.0
    run.start(20, world_size=4, backend="horovod")
    run.train(25, loss=1.0)
    run.train(30, loss=1.0)
    run.evaluation(30, 44.4)
    run.write("end", 60, exit_code=75)

    history = History.read(run.folder.path)
    assert [(record["step"], record["loss"]) for record in history.train] == [
        (10, 9.0),
        (20, 9.0),
        (25, 1.0),
        (30, 1.0),
    ]
    assert [(record["step"], record["top1_percent"]) for record in history.evaluation] == [(20, 11.1), (30, 44.4)]
    page = run.page()
    assert "stopped after 30 of 60 steps, in 2 starts" in page.text
    assert page.card("final validation top-1") == "44.4%"
    assert page.card("best validation top-1, at step 30") == "44.4%"
    assert page.card("total time") == "9.0 s"
    assert page.card("world size") == "4"
    assert page.card("backend") == "horovod"
    assert "99.9" not in page.text
    assert "order-pair" not in page.text


def test_same_record_twice(run: Run) -> None:
    run.start()
    run.evaluation(10, 20.0)
    run.evaluation(10, 21.0)
    assert [record["top1_percent"] for record in History.read(run.folder.path).evaluation] == [21.0]


def test_stopped_before_first_evaluation(run: Run) -> None:
    run.start()
    run.train(1)
    run.write("end", 720, exit_code=130)
    page = run.page()
    assert "stopped after 1 of 720 steps" in page.text
    assert "not evaluated yet" in page.text
    assert "Evaluations" not in page.text
    assert page.tags.count("svg") == 5


def test_max_steps_is_stopped_not_finished(run: Run) -> None:
    run.start()
    run.train(4)
    run.write("end", 720, exit_code=0)
    assert run.status().word == "stopped"


def test_killed_after_an_earlier_end(run: Run) -> None:
    run.start()
    run.write("end", 10, exit_code=0)
    run.start()
    assert run.status().word == "killed"


@pytest.mark.parametrize("lines", [None, "", '{"kind": "sta', "[]\n3\n{}\n"])
def test_without_records(run: Run, lines: str | None) -> None:
    if lines is not None:
        run.folder.metrics.write_text(lines)
    page = run.page()
    assert "not started after 0 steps" in page.text
    assert "There is no training record" in page.text
    assert "svg" not in page.tags


def test_numbers_that_are_none(run: Run) -> None:
    """A diverged loss appears as a gap in the plot and as nan in the table."""
    run.start()
    run.train(1)
    run.train(2, loss=float("nan"), clips_per_s=None)
    run.evaluation(2, 10.0, loss=float("nan"))
    page = run.page()
    assert "nan" in page.texts
    assert page.card("clips/s, training") == "32.0"


def test_failed_checkpoint_is_told(run: Run) -> None:
    run.start()
    run.write("checkpoint", 5, failed="No space left on device")
    assert "No checkpoint at step 5: No space left on device" in run.page().text


def test_hostile_strings_are_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"
    run = Run(tmp_path / "<b>run&")
    run.start(world_size=evil, backend=evil)
    run.train(1)
    run.write("checkpoint", 1, failed=evil)
    run.evaluation(1, 50.0, clips=evil)
    (run.folder.path / "config.yaml").write_text(f"name: {evil}\n")
    provenance = [{"command": ["train.py", evil], "git_diff": evil, "packages": {evil: evil}, evil: evil}]
    (run.folder.path / "provenance.json").write_text(json.dumps(provenance))
    run.folder.bad_clips.write_text(json.dumps({"split": evil, "row": evil, "reason": evil}) + "\n")
    # page() asserts that there is no script, no handler and no link.
    page = run.page()
    assert page.texts[0] == "<b>run&"
    assert page.text.count(evil) == 14


STREAM = {
    "source": "mine",
    "step": 1200,
    "clips": 240,
    "differs_from_run": {
        "evaluation.clips": {"here": "stream", "trained": "validation"},
        "pipeline.size": {"here": 64, "trained": 32},
    },
    "stream": [
        {
            "distance": distance,
            "frames_per_clip": 32.25 / distance,
            "clips_shorter_than_8": distance,
            "last_frame_percent": 50.0 + distance,
            "mean_of_4_percent": 60.0 + distance,
            "mean_of_8_percent": 70.0 + distance,
            "early_percent": {"mean_of_4": [10.0 * part + distance for part in range(10)]},
        }
        for distance in (1, 3, 5)
    ],
    "early": {
        "seen_percent": list(range(10, 101, 10)),
        "curves": [
            {"source": source, "step": 5, "network": network, "num_frames": 8, "top1_percent": [11.5 + part] * 10}
            for part, (source, network) in enumerate([("mine", "online TSM"), ("<other>", "TSN")])
        ],
    },
}


def test_continuous_stream(run: Run) -> None:
    """The table of distances, and the curves: the stream's at the middle distance, then each network's on clips."""
    run.start()
    run.train(10)
    charts = run.page().tags.count("svg")
    run.folder.stream.write_text(json.dumps(STREAM))
    page = run.page()
    assert page.tags.count("svg") == charts + 1
    assert "Continuous stream: step 1,200, 240 clips" in page.text
    assert "Early recognition: top-1 [%]" in page.texts
    at = page.texts.index("clips under 8 frames") + 1
    assert page.texts[at : at + 12] == "1 32.2 51.0 61.0 71.0 1 3 10.8 53.0 63.0 73.0 3".split()
    at = page.texts.index("100%") + 1
    label = "mine (online TSM), stream, distance 3, mean of 4"
    assert page.texts[at : at + 11] == [label, *(f"{10.0 * part + 3:.1f}" for part in range(10))]
    assert page.texts[at + 11 : at + 22] == ["mine (online TSM), 8 frames of what was seen"] + ["11.5"] * 10
    assert page.texts[at + 22 : at + 33] == ["<other> (TSN), 8 frames of what was seen"] + ["12.5"] * 10
    # In the legend too.
    assert page.texts.count(label) == 2
    assert "differs from the run: pipeline.size=64 (trained: 32)" in page.texts


@pytest.mark.parametrize("text", ["", "[]", "{}", "not json"])
def test_a_stream_record_of_another_kind_is_left_out(run: Run, text: str) -> None:
    run.start()
    run.folder.stream.write_text(text)
    assert "Continuous stream" not in run.page().text


def test_bad_clips_and_provenance(run: Run) -> None:
    run.start()
    bad = [
        {"split": "train", "step": step, "row": row, "epoch": step, "reason": f"clip {row} is cut", "replaced_by": 99}
        for step in (1, 2)
        for row in range(30)
    ]
    run.folder.bad_clips.write_text("".join(json.dumps(record) + "\n" for record in bad))
    (run.folder.path / "config.yaml").write_text("seed: 17\n")
    starts = [{"launcher": "torchrun", "hosts": ["a", "b"], "git_diff": None}, {"launcher": "srun", "git_diff": "+x"}]
    (run.folder.path / "provenance.json").write_text(json.dumps(starts))
    page = run.page()
    assert "Undecodable clips: 30" in page.text
    assert "and 10 more in bad_clips.jsonl" in page.text
    assert "clip 19 is cut" in page.text
    assert "seed: 17" in page.text
    assert "Start 2" in page.text
    assert page.texts[page.texts.index("hosts") + 1] == "a b"
    assert page.tags.count("details") == 3


def test_broken_provenance_is_shown_as_it_is(run: Run) -> None:
    (run.folder.path / "provenance.json").write_text('[{"launcher": "tor')
    assert '[{"launcher": "tor' in run.page().text


def test_report_is_the_same_twice(run: Run) -> None:
    run.start()
    run.train(1)
    run.train(2)
    run.page()
    first = run.folder.report.read_text()
    run.page()
    assert run.folder.report.read_text() == first
