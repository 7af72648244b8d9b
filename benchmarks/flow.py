"""Measure what the optical flow of a pair of frames costs: CPU time, bytes, and the error on a known motion.

python benchmarks/flow.py                          needs OpenCV: pip install -c constraints.txt opencv-contrib-python-headless
python benchmarks/flow.py --pairs 10 --json FILE

Real footage (tools/fetch_footage.py), scaled as `prepare.py flow` does. The methods alternate on the same pairs, on one thread. For
the error the second frame is the first one, turned, enlarged and moved by a known affine map.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

from benchmarks import common
from benchmarks.input_data import fetch
from pipelines.decoding.video import EncodedVideo, video_stream
from pipelines.manifest import ManifestRow
from pipelines.prepare.flow.flow_clip import SHORT_SIDE, encode_image, flow_size
from pipelines.prepare.flow.optical_flow import FlowField, Grey, flow_estimator, require_method, to_levels
from pipelines.prepare.repack.rescale import scaled_video

# Footage whose shorter side is 256 pixels or more, and the frame to begin with.
CLIPS = (("pedestrians.avi", 20), ("cup.mp4", 20), ("walk_vp9.mp4", 20), ("people.mp4", 20))
PRESETS = {"DIS, ultrafast": "ULTRAFAST", "DIS, fast": "FAST"}
DIS, TVL1 = "DIS, medium (--method dis)", "TV-L1 (--method tvl1)"
SHIFT_PX, TURN_DEGREES, ZOOM = (3.0, -2.0), 1.0, 1.01


def main() -> int:
    parser = common.argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each clip")
    options = parser.parse_args()
    require_method("tvl1")
    facts = common.machine_facts(threads=1)
    samples = measure(CLIPS[:1] if options.quick else CLIPS, 2 if options.quick else options.pairs)
    columns: dict[str, tuple[str, float, int]] = {
        "ms per pair": ("flow_s", 1e3, 1),
        "ms to encode and check": ("encode_s", 1e3, 1),
        "KB per pair": ("bytes", 1e-3, 1),
        "error on a known motion, px": ("error_px", 1, 3),
        "distance from TV-L1, px": ("from_tvl1_px", 1, 2),
    }
    intervals = {
        name: {key: common.median_interval(values) for key, values in sample.items()}
        for name, sample in samples.items()
    }
    table = [
        (name, *(of[key].show(scale, digits) for key, scale, digits in columns.values()))
        for name, of in intervals.items()
    ]
    common.print_table(("method", *columns), table)
    if options.json:
        common.write_rows(options.json, [{"method": name, **of} for name, of in intervals.items()], facts)
    return 0


def measure(clips: tuple[tuple[str, int], ...], pairs: int) -> dict[str, dict[str, list[float]]]:
    """Return the samples of each method: one per pair, or of the error one per clip."""
    estimators = methods()
    samples: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in estimators}
    for clip, first in clips:
        greys = read(Path(fetch(clip)), first, pairs + 1)
        for one_HW, next_HW in pairwise(greys):
            flows = {}
            for name, estimate in estimators.items():
                start_s = time.process_time()
                flows[name] = estimate(one_HW, next_HW)
                middle_s = time.process_time()
                images = [encode_image(clip, to_levels(part_HW)) for part_HW in np.moveaxis(flows[name], -1, 0)]
                samples[name]["flow_s"].append(middle_s - start_s)
                samples[name]["encode_s"].append(time.process_time() - middle_s)
                samples[name]["bytes"].append(sum(map(len, images)))
            for name, flow_HW2 in flows.items():
                distance_HW = np.linalg.norm(flow_HW2 - flows[TVL1], axis=-1)
                samples[name]["from_tvl1_px"].append(float(distance_HW.mean()))
        for name, estimate in estimators.items():
            samples[name]["error_px"].append(known_motion_error(estimate, greys[0]))
    return samples


def methods() -> dict[str, Callable[[Grey, Grey], FlowField]]:
    """Return the methods of the command, and the other presets of DIS."""
    import cv2

    def preset(name: str) -> Callable[[Grey, Grey], FlowField]:
        algorithm: Any = cv2.DISOpticalFlow.create(getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{name}"))
        return lambda one_HW, next_HW: algorithm.calc(one_HW, next_HW, None)

    ours = {DIS: flow_estimator("dis", SHORT_SIDE), TVL1: flow_estimator("tvl1", SHORT_SIDE)}
    return {name: preset(value) for name, value in PRESETS.items()} | ours


def read(path: Path, first: int, count: int) -> list[Grey]:
    """Read `count` grey frames of a video from frame `first` on."""
    import cv2

    video = EncodedVideo(path.name, path)
    with video_stream(video) as (_, stream):
        row = ManifestRow(path.name, 0, 1, 0, first + count, "", stream.width, stream.height, 0)
    images = islice(scaled_video(video, row, flow_size(row)), first, first + count)
    return [cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY) for image_HWC in images]


def known_motion_error(estimate: Callable[[Grey, Grey], FlowField], grey_HW: Grey) -> float:
    """Return the median distance in pixels between the estimated and the true motion."""
    import cv2

    height, width = grey_HW.shape
    matrix_23 = cv2.getRotationMatrix2D((width / 2, height / 2), TURN_DEGREES, ZOOM)
    matrix_23[:, 2] += SHIFT_PX
    moved_HW = cv2.warpAffine(grey_HW, matrix_23, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    y_HW, x_HW = np.mgrid[:height, :width].astype(np.float64)
    target_HW2 = np.stack([x_HW, y_HW, np.ones_like(x_HW)], -1) @ matrix_23.T
    true_HW2: NDArray[Any] = target_HW2 - np.stack([x_HW, y_HW], -1)
    error_HW = np.linalg.norm(estimate(grey_HW, moved_HW) - true_HW2, axis=-1)
    # The border shows what was not in the first frame.
    return float(np.median(error_HW[16:-16, 16:-16]))


if __name__ == "__main__":
    sys.exit(main())
