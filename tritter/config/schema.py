"""The validated configuration of a run: one frozen dataclass per config group.

Defaults are in `conf/` only. The type of a field defines its allowed values.
"""

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tritter.checkpoints.location import checkpoint_model
from tritter.checkpoints.run_text import RunText
from tritter.core.families import Model as LanguageModel
from tritter.core.families.presets import ModelConfig as ModelConfig
from tritter.data.options import DataConfig as DataConfig  # the import path in the docs
from tritter.evaluation.options import EvaluationConfig, GateConfig
from tritter.limits import MAX_PARAMETERS, MAX_SEED
from tritter.methods.moe_routing.options import AdaptationOptions, RoutingOptions
from tritter.options import PARSED_COUNT, Count, RunRequest, Text, options
from tritter.targets import Component, identity
from tritter.training.optimizer import OptimizerSettings
from tritter.training.options import EVALUATIONS, TrainerSettings, TrainerValues, TrainingConfig

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

# A token of a validation costs a third of one of training
_VALIDATION_BUDGET = 0.1 * 3  # tokens of all validations, relative to those of training
_VALIDATION_TOKENS = (1024, 4096)  # usual range per domain
_FEWEST_SCORED = 64  # documents per domain, by which intervals are narrow enough
_FEWEST_VALIDATED = 64  # per domain


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
    a rollback, in order. `growth` and `experts` are None if they are not selected, `wandb` if it is
    off. `logger` has the loggers in addition to it and to metrics.csv, which is always written.
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
    logger: tuple[Component, ...]
    evaluation: EvaluationConfig
    metrics: tuple[Component, ...]
    stages: tuple[Component, ...]
    moe_routing: RoutingOptions
    adaptation: AdaptationOptions
    growth: Component | None = None
    experts: Component | None = None
    wandb: WandbConfig | None = None
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

    def base_model(self) -> LanguageModel:
        """Return the base model that the run pretrains."""
        assert isinstance(self.model, ModelConfig), "a checkpoint has its own config.json"
        return LanguageModel(self.model.config(vocab_size=self.data.vocab_size))

    def known_model(self) -> LanguageModel | None:
        """Return the initial model of the run; None for a checkpoint on the Hub."""
        if isinstance(self.model, CheckpointModelConfig):
            return checkpoint_model(self.model.path, with_experts=True)
        return self.base_model()

    @property
    def validation_period(self) -> int:
        """Return the default of `evaluation.every_n_steps`, a tenth of the steps or more.

        All validations together cost at most a tenth of training.
        """
        fewest, _ = _VALIDATION_TOKENS
        count = int(_VALIDATION_BUDGET * self._trained_tokens) // (
            fewest * max(1, len(self.text.domains))
        )
        return max(1, self.training.max_steps // max(1, min(EVALUATIONS, count)))

    def validation_tokens(self, *, num_domains: int) -> int:
        """Return the number of tokens of each domain that a validation during training reads."""
        _, most = _VALIDATION_TOKENS
        period, steps = self.evaluation.every_n_steps, self.training.max_steps
        if period != self.validation_period:  # chosen by the user
            return most
        count = 1 + math.ceil(steps / period)  # one before the first step
        return max(
            _FEWEST_VALIDATED,
            min(most, int(_VALIDATION_BUDGET * self._trained_tokens) // (count * num_domains)),
        )

    @property
    def _trained_tokens(self) -> float:
        data, trainer = self.data, self.trainer
        of_step = data.batch_size * data.sequence_length * trainer.accumulate_grad_batches
        return float(of_step * self.training.max_steps)

    def scored_counts(self, sizes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Return domain → number of its held-out documents that are scored, in their random order.

        By default they are all documents of a run that trains its base. A run from a checkpoint
        scores about as many tokens as it trains on, over all domains, but at least 64 documents of
        each.

        Args:
            sizes: domain → tokens of each held-out document.
        """
        limit, is_base = self.evaluation.max_documents, isinstance(self.model, ModelConfig)
        if limit is not None or is_base:
            return {name: min(limit or len(each), len(each)) for name, each in sizes.items()}
        budget = self._trained_tokens / max(1, len(sizes))
        fitting = {name: bisect(list(accumulate(each)), budget) for name, each in sizes.items()}
        return {name: min(len(sizes[name]), max(_FEWEST_SCORED, n)) for name, n in fitting.items()}


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
