"""The data set, and how a clip becomes the network's input."""

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class DataConfig:
    name: str = MISSING
    """Name of the data set in reports."""
    root: str = MISSING
    """Folder of the manifests, absolute or relative to the checkout."""
    train: str = "train.arrow"
    """Manifest of the training clips, in root."""
    val: str = "val.arrow"
    """Manifest of the validation clips, in root."""
    test: str = "test.arrow"
    """Manifest of the test clips, in root, for evaluation.split=test."""
    prepare: str = ""
    """Command that prepares the data set, for the error about a missing manifest."""
    num_classes: int = MISSING
    """Number of classes; must match the manifests."""
    train_clips: int | None = None
    """Published number of training clips. Only plan.py uses it, while there is no manifest."""
    frame_rate: float | None = None
    """Frames/s of all training videos, for the distance of frames on a live stream; null: not known, or not the same."""
    mirrored_words: list[list[str]] = field(default_factory=list)
    """Pairs of words that mirroring swaps in class names ([[left, right]]), for pipeline.flip=relabel."""
    retry_s: float = 60.0
    """Time to wait for a file system that fails to read a clip (EIO, ESTALE ...), before the job ends to be requeued."""
    max_bad_clips: int = 0
    """Undecodable clips that a run tolerates before it ends. Training replaces them, evaluation reports them as missing."""


@dataclass
class PipelineConfig:
    loader: str = "torch"
    """torch (worker processes that decode) or dali (NVIDIA DALI, on the training device)."""
    dali_threads: int | None = None
    """DALI threads in each training process; null: half of the cores that the process may use."""
    decoder: str = "auto"
    """auto (torchcodec if it loads, else pyav), torchcodec or pyav. With DALI: for formats that it cannot decode."""
    workers: int = 2
    """Worker processes that decode, per training process; 0: decode in the training process."""
    prefetch: int = 2
    """Batches that each worker prefetches."""
    size: int = 224
    """Width and height of the network's input, in pixels."""
    sampling: str = "uniform"
    """Frames of a training clip: uniform (one per equal segment), dense (fixed stride in 64) or stream (for cameras)."""
    burn_in: int = 8
    """sampling=stream: frames of another clip before each training clip."""
    distances: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """sampling=stream: distances between neighbouring frames, one of which is sampled for each clip."""
    loss_from: int = 3
    """sampling=stream: first frame of a clip, counted from 1, whose logits the loss takes."""
    score_burn_in: bool = True
    """sampling=stream: the loss takes the frames of the burn-in too, as those of its own clip."""
    crop_scales: list[float] = field(default_factory=lambda: [1.0, 0.875, 0.75, 0.66])
    """Sides of the random training crop, as fractions of the frame's shorter side."""
    flip: str = "off"
    """off, on (mirror half of the training clips) or relabel (also swap labels by data.mirrored_words). Quote "off" in YAML."""
