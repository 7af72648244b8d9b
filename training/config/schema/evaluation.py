"""Settings of evaluations: the views of a clip, and the files that evaluate.py writes."""

from dataclasses import dataclass, field


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
    split: str = "val"
    """Clips that evaluate.py shows the network: val, or test, which may have no labels (data.test)."""
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
    ensemble_average: str = "logits"
    """What the ensemble averages: logits, as the official code does by default, or softmax."""
    distances: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Frame distances of evaluation=stream: every frame, every second one ..."""
    beside: list[str] = field(default_factory=list)
    """Other runs whose early recognition evaluation=stream shows beside the run's: folders, as --run takes them."""
