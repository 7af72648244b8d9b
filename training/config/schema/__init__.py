"""The typed configuration: every key with its default and meaning. The modules of this folder hold its sections."""

from dataclasses import dataclass, field

from .clips import DataConfig, PipelineConfig
from .cluster import ClusterConfig
from .evaluation import EvaluationConfig
from .job import CheckpointConfig, DistributedConfig, LoggerConfig, PlanConfig
from .network import ModelConfig, NumericsConfig
from .optimization import BatchConfig, OptimizerConfig, ScheduleConfig

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "LoggerConfig",
    "ModelConfig",
    "NumericsConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "PlanConfig",
    "ScheduleConfig",
]


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
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
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
