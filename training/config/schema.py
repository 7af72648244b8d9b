"""The typed configuration: every key with its default and meaning."""

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class ModelConfig:
    backbone: str = "resnet50"
    """resnet18, resnet34, resnet50, resnet101 or mobilenet_v2."""
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
class DataConfig:
    name: str = MISSING
    """Name of the data set in reports."""
    root: str = MISSING
    """Folder of the manifests, absolute or relative to the checkout."""
    train: str = "train.arrow"
    """Manifest of the training clips, in root."""
    val: str = "val.arrow"
    """Manifest of the validation clips, in root."""
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


@dataclass
class DistributedConfig:
    backend: str = "auto"
    """auto (horovod under horovodrun, MPI or jsrun, torch under torchrun or plain srun, else single), single, torch or horovod."""
    controller: str = "auto"
    """Horovod's controller under srun: mpi (srun --mpi=pmix), gloo, or auto (mpi if srun offers it)."""
    device: str = "auto"
    """auto (cuda if there is a GPU), cuda or cpu."""
    world_size: int | None = None
    """Expected number of processes; null: as many as the launcher starts."""
    gradient_dtype: str = "float32"
    """Gradient compression in the all-reduce: float32 (none) or float16, scaled by 1/size before the sum."""
    timeout_s: float = 600.0
    """Timeout of a single collective operation, and of start-up."""
    hang_timeout_s: float | None = 300.0
    """End the job, with the stacks of all ranks, if no rank makes progress for this long; null: wait forever."""


@dataclass
class LoggerConfig:
    wandb: str = "offline"
    """offline, online or disabled; only rank 0. metrics.jsonl is always written."""
    project: str = "tsm"
    group: str | None = None
    """wandb's group of this run, such as the restarts or seeds of one study; null: the name of the experiment."""
    tags: list[str] = field(default_factory=list)
    """wandb's tags of this run, beside the network's and the data set's names."""
    every_steps: int = 10
    """Log interval: steps between two training records."""
    diagnostics: bool = False
    """Also log norms of gradients and weights, LARS' trust ratios, and the gradient noise scale."""


@dataclass
class CheckpointConfig:
    every_epochs: int = 1
    """Epochs between two checkpoints."""
    every_steps: int | None = None
    """Also save every this many steps; null: off."""
    every_minutes: float | None = None
    """Also save at least this often (minutes, rank 0's clock, checked at each log interval); null: off."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = True
    """Save after each evaluation with the best top-1 so far, and keep that checkpoint: checkpoints/best links to it."""
    last_retry_s: float = 900.0
    """Time to keep trying to write a finished run's last checkpoint; then it is written to `second_place`."""
    second_place: str | None = None
    """Folder for a last checkpoint that the run folder cannot take; null: a new one in the temporary folder of rank 0's node."""
    allow_recipe_change: bool = False
    """Resume although the recipe differs from the checkpoint's."""
    allow_code_change: bool = False
    """Resume although code that decides numbers (deterministic mode: any code) differs. Comments and docstrings do not count."""
    allow_restart: bool = False
    """Train from step 0 although the run has checkpoints, if none of them is whole."""
    allow_no_progress: bool = False
    """Start although two restarts after faults have made no progress."""


@dataclass
class EvaluationConfig:
    every_epochs: int = 1
    """Epochs between two evaluations; the last step is always evaluated."""
    batch: int = 16
    """Batch size of each process, in views."""
    amp: str = "off"
    """Autocast of evaluation and precise batch norm: off (numerics.dtype, whatever training used), bfloat16 or float16."""
    checkpoint: str = "newest"
    """Checkpoint of a run that evaluate.py loads: newest, best, or the name of one (step-00001200)."""
    clips: str = "validation"
    """Temporal views: validation (1, by pipeline.sampling), uniform (1), twice (2), dense (10); or stream: without resets."""
    crops: int = 1
    """Spatial views: 1 (centre), 3 (left, right, centre), 5 (corners, centre) or 10 (these, mirrored too)."""
    full_resolution: bool = False
    """Crops as high as the scaled frame, not resized to pipeline.size: 256 if pipeline.size is 224."""
    portrait_bug: bool = False
    """Place 3 crops side by side in portrait clips too, as the official code does; false: one below the other."""
    save_logits: bool = False
    """evaluate.py writes each clip's logits to the run folder, for ensembles."""
    explain: int = 0
    """evaluate.py writes explain.html to the run folder: so many clips, with the logits for reversed and shuffled frames."""
    ensemble: list[str] = field(default_factory=list)
    """evaluate.py averages these files of saved logits instead of evaluating a run."""
    ensemble_weights: list[float] = field(default_factory=list)
    """A weight for each file of the ensemble; empty: equal ones."""
    distances: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Frame distances of evaluation=stream: every frame, every second one ..."""
    beside: list[str] = field(default_factory=list)
    """Other runs whose early recognition evaluation=stream shows beside the run's: folders, as --run takes them."""


@dataclass
class PlanConfig:
    """Settings that only plan.py reads."""

    world_size: int | None = None
    """World size to plan for if distributed.world_size is null; null: 1."""
    published_step_s: float | None = None
    """Published seconds per step on plan.world_size processes."""
    step_s: float | None = None
    """Seconds per step at this world size, for throughput and length of the run; null: the published ones, if any."""
    json: str | None = None
    """Write the plan to this file too."""
    write_config: bool = False
    """Write the run's config.yaml if the plan has no problems, for `train.py --run FOLDER`."""
    plot: str | None = None
    """Plot the learning rate to this file (.png, .svg, .pdf)."""


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    numerics: NumericsConfig = field(default_factory=NumericsConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    name: str = "run"
    """Name of the experiment, part of a new run's id."""
    seed: int = 0
    """Seed of weights, clip order, sampled augmentation and dropout."""
    outputs: str = "outputs"
    """Folder of the run folders."""
    run_id: str | None = None
    """Name of the run folder; an existing run resumes. null: the launcher's job id, else name and time."""
    max_steps: int | None = None
    """Stop after this many steps, with a checkpoint. The schedule stays that of the whole run."""
