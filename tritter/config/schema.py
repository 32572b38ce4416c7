"""The validated configuration of a run: one frozen dataclass per config group.

Defaults are in `conf/` only. The type of a field defines its allowed values.
"""

from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from tritter.checkpoints.run_text import RunText
from tritter.core.families.presets import ModelConfig as ModelConfig
from tritter.data.options import DataConfig as DataConfig  # the import path in the docs
from tritter.evaluation.options import EvaluationConfig, GateConfig
from tritter.limits import (
    MAX_PARAMETERS,
    MAX_SEED,
)
from tritter.methods.moe_routing.options import AdaptationOptions, RoutingOptions
from tritter.options import PARSED_COUNT, Count, RunRequest, Text, join, options
from tritter.targets import Component
from tritter.training.optimizer import OptimizerSettings
from tritter.training.options import TrainerSettings, TrainerValues, TrainingConfig

if TYPE_CHECKING:
    from tritter.core.expansions import ExpansionSpec


@options
class CheckpointModelConfig:
    """A base model loaded from a checkpoint, with the checkpoint's tokenizer.

    Args:
        path: folder (absolute after validation) or Hub id.
    """

    model_type: Literal["hf"]
    path: Text


Model = ModelConfig | CheckpointModelConfig


def start_checkpoint(model: Model) -> str | None:
    """Return the folder or Hub id of the initial checkpoint; None for a new base model."""
    return model.path if isinstance(model, CheckpointModelConfig) else None


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
ONE_OF = ("growth", "experts")  # groups with exactly one option
# Groups with arguments of third-party classes
OPEN_GROUPS = ("optimizer", "callbacks", "logger", "metrics", *ONE_OF)

# Section → keys that `resume` replays from a run folder, which may be untrusted.
# A listed key holds a number or a name that Tritter defines; it never names a class, program,
# folder, server or account. Only data sources and checkpoints are paths; they are printed first.
# Keys that are not listed are never replayed.
_REPLAYED = {
    "": "seed control",
    "model": "path model_type hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads tie_word_embeddings rms_norm_eps rope_theta max_position_embeddings "
    "initializer_range",
    "data": "old new tasks source text_field text_column streaming max_rows weights vocab_size "
    "sequence_length batch_size packing chat_template loss_on validation_fraction",
    "expansion.context": "target_length method",
    "expansion.dus": "target_layers drop_layers identity_init",
    "expansion.interpolate": "target_layers identity_init",
    "expansion.layers": "sources slices identity",
    "expansion.llama_pro": "target_layers positions new_blocks_only",
    "expansion.moe": "num_experts experts_per_token granularity layers noise reinit_fraction "
    "target norm_topk_prob router expert_hashes",
    "expansion.moe_add": "num_experts addition init clone_from noise",
    "expansion.stack": "target_layers partial identity_init",
    "expansion.vocab": "new_tokens tokens init head_init freeze_old_rows multiple_of merges",
    "expansion.width": "hidden_size intermediate_size num_attention_heads num_key_value_heads "
    "multiple_of head_strategy init noise shares",
    "forgetting.distill": "weight temperature rows top_k mask_gold",
    "forgetting.ewc": "ewc_lambda estimator num_sequences normalise at carry refresh_steps",
    "forgetting.freeze": "layers new_only old_experts old_rows until thaw",
    "forgetting.l2sp": "l2sp_lambda",
    "forgetting.online_ewc": "ewc_lambda gamma estimator num_sequences normalise at carry "
    "refresh_steps",
    "forgetting.replay": "fraction weighting weights keep",
    "forgetting.self_replay": "fraction num_sequences sequences_per_text temperature top_p "
    "min_perplexity max_perplexity min_distinct",
    "forgetting.si": "si_lambda xi num_sequences",
    "growth": "trigger initialiser gradient_percentile pressure_decay history_checks check_every "
    "growth_cooldown warmup_steps max_growth_per_step maturation_age maturation_factor "
    "plateau_threshold plateau_steps max_new_parameters max_extra_flops enable_replacement "
    "dead_quantile freeze_attention",
    "experts": "rank alpha targets learning_rate base_bits max_experts max_trainable_parameters "
    "when_full top_k router shared_router prior inner_prior evidence_scale evidence_window balance "
    "entropy z capacity_factor detector min_samples in_a_row confidence cooldown moving_average "
    "min_gain boundaries exemplars rehearsal maturity_steps temperature anneal_steps max_rank "
    "stall_steps stall_gain freeze_converged freeze_projections distill",
    **dict.fromkeys(
        ("pretraining", "training"),
        "learning_rate warmup_ratio max_steps max_tokens schedule decay_ratio minimum_ratio",
    ),
    "gate": "enabled strict retention confidence ladder max_attempts",
    "pipeline": "target_params max_rounds strategy keep_stages publish dtype",
    "optimizer": "betas eps momentum nesterov weight_decay",
    "trainer": "accelerator devices strategy precision gradient_clip_val log_every_n_steps "
    "max_non_finite_steps save_every_n_steps progress check_memory activation_checkpointing "
    "compile accumulate_grad_batches benchmark detect_anomaly deterministic "
    "enable_autolog_hparams enable_model_summary gradient_clip_algorithm limit_predict_batches "
    "limit_test_batches limit_val_batches profiler sync_batchnorm",
    "callbacks.device_stats": "cpu_stats",
    "callbacks.early_stopping": "monitor mode min_delta patience strict",
    "callbacks.ema": "decay update_every_n_steps update_starting_at_step use_buffers",
    "callbacks.lr_monitor": "logging_interval",
    "callbacks.model_checkpoint": "auto_insert_metric_name monitor mode save_top_k save_last "
    "every_n_train_steps enable_version_counter",
    "logger.wandb": "project group tags log_model",
    "logger.mlflow": "experiment_name",
    "evaluation": "max_tokens_per_document max_documents batch_size sample_tokens task_questions "
    "every_n_steps tasks tasks_path task_limit chat_template num_fewshot",
    "moe_routing": "auxiliary_loss z_loss bias_update_rate hold_old capacity_factor",
    "adaptation": "router_update router_epochs router_max_steps router_learning_rate "
    "encouragement anneal_steps freeze_base unfreeze_after distill_steps distill_temperature",
}
REPLAYED_KEYS = frozenset(
    join(section, key) for section in _REPLAYED for key in _REPLAYED[section].split()
)
