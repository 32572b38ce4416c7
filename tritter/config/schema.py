"""The validated record of a run: one frozen dataclass per config group.

The defaults live in `conf/`, nowhere else; field metadata says what a value may be:
`choices`, or limits `minimum`, `maximum` (inclusive), `above`, `below` (exclusive).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tritter.limits import (
    MAX_LAYERS,
    MAX_PARAMETERS,
    MAX_POSITIONS,
    MAX_SEED,
    MAX_WIDTH,
)

if TYPE_CHECKING:
    from tritter.config.run_text import RunText
    from tritter.expansion import ExpansionSpec


def bounded(
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Return a required number field with these limits in its metadata."""
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    return field(metadata={name: limit for name, limit in limits.items() if limit is not None})


def chosen(choices: Sequence[str]) -> Any:
    """Return a required text field that takes one of `choices`."""
    return field(metadata={"choices": tuple(choices)})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The base model's architecture, in the names of Hugging Face configs."""

    model_type: str = chosen(("llama",))
    hidden_size: int = bounded(minimum=1, maximum=MAX_WIDTH)
    intermediate_size: int = bounded(minimum=1, maximum=MAX_WIDTH)
    num_hidden_layers: int = bounded(minimum=1, maximum=MAX_LAYERS)
    num_attention_heads: int = bounded(minimum=1, maximum=MAX_WIDTH)
    num_key_value_heads: int = bounded(minimum=1, maximum=MAX_WIDTH)
    tie_word_embeddings: bool
    rms_norm_eps: float = bounded(above=0)
    rope_theta: float = bounded(above=0)
    max_position_embeddings: int = bounded(minimum=2, maximum=MAX_POSITIONS)
    initializer_range: float = bounded(above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointModelConfig:
    """A checkpoint that stands in for a base of our own, with its own tokenizer.

    Args:
        path: a folder, absolute once validated, or a hub id.
    """

    model_type: str = chosen(("hf",))
    path: str


# Domain → absolute paths (files, folders, globs) and built-in texts, in plain containers: they
# are part of the fingerprint, which is JSON.
TextSources = dict[str, list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """How text becomes batches, and the text itself: here that of the Python installation.

    Args:
        validation_fraction: None: that of the checkpoint's lineage, or a fifth of a new one.
    """

    source: str = chosen(("stdlib",))
    # 256 bytes and the end-of-text token are the least that byte-level BPE holds
    vocab_size: int = bounded(minimum=257, maximum=1_000_000)
    sequence_length: int = bounded(minimum=2)
    batch_size: int = bounded(minimum=1)
    validation_fraction: float | None = bounded(above=0, below=1)

    @property
    def old_sources(self) -> TextSources:
        return {"prose": ["stdlib:prose"]}

    @property
    def new_sources(self) -> TextSources:
        return {"code": ["stdlib:code"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDataConfig(DataConfig):
    """Text of one's own.

    Args:
        old: None: what the checkpoint learned, if anything; empty: nothing.
    """

    source: str = chosen(("text",))
    text_field: str
    old: TextSources | None
    new: TextSources

    @property
    def old_sources(self) -> TextSources:
        return self.old or {}

    @property
    def new_sources(self) -> TextSources:
        return self.new


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """One training: of the base (`pretraining`) or of the grown model (`training`)."""

    learning_rate: float = bounded(above=0)
    warmup_ratio: float = bounded(minimum=0, below=1)
    max_steps: int = bounded(minimum=1)
    schedule: str = chosen(("constant", "cosine", "wsd"))
    decay_ratio: float = bounded(above=0, maximum=1)
    minimum_ratio: float = bounded(minimum=0, maximum=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """When a grown model is kept."""

    enabled: bool
    strict: bool
    retention: float = bounded(minimum=0)
    confidence: float = bounded(above=0.5, maximum=0.999)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """How often a run expands: once, or round after round until it has a size.

    Args:
        target_params: the size; a count, in words such as 2M until it is read.
        strategy: as in `tritter plan`; None: `auto` among the methods of `expansion`.
    """

    target_params: int | None = bounded(minimum=1, maximum=MAX_PARAMETERS)
    max_rounds: int | None = bounded(minimum=1)
    strategy: str | None = chosen(("auto", "depth_first", "width_first", "balanced"))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """The optimiser and everything of it but the learning rate."""

    name: str = chosen(("adamw",))
    beta1: float = bounded(minimum=0, below=1)
    beta2: float = bounded(minimum=0, below=1)
    eps: float = bounded(above=0)
    weight_decay: float = bounded(minimum=0)
    carry: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """What Lightning's Trainer is given."""

    accelerator: str = chosen(("cpu", "gpu", "auto"))
    devices: int = bounded(minimum=1)
    strategy: str = chosen(("auto", "ddp"))
    precision: str = chosen(("32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"))
    gradient_clip_val: float | None = bounded(above=0)
    log_every_n_steps: int = bounded(minimum=1)
    max_non_finite_steps: int = bounded(minimum=0)
    save_every_n_steps: int = bounded(minimum=0)
    progress: str = chosen(("auto", "on", "off"))
    check_memory: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerConfig:
    """Where metrics go besides metrics.csv, which is always written."""

    wandb: str = chosen(("off", "offline", "online"))
    project: str
    group: str | None
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """How domains are scored and sampled."""

    max_tokens_per_document: int = bounded(minimum=2)
    batch_size: int = bounded(minimum=1)
    sample_tokens: int = bounded(minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """What a training asks of the routers of a model with experts."""

    auxiliary_loss: float = field(default=0.01, metadata={"minimum": 0})
    z_loss: float = field(default=1e-3, metadata={"minimum": 0})
    bias_update_rate: float = field(default=0.0, metadata={"minimum": 0, "below": 1})
    hold_old: float = field(default=0.0, metadata={"minimum": 0})
    capacity_factor: float = field(default=1.25, metadata={"above": 0})


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptationConfig:
    """The two trainings that open appended experts: of the routers, then of the experts."""

    router_update: str = field(
        default="fine_tune", metadata={"choices": ("fine_tune", "retrain", "frozen")}
    )
    router_epochs: int = field(default=3, metadata={"minimum": 1})
    router_max_steps: int | None = field(default=100, metadata={"minimum": 1})
    router_learning_rate: float = field(default=3e-3, metadata={"above": 0})
    encouragement: float = field(default=0.1, metadata={"minimum": 0})
    anneal_steps: int | None = field(default=None, metadata={"minimum": 1})
    freeze_base: bool = True
    unfreeze_after: int | None = field(default=None, metadata={"minimum": 1})
    distill_steps: int = field(default=100, metadata={"minimum": 1})
    distill_temperature: float = field(default=2.0, metadata={"above": 0})


@dataclass(frozen=True, slots=True)
class EWCOptions:
    """EWC (Kirkpatrick et al. 2017, arXiv 1612.00796) and how its Fisher is estimated."""

    name: ClassVar[str] = "ewc"
    ewc_lambda: float = field(default=3e4, metadata={"minimum": 0})
    normalise: str = field(default="none", metadata={"choices": ("none", "mean")})
    estimator: str = field(default="empirical", metadata={"choices": ("empirical", "true")})
    num_sequences: int = field(default=256, metadata={"minimum": 1})
    carry: str = field(default="diagonal", metadata={"choices": ("diagonal", "penalty_preserving")})


@dataclass(frozen=True, slots=True)
class L2SPOptions:
    """L2-SP (Li et al. 2018, arXiv 1802.01483): weight of the pull towards the start."""

    name: ClassVar[str] = "l2sp"
    l2sp_lambda: float = field(default=0.03, metadata={"minimum": 0})


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """Replay: the exact share of each batch that comes from the old domains.

    Args:
        weights: old domain → its weight among them; 1 where it is not named.
    """

    name: ClassVar[str] = "replay"
    fraction: float = field(default=0.25, metadata={"minimum": 0, "below": 1})
    weights: Mapping[str, float] | None = field(default=None, metadata={"minimum": 0})


ForgettingOptions = EWCOptions | L2SPOptions | ReplayOptions
FORGETTING_OPTIONS: dict[str, type[ForgettingOptions]] = {
    options.name: options for options in (EWCOptions, L2SPOptions, ReplayOptions)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything a run is asked to do; `expansion` and `forgetting` are ordered.

    `text` is worked out from `model`, `data` and what the checkpoint at `model.path` learned.

    `expansion` holds records of `tritter.expansion.EXPANSIONS`; they are not imported here,
    because that would import torch.
    """

    seed: int
    control: bool
    cache_dir: Path
    resume: str | None
    model: ModelConfig | CheckpointModelConfig
    data: DataConfig
    text: "RunText"
    expansion: "tuple[ExpansionSpec, ...]"
    forgetting: tuple[ForgettingOptions, ...]
    pretraining: TrainingConfig
    training: TrainingConfig
    gate: GateConfig
    pipeline: PipelineConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    evaluation: EvaluationConfig
    routing: RoutingConfig
    adaptation: AdaptationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RootValues:
    """The keys of the root that belong to no group, as they stand in config.yaml."""

    seed: int = bounded(minimum=0, maximum=MAX_SEED)
    control: bool
    cache_dir: str | None
    resume: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDataValues(DataConfig):
    """The keys of `data=text` but for its paths, which take several forms."""

    source: str = chosen(("text",))
    text_field: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Variants:
    """A section whose options have different keys, told apart by one that they share."""

    key: str
    records: dict[str, type]


SECTIONS: dict[str, type | Variants] = {
    "model": Variants(
        key="model_type", records={"llama": ModelConfig, "hf": CheckpointModelConfig}
    ),
    "data": Variants(key="source", records={"stdlib": DataConfig, "text": TextDataConfig}),
    "pretraining": TrainingConfig,
    "training": TrainingConfig,
    "gate": GateConfig,
    "pipeline": PipelineConfig,
    "optimizer": OptimizerConfig,
    "trainer": TrainerConfig,
    "logger": LoggerConfig,
    "evaluation": EvaluationConfig,
    "routing": RoutingConfig,
    "adaptation": AdaptationConfig,
}
METHOD_GROUPS = ("expansion", "forgetting")
