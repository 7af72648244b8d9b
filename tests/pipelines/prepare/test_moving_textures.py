"""Generate clips that differ by motion only: twins in reverse order, classes that a single frame does not tell, and a manifest."""

import io
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.manifest import Manifest
from pipelines.prepare.errors import DataSetError
from pipelines.prepare.shapes.drawing import encode_clip
from pipelines.prepare.shapes.moving_textures import CLASSES, ORDER_GROUPS, RANGES, draw_clip, sample_poses
from pipelines.prepare.shapes.write import MOTIONS, GeneratedConfig, write_generated

PARTS = len(RANGES)


def decode(content: bytes) -> np.ndarray:
    with av.open(io.BytesIO(content), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("drawing", range(PARTS))
def test_twins_are_reversed_also_once_encoded(drawing: int) -> None:
    forward_THWC, backward_THWC = (draw_clip("train", 0, 2 * drawing + twin, 48, (8, 16)) for twin in range(2))
    assert forward_THWC.shape in ((8, 48, 48, 3), (16, 48, 48, 3)) and forward_THWC.dtype == np.uint8
    assert np.array_equal(forward_THWC, draw_clip("train", 0, 2 * drawing, 48, (8, 16)))
    assert np.array_equal(forward_THWC[::-1], backward_THWC) and not np.array_equal(forward_THWC, backward_THWC)
    assert np.array_equal(decode(encode_clip(forward_THWC))[::-1], decode(encode_clip(backward_THWC)))


def test_splits_and_seeds_share_no_clip() -> None:
    drawn = [
        draw_clip(split, seed, index, 32, (8,)).tobytes()
        for split in ("train", "val")
        for seed in (0, 1)
        for index in range(16)
    ]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("changing", range(PARTS))
def test_only_the_part_of_the_class_changes(changing: int) -> None:
    poses = sample_poses(np.random.default_rng(0), changing, 24)
    for part, places_T in enumerate(poses):
        steps = np.diff(places_T)
        assert np.all(steps > 0) if part == changing else np.all(steps == 0)
    # Evenly, through its whole range.
    assert np.ptp(poses[changing]) * 24 / 23 == pytest.approx(2 * RANGES[changing])


def test_a_frame_at_a_random_time_has_the_same_poses_in_every_class() -> None:
    """Compare the deciles of each part of the pose: angles by their cosine, because they are taken around the circle."""
    rng = np.random.default_rng(1)
    deciles_PPD = np.empty((PARTS, PARTS, 9))
    for changing in range(PARTS):
        frames = [[part_T[rng.integers(24)] for part_T in sample_poses(rng, changing, 24)] for _ in range(4000)]
        parts_NP = np.array(frames)
        parts_NP[:, 3] = np.cos(parts_NP[:, 3])
        deciles_PPD[changing] = np.quantile(parts_NP, np.arange(1, 10) / 10, axis=0).T
    spread = np.ptp(deciles_PPD, axis=0) / deciles_PPD.std(axis=(0, 2))[:, None]
    # 0.13 with this seed. A part that rests in the middle of its range in the other classes gives 0.5 and more.
    assert spread.max() < 0.25


@pytest.mark.parametrize("label", range(0, 2 * PARTS, 2))
def test_pixels_move_as_the_class_says(label: int) -> None:
    """Fit a move, zoom and turn about the frame's centre to each change between neighbouring frames, by least squares."""
    centred = np.arange(64) + 0.5 - 32
    y_HW, x_HW = np.meshgrid(centred, centred, indexing="ij")
    motion_N4 = []
    for index in range(label, label + 8 * 12, 8):
        # All colours: the disc may be as light as the background.
        video_TCHW = draw_clip("val", 5, index, 64, (24,)).astype(float).transpose(0, 3, 1, 2)
        _, _, dy_TCHW, dx_TCHW = np.gradient((video_TCHW[1:] + video_TCHW[:-1]) / 2)
        columns = [dx_TCHW, dy_TCHW, dx_TCHW * x_HW + dy_TCHW * y_HW, dy_TCHW * x_HW - dx_TCHW * y_HW]
        design_TP4 = np.stack(columns, axis=-1).reshape(23, -1, 4)
        change_TP = np.diff(video_TCHW, axis=0).reshape(23, -1)
        normal_T44 = np.einsum("tpi,tpj->tij", design_TP4, design_TP4)
        right_T4 = np.einsum("tpi,tp->ti", design_TP4, change_TP)
        # Over the clip the camera's shake cancels out.
        motion_N4.append(-np.linalg.solve(normal_T44, right_T4[..., None])[..., 0].sum(0))
    positive_4 = (np.stack(motion_N4) > 0).sum(0)
    assert positive_4[label // 2] == 12
    # In no other way do the clips of this class move in one direction.
    assert np.all(np.isin(np.delete(positive_4, label // 2), range(2, 11)))


def test_the_folder_is_of_motions(tmp_path: Path) -> None:
    root, config = tmp_path / "motions", GeneratedConfig(MOTIONS, train_clips=16, val_clips=8, size=32, frames=(8,))
    assert write_generated(root, config).new_clips == 24
    manifest = Manifest.open(root / "train.arrow")
    assert (manifest.classes, manifest.order_groups) == (CLASSES, ORDER_GROUPS)
    assert manifest.labels().tolist() == [*range(8), *range(8)]
    assert (root / manifest.row(9).path).read_bytes() == encode_clip(draw_clip("train", 0, 9, 32, (8,)))
    assert write_generated(root, config).new_clips == 0
    # The shapes do not replace them, whatever the parameters.
    with pytest.raises(DataSetError, match=r"not written by prepare.py shapes"):
        write_generated(root, GeneratedConfig(train_clips=20, val_clips=10), force=True)
    with pytest.raises(DataSetError, match="--val-clips is 10. Fix: give a positive multiple of 8"):
        GeneratedConfig(MOTIONS, val_clips=10)
