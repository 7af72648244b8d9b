"""Compare evaluation views with the official rules, and their pixels with torchvision's and Pillow's."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, PILToTensor, Resize
from torchvision.transforms import functional as vision

from pipelines.loading.clips import crop_frames, resize_frames
from pipelines.stream.augmentation import SampleParams, crop_offsets
from pipelines.stream.eval_views import EvalProtocol, evaluation_views
from pipelines.stream.frame_sampling import EVALUATION_RULES

CENTRE = EvalProtocol(num_frames=8, size=224)
SIDES = st.integers(16, 700)
WIDTHS_AND_HEIGHTS = [(340, 256), (256, 340), (320, 256), (171, 128), (256, 256), (1280, 720), (639, 427), (100, 31)]


def crops(width: int, height: int, **options: object) -> list[tuple[int, int]]:
    """Return (left, top) of the crops of one temporal view."""
    views = evaluation_views(EvalProtocol(8, 224, **options), 24, width, height)  # type: ignore[arg-type]
    return [(view.left, view.top) for view in views]


# --- The scaled frame -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "frame", "scaled"),
    [
        (224, (340, 256), (340, 256)),
        (224, (256, 340), (256, 340)),
        (224, (320, 256), (320, 256)),
        (224, (171, 128), (342, 256)),
        # The exact width is 455.1.
        (224, (1280, 720), (455, 256)),
        (224, (720, 1280), (256, 455)),
        # The exact width is 384.6.
        (224, (640, 426), (384, 256)),
        (224, (50, 50), (256, 256)),
        (32, (64, 64), (36, 36)),
        # The exact width is 170.7.
        (112, (320, 240), (170, 128)),
    ],
)
def test_frames_are_scaled_to_a_shorter_side_of_8_sevenths(
    size: int, frame: tuple[int, int], scaled: tuple[int, int]
) -> None:
    assert EvalProtocol(8, size).scaled_size(*frame) == scaled


@given(size=st.integers(8, 300), width=SIDES, height=SIDES)
@settings(max_examples=100)
def test_the_scaled_size_is_torchvisions(size: int, width: int, height: int) -> None:
    image = torch.zeros(1, height, width, dtype=torch.uint8)
    resized = vision.resize(image, [size * 256 // 224], antialias=True)
    assert EvalProtocol(8, size).scaled_size(width, height) == (resized.shape[2], resized.shape[1])


# --- Crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "left", "top"),
    [
        ((340, 256), 58, 16),
        ((256, 340), 16, 58),
        ((320, 256), 48, 16),
        # The scaled frame is 342 x 256.
        ((171, 128), 59, 16),
        ((256, 256), 16, 16),
        # 58.5 rounds to even.
        ((341, 256), 58, 16),
        # 59.5 rounds to even.
        ((343, 256), 60, 16),
    ],
)
def test_the_centre_crop(frame: tuple[int, int], left: int, top: int) -> None:
    (view,) = evaluation_views(CENTRE, 24, *frame)
    assert (view.left, view.top, view.width, view.height, view.flip) == (left, top, 224, 224, False)


@given(width=SIDES, height=SIDES, size=st.integers(8, 300))
@settings(max_examples=100)
def test_the_centre_crop_is_torchvisions(width: int, height: int, size: int) -> None:
    protocol = EvalProtocol(8, size)
    (view,) = evaluation_views(protocol, 24, width, height)
    scaled_width, scaled_height = protocol.scaled_size(width, height)
    where_HW = torch.arange(scaled_height * scaled_width).view(1, scaled_height, scaled_width)
    cut_HW = CenterCrop(size)(where_HW)
    assert cut_HW[0, 0, 0] == view.top * scaled_width + view.left


THREE_CROPS = [
    # Frame, full resolution, then left, right, centre in the official order: with and without the official bug for
    # portrait clips.
    ((340, 256), True, [(0, 0), (84, 0), (42, 0)], [(0, 0), (84, 0), (42, 0)]),
    ((256, 340), True, [(0, 42), (0, 42), (0, 42)], [(0, 0), (0, 84), (0, 42)]),
    ((320, 256), True, [(0, 0), (64, 0), (32, 0)], [(0, 0), (64, 0), (32, 0)]),
    ((171, 128), True, [(0, 0), (84, 0), (42, 0)], [(0, 0), (84, 0), (42, 0)]),
    ((256, 256), True, [(0, 0), (0, 0), (0, 0)], [(0, 0), (0, 0), (0, 0)]),
    ((340, 256), False, [(0, 16), (116, 16), (58, 16)], [(0, 16), (116, 16), (58, 16)]),
    ((256, 340), False, [(0, 58), (32, 58), (16, 58)], [(16, 0), (16, 116), (16, 58)]),
    ((256, 256), False, [(0, 16), (32, 16), (16, 16)], [(0, 16), (32, 16), (16, 16)]),
]


@pytest.mark.parametrize(("frame", "full_resolution", "official", "mended"), THREE_CROPS)
def test_three_crops(
    frame: tuple[int, int],
    full_resolution: bool,
    official: list[tuple[int, int]],
    mended: list[tuple[int, int]],
) -> None:
    assert crops(*frame, crops=3, full_resolution=full_resolution, portrait_bug=True) == official
    assert crops(*frame, crops=3, full_resolution=full_resolution) == mended


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ((340, 256), [(0, 0), (116, 0), (0, 32), (116, 32), (58, 16)]),
        ((256, 340), [(0, 0), (32, 0), (0, 116), (32, 116), (16, 58)]),
        ((320, 256), [(0, 0), (96, 0), (0, 32), (96, 32), (48, 16)]),
        # 118 is truncated to four steps of 29.
        ((171, 128), [(0, 0), (116, 0), (0, 32), (116, 32), (58, 16)]),
        ((256, 256), [(0, 0), (32, 0), (0, 32), (32, 32), (16, 16)]),
    ],
)
def test_five_and_ten_crops(frame: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    """Take corners and centre; of ten crops, each is followed by its mirror image."""
    assert crops(*frame, crops=5) == expected
    views = evaluation_views(EvalProtocol(8, 224, crops=10), 24, *frame)
    assert [(view.left, view.top) for view in views] == [place for place in expected for _ in range(2)]
    assert [view.flip for view in views] == [False, True] * 5


def test_the_thirteen_training_offsets_of_a_frame() -> None:
    """Take the 13 training offsets of 256 x 256 in 340 x 260: steps of 21 and 1 pixels."""
    x, y = 21, 1
    assert crop_offsets(84, 4) == [
        (0, 0), (4 * x, 0), (0, 4 * y), (4 * x, 4 * y), (2 * x, 2 * y),
        (0, 2 * y), (4 * x, 2 * y), (2 * x, 4 * y), (2 * x, 0),
        (x, y), (3 * x, y), (x, 3 * y), (3 * x, 3 * y),
    ]  # fmt: skip


ANY_PROTOCOL = st.builds(
    EvalProtocol,
    num_frames=st.integers(1, 16),
    size=st.integers(8, 300),
    clips=st.sampled_from(sorted(EVALUATION_RULES)),
    crops=st.sampled_from([1, 3, 5, 10]),
    full_resolution=st.booleans(),
    portrait_bug=st.booleans(),
)


@given(protocol=ANY_PROTOCOL, num_frames=st.integers(1, 300), width=SIDES, height=SIDES)
@settings(max_examples=150)
def test_every_view_lies_in_the_scaled_frame(protocol: EvalProtocol, num_frames: int, width: int, height: int) -> None:
    views = evaluation_views(protocol, num_frames, width, height)
    assert len(views) == protocol.views
    for view in views:
        assert view.scaled == protocol.scaled_size(width, height)
        assert (view.width, view.height) == (protocol.side, protocol.side)
        assert 0 <= view.left <= view.scaled[0] - view.width
        assert 0 <= view.top <= view.scaled[1] - view.height
        assert 0 <= view.frame_T.min() <= view.frame_T.max() < num_frames
        assert len(view.frame_T) == protocol.num_frames


def test_protocols_that_look_at_other_pixels_have_other_names() -> None:
    looked_at: dict[str, set[str]] = {}
    for clips, count, full, bug, size in product(
        EVALUATION_RULES, (1, 3, 5, 10), (False, True), (False, True), (32, 224)
    ):
        protocol = EvalProtocol(8, size, clips, count, full, bug)
        views = [
            (view.frame_T.tolist(), view.left, view.top, view.width, view.flip, view.scaled)
            for frame in ((340, 256), (256, 340))
            for num_frames in (3, 90)
            for view in evaluation_views(protocol, num_frames, *frame)
        ]
        looked_at.setdefault(protocol.name, set()).add(str(views))
    assert all(len(views) == 1 for views in looked_at.values())
    assert len(set.union(*looked_at.values())) == len(looked_at)


@pytest.mark.parametrize(
    ("options", "side", "views"),
    [
        ({"clips": "uniform"}, 224, 1),
        ({"clips": "twice", "crops": 3, "full_resolution": True}, 256, 6),
        ({"clips": "dense", "crops": 3, "full_resolution": True}, 256, 30),
        ({"clips": "uniform", "crops": 10}, 224, 10),
    ],
)
def test_the_published_protocols(options: dict[str, object], side: int, views: int) -> None:
    protocol = EvalProtocol(8, 224, **options)  # type: ignore[arg-type]
    assert (protocol.side, protocol.views) == (side, views)


# --- Pixels -----------------------------------------------------------------------------------------------------------


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Return a smooth image with noise, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves_HW3 = np.stack([127 + 90 * np.sin(x / (7 + c) + y / (11 - c)) for c in range(3)], axis=-1)
    return np.clip(waves_HW3 + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)


def ours(image_HWC: np.ndarray, view: SampleParams) -> torch.Tensor:
    assert view.scaled is not None
    frame_TCHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
    return crop_frames(resize_frames(frame_TCHW, *view.scaled), view)[0]


def largest_gap(one_CHW: torch.Tensor, other_CHW: torch.Tensor) -> int:
    assert one_CHW.shape == other_CHW.shape
    return int((one_CHW.int() - other_CHW.int()).abs().max())


@pytest.mark.parametrize(("width", "height"), WIDTHS_AND_HEIGHTS)
def test_pixels_are_torchvisions_and_pillows(width: int, height: int) -> None:
    """Match Resize and CenterCrop on tensors, and on Pillow images as in the official code, within one level of 255."""
    image_HWC = noise(width, height)
    (view,) = evaluation_views(CENTRE, 24, width, height)
    cut_CHW = ours(image_HWC, view)
    tensor_CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)
    assert largest_gap(cut_CHW, CenterCrop(224)(Resize(256, antialias=True)(tensor_CHW))) <= 1
    pillow_CHW = PILToTensor()(CenterCrop(224)(Resize(256)(Image.fromarray(image_HWC))))
    assert largest_gap(cut_CHW, pillow_CHW) <= 1


@pytest.mark.parametrize(("width", "height"), [(340, 256), (256, 340), (171, 128), (639, 427)])
@pytest.mark.parametrize("full_resolution", [False, True])
def test_pixels_of_many_crops_are_pillows(width: int, height: int, full_resolution: bool) -> None:
    image_HWC = noise(width, height)
    scaled = Resize(256)(Image.fromarray(image_HWC))
    protocol = EvalProtocol(8, 224, crops=10, full_resolution=full_resolution)
    for view in evaluation_views(protocol, 24, width, height):
        cut = scaled.crop((view.left, view.top, view.left + protocol.side, view.top + protocol.side))
        expected = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else cut
        assert largest_gap(ours(image_HWC, view), PILToTensor()(expected)) <= 1


def test_training_pixels_are_pillows() -> None:
    """Crop first and scale second: the filter must not reach beyond the crop."""
    image_HWC = noise(340, 256)
    frame_TCHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
    for left, top, width, height in [(42, 32, 256, 192), (0, 0, 168, 168), (84, 0, 224, 256)]:
        params = SampleParams(np.arange(1), left, top, width, height, flip=False)
        cut = Image.fromarray(image_HWC).crop((left, top, left + width, top + height))
        expected = PILToTensor()(cut.resize((224, 224), Image.Resampling.BILINEAR))
        assert largest_gap(resize_frames(crop_frames(frame_TCHW, params), 224, 224)[0], expected) <= 1
