"""Measure the browser demo (web/) in headless Chromium with a fake camera: frames per second and latency.

python benchmarks/browser.py EXPORT             pages with one thread and with as many as the browser takes
python benchmarks/browser.py EXPORT --quick     a first impression

EXPORT is a folder written by export.py, format=onnx and form=stream. The camera gives more frames than the page can take. Each
round opens a new page of each kind, and after it the same network runs in Python's ONNX Runtime with as many threads: the ratio
is that of the page's latency (scaling, normalising and the network) to the network's time there. Needs `make web` and Chromium.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

import numpy as np
from numpy.typing import NDArray

from benchmarks import common
from benchmarks.chromium import CHROMIUM, Page, fake_camera, write_y4m

_CAMERA_FPS = 60
# Compiled and allocated; ONNX Runtime's first calls are slow.
_FIRST_FRAMES = 20
_PAUSE_S = 1.0


def main() -> int:
    options = parse_arguments()
    if CHROMIUM is None:
        print("browser: no Chromium. Fix: apt-get install chromium", file=sys.stderr)
        return 2
    if options.quick:
        options.rounds, options.frames = 2, 20
    facts = common.machine_facts(threads=0)
    del facts["threads"]
    with tempfile.TemporaryDirectory() as folder:
        camera = write_y4m(Path(folder) / "camera.y4m", moving_waves(60, 240, 320), _CAMERA_FPS)
        rounds = [
            measure_round(options.export.absolute(), camera, options.frames, Path(folder))
            for _ in range(options.rounds)
        ]
    card = json.loads((options.export / "model.json").read_text())
    network = {"backbone": card["run"]["backbone"], "size": card["pixels"]["size"]}
    rows = [row_of(kind, rounds, network) for kind in rounds[0]]
    facts["load_after"] = round(os.getloadavg()[0], 1)
    print(
        f"\n{network['backbone']}, {network['size']} px, camera 320x240 at {_CAMERA_FPS} frames/s, {options.frames} frames of "
        f"{options.rounds} rounds\n{facts['cpu']}, {facts['cores']} cores, load {facts['load']} to {facts['load_after']}; "
        f"{facts['date']}\nmedian [its 95% interval] over rounds"
    )
    common.print_table(
        ("page", "threads", "frames/s", "latency, ms", "p95, ms", "Python's, ms", "latency / Python's"),
        [
            [
                row["page"],
                str(row["threads"]),
                row["fps"].show(),
                row["latency_s"].show(1000),
                row["p95_s"].show(1000),
                row["python_s"].show(1000),
                row["relative_to_python"].show(digits=2),
            ]
            for row in rows
        ],
    )
    if options.json:
        common.write_rows(options.json, rows, facts)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser("The browser demo in headless Chromium.")
    parser.add_argument("export", type=Path, metavar="EXPORT", help="a folder of export.py, format=onnx form=stream")
    parser.add_argument("--rounds", type=int, default=6, help="pages of each kind")
    parser.add_argument(
        "--frames", type=int, default=100, help="measured frames of each page; the page keeps the last 100"
    )
    return parser.parse_args()


def moving_waves(frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """Return a video, (T, H, W), of which no frame equals another."""
    t_T11, y_H1, x_W = (
        np.arange(frames)[:, None, None] / 5,
        np.linspace(0, 9, height)[:, None],
        np.linspace(0, 12, width),
    )
    return (127.5 + 100 * np.sin(x_W + t_T11) * np.cos(y_H1 - t_T11)).astype(np.uint8)


def measure_round(export: Path, camera: Path, frames: int, folder: Path) -> dict[str, dict[str, float]]:
    """Measure a page of each kind, and Python beside it. Seconds, frames per second, and the number of threads."""
    found = {}
    for kind, with_threads in (("plain", False), ("with COOP and COEP headers", True)):
        time.sleep(_PAUSE_S)
        page = measure_page(export, camera, frames, with_threads, folder)
        time.sleep(_PAUSE_S)
        found[kind] = page | {"python_s": python_s(export, int(page["threads"]), frames)}
    return found


def measure_page(export: Path, camera: Path, frames: int, with_threads: bool, folder: Path) -> dict[str, float]:
    with (
        served(export, with_threads) as url,
        tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as profile,
        Page(url, Path(profile), *fake_camera(camera)) as page,
    ):
        page.wait_for("document.querySelector('#status')?.textContent", lambda text: text == "ready")
        page.evaluate("window.seen = []; document.addEventListener('frame', (e) => seen.push(e.detail.latencyMs))")
        # Every frame that the page can take.
        page.evaluate("document.querySelector('#rate').value = 1000; document.querySelector('#camera').click()")
        page.wait_for("window.seen.length", lambda count: count >= _FIRST_FRAMES + frames)
        latency_ms = page.evaluate(f"window.seen.slice({_FIRST_FRAMES}, {_FIRST_FRAMES + frames})")
        return {
            "threads": page.evaluate("import('./stream_model.js').then(({ threads }) => threads)"),
            "fps": float(page.evaluate("document.querySelector('#fps').textContent").split()[0]),
            "latency_s": median(latency_ms) / 1000,
            "p95_s": sorted(latency_ms)[int(0.95 * (frames - 1))] / 1000,
        }


@contextmanager
def served(export: Path, with_threads: bool) -> Iterator[str]:
    """Serve the page and the export; yield the page's address."""
    options = ["--port", "0", *([] if with_threads else ["--no-threads"])]
    command = [sys.executable, "-m", "tools.serve_web", str(export), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=sys.path[0]) as server:
        assert server.stdout is not None
        try:
            # It has told what is missing, if anything is.
            if not (line := server.stdout.readline()):
                raise SystemExit(server.wait())
            yield line.split()[0]
        finally:
            server.terminate()


def python_s(export: Path, threads: int, frames: int) -> float:
    """Return the median time of a frame in Python's ONNX Runtime, caches carried."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(export / "model.onnx", settings, providers=["CPUExecutionProvider"])
    tensors: dict[str, NDArray[Any]] = {
        each.name: np.zeros((1, *each.shape[1:]), np.float32) for each in session.get_inputs()
    }
    caches = [name for name in tensors if name != "frame"]
    tensors["frame"] = np.random.default_rng(0).standard_normal(tensors["frame"].shape).astype(np.float32)
    times_s = []
    for _ in range(_FIRST_FRAMES + frames):
        start = time.perf_counter()
        _, *kept = session.run(None, tensors)
        times_s.append(time.perf_counter() - start)
        tensors |= dict(zip(caches, kept, strict=True))
    return median(times_s[_FIRST_FRAMES:])


def row_of(kind: str, rounds: list[dict[str, dict[str, float]]], network: dict[str, Any]) -> dict[str, Any]:
    samples = {name: [each[kind][name] for each in rounds] for name in rounds[0][kind]}
    return {
        "benchmark": "browser",
        **network,
        "page": kind,
        "threads": int(samples.pop("threads")[0]),
        **{name: common.median_interval(values) for name, values in samples.items()},
        "relative_to_python": common.ratio_interval(samples["latency_s"], samples["python_s"]),
    }


if __name__ == "__main__":
    sys.exit(main())
