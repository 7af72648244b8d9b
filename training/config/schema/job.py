"""One job: its processes, its records and checkpoints, and its plan."""

from dataclasses import dataclass, field


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
    horovod_cycle_ms: float | None = None
    """Time between two cycles of Horovod, in which ranks agree on the gradients to reduce; null: Horovod's own (1)."""
    horovod_fusion_mib: float | None = None
    """Gradients that Horovod reduces in one message, at most; 0: each by itself; null: Horovod's own (128)."""
    horovod_cache: int | None = None
    """Agreements that Horovod remembers, so that ranks need not agree again; 0: none; null: Horovod's own (1024)."""
    horovod_hierarchical: bool | None = None
    """Horovod reduces within nodes first, then between them; null: Horovod's own (false, one NCCL ring)."""
    horovod_timeline: str | None = None
    """File for Horovod's timeline of all messages, which rank 0 writes (chrome://tracing reads it); null: none."""


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
    tensorboard: bool = False
    """Also log to TensorBoard, in the run folder's `tensorboard`; needs the package (the extra tensorboard)."""
    profile_steps: list[int] = field(default_factory=list)
    """First and last step, from 0, that rank 0 records with torch's profiler, for the run folder's `profile`; empty: none."""


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
class PlanConfig:
    """Settings that only plan.py reads."""

    world_size: int | None = None
    """World size to plan for if distributed.world_size is null; null: 1."""
    step_s: float | None = None
    """Measured seconds per step at this world size, instead of the simulated ones; checked against the device's peak."""
    experience: float | None = None
    """Published efficiency over the simulator's, by which it divides step times; null: the cluster's figure; 1: none."""
    prepared: bool = True
    """The clips decode fast: JPEG frames, or videos of `prepare.py transcode`. false: videos as downloaded."""
    sweep: list[int] = field(default_factory=list)
    """World sizes to compare on the cluster."""
    html: str | None = None
    """Write the comparison of plan.sweep to this file, as a page with plots."""
    json: str | None = None
    """Write the plan to this file too."""
    write_config: bool = False
    """Write the run's config.yaml if the plan has no problems, for `train.py --run FOLDER`."""
    calibrate: str | None = None
    """Instead of a plan, measure this machine and write conf/cluster/NAME.yaml; also typed as calibrate=NAME."""
    plot: str | None = None
    """Plot the learning rate to this file (.png, .svg, .pdf)."""
