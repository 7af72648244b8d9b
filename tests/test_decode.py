"""Decoding chosen frames, told by their grey levels, and what is said of files that are not what they should be."""

import re
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipelines.decode import choose_decoder, decode_clip
from pipelines.manifest import ManifestRow
from pipelines.scan import BadClip, scan_clip

FRAMES, WIDTH, HEIGHT = 30, 64, 48
Indices = NDArray[np.int64]


def grey(index: int) -> int:
    return 16 + 7 * index


def encode(path: Path, video_THWC: NDArray[np.uint8], faststart: bool = False, time_T: list[int] | None = None) -> Path:
    """H.264 with a key frame every ten frames and two B-frames between the others.

    `time_T`: when each frame is shown, in 240ths of a second; without it 24 a second.
    """
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width = video_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"x264-params": "qp=4:keyint=10:min-keyint=10:scenecut=0:bframes=2:b-adapt=0:threads=1"}
        stream.codec_context.time_base = Fraction(1, 240)
        for index, image_HWC in enumerate(video_THWC):
            frame = av.VideoFrame.from_ndarray(image_HWC, format="rgb24")
            frame.pts, frame.time_base = 10 * index if time_T is None else time_T[index], Fraction(1, 240)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("clips") / "grey.mp4", greys())


def greys() -> NDArray[np.uint8]:
    """Frame i is grey level `grey(i)` throughout."""
    levels_T111 = np.array([grey(index) for index in range(FRAMES)], dtype=np.uint8)[:, None, None, None]
    return np.ascontiguousarray(np.broadcast_to(levels_T111, (FRAMES, HEIGHT, WIDTH, 3)))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large frames, with the index in front of them: a file that is cut loses its last frames and still opens."""
    video_THWC = np.random.default_rng(0).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    return encode(tmp_path_factory.mktemp("clips") / "noisy.mp4", video_THWC, faststart=True)


@pytest.fixture(params=["pyav", "torchcodec"])
def decoder(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


def usable(name: str) -> str:
    try:
        return choose_decoder(name)
    except ValueError as error:
        pytest.skip(str(error))


def indices(*frames: int) -> Indices:
    return np.array(frames, dtype=np.int64)


def decode(decoder: str, path: Path, frame_T: Indices, rotation: int = 0) -> torch.Tensor:
    return decode_clip(decoder, path.parent, row_of(path, rotation), frame_T)


def row_of(path: Path, rotation: int = 0, length: int | None = None) -> ManifestRow:
    size = path.stat().st_size if length is None else length
    return ManifestRow(path.name, 0, size, 0, FRAMES, "h264", WIDTH, HEIGHT, rotation)


# --- The frames that were asked for -----------------------------------------------------------------------------------


def test_the_clip_is_as_hard_as_it_should_be(clip: Path) -> None:
    with av.open(str(clip)) as container:
        kinds = [av.video.frame.PictureType(frame.pict_type).name for frame in container.decode(video=0)]
    assert [index for index, kind in enumerate(kinds) if kind == "I"] == [0, 10, 20]
    assert kinds.count("B") > 10


@pytest.mark.parametrize(
    "frames",
    [
        tuple(range(FRAMES)),
        (0,),
        (29,),
        (1, 8, 11, 19, 25),
        (3, 3, 3, 17, 17),
        (0, 0, 0, 0, 0, 0, 0, 0),
        (29, 0, 15, 14, 15),
    ],
)
def test_the_frames_come_as_asked_for(decoder: str, clip: Path, frames: tuple[int, ...]) -> None:
    video_TCHW = decode(decoder, clip, indices(*frames))
    assert video_TCHW.dtype == torch.uint8
    assert video_TCHW.shape == (len(frames), 3, HEIGHT, WIDTH)
    check_levels(video_TCHW, frames)


def check_levels(video_TCHW: torch.Tensor, frames: tuple[int, ...]) -> None:
    levels_T1 = torch.tensor([grey(frame) for frame in frames])[:, None]
    assert (video_TCHW.flatten(1).int() - levels_T1).abs().max() <= 2  # neighbours are 7 apart


TIMES = {
    "late start": [10 * index + 37 for index in range(FRAMES)],
    "a pause": [10 * index + 200 * (index >= 15) for index in range(FRAMES)],
    "jitter": [10 * index + 4 * (index % 3) for index in range(FRAMES)],
    "slowing down": [index * (index + 3) for index in range(FRAMES)],
}


@pytest.mark.parametrize("times", TIMES)
def test_frames_are_counted_and_not_timed(decoder: str, tmp_path: Path, times: str) -> None:
    """A manifest's row holds a number of frames: whatever the clock of a file says, frame i is the i-th."""
    path = encode(tmp_path / "c.mp4", greys(), time_T=TIMES[times])
    frames = (1, 5, 9, 14, 18, 22, 25, 29)
    check_levels(decode(decoder, path, indices(*frames)), frames)


def test_decoders_agree(noisy: Path) -> None:
    frame_T = indices(0, 7, 7, 13, 29)
    usable("torchcodec")
    difference = decode("pyav", noisy, frame_T).int() - decode("torchcodec", noisy, frame_T).int()
    assert difference.abs().max() <= 2
    assert difference.float().abs().mean() < 0.5


def test_colours_and_sides_are_where_they_were(decoder: str, tmp_path: Path) -> None:
    video_TCHW = decode(decoder, encode(tmp_path / "c.mp4", corner()), indices(0, 1))
    check_corner(video_TCHW, top=True, left=True)


def corner() -> NDArray[np.uint8]:
    """Red in the top left quarter, black elsewhere."""
    video_THWC = np.zeros((2, HEIGHT, WIDTH, 3), dtype=np.uint8)
    video_THWC[:, : HEIGHT // 2, : WIDTH // 2, 0] = 255
    return video_THWC


def check_corner(video_TCHW: torch.Tensor, top: bool, left: bool) -> None:
    height, width = video_TCHW.shape[2] // 2, video_TCHW.shape[3] // 2
    inner = slice(4, -4)  # half the colours are stored: edges blur
    for is_top, rows in ((True, video_TCHW[:, :, :height]), (False, video_TCHW[:, :, height:])):
        for is_left, part in ((True, rows[..., :width]), (False, rows[..., width:])):
            red, green, blue = part[:, :, inner, inner].float().mean((0, 2, 3)).tolist()
            assert max(green, blue) < 20
            assert red > 230 if (is_top, is_left) == (top, left) else red < 20


def turned(path: Path, degrees: int) -> Path:
    """Write into the track header that players turn the picture by `degrees` clockwise (ISO 14496-12, 8.3.2)."""
    cosine, sine = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    content = bytearray(path.read_bytes())
    matrix_at = content.index(b"tkhd") + 4 + 40
    one = 1 << 16
    content[matrix_at : matrix_at + 36] = struct.pack(
        ">9i", cosine * one, sine * one, 0, -sine * one, cosine * one, 0, 0, 0, 1 << 30
    )
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("clockwise", "top", "left"), [(0, True, True), (90, True, False), (180, False, False), (270, False, True)]
)
def test_rotated_clips_come_upright(decoder: str, tmp_path: Path, clockwise: int, top: bool, left: bool) -> None:
    path = turned(encode(tmp_path / "c.mp4", corner()), clockwise)
    facts = scan_clip(path)
    assert (facts.width, facts.height) == (WIDTH, HEIGHT)
    video_TCHW = decode(decoder, path, indices(0, 1), facts.rotation)
    assert video_TCHW.shape[2:] == ((WIDTH, HEIGHT) if clockwise % 180 else (HEIGHT, WIDTH))
    check_corner(video_TCHW, top, left)


# --- Broken files -----------------------------------------------------------------------------------------------------


def check_bad(decoder: str, path: Path, frame_T: Indices, says: str, length: int | None = None) -> None:
    with pytest.raises(BadClip, match=says) as caught:
        decode_clip(decoder, path.parent, row_of(path, length=length), frame_T)
    assert str(path) in str(caught.value)


def test_a_missing_file(decoder: str, tmp_path: Path) -> None:
    check_bad(decoder, tmp_path / "gone.mp4", indices(0), "No such file", length=1)


@pytest.mark.parametrize("by", [-1, 1])
def test_another_length_than_the_manifest_says(decoder: str, clip: Path, by: int) -> None:
    length = clip.stat().st_size
    check_bad(decoder, clip, indices(0), f"{length} bytes, but {length + by} when", length=length + by)


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100], ids=["empty", "text"])
def test_no_video(decoder: str, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    check_bad(decoder, path, indices(0), f"{decoder} cannot decode it")


def test_no_video_stream(decoder: str, tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    check_bad(decoder, path, indices(0), "cannot decode")


def test_a_file_without_its_end(decoder: str, clip: Path, tmp_path: Path) -> None:
    """The index is at the end: nothing can be decoded."""
    path = tmp_path / "cut.mp4"
    path.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    check_bad(decoder, path, indices(0), "cannot decode")


def test_a_file_without_its_last_frames(decoder: str, noisy: Path, tmp_path: Path) -> None:
    """The index is at the front, and promises frames that are not there."""
    path = tmp_path / "cut.mp4"
    path.write_bytes(noisy.read_bytes()[: noisy.stat().st_size * 6 // 10])
    assert decode(decoder, path, indices(0, 9)).shape[0] == 2
    check_bad(decoder, path, indices(0, 29), "cut.mp4: ")


@pytest.mark.parametrize("frame", [FRAMES, FRAMES + 100])
def test_a_frame_behind_the_last(decoder: str, clip: Path, frame: int) -> None:
    check_bad(decoder, clip, indices(0, frame), "grey.mp4: ")


def test_pyav_names_the_frame_that_is_not_there(clip: Path) -> None:
    check_bad("pyav", clip, indices(0, 31, 40), "frame 31 is not there")


# --- The choice of a decoder ------------------------------------------------------------------------------------------


def test_an_unknown_decoder_is_refused() -> None:
    message = "pipeline.decoder must be one of auto, torchcodec, pyav, got 'decord'"
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_decoder("decord")


def test_pyav_is_always_there() -> None:
    assert choose_decoder("pyav") == "pyav"


def test_auto_is_torchcodec_where_it_loads() -> None:
    usable("torchcodec")
    assert choose_decoder("auto") == "torchcodec"


@pytest.fixture
def _no_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where the package does not import; the choice is not remembered from another test."""
    monkeypatch.setitem(__import__("sys").modules, "torchcodec.decoders", None)
    monkeypatch.setattr("pipelines.decode.choose_decoder", choose_decoder.__wrapped__)


@pytest.mark.usefixtures("_no_torchcodec")
def test_auto_is_pyav_where_torchcodec_does_not_load() -> None:
    assert choose_decoder.__wrapped__("auto") == "pyav"


@pytest.mark.usefixtures("_no_torchcodec")
def test_torchcodec_that_does_not_load_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"pipeline\.decoder=torchcodec does not load.*Fix: .*pipeline\.decoder=pyav"):
        choose_decoder.__wrapped__("torchcodec")
