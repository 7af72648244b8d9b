"""The global batch, the optimizer and its learning rate over time."""

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class BatchConfig:
    global_batch: int = MISSING
    """Clips per step over all processes. It decides the result."""
    bn_group: int | None = None
    """Clips that share BN statistics; null: the whole global batch."""
    micro_batch: str | None = None
    """Limit of clips per process and micro-step, which changes no result; null: none; auto: what the GPU's memory holds."""
    precise_bn_steps: int = 0
    """Precise BN: steps of training clips over which an evaluation recomputes BN statistics; 0: use the running averages."""

    @property
    def is_auto(self) -> bool:
        """The micro-batch is found at start-up (training.micro_batch)."""
        return self.micro_batch == "auto"

    @property
    def micro_batch_limit(self) -> int | None:
        """`micro_batch` as a number; None: no limit, or not known yet."""
        return None if self.micro_batch is None or self.is_auto else int(self.micro_batch)

    @property
    def bn_clips(self) -> int:
        """`bn_group` as a number."""
        return self.global_batch if self.bn_group is None else self.bn_group


@dataclass
class OptimizerConfig:
    name: str = "sgd"
    """sgd, lars (You et al., arXiv:1708.03888) or lamb (arXiv:1904.00962)."""
    lr: float = MISSING
    """Learning rate at a global batch of base_batch."""
    base_batch: int = MISSING
    """Global batch that lr is meant for."""
    scaling: str = "linear"
    """Rule that scales lr from base_batch to the global batch: linear, sqrt or none."""
    momentum: float = 0.9
    """Momentum; in LAMB the first beta."""
    beta2: float = 0.999
    """LAMB's second beta."""
    trust_coefficient: float = 0.001
    """LARS' eta: a layer's step relative to the norm of its weights, at a rate of 1."""
    eps: float = 1e-8
    """Added to the denominator of LARS' trust ratio, and to LAMB's (LAMB's authors: 1e-6)."""
    weight_decay: float = 1e-4
    """Weight decay of convolutions and classifier. BN parameters and biases have none."""
    nesterov: bool = False
    bias_lr_multiplier: float = 1.0
    """Factor on the learning rate of convolution and classifier biases (official TSM: 2)."""
    classifier_lr_multiplier: float = 1.0
    """Factor on the learning rate of the classifier. Its bias has both factors (official TSM: 5, and 10 for the bias)."""
    first_conv_lr_multiplier: float = 1.0
    """Factor on the learning rate of a flow network's first convolution (official TSM: 5). RGB networks do not read it."""
    clip_norm: float | None = None
    """Clip the norm of the global gradient to this; null: do not clip."""
    ema_decay: float | None = None
    """Evaluate an EMA of the weights with this decay per step; null: evaluate the weights."""
    label_smoothing: float = 0.0
    """Fraction of the target that is spread over all classes (Szegedy et al., arXiv:1512.00567)."""


@dataclass
class ScheduleConfig:
    epochs: float = MISSING
    """Passes over the training clips."""
    decay: str = "cosine"
    """constant, step, cosine or poly2."""
    warmup_epochs: float = 0.0
    """Length of the gradual warm-up."""
    warmup_start: float = 0.0
    """Learning rate at the start of the warm-up."""
    milestones: list[float] = field(default_factory=list)
    """Epochs at which step decay multiplies the rate by factor."""
    factor: float = 0.1
    end: float = 0.0
    """Learning rate at the end of cosine and poly2."""
