"""The browser demo computes in Chromium what ONNX Runtime computes in Python, from the pixels of training."""

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.chromium import CHROMIUM, Page, fake_camera, write_y4m
from pipelines.loading.clips import crop_frames, resize_frames
from pipelines.stream.eval_views import EvalProtocol, evaluation_views
from pipelines.stream.frame_clock import FrameClock
from tests.helpers.clips import smooth_video, write_video
from tests.helpers.tiny_run import write_run
from tools.serve_web import make_server, missing_packages
from training.deploy.export.command import run_export

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.skipif(bool(missing_packages()), reason="no onnxruntime-web: make web"),
    pytest.mark.usefixtures("one_thread"),
]

CLASSES = [f"class {number}" for number in range(7)]

# Keeps what the page computed of its last source.
LISTEN = """
window.seen = [];
document.addEventListener("frame", ({ detail }) => {
  window.seen.push({ ...detail, levels: Array.from(detail.levels), logits: Array.from(detail.logits) });
});
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX stream of random weights, 32 px."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is of the extra onnx: make dev installs it")
    run = tmp_path_factory.mktemp("outputs") / "mine"
    write_run(run, CLASSES, "model.direction=past", "data.root=/gone")
    assert run_export([str(run)], "") == 0
    return run / "export/onnx-fp32-stream"


@pytest.fixture(scope="module")
def page(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page with its model loaded, on a machine whose camera shows a video."""
    folder = tmp_path_factory.mktemp("chromium")
    camera = write_y4m(folder / "camera.y4m", smooth_video(60, 240, 320)[..., 1])
    with make_server(export) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        try:
            with Page(url, folder / "profile", *fake_camera(camera)) as page:
                page.wait_for("document.querySelector('#status')?.textContent", lambda text: text == "ready")
                page.evaluate(LISTEN)
                yield page
        finally:
            server.shutdown()


def streamed(export: Path, seen: list[dict[str, Any]], carry: bool = True) -> NDArray[np.float32]:
    """Return the logits of Python's ONNX Runtime on the levels that the browser saw. `carry`: the caches."""
    import onnxruntime

    card = json.loads((export / "model.json").read_text())
    session = onnxruntime.InferenceSession(export / "model.onnx", providers=["CPUExecutionProvider"])
    size, pixels = card["pixels"]["size"], card["pixels"]
    caches = {each["name"]: np.zeros((1, *each["shape"][1:]), np.float32) for each in card["inputs"][1:]}
    found = []
    for frame in seen:
        level_HWC = np.array(frame["levels"], np.float32).reshape(size, size, 3)
        x_HWC = (level_HWC - np.float32(pixels["mean"])) / np.float32(pixels["std"])
        logit_NK, *kept = session.run(None, {"frame": x_HWC.transpose(2, 0, 1)[None], **caches})
        found.append(logit_NK[0])
        if carry:
            caches = dict(zip(caches, kept, strict=True))
    return np.stack(found)


def test_the_camera_gives_the_logits_of_python(page: Page, export: Path, tmp_path: Path) -> None:
    page.evaluate("document.querySelector('#rate').value = 1000; window.seen.length = 0")
    page.evaluate("document.querySelector('#camera').click()")
    page.wait_for("window.seen.length", lambda count: count >= 40)
    seen = page.evaluate("window.seen.slice(0, 40)")
    page.screenshot(tmp_path / "camera.png")
    # The camera moves.
    assert len({json.dumps(frame["levels"]) for frame in seen}) > len(seen) // 2
    logit_TK = np.array([frame["logits"] for frame in seen])
    largest = np.abs(logit_TK).max()
    difference = np.abs(logit_TK - streamed(export, seen)).max() / largest
    print(f"\nlargest difference {difference:.1g} of the largest logit, {seen[-1]['fps']:.1f} frames/s")
    assert difference < 1e-4
    # The caches count.
    assert np.abs(logit_TK - streamed(export, seen, carry=False)).max() / largest > 1e-2
    shown = page.evaluate("[...document.querySelectorAll('#top li')].map((line) => line.textContent)")
    assert len(shown) == 5 and all(line.startswith("class ") and line.endswith(" %") for line in shown)
    assert "frames/s" in page.evaluate("document.querySelector('#fps').textContent")
    assert page.evaluate("crossOriginIsolated")
    assert page.log == []


def test_a_video_file_is_taken_at_the_distance_of_the_card(page: Page, export: Path, tmp_path: Path) -> None:
    # Long enough for a slow machine.
    video = write_video(tmp_path / "a.webm", smooth_video(240), codec="libvpx")
    page.evaluate("document.querySelector('#rate').value = ''")
    page.choose_files("#files", [video])
    # Frames of the camera that were under way are older.
    page.wait_for("document.querySelector('#status').textContent", lambda text: text.startswith("a.webm"))
    page.evaluate("window.seen.length = 0")
    page.wait_for("window.seen.length", lambda count: count >= 6)
    status = page.evaluate("document.querySelector('#status').textContent")
    # Uniform sampling has no distance of its own: every second frame of the 24 per second of the training videos.
    assert "83 ms" in status, status
    time_s = [frame["timeS"] for frame in page.evaluate("window.seen")]
    # Frames may be late on a slow machine, but never nearer than a third of an interval.
    assert min(np.diff(time_s)) > 0.027
    assert page.log == []


def test_files_of_an_export_are_dropped_on_the_page(page: Page, export: Path, tmp_path: Path) -> None:
    status = "document.querySelector('#status').textContent"
    page.choose_files("#files", [export / "model.json"])
    page.wait_for(status, lambda text: "Fix: choose model.json and model.onnx together" in text)
    other = tmp_path / "model.onnx"
    other.write_bytes((export / "model.onnx").read_bytes()[:-1])
    page.choose_files("#files", [export / "model.json", other])
    page.wait_for(status, lambda text: "not the file of this model.json" in text)
    page.choose_files("#files", [export / "model.json", export / "model.onnx"])
    page.wait_for(status, lambda text: text == "ready")


@pytest.mark.parametrize(("width", "height"), [(61, 47), (47, 90), (320, 240), (30, 33), (36, 36)])
def test_pixels_are_those_of_the_evaluation(page: Page, width: int, height: int) -> None:
    """Scaled down, up and not at all."""
    level_HWC = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    found_HWC = levels_in_the_browser(page, level_HWC, 32)
    (view,) = evaluation_views(EvalProtocol(8, 32), 8, width, height)
    assert view.scaled is not None
    image_1CHW = torch.from_numpy(level_HWC).permute(2, 0, 1)[None]
    wanted_HWC = crop_frames(resize_frames(image_1CHW, *view.scaled), view)[0].permute(1, 2, 0).numpy()
    difference_HWC = np.abs(found_HWC.astype(int) - wanted_HWC)
    # torch's weights have fewer bits, so a level may be rounded to the next one.
    assert difference_HWC.max() <= 1
    assert (difference_HWC > 0).mean() < 0.15


def levels_in_the_browser(page: Page, level_HWC: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    height, width = level_HWC.shape[:2]
    rgba = np.dstack([level_HWC, np.full((height, width, 1), 255, np.uint8)])
    pixels = {"size": size, "resize": {"shorter_side": size * 256 // 224}}
    found = page.evaluate(f"""
        import("./pixels.js").then(({{ resizeAndCrop }}) => {{
          const data = Uint8ClampedArray.from(atob("{base64.b64encode(rgba.tobytes()).decode()}"), (c) => c.charCodeAt(0));
          return Array.from(resizeAndCrop({{ data, width: {width}, height: {height} }}, {json.dumps(pixels)}));
        }})""")
    return np.array(found, np.uint8).reshape(size, size, 3)


def test_the_clock_takes_the_frames_that_python_takes(page: Page) -> None:
    rng = np.random.default_rng(1)
    # A camera at 30 frames/s whose times jitter, with a pause, and a file that begins again.
    gaps_s = 1 / 30 + rng.uniform(-0.01, 0.01, 300)
    gaps_s[100] = 2.0
    time_s = np.cumsum(gaps_s)
    time_s[200:] -= time_s[200]
    clock, wanted = FrameClock(0.08), []
    for each_s in time_s.tolist():
        taken, clock = clock.at(each_s)
        wanted.append(taken)
    found = page.evaluate(f"""
        import("./frame_clock.js").then(({{ FrameClock }}) => {{
          const clock = new FrameClock(0.08);
          return {json.dumps(time_s.tolist())}.map((timeS) => clock.take(timeS));
        }})""")
    assert found == wanted
    assert 80 < sum(wanted) < 200
    distances = page.evaluate("""
        import("./frame_clock.js").then(({ trainedDistance }) =>
          [[1, 2, 3, 4, 5], [5, 2], null].map((distances) => trainedDistance({ distances })))""")
    assert distances == [3, 3.5, 2]
    intervals = page.evaluate("""
        import("./frame_clock.js").then(({ trainedInterval }) =>
          [[0.25, 30], [0.25, null], [null, 30], [null, null]].map(
            ([interval_s, rate]) => trainedInterval({ interval_s, distances: [3] }, rate)))""")
    # By the card first, then by the source's rate.
    assert intervals == [0.25, 0.25, 0.1, None]


def test_the_rate_of_a_file_is_found_from_times_with_drops(page: Page) -> None:
    """24 frames/s in whole milliseconds, as WebM has them, with two frames dropped."""
    time_s = [round(number / 24, 3) for number in range(14) if number not in (3, 8)]
    found = page.evaluate(f"""
        import("./frame_clock.js").then(({{ RateEstimate }}) => {{
          const estimate = new RateEstimate();
          return {json.dumps(time_s)}.map((timeS) => estimate.add(timeS));
        }})""")
    assert found[:9] == [None] * 9
    assert found[-1] == pytest.approx(24, rel=0.003)
