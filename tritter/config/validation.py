"""The judgement on a composed config: one RunConfig, or one error that lists all that is wrong."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tritter.config.checkpoint_folder import checkpoint_config
from tritter.config.experts import expert_problems
from tritter.config.moments import carry_problems
from tritter.config.problems import Origin, describe, nearest_key, raise_problems
from tritter.config.reading import Reader, field_keys
from tritter.config.rounds import pipeline_problems, planned_rounds
from tritter.config.schema import (
    FORGETTING_OPTIONS,
    METHOD_GROUPS,
    SECTIONS,
    CheckpointModelConfig,
    ModelConfig,
    ReplayOptions,
    RootValues,
    RunConfig,
    TextDataConfig,
    TrainingConfig,
    Variants,
)
from tritter.config.sections import read_section
from tritter.config.text_resolution import run_text
from tritter.errors import RequestError, nearest
from tritter.expansion import EXPANSIONS, target_config
from tritter.families import Config, check_size, family_of, llama_config
from tritter.limits import MAX_BATCH_TOKENS
from tritter.storage.names import named_path

# Methods that work without old text.
_NO_OLD_TEXT = {"l2sp"}

METHODS: dict[str, dict[str, type]] = {
    "expansion": dict(EXPANSIONS),
    "forgetting": dict(FORGETTING_OPTIONS),
}


def known_keys() -> tuple[str, ...]:
    """Return every dotted key of a config, the bodies of all methods included, sorted."""
    keys = [*field_keys(RootValues, "")]
    for name, section in SECTIONS.items():
        records = section.records.values() if isinstance(section, Variants) else (section,)
        keys += dict.fromkeys(key for record in records for key in field_keys(record, name))
    for group, registry in METHODS.items():
        for name, record_type in registry.items():
            keys += field_keys(record_type, f"{group}.{name}")
    return tuple(sorted(keys))


def validate(raw: Mapping[str, Any], *, origin: Origin | None = None) -> RunConfig:
    """Return the record of a composed config, given as plain values.

    Args:
        raw: nested plain values, interpolations resolved, without the `hydra` node.
        origin: tells which file a dotted key came from, for the messages.

    Raises:
        RequestError: lists every problem with key, value, what is allowed and the nearest match.
    """
    reader = Reader(known_keys(), origin=origin)
    root = {name: value for name, value in raw.items() if name not in (*SECTIONS, *METHOD_GROUPS)}
    values = reader.read(RootValues, root, prefix="")
    sections: dict[str, Any] = {
        name: read_section(reader, name, section, raw.get(name))
        for name, section in SECTIONS.items()
    }
    methods: dict[str, Any] = {
        group: _read_methods(reader, group, raw.get(group)) for group in METHOD_GROUPS
    }
    raise_problems(reader.problems)
    text = run_text(sections["model"], sections["data"], seed=values.seed)
    config = RunConfig(
        seed=values.seed,
        text=text,
        control=values.control,
        cache_dir=_cache_folder(values.cache_dir),
        resume=values.resume,
        **sections,
        **methods,
    )
    raise_problems(_disagreements(config))
    return config


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


def start_problems(config: RunConfig, source: Config) -> list[str]:
    """Return why a run can't start from a model of this config.json."""
    problems = _length_problems(config, source) or _expansion_problems(config, source)
    return problems or expert_problems(config, source)


def _read_methods(reader: Reader, group: str, raw: object) -> tuple[Any, ...]:
    """Read the bodies of an ordered group; `none`, an empty list and no group mean no method."""
    registry = METHODS[group]
    if raw is None:
        return ()
    if not isinstance(raw, Mapping):
        reader.report(group, raw, reason=f"choose among none, {', '.join(registry)}, or a list")
        return ()
    names = [str(name) for name in raw]
    if "none" in names:
        if len(names) > 1:
            reader.report(group, names, reason="none stands alone; leave it out of the list")
        for key in raw["none"] or ():
            reader.report_unknown(f"{group}.none.{key}", raw["none"][key])
        return ()
    records = []
    for name in names:
        if name in registry:
            records.append(reader.read(registry[name], raw[name], prefix=f"{group}.{name}"))
        else:
            _report_no_method(reader, group, name, raw)
    return tuple(records)


def _report_no_method(reader: Reader, group: str, name: str, raw: Mapping[str, Any]) -> None:
    """Report what stands where methods stand: a misspelt one, or a method's key without it."""
    registry = METHODS[group]
    key, value = f"{group}.{name}", raw[name]
    near = nearest(name, registry)
    if near is not None or isinstance(value, Mapping):
        reason = f"there is no such method; there are {', '.join(registry)}"
        reader.report(key, value, reason=reason, nearest=near)
        return
    bodies = [key for key in known_keys() if key.startswith(f"{group}.")]
    chosen = [key for key in bodies if key.split(".")[1] in raw]
    near = nearest_key(key, bodies, first=chosen)
    reason = f"a key stands below its method, {group}.METHOD.{name}"
    reader.report(key, value, reason=f"{reason}; methods are {', '.join(registry)}", nearest=near)


def _cache_folder(value: str | None) -> Path:
    folder = value or os.environ.get("TRITTER_CACHE") or "~/.cache/tritter"
    return named_path(folder, key="cache_dir").absolute()


def _disagreements(config: RunConfig) -> list[str]:
    """Return what is wrong between keys that are right one by one."""
    problems = _batch_problems(config)
    if isinstance(config.model, ModelConfig):
        problems += _model_problems(config.model)
    problems += _data_problems(config)
    problems += _schedule_problems("pretraining", config.pretraining)
    problems += _schedule_problems("training", config.training)
    if config.gate.strict and not config.gate.enabled:
        problems.append(
            "gate.strict = true with gate.enabled = false: a gate that is off can't refuse; "
            "use gate=strict or gate=off."
        )
    if config.trainer.precision == "16-mixed" and config.trainer.accelerator == "cpu":
        problems.append(
            "trainer.precision = 16-mixed: float16 needs a GPU; on trainer=cpu use bf16-mixed or "
            "32-true."
        )
    problems += _device_problems(config)
    problems += _replay_problems(config)
    problems += pipeline_problems(config)
    problems += carry_problems(config)
    if problems:
        return problems
    try:
        source = known_config(config)
        if source is not None:
            check_size(family_of(source), source)
    except RequestError as error:
        return [str(error).replace("config.json: ", "model: ")]
    return [] if source is None else start_problems(config, source)


def _batch_problems(config: RunConfig) -> list[str]:
    size, length = config.data.batch_size, config.data.sequence_length
    if size * length <= MAX_BATCH_TOKENS:
        return []
    return [
        f"data.batch_size = {size}: with data.sequence_length = {length} a batch has "
        f"{size * length:,} tokens; allowed is at most {MAX_BATCH_TOKENS:,}."
    ]


def _device_problems(config: RunConfig) -> list[str]:
    trainer, batch_size = config.trainer, config.data.batch_size
    if trainer.strategy != "ddp":
        if trainer.devices == 1:
            return []
        return [
            f"trainer.devices = {trainer.devices}: several devices train together with "
            "trainer=ddp; else allowed is 1."
        ]
    problems = []
    if trainer.devices == 1:
        problems.append(
            "trainer.devices = 1: trainer=ddp is for 2 or more; for one device use trainer=cpu or "
            "trainer=gpu."
        )
    if trainer.accelerator == "auto":
        problems.append(
            "trainer.accelerator = auto: trainer=ddp has to be told which devices; allowed are cpu "
            "and gpu."
        )
    if batch_size % trainer.devices:
        problems.append(
            f"data.batch_size = {batch_size}: each of trainer.devices = {trainer.devices} takes an "
            f"equal part; nearest: {_nearest_multiples(batch_size, trainer.devices)}."
        )
    return problems


def _data_problems(config: RunConfig) -> list[str]:
    old, new = config.data.old_sources, config.data.new_sources
    problems = [
        describe(f"data.new.{name}", new[name], reason="an old domain has that name already")
        for name in new
        if name in old
    ]
    if config.text.old:
        return problems
    if isinstance(config.model, ModelConfig):
        reason = "the base is pretrained on old text; name it, or start from a checkpoint: model=hf"
        return [*problems, describe("data.old", None, reason=reason)]
    typed = config.data.old if isinstance(config.data, TextDataConfig) else None
    needing = [options.name for options in config.forgetting if options.name not in _NO_OLD_TEXT]
    if needing:
        reason = (
            f"{' and '.join(needing)} against forgetting needs old text; name it, or choose "
            "forgetting=none"
        )
        problems.append(describe("data.old", typed, reason=reason))
    return problems


def _length_problems(config: RunConfig, source: Config) -> list[str]:
    length, limit = config.data.sequence_length, source.get("max_position_embeddings")
    if not isinstance(limit, int) or length <= limit:
        return []
    where = "model" if isinstance(config.model, ModelConfig) else "config.json"
    return [
        f"data.sequence_length = {length}: the model has positions for "
        f"{where}.max_position_embeddings = {limit}; allowed is at most that."
    ]


def _model_problems(model: ModelConfig) -> list[str]:
    problems = [
        f"model.{key} = {value}: it has to be a multiple of model.{divisor_key} = {divisor}; "
        f"nearest: {_nearest_multiples(value, divisor)}."
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
        problems.append(
            f"model.hidden_size = {model.hidden_size}: rotary positions turn pairs, so each of the "
            f"{model.num_attention_heads} heads needs an even width; nearest: "
            f"{_nearest_multiples(model.hidden_size, pairs)}."
        )
    return problems


def _nearest_multiples(value: int, divisor: int) -> str:
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return f"{below} or {above}" if below else str(above)


def _schedule_problems(prefix: str, training: TrainingConfig) -> list[str]:
    if training.schedule != "wsd" or training.warmup_ratio + training.decay_ratio <= 1:
        return []
    return [
        f"{prefix}.decay_ratio = {training.decay_ratio}: with {prefix}.warmup_ratio = "
        f"{training.warmup_ratio} more than all steps are spoken for; allowed is at most "
        f"{1 - training.warmup_ratio:g}."
    ]


def _replay_problems(config: RunConfig) -> list[str]:
    sequences = config.training.max_steps * config.data.batch_size
    replays = [options for options in config.forgetting if isinstance(options, ReplayOptions)]
    problems = [
        f"forgetting.replay.fraction = {options.fraction}: of the {sequences} sequences that are "
        f"trained on not one would be replayed; use at least {1 / sequences:.2g}, or leave replay "
        "out."
        for options in replays
        if math.floor(sequences * options.fraction) < 1
    ]
    for options in replays:
        problems += _weight_problems(options.weights or {}, config.text.old)
    return problems


def _weight_problems(weights: Mapping[str, float], old: Sequence[str]) -> list[str]:
    key = "forgetting.replay.weights"
    known = ", ".join(old) or "none"
    problems = [
        describe(
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
        problems.append(describe(key, dict(weights), reason=reason))
    return problems


def _expansion_problems(config: RunConfig, source: Config) -> list[str]:
    try:
        if config.pipeline.target_params is not None:
            planned_rounds(config, source)
        else:
            target_config(source, config.expansion)
    except RequestError as error:
        return [str(error)]
    return []
