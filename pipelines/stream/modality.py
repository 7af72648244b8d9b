"""The modalities of clips: RGB frames, or the optical flow between them."""

RGB, FLOW = "rgb", "flow"

FRAMES_PER_SEGMENT = {RGB: 1, FLOW: 5}
"""Consecutive frames that each segment of a clip gives (L): the official code's. A frame of a flow clip is a flow field, the
motion from one video frame to the next, with the components x and y."""

CHANNELS_PER_FRAME = {RGB: 3, FLOW: 2}


def channels_of(modality: str) -> int:
    """Return the channels of a segment as the network gets it: RGB, or x1 y1 x2 y2 ... of its flow fields."""
    return FRAMES_PER_SEGMENT[modality] * CHANNELS_PER_FRAME[modality]
