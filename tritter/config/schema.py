"""The validated configuration of a run: one frozen dataclass per config group.

Defaults are in `conf/` only. The type of a field defines its allowed values.
"""

from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tritter.checkpoints.run_text import RunText
from tritter.core.families.presets import ModelConfig as ModelConfig
from tritter.data.options import DataConfig as DataConfig  # the import path in the docs
from tritter.evaluation.options import EvaluationConfig, GateConfig
from tritter.limits import MAX_PARAMETERS, MAX_SEED
from tritter.methods.moe_routing.options import AdaptationOptions, RoutingOptions
from tritter.options import PARSED_COUNT, Count, RunRequest, Text, options
from tritter.targets import Component, identity
from tritter.training.optimizer import OptimizerSettings
from tritter.training.options import TrainerSettings, TrainerValues, TrainingConfig

if TYPE_CHECKING:
    from tritter.core.expansions import ExpansionSpec

# Keys that `resume` does not replay from a run folder, which may be untrusted: they name a program,
# a class, a model, a folder, a server or an account, or start another run. Of data and checkpoints,
# only the run's own are replayed; they are printed first.
TYPED_ONLY = frozenset(
    {
        "cache_dir",
        "callbacks.model_checkpoint.dirpath",
        "callbacks.model_checkpoint.filename",
        "evaluation.allow_code",
        "evaluation.code_sandbox",
        "evaluation.code_sandbox_command",
        "evaluation.prompts",
        "expansion.moe.attention_from",
        "expansion.moe.experts_from",
        "expansion.moe_add.teacher",
        "expansion.vocab.tokenizer",
        "forgetting.distill.teacher",
        "logger.mlflow.save_dir",
        "logger.mlflow.tracking_uri",
        "logger.tensorboard.name",
        "logger.tensorboard.save_dir",
        "logger.tensorboard.version",
        "logger.wandb.mode",
        "optimizer.name",
        "resume",
    }
)


@options
class CheckpointModelConfig:
    """A base model loaded from a checkpoint, with the checkpoint's tokenizer.

    Args:
        path: folder (absolute after validation) or Hub id.
    """

    model_type: Literal["hf"]
    path: Text


Model = ModelConfig | CheckpointModelConfig


@options
class PipelineConfig:
    """How often a run expands its model, and which checkpoints it keeps.

    Args:
        target_params: parameter count to grow to; may be written as 2M.
        max_rounds: maximum number of rounds; None means no limit.
        strategy: growth strategy, as in `tritter plan`; None means `auto` among the methods of
            `expansion`.
        keep_stages: keep the weights of every stage. Otherwise the weights of a stage are deleted
            once the next stage is verified.
        publish: weights that a training run ends with: those of the last step, or the best that a
            ModelCheckpoint saved.
        dtype: dtype of the published weights; `source` keeps the dtype of the initial model.
    """

    target_params: Annotated[int, Field(ge=1, le=MAX_PARAMETERS), PARSED_COUNT] | None
    max_rounds: Count | None
    strategy: Literal["auto", "depth_first", "width_first", "balanced"] | None
    keep_stages: bool
    publish: Literal["last", "best"]
    dtype: Literal["source", "float32", "bfloat16"]


@options
class WandbConfig:
    """Settings of the Weights & Biases logger."""

    mode: Literal["off", "offline", "online"]
    project: Text
    group: Text | None
    tags: tuple[Text, ...]
    log_model: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerConfig:
    """Loggers in addition to metrics.csv, which is always written.

    Args:
        wandb: Weights & Biases settings; None if it is off.
        others: the other loggers.
    """

    wandb: WandbConfig | None
    others: tuple[Component, ...]


@options
class RootValues:
    """The keys of the config root that belong to no group, as written in config.yaml."""

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    control: bool
    cache_dir: Text | None
    resume: Text | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(RootValues, RunRequest):
    """The complete configuration of a run; `expansion` and `forgetting` are ordered.

    `text` is derived from `model`, `data` and the lineage of the checkpoint at `model.path`.

    `expansion` holds the typed options of the expansion methods. `fallbacks` are the retries after
    a rollback, in order. `growth` and `experts` are None if they are not selected.
    """

    cache_dir: Path  # type: ignore[assignment] # resolved by validation
    model: Model
    data: DataConfig
    text: RunText
    expansion: "tuple[ExpansionSpec, ...]"
    forgetting: tuple[Component, ...]
    pretraining: TrainingConfig
    training: TrainingConfig
    gate: GateConfig
    pipeline: PipelineConfig
    optimizer: OptimizerSettings
    trainer: TrainerSettings
    callbacks: tuple[Component, ...]
    logger: LoggerConfig
    evaluation: EvaluationConfig
    metrics: tuple[Component, ...]
    stages: tuple[Component, ...]
    moe_routing: RoutingOptions
    adaptation: AdaptationOptions
    growth: Component | None = None
    experts: Component | None = None
    fallbacks: "tuple[RunConfig, ...]" = ()
    fallback_overrides: tuple[str, ...] = ()  # set on a fallback: its own overrides
    rate_note: str = ""  # explains a default training.learning_rate

    @property
    def attempts(self) -> "tuple[RunConfig, ...]":
        """The configuration of each attempt: the run itself, then its fallbacks."""
        return (self, *self.fallbacks)

    def optimizer_record(self) -> dict[str, Any]:
        """Return the optimizer's class and all options that apply to a base."""
        optimizer = self.optimizer
        return {
            "target": optimizer.target,
            "weight_decay": optimizer.weight_decay,
            **optimizer.arguments,
            **identity(optimizer.target),
        }


SECTIONS: dict[str, type | UnionType] = {
    "model": Model,
    "data": DataConfig,
    "pretraining": TrainingConfig,
    "training": TrainingConfig,
    "gate": GateConfig,
    "pipeline": PipelineConfig,
    "trainer": TrainerValues,
    "evaluation": EvaluationConfig,
    "moe_routing": RoutingOptions,
    "adaptation": AdaptationOptions,
}
