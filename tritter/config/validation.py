"""Validates a composed config: returns one RunConfig, or raises one error with all problems."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from difflib import get_close_matches
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tritter.checkpoints import Lineage
from tritter.checkpoints.location import require_plain
from tritter.checkpoints.record import StateHead, window_length
from tritter.checkpoints.run_text import RunText
from tritter.config.components import (
    BASES,
    CHOSEN_GROUPS,
    METHOD_GROUPS,
    Origin,
    Reader,
    known_keys,
    method_class,
    method_names,
)
from tritter.config.fallbacks import ladder_problems
from tritter.config.folders import body_of, option_files
from tritter.config.schema import (
    SECTIONS,
    CheckpointModelConfig,
    ModelConfig,
    RootValues,
    RunConfig,
    WandbConfig,
)
from tritter.core.expansions import target_model, vocab_place
from tritter.core.families import Model
from tritter.core.families.config_file import read_model_file
from tritter.core.families.presets import model_problems
from tritter.core.parameter_map.carry import STATE_KINDS
from tritter.data.options import RULES as DATA_RULES
from tritter.data.options import NamedTextConfig
from tritter.errors import Problem, RequestError, TritterError, raise_problems
from tritter.evaluation.options import RULES as EVALUATION_RULES
from tritter.options import Start, leaves, read_options
from tritter.planning.strategy import pipeline_problems, planned_rounds
from tritter.storage.reading import named_path
from tritter.targets import TARGET
from tritter.training.forgetting_method import (
    ForgettingMethod,
    method_start_problems,
    replayed_share,
)
from tritter.training.method import Method
from tritter.training.options import (
    PRESET_RATE,
    STEPS,
    callbacks_of,
    default_rate,
    positive_count,
    trainer_start_problems,
    with_steps,
)
from tritter.training.options import RULES as TRAINING_RULES

_Bodies = Mapping[str, Mapping[str, Any]]  # group → its body

_OF_ENTRIES = (*METHOD_GROUPS, *BASES)  # groups with several options
_NOTHING = {"logger": "csv"}  # the option that selects nothing; `none` in other groups
_OF_EXPERTS = ("moe_routing", "adaptation")  # not in the config unless an expansion selects them
Rule = Callable[[RunConfig], Iterable[Problem]]
_LENGTH, _BATCH, _SAMPLES = "sequence_length", "batch_size", "num_sequences"
_SMALL_LENGTH, _MOST = 128, 16  # of a base that the run trains
_FEWEST, _FEWEST_TOKENS = 8, 2048  # sequences, or fewer if they have as many tokens
_UNMIXED_SHARE = 0.1  # of generated text that only other methods read
_GROUPS = (*SECTIONS, "optimizer", *CHOSEN_GROUPS, *_OF_ENTRIES)


def _group_bodies(reader: Reader, raw: Mapping[str, Any]) -> _Bodies:
    """Return the body of each group, without the option `none` and disabled entries."""
    bodies = {}
    for group in _GROUPS:
        body = raw.get(group)
        if body is None and group in (*_OF_ENTRIES, *CHOSEN_GROUPS, *_OF_EXPERTS):
            body = {}
        if not isinstance(body, Mapping):
            reader.report(group, body, reason="it must be a mapping; choose an option")
            continue
        bodies[group] = body
        if group not in _OF_ENTRIES:
            continue
        none, names = _NOTHING.get(group, "none"), [str(name) for name in body]
        # callbacks.NAME=… adds to the default option none, which the user did not type
        if group in METHOD_GROUPS and none in names and len(names) > 1:
            reader.report(
                group,
                names,
                reason="none can't be combined with other options; remove it from the list",
            )
        if options := body.get(none):
            for key, value in leaves(options, f"{group}.{none}").items():
                reader.report(key, value, reason=f"{none} has no keys")
        off = [none, *(name for name in body if body[name] is None and group in BASES)]
        bodies[group] = {str(name): each for name, each in body.items() if name not in off}
    return bodies


def _with_frozen_rows(bodies: _Bodies) -> _Bodies:
    """Return the bodies, with `forgetting=freeze` if `expansion.vocab.freeze_old_rows` is set."""
    vocab = bodies.get("expansion", {}).get("vocab")
    if not isinstance(vocab, Mapping) or vocab.get("freeze_old_rows") is not True:
        return bodies
    chosen = bodies.get("forgetting", {}).get("freeze")
    freeze: Any
    if not isinstance(chosen, Mapping):
        freeze = body_of(option_files()["forgetting"]["freeze"]).get("freeze")
        assert isinstance(freeze, Mapping)
    else:  # its own default, which old_rows would replace
        parts = ("layers", "new_only", "old_experts")
        freeze = {**chosen, **({} if any(map(chosen.get, parts)) else {"layers": "attention"})}
    forgetting = {**bodies.get("forgetting", {}), "freeze": {**freeze, "old_rows": True}}
    return {**bodies, "forgetting": forgetting}


def _with_batches(bodies: _Bodies) -> dict[str, Mapping[str, Any]]:
    """Return the bodies with `data.sequence_length` and `data.batch_size`.

    A base that the run trains reads 16 sequences of 128 tokens. A checkpoint reads windows as in
    its last training run, else up to 1024 tokens, and at most as many tokens per batch.
    """
    data = bodies.get("data", {})
    length, size = data.get(_LENGTH, 0), data.get(_BATCH, 0)
    if length is None:
        length = _default_length(bodies.get("model", {}))
    if size is None:
        trainer = bodies.get("trainer", {})
        processes = positive_count(trainer.get("devices")) or 1
        if trainer.get("strategy", "auto") == "auto":
            processes = 1
        size = _MOST
        if bodies.get("model", {}).get("model_type") == "hf":
            fitting = _MOST * _SMALL_LENGTH // (positive_count(length) or _SMALL_LENGTH)
            size = min(_MOST, max(1, fitting))
        size = processes * max(1, size // processes)
    chosen = {_LENGTH: length, _BATCH: size}
    return {**bodies, "data": {**data, **{key: chosen[key] for key in chosen if key in data}}}


def _default_length(model: Mapping[str, Any]) -> int:
    if model.get("model_type") != "hf":
        return _SMALL_LENGTH
    lineage = positions = None
    # A damaged checkpoint is reported elsewhere; that of the hub is not known yet
    with suppress(TritterError):
        folder = named_path(str(model.get("path")), key="model.path")
        if Path(folder).is_dir():
            positions = read_model_file(folder).position_limit
            lineage = Lineage.read(folder)
    return window_length(lineage, positions)


def _with_samples(bodies: _Bodies, classes: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the bodies with `num_sequences` of forgetting methods.

    It is the default of the method. But a method reads no more in all than the sequences of
    training, or the share that it replays. The fewest are 8, or 2,048 tokens if these are fewer
    sequences, but at least 2. Generated text that only other methods read has a tenth of the
    sequences that training reads, and at least 8 if it reads so many.
    """
    data, trainer = bodies.get("data", {}), bodies.get("trainer", {})
    factors = (
        bodies.get("training", {}).get(STEPS),
        data.get(_BATCH),
        trainer.get("accumulate_grad_batches", 1),
    )
    length = positive_count(data.get(_LENGTH)) or _SMALL_LENGTH
    fewest = min(_FEWEST, max(2, _FEWEST_TOKENS // length))
    num_read = math.prod(filter(None, map(positive_count, factors)))
    steps = positive_count(factors[0]) or 1
    methods = dict(bodies.get("forgetting", {}))
    for name, body in methods.items():
        kind = classes.get(f"forgetting.{name}")
        if kind is None or not isinstance(body, Mapping) or body.get(_SAMPLES, 0) is not None:
            continue
        most, share = getattr(kind.Options(), _SAMPLES), body.get("fraction", 1)
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            share = 1  # reported elsewhere
        asked = {**body, _SAMPLES: most}
        asked.pop(TARGET, None)
        options = read_options(kind.Options, asked, prefix="", problems=[])  # reported elsewhere
        times = 1
        if options is not None:
            times = bool(kind.needs(options).prepares) + kind.refreshes(options, steps)
        least = fewest if share else max(fewest, min(_FEWEST, num_read))
        at_once = -(-num_read // max(1, times))
        count = min(most, max(least, math.ceil(at_once * (share or _UNMIXED_SHARE))))
        methods[name] = {**body, _SAMPLES: count}
    return {**bodies, "forgetting": methods} if "forgetting" in bodies else dict(bodies)


def _start_checkpoint(model: ModelConfig | CheckpointModelConfig) -> str | None:
    """Return the folder or Hub id of the initial checkpoint; None for a new base model."""
    return model.path if isinstance(model, CheckpointModelConfig) else None


class _InvalidSection(Exception):
    """A rule reads a section that could not be read."""


class _ValidSections(RunConfig):
    """The valid sections of a config; rules that read any other section get `_InvalidSection`."""

    def __init__(self, values: Mapping[str, Any], unread: set[str]) -> None:
        object.__setattr__(self, "_values", values)  # the record is frozen
        object.__setattr__(self, "_unread", unread)

    def __getattr__(self, name: str) -> Any:  # of every field, because none is set
        if name not in self._values or name in self._unread:
            raise _InvalidSection(name)
        return self._values[name]


def validate(
    raw: Mapping[str, Any],
    *,
    origin: Origin | None = None,
    found: Sequence[Problem] = (),
    rules: Sequence[Rule] = (),
) -> RunConfig:
    """Return the validated configuration for a composed config.

    Validation has three passes: find classes, read sections, apply the rules across sections. A
    rule is skipped if it reads an invalid section. The checks of the initial model run last.
    All problems are reported together.

    Args:
        raw: nested plain values, with interpolations resolved and without the `hydra` node.
        origin: function that returns the file in which a dotted key is set, for messages.
        found: problems found earlier.
        rules: additional rules of the caller.
    """
    reader = Reader(known_keys)
    has_no_period = (raw.get("evaluation") or {}).get("every_n_steps", 0) is None
    bodies = _with_batches(_with_frozen_rows(_group_bodies(reader, raw)))
    bodies = with_steps(bodies, reader.problems)
    has_no_rate = bodies.get("training", {}).get("learning_rate", 0) is None
    if has_no_rate:
        bodies["training"] = {**bodies["training"], "learning_rate": PRESET_RATE}
    classes = reader.find_classes(bodies)
    bodies = _with_samples(bodies, classes)
    num_class_problems = len(reader.problems)
    values = _read_sections(reader, raw, bodies, classes)
    if has_no_rate and {"model", "training"} <= values.keys():
        rate, reason = default_rate(values["model"])
        values["training"] = replace(values["training"], learning_rate=rate)
        if values.get("experts") is None:  # they have a learning rate of their own
            values["rate_note"] = f"training.learning_rate = {rate:g}: {reason}."
    problems, unread = list(found), set[str]()
    for number, problem in enumerate(reader.problems):
        where = problem.origin or (origin and origin(problem.key))
        found_by = 1 if number < num_class_problems else 2
        problems.append(replace(problem, origin=where, found_by=found_by))
    sound = _ValidSections(values, unread)

    def read_text(config: RunConfig) -> Iterable[Problem]:
        values["text"] = RunText.of(_start_checkpoint(config.model), config.data, seed=config.seed)
        if has_no_period:
            every = config.validation_period
            values["evaluation"] = replace(config.evaluation, every_n_steps=every)
        return ()

    chosen = (*values.get("forgetting", ()), values.get("growth"), values.get("experts"))
    feature_rules: list[Rule] = [
        partial(one.kind.problems, one.options) for one in chosen if one is not None
    ]
    for stage in ((read_text,), (*_RULES, *feature_rules, *rules), (_begin_problems,)):
        unread |= {problem.key.partition(".")[0] for problem in problems}
        found_here = (replace(p, found_by=3) for rule in stage for p in _problems_of(rule, sound))
        problems += [problem for problem in found_here if problem not in problems]
    raise_problems(problems)
    return RunConfig(**values)


def _problems_of(rule: Rule, config: RunConfig) -> Sequence[Problem]:
    """Return the problems of a rule, up to the first invalid section that it reads."""
    found: list[Problem] = []
    try:
        for problem in rule(config):
            found.append(problem)  # keep the problems found before an error
    except _InvalidSection:
        pass
    except RequestError as error:
        found += error.problems
    return found


def _read_sections(
    reader: Reader, raw: Mapping[str, Any], bodies: _Bodies, classes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values of a RunConfig without `text`; problems are recorded by the reader."""
    values: dict[str, Any] = {}
    for name, body in bodies.items():
        values[name] = reader.read_section(name, body, classes)
    loggers = values.get("logger", ())
    values["wandb"] = next((one.options for one in loggers if one.kind is WandbConfig), None)
    values["logger"] = tuple(one for one in loggers if one.kind is not WandbConfig)
    values["expansion"] = tuple(selected.options for selected in values.get("expansion", ()))
    root_values = {name: value for name, value in raw.items() if name not in _GROUPS}
    root: RootValues | None = reader.read(RootValues, root_values, prefix="")
    if root is not None and values.get("trainer") is not None:
        values["trainer"] = replace(values["trainer"], seed=root.seed)
    values["cache_dir"] = root and reader.call(cache_folder, root.cache_dir)
    read = {name: value for name, value in values.items() if value is not None}
    # An empty selection is valid
    read |= {group: None for group in CHOSEN_GROUPS if not bodies.get(group, True)}
    return read if root is None else {**asdict(root), **read}


def start_problems(
    config: RunConfig, source: Model, *, folder: Path | None = None
) -> Sequence[Problem]:
    """Return the reasons why a run can't start from a model.

    Args:
        folder: checkpoint folder; None if it is not local, or created by the run.
    """
    length, limit = config.data.sequence_length, source.position_limit
    if limit is not None and length > limit:
        where = "model" if isinstance(config.model, ModelConfig) else "config.json"
        reason = (
            f"the model supports {where}.{source.positions_key} = {limit} positions; "
            "allowed: at most that"
        )
        return [Problem("data.sequence_length", length, reason=reason)]
    if config.data.packing == "documents" and not source.separates_documents:
        reason = f"a token of {source.model_type} depends on earlier documents; use stream"
        return [Problem("data.packing", "documents", reason=reason)]
    trained = [source] if config.control else []
    try:
        if config.pipeline.target_params is not None:
            trained += (shape.model for shape in planned_rounds(config, source))
        else:
            trained.append(target_model(source, config.expansion))
    except RequestError as error:
        return error.problems
    if config.experts is None and folder is not None:
        require_plain(folder, doing="training with experts=none", key="model.path")
    start = Start(source=source, trained=tuple(trained), folder=folder)
    return [
        *config.adaptation.start_problems(config, source),
        *method_start_problems(config, source),
        *trainer_start_problems(config, source),
        *chain(*(m.kind.start_problems(m.options, config, start) for _, m in config.methods())),
    ]


def cache_folder(value: str | None) -> Path:
    """Return the cache folder: from the config, the environment, or the default."""
    folder = value or os.environ.get("TRITTER_CACHE") or "~/.cache/tritter"
    return named_path(folder, key="cache_dir" if value else "TRITTER_CACHE").absolute()


def _begin_problems(config: RunConfig) -> Iterator[Problem]:
    if (source := config.known_model()) is not None:
        source.check_size()
        model = config.model
        path = Path(model.path) if isinstance(model, CheckpointModelConfig) else None
        yield from start_problems(config, source, folder=path)


def _method_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield problems of methods that conflict with each other or require trainable weights."""
    needs = [one.kind.needs(one.options) for one in config.forgetting]
    for one, each in zip(config.forgetting, needs, strict=True):
        if unknown := {*each.prepares, *each.leaves, *each.state} - STATE_KINDS.keys():
            reason = f"no call of `register` declares its state {', '.join(sorted(unknown))}"
            yield Problem("forgetting", one.name, reason=reason)
        for name in sorted(vars(one.kind).keys() - {*dir(ForgettingMethod)}):
            near = get_close_matches(name, dir(ForgettingMethod), n=1, cutoff=0.9)
            if near and name[0] != "_" and callable(getattr(one.kind, name)):
                reason = f"`{name}` resembles the hook {near[0]}; rename it, or begin it with _"
                yield Problem("forgetting", one.name, reason=reason)
        if each.mixes and not hasattr(one.options, "fraction"):
            yield Problem("forgetting", one.name, reason="it mixes, but has no option `fraction`")
    for what, verb in (("prepares", "prepare"), ("leaves", "save")):
        counts = Counter(kind for each in needs for kind in getattr(each, what))
        if twice := [kind for kind, count in counts.items() if count > 1]:
            reason = f"several of them {verb} {', '.join(twice)}; leave one out"
            yield Problem("forgetting", [one.name for one in config.forgetting], reason=reason)
    weighty = [one.name for one in config.forgetting if one.kind.uses_weights]
    allowed = ", ".join(["none", *_weightless_methods()])
    if config.trainer.strategy == "fsdp" and weighty:
        reason = "they read whole weights or gradients, but each process has a shard; "
        reason += f"use trainer=ddp, otherwise choose one of {allowed}"
        yield Problem("forgetting", weighty, reason=reason)
    weighty = [name for name in weighty if name != "self_replay"]  # the frozen base writes
    if config.experts is not None and weighty:
        reason = "they protect weights of the base, which is frozen; with experts, choose "
        yield Problem("forgetting", weighty, reason=f"{reason}{allowed} or self_replay")
    loading = [each for each in config.methods() if each[1].kind.load is not Method.load]
    if len(loading) > 1:
        group, last = loading[-1]
        reason = "only one method of a run can load the model; leave one out"
        yield Problem(group, last.name, reason=reason)
    if (share := replayed_share(config.forgetting)) >= 1:
        mixing = [one for one in config.forgetting if one.kind.needs(one.options).mixes]
        keys = [f"forgetting.{one.name}.fraction" for one in mixing]
        yield Problem(" + ".join(keys), float(share), reason="the sum must be below 1")


def _weightless_methods() -> list[str]:
    """Return the forgetting methods that use no weights; for messages."""
    found = []
    for name in method_names("forgetting"):
        with suppress(RequestError):  # reported when it is selected
            body = body_of(option_files()["forgetting"][name])
            found += [] if method_class("forgetting", name, body).uses_weights else [name]
    return found


def _data_problems(config: RunConfig) -> Iterator[Problem]:
    old, new = config.data.old_sources, config.data.new_sources
    for name in new:
        if name in old:
            reason = "an old domain already has that name"
            has_tasks = isinstance(config.data, NamedTextConfig) and config.data.tasks
            side = "tasks" if has_tasks else "new"
            yield Problem(f"data.{side}.{name}", new[name], reason=reason)
    if config.text.old:
        return
    if isinstance(config.model, ModelConfig):
        reason = (
            "the base model is pretrained on old data; set it, or start from a checkpoint: model=hf"
        )
        yield Problem(_old_key(config), None, reason=reason)
        return
    if Path(config.model.path).is_dir():  # data of a hub checkpoint is known later
        yield from old_data_problems(config, config.text, Path(config.model.path))


def _old_key(config: RunConfig) -> str:
    """Return the key that sets the old data, for messages."""
    is_named = isinstance(config.data, NamedTextConfig)
    return "data.old" if is_named else f"{type(config.data).__name__}.old_domains"


def old_data_problems(config: RunConfig, text: RunText, folder: Path) -> Iterator[Problem]:
    """Yield forgetting methods that need old data, if nothing replaces it.

    Args:
        text: data of the run that starts from the checkpoint.
        folder: of the checkpoint.
    """
    if text.old:
        return
    typed = config.data.old if isinstance(config.data, NamedTextConfig) else ()
    needs_of = {one.name: one.kind.needs(one.options) for one in config.forgetting}
    needing = [
        name
        for name, needs in needs_of.items()
        if needs.old_text
        and not text.kept_sequences.sequences
        and not (needs.instead and StateHead.kinds_in(folder) >= set(needs.instead))
        and not any(needs.can_read_text_of(other) for other in needs_of.values())
    ]
    if needing:
        others = [name for name, needs in needs_of.items() if not needs.mixes]
        # self_replay needs no old data and replaces other replay methods
        writing = f"[{','.join(['self_replay', *others])}]" if others else "self_replay"
        reason = f"it is required by {' and '.join(needing)}; set it, let the model generate it "
        reason += f"(forgetting={writing}), or choose forgetting=none"
        yield Problem(_old_key(config), typed, reason=reason)


def _vocabulary_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the options that a larger vocabulary excludes, and those that several tasks do."""
    for spec in config.expansion if len(config.text.tasks) > 1 else ():
        if getattr(spec, "freeze_old_rows", False):
            reason = "later tasks would freeze all rows, the new ones included; use one task"
            yield Problem("expansion.vocab.freeze_old_rows", True, reason=reason)
        if spec.new_blocks_only:
            reason = "later tasks would train the whole model; use one task"
            yield Problem(f"expansion.{spec.name}.new_blocks_only", True, reason=reason)
    place = vocab_place(config.expansion)
    if place is None:
        return
    reason = "it compares probabilities of the same tokens, and expansion=vocab changes the tokens"
    if taught := [one.name for one in config.forgetting if one.kind.needs(one.options).teacher]:
        yield Problem("forgetting", taught, reason=f"{reason}; use replay or self_replay")
    for spec in config.expansion:
        if getattr(spec, "teacher", None) is not None:
            yield Problem("expansion.moe_add.init", "distill", reason=f"{reason}; use clone")


def _children_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the options that experts from children exclude."""
    of = ((each, getattr(each, "experts_from", None)) for each in config.expansion)
    spec, listed = next((pair for pair in of if pair[1]), (None, None))
    if listed is None:
        return
    if _start_checkpoint(config.model) is None:
        reason = "the models were trained from a checkpoint: set model=hf model.path=CHECKPOINT"
        yield Problem("expansion.moe.experts_from", listed, reason=reason)
    needs = [(one, one.kind.needs(one.options)) for one in config.forgetting]
    without_weights = [
        one.name
        for one, each in needs
        if getattr(one.options, "at", None) != "expanded"
        and (each.state or bool(each.prepares) != each.carried)
    ]
    if without_weights and getattr(spec, "attention_from", None) != "source":
        reason = "it protects weights of the source, and expansion.moe.experts_from replaces them "
        reason += "all; use replay, self_replay or distill, or expansion.moe.attention_from=source"
        yield Problem("forgetting", without_weights, reason=reason)


def _averaging_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield reasons against averaging weights: rounding moves frozen ones, experts are added."""
    adaptation = config.adaptation
    freezing_keys = {
        "expansion.llama_pro.new_blocks_only": any(s.new_blocks_only for s in config.expansion),
        "adaptation.freeze_base": adaptation.freeze_base and adaptation.is_used(config),
    }
    cause = next((f"{key} = true" for key, is_set in freezing_keys.items() if is_set), None)
    methods = (f"forgetting={one.name}" for one in config.forgetting if one.kind.freezes)
    cause = cause or next(methods, None)
    reason = f"{cause} freezes weights, and averaging would move them by rounding; "
    reason += "leave one of the two out"
    if config.experts is not None:
        cause, reason = "experts", "averaging misses experts added during training; leave it out"
    for one in callbacks_of("WeightAveraging", config) if cause else ():
        yield Problem(f"callbacks.{one.name}.{TARGET}", one.options[TARGET], reason=reason)


_RULES: tuple[Rule, ...] = (
    model_problems,
    _data_problems,
    *DATA_RULES,
    *EVALUATION_RULES,
    ladder_problems,
    *TRAINING_RULES,
    _method_problems,
    _vocabulary_problems,
    _children_problems,
    pipeline_problems,
    _averaging_problems,
)
