"""The judgement on a composed config: one RunConfig, or one error that lists all that is wrong."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from tritter.checkpoint.usable import checkpoint_config
from tritter.config.callbacks import (
    asking_problems,
    averaging_problems,
    monitor_problems,
    read_callbacks,
)
from tritter.config.chosen import chosen_keys
from tritter.config.classes import Bodies, find_classes, group_bodies
from tritter.config.experts import experts_problems, experts_start_problems, read_experts
from tritter.config.growth import growth_problems, growth_start_problems, read_growth
from tritter.config.ladder import ladder_problems
from tritter.config.loggers import read_loggers
from tritter.config.optimizers import read_optimizer
from tritter.config.rates import PRESET_RATE, default_rate
from tritter.config.reading import Origin, Reader
from tritter.config.rounds import pipeline_problems, planned_rounds
from tritter.config.rules.benchmarks import benchmark_problems
from tritter.config.rules.devices import device_problems, nearest_multiples, precision_problems
from tritter.config.rules.engines import (
    apple_problems,
    compile_problems,
    compile_start_problems,
    sharding_problems,
    sharding_start_problems,
)
from tritter.config.rules.forgetting import method_problems, method_start_problems
from tritter.config.rules.kept import kept_text
from tritter.config.rules.moe import expert_problems
from tritter.config.rules.moments import carry_problems, kinds_beside
from tritter.config.rules.replay import replay_problems
from tritter.config.rules.weights import weight_problems
from tritter.config.schema import (
    ONE_OF,
    OPEN_GROUPS,
    SECTIONS,
    CheckpointModelConfig,
    ModelConfig,
    NamedTextConfig,
    OptimizerValues,
    RootValues,
    RunConfig,
    TrainingConfig,
    WandbConfig,
)
from tritter.config.sections import data_keys, read_data, read_evaluation, read_model
from tritter.config.selection import METHOD_GROUPS, method_keys, read_methods
from tritter.config.text_resolution import run_text
from tritter.config.trainer_arguments import argument_problems, split_trainer
from tritter.config.training_steps import with_evaluation_steps, with_steps
from tritter.errors import Problem, RequestError, raise_problems
from tritter.expansion import target_config
from tritter.families import Config, check_size, family_of, llama_config, position_limit
from tritter.limits import MAX_BATCH_TOKENS
from tritter.options import field_keys
from tritter.storage.names import named_path


def known_keys() -> tuple[str, ...]:
    """Return every dotted key of a config, the bodies of all methods included, sorted."""
    keys = [*field_keys(RootValues, ""), "optimizer.name"]
    for name, section in SECTIONS.items():
        records = get_args(section) or (section,)
        keys += dict.fromkeys(key for record in records for key in field_keys(record, name))
    keys += {f"data.{key}" for own in data_keys().values() for key in own} - {*keys}
    keys += [*field_keys(OptimizerValues, "optimizer"), *field_keys(WandbConfig, "logger.wandb")]
    return tuple(sorted([*keys, *method_keys(), *chosen_keys()]))


Rule = Callable[[RunConfig], Iterable[Problem]]
_GROUPS = (*SECTIONS, *METHOD_GROUPS, *OPEN_GROUPS)
_READERS: Mapping[str, Callable[[Reader, Mapping[str, Any], Mapping[str, Any]], object]] = {
    "model": read_model,
    "data": read_data,
    "evaluation": read_evaluation,
    "optimizer": read_optimizer,
    "callbacks": read_callbacks,
    "growth": read_growth,
    "experts": read_experts,
    "logger": read_loggers,
}


class _Unread(Exception):
    """A rule asks for a section that could not be read."""


class _Sound:
    """What could be read of a config, for rules; who asks for anything else gets `_Unread`."""

    def __init__(self, values: Mapping[str, Any], unread: set[str]) -> None:
        self._values, self._unread = values, unread

    def __getattr__(self, name: str) -> Any:
        section = "trainer" if name == "trainer_arguments" else name
        if name not in self._values or section in self._unread:
            raise _Unread(name)
        return self._values[name]


def validate(
    raw: Mapping[str, Any],
    *,
    origin: Origin | None = None,
    found: Sequence[Problem] = (),
    rules: Sequence[Rule] = (),
) -> RunConfig:
    """Return the record of a composed config, given as plain values.

    In three passes: classes are found; sections are read one by one; then every rule across them
    is asked that reads none which is wrong by itself, and of these last whether a run can start.
    What all of them find is told at once.

    Args:
        raw: nested plain values, interpolations resolved, without the `hydra` node.
        origin: tells which file a dotted key came from, for the messages.
        found: what is known to be wrong already.
        rules: further ones, of who asks.

    Raises:
        RequestError: lists every problem with key, value, what is allowed and the nearest match.
    """
    reader = Reader(known_keys)
    bodies = with_evaluation_steps(with_steps(reader, group_bodies(reader, raw)))
    has_no_rate = bodies.get("training", {}).get("learning_rate", 0) is None
    if has_no_rate:
        bodies["training"] = {**bodies["training"], "learning_rate": PRESET_RATE}
    classes = find_classes(reader, bodies)
    num_of_classes = len(reader.problems)
    values = _read(reader, raw, bodies, classes)
    if has_no_rate and {"model", "training"} <= values.keys():
        rate, reason = default_rate(values["model"])
        values["training"] = replace(values["training"], learning_rate=rate)
        values["rate_note"] = f"training.learning_rate = {rate:g}: {reason}."
    problems, unread = list(found), set[str]()
    for number, problem in enumerate(reader.problems):
        where = problem.origin or (origin and origin(problem.key))
        found_by = 1 if number < num_of_classes else 2
        problems.append(replace(problem, origin=where, found_by=found_by))
    sound = cast(RunConfig, _Sound(values, unread))

    def set_text(config: RunConfig) -> Iterable[Problem]:
        values["text"] = run_text(config.model, config.data, seed=config.seed)
        return ()

    for asked in ((set_text,), (*_RULES, *rules), (_begin_problems,)):
        unread |= {problem.key.partition(".")[0] for problem in problems}
        told = [problem for rule in asked for problem in _found(rule, sound)]
        problems += [replace(problem, found_by=3) for problem in told]
    raise_problems(problems)
    return RunConfig(**values)


def _found(rule: Rule, config: RunConfig) -> Sequence[Problem]:
    """Return what a rule finds; nothing where it reads a section that is wrong by itself."""
    try:
        return list(rule(config))
    except _Unread:
        return ()
    except RequestError as error:
        return error.problems


def _read(
    reader: Reader, raw: Mapping[str, Any], bodies: Bodies, classes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values of a RunConfig but for its text; what is wrong goes to the reader."""
    own, further = split_trainer(bodies.get("trainer", {}))
    reader.problems += argument_problems(further)
    values: dict[str, Any] = {"trainer_arguments": further}
    for name, body in bodies.items():
        if name in METHOD_GROUPS:
            values[name] = read_methods(reader, name, body, classes)
        elif name in _READERS:
            values[name] = _READERS[name](reader, body, classes)
        else:
            body = own if name == "trainer" else body
            values[name] = reader.read(cast(type, SECTIONS[name]), body, prefix=name)
    values["expansion"] = tuple(selected.options for selected in values.get("expansion", ()))
    given = {name: value for name, value in raw.items() if name not in _GROUPS}
    root: RootValues | None = reader.read(RootValues, given, prefix="")
    values["cache_dir"] = root and reader.ask(cache_folder, root.cache_dir)
    read = {name: value for name, value in values.items() if value is not None}
    # Nothing was chosen: so it was asked, and read
    read |= {group: None for group in ONE_OF if not bodies.get(group, True)}
    return read if root is None else {**asdict(root), **read}


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
        return checkpoint_config(config.model.path, with_experts=True)
    return source_config(config)


def start_problems(
    config: RunConfig, source: Config, *, folder: Path | None = None
) -> Sequence[Problem]:
    """Return why a run can't start from a model of this config.json.

    Args:
        folder: where it lies; None: it is not at hand, or made by the run.
    """
    problems = [*_length_problems(config, source)] or _expansion_problems(config, source)
    return problems or [
        *expert_problems(config, source),
        *method_start_problems(config, source),
        *growth_start_problems(config, source),
        *compile_start_problems(config, source),
        *sharding_start_problems(config, source),
        *experts_start_problems(config, source, folder),
    ]


def cache_folder(value: str | None) -> Path:
    """Return the folder of all caches: named, in the environment, or the usual one."""
    folder = value or os.environ.get("TRITTER_CACHE") or "~/.cache/tritter"
    return named_path(folder, key="cache_dir" if value else "TRITTER_CACHE").absolute()


def _begin_problems(config: RunConfig) -> Iterator[Problem]:
    if (source := known_config(config)) is not None:
        check_size(family_of(source), source)
        model = config.model
        given = Path(model.path) if isinstance(model, CheckpointModelConfig) else None
        yield from start_problems(config, source, folder=given)


def _gate_problems(config: RunConfig) -> Iterator[Problem]:
    if config.gate.strict and not config.gate.enabled:
        reason = "with gate.enabled = false a gate can't refuse; use gate=strict or gate=off"
        yield Problem("gate.strict", True, reason=reason)


def _batch_problems(config: RunConfig) -> Iterator[Problem]:
    size, length = config.data.batch_size, config.data.sequence_length
    if size * length > MAX_BATCH_TOKENS:
        reason = (
            f"with data.sequence_length = {length} a batch has {size * length:,} tokens; allowed "
            f"is at most {MAX_BATCH_TOKENS:,}"
        )
        yield Problem("data.batch_size", size, reason=reason)


def _data_problems(config: RunConfig) -> Iterator[Problem]:
    old, new = config.data.old_sources, config.data.new_sources
    for name in new:
        if name in old:
            reason = "an old domain has that name already"
            has_tasks = isinstance(config.data, NamedTextConfig) and config.data.tasks
            side = "tasks" if has_tasks else "new"
            yield Problem(f"data.{side}.{name}", new[name], reason=reason)
    if config.text.old:
        return
    if isinstance(config.model, ModelConfig):
        reason = "the base is pretrained on old text; name it, or start from a checkpoint: model=hf"
        yield Problem("data.old", None, reason=reason)
        return
    typed = config.data.old if isinstance(config.data, NamedTextConfig) else None
    asked = {one.name: one.kind.needs(one.options) for one in config.forgetting}
    needing = [name for name, needs in asked.items() if _lacks_old_text(config, needs)]
    if needing and not any(needs.writes for needs in asked.values()):
        reason = (
            f"{' and '.join(needing)} against forgetting needs old text; name it, let the model "
            f"write it (forgetting={_with_self_replay(asked)}), or choose forgetting=none"
        )
        yield Problem("data.old", typed, reason=reason)


def _with_self_replay(asked: Mapping[str, Any]) -> str:
    """Return the methods of a run with the one that needs no old text; it replays alone."""
    others = [name for name, needs in asked.items() if not needs.mixes]
    return f"[{','.join(['self_replay', *others])}]" if others else "self_replay"


def _lacks_old_text(config: RunConfig, needs: Any) -> bool:
    """Say whether a method can't do without, given what lies beside the checkpoint."""
    assert isinstance(config.model, CheckpointModelConfig)
    folder = Path(config.model.path)
    if not needs.old_text or kept_text(config).sequences:
        return False
    return not (needs.instead and kinds_beside(folder) >= set(needs.instead))


def _length_problems(config: RunConfig, source: Config) -> Iterator[Problem]:
    length, limit = config.data.sequence_length, position_limit(source)
    if limit is not None and length > limit:
        where = "model" if isinstance(config.model, ModelConfig) else "config.json"
        reason = (
            f"the model has positions for {where}.{family_of(source).positions_key} = {limit}; "
            "allowed is at most that"
        )
        yield Problem("data.sequence_length", length, reason=reason)


def _model_problems(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    if not isinstance(model, ModelConfig):
        return
    hidden_size, heads = model.hidden_size, model.num_attention_heads
    kv_heads = model.num_key_value_heads
    for key, value, divisor_key, divisor in (
        ("hidden_size", hidden_size, "num_attention_heads", heads),
        ("num_attention_heads", heads, "num_key_value_heads", kv_heads),
    ):
        if value % divisor:
            reason = (
                f"it has to be a multiple of model.{divisor_key} = {divisor}; nearest: "
                f"{nearest_multiples(value, divisor)}"
            )
            yield Problem(f"model.{key}", value, reason=reason)
    if hidden_size % heads == heads % kv_heads == 0 and hidden_size % (2 * heads):
        reason = (
            f"rotary positions turn pairs, so each of the {heads} heads needs an even width; "
            f"nearest: {nearest_multiples(hidden_size, 2 * heads)}"
        )
        yield Problem("model.hidden_size", hidden_size, reason=reason)


def _schedule_problems(config: RunConfig, prefix: str) -> Iterator[Problem]:
    training: TrainingConfig = getattr(config, prefix)
    if prefix == "pretraining" and training.schedule == "rewarm":
        reason = "a base has no rate to warm up from again; allowed are constant, cosine and wsd"
        yield Problem(f"{prefix}.schedule", training.schedule, reason=reason)
    if training.schedule == "wsd" and training.warmup_ratio + training.decay_ratio > 1:
        reason = (
            f"with {prefix}.warmup_ratio = {training.warmup_ratio} more than all steps are spoken "
            f"for; allowed is at most {1 - training.warmup_ratio:g}"
        )
        yield Problem(f"{prefix}.decay_ratio", training.decay_ratio, reason=reason)


def _expansion_problems(config: RunConfig, source: Config) -> Sequence[Problem]:
    try:
        if config.pipeline.target_params is not None:
            planned_rounds(config, source)
        else:
            target_config(source, config.expansion)
    except RequestError as error:
        return error.problems
    return ()


_RULES: tuple[Rule, ...] = (
    _batch_problems,
    _model_problems,
    _data_problems,
    partial(_schedule_problems, prefix="pretraining"),
    partial(_schedule_problems, prefix="training"),
    _gate_problems,
    benchmark_problems,
    ladder_problems,
    precision_problems,
    device_problems,
    apple_problems,
    compile_problems,
    sharding_problems,
    replay_problems,
    weight_problems,
    method_problems,
    growth_problems,
    experts_problems,
    pipeline_problems,
    carry_problems,
    asking_problems,
    averaging_problems,
    monitor_problems,
)
