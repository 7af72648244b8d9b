"""Decode selected frames, identified by their grey level, and reject broken or changed files."""

import io
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipelines.decoding import decode as decode_module
from pipelines.decoding import video as video_module
from pipelines.decoding.decode import choose_decoder, decode_clip
from pipelines.decoding.jpeg import decode_jpeg_bytes, jpeg_size
from pipelines.decoding.tar import TarWriter
from pipelines.decoding.video import EncodedVideo
from pipelines.errors import BadClip
from pipelines.manifest import ManifestRow
from pipelines.prepare.scan.frame_folders import scan_frames
from pipelines.prepare.scan.scan_clip import scan_clip
from tests.helpers.clips import smooth_video, turned, write_frames, write_video, write_video_apart

FRAMES, WIDTH, HEIGHT = 30, 64, 48
Indices = NDArray[np.int64]


def grey(index: int) -> int:
    return 16 + 7 * index


def encode(path: Path, video_THWC: NDArray[np.uint8], faststart: bool = False, time_T: list[int] | None = None) -> Path:
    """Encode H.264 with a key frame every ten frames and two B-frames between reference frames.

    `time_T` gives each frame's display time in units of 1/240 s. The default is 24 frames/s.
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
    """A video whose frame i has the uniform grey level `grey(i)`."""
    levels_T111 = np.array([grey(index) for index in range(FRAMES)], dtype=np.uint8)[:, None, None, None]
    return np.ascontiguousarray(np.broadcast_to(levels_T111, (FRAMES, HEIGHT, WIDTH, 3)))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of large frames with its index at the front: after truncation it opens but lacks its last frames."""
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


def decode(decoder: str, path: Path, frame_T: Indices) -> torch.Tensor:
    return decode_clip(decoder, path.parent, row_of(path), frame_T)


def row_of(path: Path) -> ManifestRow:
    return ManifestRow(path.name, 0, label=0, **asdict(scan_clip(path)))


# --- Requested frames -------------------------------------------------------------------------------------------------


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
    # Neighbouring frames differ by 7 levels.
    assert (video_TCHW.flatten(1).int() - levels_T1).abs().max() <= 2


TIMES = {
    "late start": [10 * index + 37 for index in range(FRAMES)],
    "a pause": [10 * index + 200 * (index >= 15) for index in range(FRAMES)],
    "jitter": [10 * index + 4 * (index % 3) for index in range(FRAMES)],
    "slowing down": [index * (index + 3) for index in range(FRAMES)],
}


@pytest.mark.parametrize("times", TIMES)
def test_frames_are_counted_and_not_timed(decoder: str, tmp_path: Path, times: str) -> None:
    """Select frames by index, not by timestamp: frame i is the i-th frame whatever the file's timestamps say."""
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
    """A video that is red in the top left quarter and black elsewhere."""
    video_THWC = np.zeros((2, HEIGHT, WIDTH, 3), dtype=np.uint8)
    video_THWC[:, : HEIGHT // 2, : WIDTH // 2, 0] = 255
    return video_THWC


def check_corner(video_TCHW: torch.Tensor, top: bool, left: bool) -> None:
    height, width = video_TCHW.shape[2] // 2, video_TCHW.shape[3] // 2
    # 4:2:0 stores colour at half resolution, so edges blur.
    inner = slice(4, -4)
    for is_top, rows in ((True, video_TCHW[:, :, :height]), (False, video_TCHW[:, :, height:])):
        for is_left, part in ((True, rows[..., :width]), (False, rows[..., width:])):
            red, green, blue = part[:, :, inner, inner].float().mean((0, 2, 3)).tolist()
            assert max(green, blue) < 20
            assert red > 230 if (is_top, is_left) == (top, left) else red < 20


@pytest.mark.parametrize(
    ("clockwise", "top", "left"), [(0, True, True), (90, True, False), (180, False, False), (270, False, True)]
)
def test_rotated_clips_come_upright(decoder: str, tmp_path: Path, clockwise: int, top: bool, left: bool) -> None:
    path = turned(encode(tmp_path / "c.mp4", corner()), clockwise)
    facts = scan_clip(path)
    assert (facts.width, facts.height) == (WIDTH, HEIGHT)
    video_TCHW = decode(decoder, path, indices(0, 1))
    assert video_TCHW.shape[2:] == ((WIDTH, HEIGHT) if clockwise % 180 else (HEIGHT, WIDTH))
    check_corner(video_TCHW, top, left)


# --- Every kind of file -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A container, an encoder and the codec name that the scan must report."""

    suffix: str
    encoder: str
    codec: str
    pix_fmt: str = "yuv420p"
    height: int = 48
    width: int = 64
    options: dict[str, str] = field(default_factory=dict)


ALT_REF = {
    "deadline": "good",
    "cpu-used": "4",
    "auto-alt-ref": "1",
    "lag-in-frames": "16",
    "arnr-maxframes": "5",
    "b": "60k",
}
KINDS = {
    "h264": Kind(".mp4", "libx264", "h264"),
    "h264 of 10 bits": Kind(".mp4", "libx264", "h264", "yuv420p10le"),
    "h264 4:4:4, odd": Kind(".mkv", "libx264", "h264", "yuv444p", 47, 63),
    "h264 grey": Kind(".mp4", "libx264", "h264", "gray", options={"crf": "6"}),
    "hevc": Kind(".mp4", "libx265", "hevc", options={"x265-params": "log-level=none:pools=1"}),
    "hevc of 10 bits": Kind(
        ".mp4", "libx265", "hevc", "yuv420p10le", options={"x265-params": "log-level=none:pools=1"}
    ),
    "vp9, odd": Kind(
        ".webm", "libvpx-vp9", "vp9", height=47, width=63, options={"cpu-used": "8", "crf": "10", "b": "0"}
    ),
    "vp9 with hidden frames": Kind(".webm", "libvpx-vp9", "vp9", options=ALT_REF | {"b": "200k"}),
    "vp8": Kind(".webm", "libvpx", "vp8", options=ALT_REF | {"b": "200k"}),
    "av1": Kind(".mp4", "libsvtav1", "libdav1d", height=64, options={"preset": "12", "crf": "20"}),
    "mjpeg": Kind(".avi", "mjpeg", "mjpeg", "yuvj420p", 47, 63, options={"qmin": "2", "qmax": "2"}),
    "mpeg4 with B-frames": Kind(".avi", "mpeg4", "mpeg4", options={"bf": "2", "qmin": "2", "qmax": "3"}),
    "mpeg2": Kind(".mpg", "mpeg2video", "mpeg2video", options={"qmin": "2", "qmax": "3"}),
    "mpeg2 with B-frames": Kind(".mpg", "mpeg2video", "mpeg2video", options={"bf": "2", "qmin": "2", "qmax": "3"}),
    "h264 in a transport stream": Kind(
        ".ts", "libx264", "h264", options={"x264-params": "bframes=2:b-adapt=0:keyint=15"}
    ),
    "h264 in flv": Kind(".flv", "libx264", "h264", options={"x264-params": "bframes=2:b-adapt=0:keyint=15"}),
    "wmv": Kind(".wmv", "wmv2", "wmv2", options={"qmin": "2", "qmax": "3"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Scan and both decoders count the same frames and return the frames that were written."""
    kind = KINDS[name]
    if kind.encoder not in av.codecs_available:
        pytest.skip(f"PyAV was built without the encoder {kind.encoder}")
    video_THWC = smooth_video(40, kind.height, kind.width)
    path = tmp_path / f"clip{kind.suffix}"
    write = write_video_apart if kind.encoder == "libsvtav1" else write_video
    write(path, video_THWC, kind.encoder, kind.pix_fmt, kind.options)
    row = row_of(path)
    assert (row.num_frames, row.codec, row.width, row.height) == (40, kind.codec, kind.width, kind.height)
    if kind.pix_fmt == "gray":
        # The encoder takes levels 0 to 255 and tags them as limited range (16 to 235), so both decoders expand them.
        video_THWC = (video_THWC @ np.array([[0.299], [0.587], [0.114]]) - 16) * 255 / 219 * np.ones(3)
    # The smallest mean difference between neighbouring frames.
    step = np.abs(np.diff(video_THWC.astype(float), axis=0)).mean((1, 2, 3)).min()
    frames = (1, 7, 12, 20, 27, 33, 39)
    expected_TCHW = torch.from_numpy(video_THWC[list(frames)]).permute(0, 3, 1, 2).float()
    decoded = {decoder: decode(usable(decoder), path, indices(*frames)).float() for decoder in ("pyav", "torchcodec")}
    for video_TCHW in decoded.values():
        assert video_TCHW.shape == expected_TCHW.shape
        assert (video_TCHW - expected_TCHW).abs().mean((1, 2, 3)).max() < 0.8 * step
    assert (decoded["pyav"] - decoded["torchcodec"]).abs().mean() < 1.5
    packed = pack(tmp_path / "shard.tar", path, row)
    for decoder, video_TCHW in decoded.items():
        assert torch.equal(decode_clip(decoder, tmp_path, packed, indices(*frames)), video_TCHW.byte())
    # For a single frame torchcodec takes another seek path.
    for frame in frames:
        one_TCHW = decode("torchcodec", path, indices(frame)).float()
        assert (one_TCHW[0] - expected_TCHW[frames.index(frame)]).abs().mean() < 0.8 * step


def pack(shard: Path, path: Path, row: ManifestRow) -> ManifestRow:
    """Store the clip as the second member of a shard."""
    with open(shard, "wb") as file:
        writer = TarWriter(file)
        writer.add("first.cls", b"1")
        offset = writer.add(f"second{path.suffix}", path.read_bytes())
    return replace(row, path=shard.name, offset=offset)


@pytest.mark.parametrize(("name", "by"), [("h264", "torchcodec"), ("vp9, odd", "torchcodec"), ("mjpeg", "pyav")])
def test_torchcodec_decodes_what_it_can_index(
    name: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable("torchcodec")
    kind = KINDS[name]
    video_THWC = smooth_video(8, kind.height, kind.width)
    path = write_video(tmp_path / f"clip{kind.suffix}", video_THWC, kind.encoder, kind.pix_fmt, kind.options)
    assert torchcodec_or_pyav(path, monkeypatch) == by


def torchcodec_or_pyav(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the decoder that decodes a file when torchcodec is requested."""
    used, real = ["torchcodec"], decode_module._decode_pyav

    def spy(video: EncodedVideo, row: ManifestRow, frame_T: Indices) -> torch.Tensor:
        used.append("pyav")
        return real(video, row, frame_T)

    with monkeypatch.context() as patch:
        patch.setattr(decode_module, "_decode_pyav", spy)
        decode("torchcodec", path, indices(0, 7))
    return used[-1]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg program: install it (apt-get install ffmpeg)")
def test_packets_that_show_no_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fall back to PyAV for VP8 files with hidden reference frames, each of which torchcodec counts as a frame.

    The two-pass encoder of libvpx makes such frames.
    """
    usable("torchcodec")
    video_THWC = smooth_video(96)
    video_THWC[48:] = video_THWC[48:, ::-1]
    # A lossless codec, because x264 does not always give the same pixels.
    path = write_video(tmp_path / "clip.mkv", video_THWC, "ffv1")
    for number in ("1", "2"):
        output = ["-f", "null", "-"] if number == "1" else [str(tmp_path / "clip.webm")]
        two_pass = ["-pass", number, "-passlogfile", str(tmp_path / "log")]
        encoder = [
            "-c:v",
            "libvpx",
            *(part for key, value in ALT_REF.items() for part in (f"-{key}", value)),
            "-b:v",
            "200k",
            # With several threads, timing decides whether a frame is hidden.
            "-threads",
            "1",
        ]
        subprocess.run(["ffmpeg", "-v", "error", "-y", "-i", str(path), *encoder, *two_pass, *output], check=True)
    path = tmp_path / "clip.webm"
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) > 96
    assert row_of(path).num_frames == 96
    assert torchcodec_or_pyav(path, monkeypatch) == "pyav"
    video_TCHW = decode("torchcodec", path, indices(20, 60, 95))
    assert torch.equal(video_TCHW, decode("pyav", path, indices(20, 60, 95)))
    error_FT = (
        (video_TCHW[None].float() - torch.from_numpy(video_THWC).permute(0, 3, 1, 2)[:, None]).abs().mean((2, 3, 4))
    )
    for wanted, error_F in zip((20, 60, 95), error_FT.T, strict=True):
        assert error_F[wanted] <= 1.05 * error_F[error_F.argmin()]


# --- Folders of JPEG frames -------------------------------------------------------------------------------------------


@pytest.fixture
def frames_row(tmp_path: Path) -> ManifestRow:
    """Frames 0 to 9, numbered from 1, in a folder whose name looks like a pattern."""
    series, facts = scan_frames(write_frames(tmp_path / "50%d", smooth_video(10)))
    return ManifestRow(f"50%d/{series.pattern}", series.first, label=0, **asdict(facts))


def test_jpeg_frames_come_as_asked_for(tmp_path: Path, frames_row: ManifestRow) -> None:
    expected_TCHW = torch.from_numpy(smooth_video(10)).permute(0, 3, 1, 2).float()
    for frames in ((0, 9, 4), (2, 2, 2), tuple(range(10))):
        # JPEG frames use neither decoder.
        for decoder in ("pyav", "torchcodec"):
            video_TCHW = decode_clip(decoder, tmp_path, frames_row, indices(*frames))
            assert video_TCHW.dtype == torch.uint8
            assert (video_TCHW.float() - expected_TCHW[list(frames)]).abs().mean((1, 2, 3)).max() < 2


def test_only_the_frames_asked_for_are_opened(tmp_path: Path, frames_row: ManifestRow) -> None:
    (tmp_path / "50%d" / "00005.jpg").write_bytes(b"")
    assert len(decode_clip("pyav", tmp_path, frames_row, indices(0, 3, 5))) == 3
    with pytest.raises(BadClip, match="00005.jpg: the file is empty"):
        decode_clip("pyav", tmp_path, frames_row, indices(0, 4))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_jpeg_of_any_colours_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image_HWC = smooth_video(1)[0]
    Image.fromarray(image_HWC).convert(mode).save(tmp_path / "1.jpg", quality=95)
    image_CHW = decode_jpeg_bytes("1.jpg", (tmp_path / "1.jpg").read_bytes())
    expected_HWC = np.asarray(Image.fromarray(image_HWC).convert(mode).convert("RGB")).astype(float)
    assert image_CHW.shape == (3, 48, 64) and image_CHW.dtype == torch.uint8
    assert np.abs(image_CHW.permute(1, 2, 0).numpy() - expected_HWC).mean() < 3


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "00004.jpg: No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), "00004.jpg: does not decode .Image is incomplete"),
        (lambda path: shutil.copyfile(__file__, path), "00004.jpg: not a JPEG file"),
        (lambda path: Image.new("RGB", (32, 32)).save(path), "00004.jpg: 32x32, but 64x48 when the manifest was made"),
    ],
)
def test_broken_jpeg_frames(
    tmp_path: Path, frames_row: ManifestRow, spoil: Callable[[Path], object], says: str
) -> None:
    spoil(tmp_path / "50%d" / "00004.jpg")
    with pytest.raises(BadClip, match=says):
        decode_clip("pyav", tmp_path, frames_row, indices(0, 3))


@pytest.mark.parametrize("frame", [-1, 10])
def test_jpeg_frames_outside_of_the_clip(tmp_path: Path, frames_row: ManifestRow, frame: int) -> None:
    (tmp_path / "50%d" / "00011.jpg").touch()
    with pytest.raises(BadClip, match=f"frame {frame} of a clip of 10"):
        decode_clip("pyav", tmp_path, frames_row, indices(frame))


# --- Broken files -----------------------------------------------------------------------------------------------------


def check_bad(decoder: str, path: Path, frame_T: Indices, says: str, length: int | None = None) -> None:
    """Check that decoding fails with BadClip; `length` is the manifest's file length (default: the file's own)."""
    size = path.stat().st_size if length is None else length
    row = ManifestRow(path.name, 0, size, 0, FRAMES, "h264", WIDTH, HEIGHT, 0)
    with pytest.raises(BadClip, match=says) as caught:
        decode_clip(decoder, path.parent, row, frame_T)
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
    check_bad(decoder, path, indices(0), "no video stream")


def test_a_file_without_its_end(decoder: str, clip: Path, tmp_path: Path) -> None:
    """Reject a truncated file whose index was at the end, so that no frame decodes."""
    path = tmp_path / "cut.mp4"
    path.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    check_bad(decoder, path, indices(0), "cannot decode")


def test_a_file_without_its_last_frames(decoder: str, noisy: Path, tmp_path: Path) -> None:
    """Reject a truncated file whose index, at the front, lists frames that are missing."""
    path = tmp_path / "cut.mp4"
    path.write_bytes(noisy.read_bytes()[: noisy.stat().st_size * 6 // 10])
    whole = replace(row_of(noisy), path=path.name, length=path.stat().st_size)
    assert decode_clip(decoder, path.parent, whole, indices(0, 9)).shape[0] == 2
    check_bad(decoder, path, indices(0, 29), "cut.mp4: ")


@pytest.mark.parametrize("frame", [FRAMES, FRAMES + 100])
def test_a_frame_behind_the_last(decoder: str, clip: Path, frame: int) -> None:
    check_bad(decoder, clip, indices(0, frame), "grey.mp4: ")


def test_pictures_of_another_size_take_no_memory_for_their_pixels(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reject a file of the right length but ten times the width before any frame becomes an array."""
    monkeypatch.setattr("av.VideoFrame.to_ndarray", lambda *_, **__: pytest.fail("pixels were made"), raising=True)
    path = write_video(tmp_path / "wide.mp4", smooth_video(FRAMES, HEIGHT, 10 * WIDTH))
    check_bad(decoder, path, indices(0), "640x48, but 64x48 when the manifest was made")


def test_pictures_beyond_the_limit_are_refused_before_they_are_decoded(
    decoder: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = row_of(clip)
    monkeypatch.setattr(video_module, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(BadClip, match="grey.mp4: images of 64x48, more than 3071 pixels. Fix: scale the clip down"):
        scan_clip(clip)
    with pytest.raises(BadClip, match="images of 64x48"):
        decode_clip(decoder, clip.parent, replace(row, path=clip.name, fast_seek=False), indices(0))
    (path,) = write_frames(tmp_path / "frames", smooth_video(1)).iterdir()
    with pytest.raises(BadClip, match="00001.jpg: images of 64x48"):
        decode_jpeg_bytes(str(path), path.read_bytes())


def test_pictures_that_outgrow_the_limit_later_are_refused(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let FFmpeg reject images that exceed the limit later in the file, before it allocates memory for them."""
    monkeypatch.setattr(video_module, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    monkeypatch.setattr(video_module, "check_pixels", lambda *_: None)
    with pytest.raises(BadClip, match="grey.mp4: does not decode"):
        scan_clip(clip)


@settings(max_examples=40)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    options=st.fixed_dictionaries(
        {"progressive": st.booleans(), "comment": st.binary(max_size=99), "exif": st.binary(max_size=99)}
    ),
)
def test_the_size_of_a_jpeg_is_that_of_its_pixels(width: int, height: int, mode: str, options: dict[str, Any]) -> None:
    content = io.BytesIO()
    Image.new(mode, (width, height)).save(content, format="JPEG", **options)
    assert jpeg_size("a.jpg", content.getvalue()) == (width, height)


@given(st.binary(max_size=400), st.booleans())
def test_the_size_of_anything_is_a_size_or_a_bad_clip(content: bytes, head: bool) -> None:
    with suppress(BadClip):
        width, height = jpeg_size("a.jpg", b"\xff\xd8\xff" * head + content)
        assert 0 <= width < 1 << 16 and 0 <= height < 1 << 16


def test_pyav_names_the_frame_that_is_not_there(clip: Path) -> None:
    check_bad("pyav", clip, indices(0, 31, 40), "frame 31 is missing")


# --- Choice of the decoder --------------------------------------------------------------------------------------------


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
    """Make torchcodec fail to import, and bypass the cached choice of an earlier test."""
    monkeypatch.setitem(__import__("sys").modules, "torchcodec.decoders", None)
    monkeypatch.setattr("pipelines.decoding.decode.choose_decoder", choose_decoder.__wrapped__)


@pytest.mark.usefixtures("_no_torchcodec")
def test_auto_is_pyav_where_torchcodec_does_not_load() -> None:
    assert choose_decoder.__wrapped__("auto") == "pyav"


@pytest.mark.usefixtures("_no_torchcodec")
def test_torchcodec_that_does_not_load_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"pipeline\.decoder=torchcodec does not load.*Fix: .*pipeline\.decoder=pyav"):
        choose_decoder.__wrapped__("torchcodec")
