"""The typed configuration: what every key means, its default, and the checks that need no data and no process group."""

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class ModelConfig:
    backbone: str = "resnet50"
    """resnet18, resnet34, resnet50, resnet101 or mobilenet_v2."""
    shift: str = "residual"
    """Where the temporal shift stands: residual, block (ResNets alone), or none (TSN)."""
    direction: str = "both"
    """both (offline) or past (online, uni-directional)."""
    fold_div: int = 8
    """1/fold_div of the channels moves in each direction."""
    num_frames: int = 8
    """Frames that the network sees of each clip."""
    temporal_pool: bool = False
    """Halve the frames in front of layer2 (ResNets alone)."""
    non_local: bool = False
    """Add the five non-local blocks (resnet50 alone)."""
    dropout: float = 0.5
    """Dropout in front of the classifier; masks are a function of (seed, step, slot)."""
    partial_bn: bool = False
    """Freeze every batch norm but the first, statistics and parameters: for fine-tuning from few clips."""
    zero_init_gamma: bool = False
    """Start the last batch norm of each residual block at 0 (ResNets from random weights alone)."""
    init: str = "random"
    """First weights: random, imagenet (torchvision's, from torch hub's cache), or a file or checkpoint folder."""
    init_sha256: str | None = None
    """Refuse to start from another file; of a checkpoint folder, that of its network.safetensors. null: take what is there."""


@dataclass
class DataConfig:
    name: str = MISSING
    """What reports call the data set."""
    root: str = MISSING
    """Folder of the manifests, relative to the checkout or absolute."""
    train: str = "train.arrow"
    """Manifest of the training clips, in root."""
    val: str = "val.arrow"
    """Manifest of the validation clips, in root."""
    prepare: str = ""
    """The command that makes the data set: named when a manifest is missing."""
    num_classes: int = MISSING
    """Must be the number of classes in the manifests."""
    train_clips: int | None = None
    """Training clips as published: plan.py counts with them while there is no manifest; nothing else reads this."""
    mirrored_words: list[list[str]] = field(default_factory=list)
    """Pairs of words that a mirror exchanges in class names ([[left, right]]), for pipeline.flip=relabel."""
    max_bad_clips: int = 0
    """Undecodable clips tolerated in a run (training replaces them, evaluation reports them missing) before it ends."""


@dataclass
class PipelineConfig:
    loader: str = "torch"
    """torch (processes that decode) or dali (NVIDIA DALI, on the device that trains)."""
    dali_threads: int | None = None
    """DALI's threads in each training process; null: half of the cores that the process may use."""
    decoder: str = "auto"
    """auto (torchcodec where it loads, else pyav), torchcodec or pyav; under DALI for what it does not know."""
    workers: int = 2
    """Decoding processes for each training process; 0 decodes in the training process."""
    prefetch: int = 2
    """Batches that each worker decodes ahead."""
    size: int = 224
    """Side in pixels of the network's input."""
    sampling: str = "uniform"
    """Frames of a training clip: uniform (one from each equal part) or dense (at a fixed distance, from 64 neighbours)."""
    crop_scales: list[float] = field(default_factory=lambda: [1.0, 0.875, 0.75, 0.66])
    """Sides of the random training crop, as parts of the shorter side of the frame."""
    flip: str = "off"
    """off, on (mirror half of the training clips) or relabel (and exchange labels by data.mirrored_words). In YAML: "off"."""


@dataclass
class BatchConfig:
    global_batch: int = MISSING
    """Clips in a step over all processes: decides the result."""
    bn_group: int | None = None
    """Clips that share batch-norm statistics; null: the whole global batch."""
    micro_batch: int | None = None
    """The most clips that a process takes at once; null: its whole part. More accumulation, same result."""
    precise_bn_steps: int = 0
    """Steps of training clips over which an evaluation averages batch-norm statistics anew; 0: keep the running averages."""

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
    """The global batch that lr is meant for."""
    scaling: str = "linear"
    """How the peak rate follows from lr, base_batch and the global batch: linear, sqrt or none."""
    momentum: float = 0.9
    """LAMB's first beta."""
    beta2: float = 0.999
    """Of LAMB."""
    trust_coefficient: float = 0.001
    """LARS' eta: a layer's step in parts of its weights' norm, at a rate of 1."""
    eps: float = 1e-8
    """Of LARS' trust ratio, and of LAMB's denominator (LAMB's authors: 1e-6)."""
    weight_decay: float = 1e-4
    """Decay of convolution and classifier weights; BN parameters and biases have none."""
    nesterov: bool = False
    bias_lr_multiplier: float = 1.0
    """The rate of convolution and classifier biases, in parts of the schedule's (official TSM: 2)."""
    classifier_lr_multiplier: float = 1.0
    """The rate of the classifier, likewise; its bias has both factors (official TSM: 5, and 10 for the bias)."""
    clip_norm: float | None = None
    """Clip the global gradient's norm to this; null: do not."""
    ema_decay: float | None = None
    """Evaluate an exponential moving average of the weights with this decay a step; null: the weights."""
    label_smoothing: float = 0.0
    """Part of the target that is spread over all classes (Szegedy et al., arXiv:1512.00567)."""


@dataclass
class ScheduleConfig:
    epochs: float = MISSING
    """Passes over the training clips."""
    decay: str = "cosine"
    """constant, step, cosine or poly2."""
    warmup_epochs: float = 0.0
    """Length of the gradual warm-up."""
    warmup_start: float = 0.0
    """Rate that the warm-up starts from."""
    milestones: list[float] = field(default_factory=list)
    """Epochs at which step decay multiplies the rate by factor."""
    factor: float = 0.1
    end: float = 0.0
    """Rate at the end of cosine and poly2."""


@dataclass
class NumericsConfig:
    """How numbers are computed. numerics=reference, gpu or gpu_fp16 chooses a set; dtype and amp are part of the recipe."""

    dtype: str = "float32"
    """float32, or float64 for equivalence tests."""
    amp: str = "off"
    """Autocast of training: off, bfloat16 (GPUs of compute capability 8.0 and higher) or float16 (with loss scaling)."""
    channels_last: bool = False
    """Hold images and convolution weights with channels last in memory (NHWC): what tensor cores take without a transpose."""
    tf32: bool = True
    """Let CUDA use TF32 in float32 matrix products and convolutions."""
    cudnn_benchmark: bool = True
    deterministic: bool = False
    """Bit-equal repetition at the same world, at some cost in speed."""
    max_bad_steps_in_a_row: int = 20
    """Steps with a gradient that is not finite are rolled back; so many in a row end the run. amp=float16 needs 16 in a row
    before its loss scale is down from 65536 to 1."""


@dataclass
class DistributedConfig:
    backend: str = "auto"
    """auto (horovod under horovodrun, MPI or jsrun, torch under torchrun or plain srun, else single), single, torch or horovod."""
    controller: str = "auto"
    """How Horovod's ranks find each other under srun: mpi (srun --mpi=pmix), gloo, or auto (mpi where srun offers it)."""
    device: str = "auto"
    """auto (cuda where there is one), cuda or cpu."""
    world_size: int | None = None
    """Refuse to start with any other number of processes; null: take what the launcher gives."""
    gradient_dtype: str = "float32"
    """Gradient compression in the all-reduce: float32 (none) or float16, scaled by 1/size before the sum."""
    timeout_s: float = 600.0
    """Limit of a single collective operation, and of start-up."""
    hang_timeout_s: float | None = 300.0
    """End the job, with the stacks of all ranks, when no rank has made progress for so long; null: wait forever."""


@dataclass
class LoggerConfig:
    wandb: str = "offline"
    """offline, online or disabled; rank 0 alone. metrics.jsonl is always written."""
    project: str = "tsm"
    group: str | None = None
    """wandb's group of this run, such as the restarts or seeds of one study; null: the name of the experiment."""
    tags: list[str] = field(default_factory=list)
    """wandb's tags of this run, beside the network's and the data set's names."""
    every_steps: int = 10
    """Steps between two training records."""
    diagnostics: bool = False
    """Beside each training record: norms of gradients and weights, LARS' trust ratios, the gradient noise scale."""


@dataclass
class CheckpointConfig:
    every_epochs: int = 1
    """Epochs between two checkpoints."""
    every_steps: int | None = None
    """Steps between two checkpoints, beside those of the epochs; null: only those."""
    every_minutes: float | None = None
    """The longest time without a checkpoint, by rank 0's clock, looked at with each training record; null: any."""
    keep: int = 2
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Save after each evaluation with a better top-1 than all before, and keep that checkpoint: checkpoints/best links to it."""
    allow_recipe_change: bool = False
    """Resume although the recipe differs from the checkpoint's."""
    allow_code_change: bool = False
    """Resume although code that decides numbers differs from the checkpoint's (deterministic mode: any code). Comments and
    docstrings do not count."""
    allow_no_progress: bool = False
    """Start although two restarts behind faults have not come further than the start before them."""


@dataclass
class EvaluationConfig:
    every_epochs: int = 1
    """Epochs between two evaluations; the last step is always evaluated."""
    batch: int = 16
    """Views (clips, where each has one view) that the network of each process takes at once."""
    amp: str = "off"
    """Autocast of evaluation and precise batch norm: off (numerics.dtype, whatever training used), bfloat16 or float16."""
    checkpoint: str = "newest"
    """Of a run, evaluate.py takes its newest checkpoint or its best."""
    clips: str = "validation"
    """Temporal views: validation (1, by pipeline.sampling), uniform (1, the test rule), twice (2) or dense (10)."""
    crops: int = 1
    """Spatial views: 1 (centre), 3 (left, right, centre), 5 (corners, centre) or 10 (these, mirrored too)."""
    full_resolution: bool = False
    """Crops as high as the scaled frame, which the network takes as they are: 256 where pipeline.size is 224."""
    portrait_bug: bool = False
    """Place 3 crops side by side in portrait clips too, as the official code does; false: one above the other."""
    save_logits: bool = False
    """evaluate.py writes each clip's logits to the run folder, for ensembles."""
    ensemble: list[str] = field(default_factory=list)
    """evaluate.py averages these files of saved logits, and evaluates no run."""
    ensemble_weights: list[float] = field(default_factory=list)
    """A weight for each file of the ensemble; empty: equal ones."""


@dataclass
class PlanConfig:
    """What plan.py alone reads."""

    world_size: int | None = None
    """Processes to lay the recipe out on where distributed.world_size says none; null: 1."""
    published_step_s: float | None = None
    """Seconds of a step on plan.world_size processes, as published."""
    step_s: float | None = None
    """Seconds of a step on this world, for clips and bytes a second and the length of the run; null: the published, if any."""
    json: str | None = None
    """Write the plan to this file too."""
    write_config: bool = False
    """Write the run's config.yaml, where nothing keeps it from starting: `train.py --run FOLDER` then trains by it."""
    plot: str | None = None
    """Draw the learning rate into this file; its ending says how (.png, .svg, .pdf)."""


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
    """Experiment name: part of a new run's id."""
    seed: int = 0
    """Of weights, clip order, draws and dropout."""
    outputs: str = "outputs"
    """Where run folders are made."""
    run_id: str | None = None
    """The run folder's name; a folder that exists is resumed. null: the launcher's job id, else name and time."""
    max_steps: int | None = None
    """Stop after this many steps, with a checkpoint; the schedule stays that of the whole run."""
