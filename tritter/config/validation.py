"""The judgement on a composed config: one RunConfig, or one error that lists all that is wrong."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, cast

from tritter.config.callbacks import (
    asking_problems,
    averaging_problems,
    monitor_problems,
    read_callbacks,
)
from tritter.config.checkpoint_folder import checkpoint_config
from tritter.config.loggers import read_loggers
from tritter.config.moe import expert_problems
from tritter.config.moments import carry_problems
from tritter.config.optimizers import read_optimizer
from tritter.config.reading import Origin, Reader
from tritter.config.rounds import pipeline_problems, planned_rounds
from tritter.config.schema import (
    OPEN_GROUPS,
    SECTIONS,
    CheckpointModelConfig,
    ModelConfig,
    OptimizerValues,
    RootValues,
    RunConfig,
    TextDataConfig,
    TrainingConfig,
    Variants,
    WandbConfig,
)
from tritter.config.sections import data_keys, read_section
from tritter.config.selection import METHOD_GROUPS, method_keys, read_methods
from tritter.config.text_resolution import run_text
from tritter.config.trainer_arguments import OWN_OF_TRAINER, argument_problems, split_trainer
from tritter.errors import Problem, RequestError, nearest, raise_problems
from tritter.expansion import target_config
from tritter.families import Config, check_size, family_of, llama_config
from tritter.limits import MAX_BATCH_TOKENS
from tritter.options import field_keys
from tritter.storage.names import named_path


def known_keys() -> tuple[str, ...]:
    """Return every dotted key of a config, the bodies of all methods included, sorted."""
    keys = [*field_keys(RootValues, "")]
    for name, section in SECTIONS.items():
        records = section.records.values() if isinstance(section, Variants) else (section,)
        keys += dict.fromkeys(key for record in records for key in field_keys(record, name))
    keys += {f"data.{key}" for own in data_keys().values() for key in own} - {*keys}
    keys += [*field_keys(OptimizerValues, "optimizer"), *field_keys(WandbConfig, "logger.wandb")]
    return tuple(sorted([*keys, *method_keys()]))


Rule = Callable[[RunConfig], Sequence[Problem]]


class _Unread(Exception):
    """A rule asks for a section that could not be read."""


class _Sound:
    """What could be read of a config, for rules; who asks for anything else gets `_Unread`."""

    def __init__(self, values: Mapping[str, Any], unread: set[str]) -> None:
        self._values, self._unread = values, unread

    def __getattr__(self, name: str) -> Any:
        value = self._values.get(name)
        section = "trainer" if name == "trainer_arguments" else name
        if value is None or section in self._unread:
            raise _Unread(name)
        return value


def validate(
    raw: Mapping[str, Any], *, origin: Origin | None = None, found: Sequence[Problem] = ()
) -> RunConfig:
    """Return the record of a composed config, given as plain values.

    Sections are read one by one; then every rule across them is asked that reads none which is
    wrong by itself, and of these last whether a run can start.

    Args:
        raw: nested plain values, interpolations resolved, without the `hydra` node.
        origin: tells which file a dotted key came from, for the messages.
        found: what is known to be wrong already.

    Raises:
        RequestError: lists every problem with key, value, what is allowed and the nearest match.
    """
    reader = Reader(known_keys, origin=origin)
    reader.problems += found
    values, unread = _read(reader, raw), set[str]()
    sound = cast(RunConfig, _Sound(values, unread))

    def text_problems(config: RunConfig) -> list[Problem]:
        values["text"] = run_text(config.model, config.data, seed=config.seed)
        return []

    for rules in ((text_problems,), _RULES, (_begin_problems,)):
        unread |= {problem.key.partition(".")[0] for problem in reader.problems}
        reader.problems += [problem for rule in rules for problem in _found(rule, sound)]
    raise_problems(reader.problems)
    return RunConfig(**values)


def _found(rule: Rule, config: RunConfig) -> Sequence[Problem]:
    """Return what a rule finds; nothing where it reads a section that is wrong by itself."""
    try:
        return rule(config)
    except _Unread:
        return ()
    except RequestError as error:
        return error.problems


def _read(reader: Reader, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a RunConfig but for its text; what is wrong goes to the reader."""
    groups = (*SECTIONS, *METHOD_GROUPS, *OPEN_GROUPS)
    root = reader.read(RootValues, {n: v for n, v in raw.items() if n not in groups}, prefix="")
    trainer, further = split_trainer(raw.get("trainer"))
    reader.add(argument_problems(further, own=OWN_OF_TRAINER))
    values: dict[str, Any] = {
        name: read_section(reader, name, section, trainer if name == "trainer" else raw.get(name))
        for name, section in SECTIONS.items()
    }
    values["callbacks"] = read_callbacks(reader, raw.get("callbacks"))
    values["logger"] = read_loggers(reader, raw.get("logger"))
    values["optimizer"] = read_optimizer(reader, raw.get("optimizer"))
    expansion = read_methods(reader, "expansion", raw.get("expansion"))
    values["expansion"] = tuple(selected.options for selected in expansion)
    values["forgetting"] = read_methods(reader, "forgetting", raw.get("forgetting"))
    values["trainer_arguments"] = further
    values |= {field.name: getattr(root, field.name, None) for field in fields(RootValues)}
    try:
        values["cache_dir"] = _cache_folder(values["cache_dir"])
    except RequestError as error:
        reader.problems += error.problems
    return values


def source_config(config: RunConfig) -> Config:
    """Return the base model's config.json, as the family's builder writes it."""
    model = config.model
    assert isinstance(model, ModelConfig), "a checkpoint has a config.json of its own"
    return llama_config(
        vocab_size=config.data.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        tie_word_embeddings=model.tie_word_embeddings,
        rms_norm_eps=model.rms_norm_eps,
        rope_theta=model.rope_theta,
        max_position_embeddings=model.max_position_embeddings,
        initializer_range=model.initializer_range,
    )


def known_config(config: RunConfig) -> Config | None:
    """Return the config.json that a run starts from, as far as it is at hand; None for a hub id.

    Raises:
        RequestError: the checkpoint at `model.path` can't be trained on.
    """
    if isinstance(config.model, CheckpointModelConfig):
        return checkpoint_config(config.model.path)
    return source_config(config)


def start_problems(config: RunConfig, source: Config) -> list[Problem]:
    """Return why a run can't start from a model of this config.json."""
    problems = _length_problems(config, source) or _expansion_problems(config, source)
    return problems or expert_problems(config, source)


def _cache_folder(value: str | None) -> Path:
    folder = value or os.environ.get("TRITTER_CACHE") or "~/.cache/tritter"
    return named_path(folder, key="cache_dir").absolute()


def _begin_problems(config: RunConfig) -> list[Problem]:
    source = known_config(config)
    if source is None:
        return []
    check_size(family_of(source), source)
    return start_problems(config, source)


def _gate_problems(config: RunConfig) -> list[Problem]:
    if not config.gate.strict or config.gate.enabled:
        return []
    reason = "with gate.enabled = false a gate can't refuse; use gate=strict or gate=off"
    return [Problem("gate.strict", True, reason=reason)]


def _batch_problems(config: RunConfig) -> list[Problem]:
    size, length = config.data.batch_size, config.data.sequence_length
    if size * length <= MAX_BATCH_TOKENS:
        return []
    reason = (
        f"with data.sequence_length = {length} a batch has {size * length:,} tokens; allowed is "
        f"at most {MAX_BATCH_TOKENS:,}"
    )
    return [Problem("data.batch_size", size, reason=reason)]


def _precision_problems(config: RunConfig) -> list[Problem]:
    if config.trainer.precision != "16-mixed" or config.trainer.accelerator != "cpu":
        return []
    reason = "float16 needs a GPU; on trainer=cpu use bf16-mixed or 32-true"
    return [Problem("trainer.precision", "16-mixed", reason=reason)]


def _device_problems(config: RunConfig) -> list[Problem]:
    trainer, batch_size = config.trainer, config.data.batch_size
    if trainer.strategy != "ddp":
        if trainer.devices == 1:
            return []
        reason = "several devices train together with trainer=ddp; else allowed is 1"
        return [Problem("trainer.devices", trainer.devices, reason=reason)]
    problems = []
    if trainer.devices == 1:
        reason = "trainer=ddp is for 2 or more; for one device use trainer=cpu or trainer=gpu"
        problems.append(Problem("trainer.devices", 1, reason=reason))
    if trainer.accelerator == "auto":
        reason = "trainer=ddp has to be told which devices; allowed are cpu and gpu"
        problems.append(Problem("trainer.accelerator", "auto", reason=reason))
    if batch_size % trainer.devices:
        reason = (
            f"each of trainer.devices = {trainer.devices} takes an equal part; nearest: "
            f"{_nearest_multiples(batch_size, trainer.devices)}"
        )
        problems.append(Problem("data.batch_size", batch_size, reason=reason))
    return problems


def _data_problems(config: RunConfig) -> list[Problem]:
    old, new = config.data.old_sources, config.data.new_sources
    problems = [
        Problem(f"data.new.{name}", new[name], reason="an old domain has that name already")
        for name in new
        if name in old
    ]
    if config.text.old:
        return problems
    if isinstance(config.model, ModelConfig):
        reason = "the base is pretrained on old text; name it, or start from a checkpoint: model=hf"
        return [*problems, Problem("data.old", None, reason=reason)]
    typed = config.data.old if isinstance(config.data, TextDataConfig) else None
    needing = [one.name for one in config.forgetting if one.kind.needs(one.options).old_text]
    if needing:
        reason = (
            f"{' and '.join(needing)} against forgetting needs old text; name it, or choose "
            "forgetting=none"
        )
        problems.append(Problem("data.old", typed, reason=reason))
    return problems


def _length_problems(config: RunConfig, source: Config) -> list[Problem]:
    length, limit = config.data.sequence_length, source.get("max_position_embeddings")
    if not isinstance(limit, int) or length <= limit:
        return []
    where = "model" if isinstance(config.model, ModelConfig) else "config.json"
    reason = (
        f"the model has positions for {where}.max_position_embeddings = {limit}; allowed is at "
        "most that"
    )
    return [Problem("data.sequence_length", length, reason=reason)]


def _model_problems(config: RunConfig) -> list[Problem]:
    model = config.model
    if not isinstance(model, ModelConfig):
        return []
    problems = [
        Problem(
            f"model.{key}",
            value,
            reason=f"it has to be a multiple of model.{divisor_key} = {divisor}; nearest: "
            f"{_nearest_multiples(value, divisor)}",
        )
        for key, value, divisor_key, divisor in (
            ("hidden_size", model.hidden_size, "num_attention_heads", model.num_attention_heads),
            (
                "num_attention_heads",
                model.num_attention_heads,
                "num_key_value_heads",
                model.num_key_value_heads,
            ),
        )
        if value % divisor
    ]
    pairs = 2 * model.num_attention_heads
    if not problems and model.hidden_size % pairs:
        reason = (
            f"rotary positions turn pairs, so each of the {model.num_attention_heads} heads needs "
            f"an even width; nearest: {_nearest_multiples(model.hidden_size, pairs)}"
        )
        problems.append(Problem("model.hidden_size", model.hidden_size, reason=reason))
    return problems


def _nearest_multiples(value: int, divisor: int) -> str:
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return f"{below} or {above}" if below else str(above)


def _schedule_problems(config: RunConfig, prefix: str) -> list[Problem]:
    training: TrainingConfig = getattr(config, prefix)
    if training.schedule != "wsd" or training.warmup_ratio + training.decay_ratio <= 1:
        return []
    reason = (
        f"with {prefix}.warmup_ratio = {training.warmup_ratio} more than all steps are spoken "
        f"for; allowed is at most {1 - training.warmup_ratio:g}"
    )
    return [Problem(f"{prefix}.decay_ratio", training.decay_ratio, reason=reason)]


def _replay_problems(config: RunConfig) -> list[Problem]:
    gathered = config.trainer_arguments.get("accumulate_grad_batches", 1)
    sequences = config.training.max_steps * gathered * config.data.batch_size
    replays = [one.options for one in config.forgetting if one.name == "replay"]
    problems = [
        Problem(
            "forgetting.replay.fraction",
            options.fraction,
            reason=f"of the {sequences} sequences that are trained on not one would be replayed; "
            f"use at least {1 / sequences:.2g}, or leave replay out",
        )
        for options in replays
        if math.floor(sequences * options.fraction) < 1
    ]
    for options in replays:
        problems += _weight_problems(options.weights or {}, config.text.old)
    return problems


def _weight_problems(weights: Mapping[str, float], old: Sequence[str]) -> list[Problem]:
    key = "forgetting.replay.weights"
    known = ", ".join(old) or "none"
    problems = [
        Problem(
            f"{key}.{name}",
            weight,
            reason=f"there is no such old domain; there are {known}",
            nearest=nearest(name, old),
        )
        for name, weight in weights.items()
        if name not in old
    ]
    if not problems and old and not any(weights.get(name, 1) for name in old):
        reason = "every old domain has the weight 0; leave replay out instead"
        problems.append(Problem(key, dict(weights), reason=reason))
    return problems


def _expansion_problems(config: RunConfig, source: Config) -> list[Problem]:
    try:
        if config.pipeline.target_params is not None:
            planned_rounds(config, source)
        else:
            target_config(source, config.expansion)
    except RequestError as error:
        return list(error.problems)
    return []


_RULES: tuple[Rule, ...] = (
    _batch_problems,
    _model_problems,
    _data_problems,
    partial(_schedule_problems, prefix="pretraining"),
    partial(_schedule_problems, prefix="training"),
    _gate_problems,
    _precision_problems,
    _device_problems,
    _replay_problems,
    pipeline_problems,
    carry_problems,
    asking_problems,
    averaging_problems,
    monitor_problems,
)
