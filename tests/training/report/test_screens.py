"""report.html in a browser, on a wide and on a narrow screen: nothing overflows, and curves come before cards on a phone."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.chromium import CHROMIUM, Page
from training.report.html import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

# Boxes that reach out of the window, except where a box with a scroll bar of its own holds them; SVG clips its contents.
OVERFLOWING = """
[...document.querySelectorAll("body *:not(svg *)")].filter((each) => {
  for (let box = each.parentElement; box; box = box.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(box).overflowX)) return false;
  const { left, right, width } = each.getBoundingClientRect();
  return width > 0 && (left < -0.5 || right > innerWidth + 0.5);
}).map((each) => each.tagName + "." + each.className)
"""

TOP = "document.querySelector({!r}).getBoundingClientRect().top"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that failed, with all of its parts."""
    folder = tmp_path_factory.mktemp("outputs") / ("a-very-long-name-of-a-run-" * 4)
    folder.mkdir()
    records = [
        {"kind": "start", "time_s": 1.0, "step": 0, "world_size": 1536, "backend": "horovod", "device": "x" * 60}
    ]
    for step in range(10, 400, 10):
        values = {
            "loss": 900.0 / step,
            "top1_percent": step / 5,
            "learning_rate": 0.1,
            "step_s": 0.5,
            "clips_per_s": 32.0,
        }
        records.append({"kind": "train", "time_s": 1.0 + step, "step": step, "input_wait_percent": 3.0, **values})
    scores = {"top1_percent": 40.0, "top5_percent": 80.0, "mean_class_percent": 41.0, "order_group_percent": 70.0}
    records.append({"kind": "evaluation", "time_s": 405.0, "step": 390, "loss": 1e5, "clips": 20_000, **scores})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    reason = "rank 1 on n17 hangs at step 391, phase step; stacks of all ranks: " + "/a_long_folder" * 20
    (folder / "outcome.json").write_text(json.dumps({"exit_code": 75, "reason": reason, "time_s": 410.0}))
    (folder / "log.txt").write_text("".join(f"line {number} {'word ' * 60}\n" for number in range(90)))
    ended = [{"ended": {"exit_code": 75, "reason": "x" * 300, "time_s": 1.0}, "first_step": 0, "hosts": ["n17"] * 300}]
    (folder / "provenance.json").write_text(json.dumps(ended))
    write_report(folder)
    return folder / "report.html"


@pytest.mark.parametrize("width", [1280, 420])
def test_layout(page: Path, width: int, tmp_path: Path) -> None:
    with Page(page.as_uri(), tmp_path / "profile") as browser:
        browser.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        browser.wait_for("document.readyState === 'complete' && document.querySelectorAll('figure svg').length === 5")
        assert browser.evaluate("innerWidth") == width
        assert browser.evaluate(OVERFLOWING) == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        reason, failure, curves, cards = (
            browser.evaluate(TOP.format(f".{name}")) for name in ("reason", "failure", "curves", "cards")
        )
        assert reason < failure < min(curves, cards)
        assert (curves < cards) == (width == 420)
        assert browser.log == []
        browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    # Kept for a look at them: pytest keeps the folders of the last three runs.
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)
