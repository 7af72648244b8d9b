"""Clips stored as JPEG images: their codecs, and the modality of a codec."""

from pipelines.stream.modality import FLOW, RGB

JPEG_FRAMES = "jpeg-frames"
"""The codec of a clip stored as one JPEG image per RGB frame."""
JPEG_FLOW = "jpeg-flow"
"""The codec of optical flow stored as two grey JPEG images per flow field, x and y, as for Something-Something v1."""
JPEG_FLOW_RG = "jpeg-flow-rg"
"""The codec of optical flow stored as one colour JPEG image per flow field, x in red and y in green, as the official TSM code
reads it for Something-Something v2."""
IMAGES_PER_FRAME = {JPEG_FRAMES: 1, JPEG_FLOW: 2, JPEG_FLOW_RG: 1}
"""Images of a frame, or of a flow field, by codec. Clips with other codecs are videos."""
JPEG_COLOURS = ("bt470bg", "pc")
"""The colour space and range of JPEG images (JFIF)."""
COMPONENT = "{xy}"
"""What stands for `x` or `y` in the file name of a JPEG_FLOW clip: `flow_{xy}_%05d.jpg`."""


def modality_of(codec: str) -> str:
    """Return the modality of the clips with this codec."""
    return FLOW if codec in (JPEG_FLOW, JPEG_FLOW_RG) else RGB
