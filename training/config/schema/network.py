"""The network, and the precision that it computes in."""

from dataclasses import dataclass


@dataclass
class ModelConfig:
    backbone: str = "resnet50"
    """One of torchvision's ResNets by its name there (resnet18 ... wide_resnet101_2), or mobilenet_v2."""
    modality: str = "rgb"
    """Input: rgb (3 channels), or flow (10 channels: x and y of 5 consecutive optical flow fields), which needs flow manifests."""
    shift: str = "residual"
    """Place of the temporal shift: residual, block (only ResNets), or none (TSN)."""
    direction: str = "both"
    """both (offline) or past (online, uni-directional)."""
    fold_div: int = 8
    """1/fold_div of the channels is shifted in each direction."""
    num_frames: int = 8
    """Frames of each clip that the network gets."""
    temporal_pool: bool = False
    """Halve the number of frames before layer2 (only ResNets)."""
    non_local: bool = False
    """Add the five non-local blocks (only resnet50)."""
    dropout: float = 0.5
    """Dropout before the classifier; masks are a function of (seed, step, slot)."""
    partial_bn: bool = False
    """Freeze statistics and parameters of every BN but the first, for fine-tuning on few clips."""
    zero_init_gamma: bool = False
    """Initialize the last BN weight of each residual block to 0 (only ResNets, from random weights)."""
    init: str = "random"
    """Initial weights: random, imagenet (torchvision's, from torch hub's cache), or a file or checkpoint folder."""
    init_sha256: str | None = None
    """Expected sha256 of that file (of a checkpoint folder: of its network.safetensors). null: do not check."""


@dataclass
class NumericsConfig:
    """Precision and memory format. numerics=reference, gpu or gpu_fp16 selects a set. dtype and amp are part of the recipe."""

    dtype: str = "float32"
    """float32, or float64 for equivalence tests."""
    amp: str = "off"
    """Autocast of training: off, bfloat16 (GPUs of compute capability 8.0 and higher) or float16 (with loss scaling)."""
    channels_last: bool = False
    """Store images and convolution weights in channels_last format (NHWC), which tensor cores use without a transpose."""
    tf32: bool = True
    """Let CUDA use TF32 in float32 matrix products and convolutions."""
    cudnn_benchmark: bool = True
    deterministic: bool = False
    """Deterministic mode: a repeated or resumed run is bit-equal at the same world size, at some cost in speed."""
    max_bad_steps_in_a_row: int = 20
    """Abort after so many skipped steps (non-finite gradients) in a row; amp=float16 may skip 16 to lower its loss scale."""
