"""Whether a run fits into memory: what each of its trainings holds at once, against what there is.

What is refused for is exact, and no more than what surely lies there at the same time: parameters,
gradients, the optimizer's state, and the copies that the start and the methods against forgetting
keep. Activations are an estimate, so they only lead to a note.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from tritter.checkpoints.location import checkpoint_config
from tritter.core.expansions import target_config
from tritter.core.families import Config, family_of
from tritter.core.families.presets import PRESETS
from tritter.errors import Problem, RequestError
from tritter.options import RunRequest
from tritter.planning.memory import TrainingSetup, machine_memory, training_memory
from tritter.planning.strategy import planned_rounds
from tritter.targets import Component

_FLOAT32 = 4
_PATH_COPIES = 4  # ω, the weights at the start and before a step, its gradients
_FEWER_BYTES: Literal["bf16-true"] = "bf16-true"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """What one training holds at once, in bytes.

    Args:
        model: which one is trained, in words.
        parameters: of the model.
        states: parameters, gradients and optimizer states, exact.
        copies: of weights and gradients that methods against forgetting hold, where the model is;
            exact.
        start: the weights before the training, in the machine's memory.
        teacher: the weights of a model to learn from, where the model is; processes share those
            in the machine's memory.
        activations: estimated.
        processes: that hold all of it but `start`, each.
    """

    model: str
    parameters: int
    states: int
    copies: int
    start: int
    activations: int
    teacher: int = 0
    processes: int = 1

    @property
    def device(self) -> int:
        """Of one process, where the model is."""
        return self.states + self.copies


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is held: its name, its bytes, and how many are to be held there."""

    name: str
    limit: int
    needed: int


def memory_problems(config: RunRequest, source: Config) -> list[Problem]:
    """Return why a run can't fit, or nothing when it can or is not to be asked.

    Args:
        source: config.json of what the run starts from.
    """
    if not config.trainer.check_memory:
        return []
    worst = _worst(config, source)
    if worst is None:
        return []
    held, place = worst
    fitting = held.parameters * place.limit // place.needed
    copied = held.copies + held.start + held.teacher
    advice = [*_what_fits(config, source), "trainer.check_memory=false tries it all the same"]
    each = f"; each of {held.processes} processes holds its own" if held.processes > 1 else ""
    reason = (
        f"training {held.model} of {_count(held.parameters)} parameters takes "
        f"{_size(place.needed)} before any activation (weights, gradients and optimizer "
        f"{_size(held.states)}, copies {_size(copied)}{each}), and "
        f"{place.name} has {_size(place.limit)}; at most about {_count(fitting)} parameters fit"
    )
    return [Problem("trainer.check_memory", True, reason, "; ".join(advice))]


def memory_notes(config: RunRequest, source: Config) -> tuple[str, ...]:
    """Say where a run may not fit once activations, which are estimated, are added."""
    worst = _worst(config, source, with_activations=True)
    if worst is None:
        return ()
    held, place = worst
    less = "a smaller data.batch_size or data.sequence_length takes less"
    again = config.with_sections(trainer=replace(config.trainer, activation_checkpointing=True))
    if again != config and _worst(again, source, with_activations=True) is None:
        less += ", and with trainer.activation_checkpointing=true it fits"
    return (
        f"memory: training {held.model} may take {_size(place.needed)} with activations "
        f"(estimated), and {place.name} has {_size(place.limit)}; {less}",
    )


def side_by_side_problems(
    jobs: Sequence[tuple[RunRequest, Config]], *, launcher: str, at_once: int
) -> list[Problem]:
    """Return why the largest jobs of a sweep can't be held at the same time, or nothing.

    Args:
        jobs: config and config.json of what it starts from; each fits alone.
        at_once: jobs that run side by side on this machine.
    """
    asked = [(config, source) for config, source in jobs if config.trainer.check_memory]
    if at_once == 1 or not asked:
        return []
    needed: dict[str, list[int]] = {}
    limits: dict[str, int] = {}
    for config, source in asked:
        most: dict[str, int] = {}
        for held in trainings(config, source):
            for place in _places(config, held, 0):
                limits[place.name] = place.limit
                most[place.name] = max(most.get(place.name, 0), place.needed)
        for name, each in most.items():
            needed.setdefault(name, []).append(each)
    for name, of_jobs in needed.items():
        largest = sorted(of_jobs, reverse=True)
        if sum(largest[:at_once]) > limits[name]:
            fits = max(1, sum(total <= limits[name] for total in accumulate(largest)))
            reason = (
                f"it runs {at_once} jobs at a time, which take {_size(sum(largest[:at_once]))} "
                f"before any activation, and {name} has {_size(limits[name])}; {fits} at a time "
                "fit; trainer.check_memory=false tries it all the same"
            )
            return [Problem("hydra/launcher", launcher, reason=reason)]
    return []


def trainings(config: RunRequest, source: Config) -> Iterator[TrainingMemory]:
    """Yield what each training of a run holds: of the base, of what grew, of the control."""
    if config.model.model_type != "hf":
        yield _held(config, source, model="the base")
    name = "the grown model"
    if config.pipeline.target_params is not None:
        before = source
        for shape in planned_rounds(config, source):
            new = _parameters(shape.config) - _parameters(before)
            trained = new if shape.spec.new_blocks_only else None
            yield _held(config, shape.config, model=name, before=before, trained=trained)
            before = shape.config
    elif config.expansion:
        grown, trained = target_config(source, config.expansion), _trained(config, source)
        yield _held(config, grown, model=name, before=source, trained=trained)
    else:
        yield _held(config, source, model="the model", before=source)
    if config.control:
        of_control = config.with_sections(growth=None, experts=None)
        yield _held(of_control, source, model="the control", before=source)


def _trained(config: RunRequest, source: Config) -> int | None:
    """Return how many parameters are trained where new blocks alone are; else None: all."""
    specs = config.expansion
    if not any(spec.new_blocks_only for spec in specs):
        return None
    layers = [
        family_of(grown).dimensions(grown).num_hidden_layers
        for grown in (target_config(source, specs[:number]) for number in range(len(specs) + 1))
    ]
    new = sum(layers[n + 1] - layers[n] for n, spec in enumerate(specs) if spec.new_blocks_only)
    grown = target_config(source, specs)
    without = family_of(grown).with_layers(grown, tuple(range(layers[-1] - new)))
    return _parameters(grown) - _parameters(without)


def _held(
    config: RunRequest,
    model_config: Config,
    *,
    model: str,
    before: Config | None = None,
    trained: int | None = None,
) -> TrainingMemory:
    trainer = config.trainer
    processes = trainer.devices if trainer.strategy != "auto" else 1
    setup = TrainingSetup(
        optimizer="adamw8bit" if "8bit" in config.optimizer.target else "adamw",
        precision=trainer.precision,
        batch_size=max(1, config.data.batch_size // processes),
        sequence_length=config.data.sequence_length,
        is_checkpointed=trainer.activation_checkpointing,
    )
    kept = config.optimizer.kept_per_parameter() if setup.optimizer == "adamw" else 2
    memory = training_memory(model_config, setup, kept_per_parameter=kept)
    count = _parameters(model_config)
    of_one = memory.parameters_bytes // count
    states, moments = memory.states_bytes, memory.optimizer_bytes
    teacher = 0
    if before is None:  # of a base what is recorded for the run's methods
        kinds = {kind for one in config.forgetting for kind in one.kind.needs(one.options).state}
        copies = _PATH_COPIES * memory.parameters_bytes if "path_integral" in kinds else 0
    else:
        if frozen := _num_frozen(config, model_config, before):
            trained = max(0, (count if trained is None else trained) - frozen)
        copies = sum(_copies(one) for one in config.forgetting) * memory.parameters_bytes
        needs = [one.kind.needs(one.options) for one in config.forgetting]
        places = {each.teacher_folder for each in needs if each.teacher}
        teachers = (before if place is None else checkpoint_config(place) for place in places)
        # Of a hub id, which is not at hand, the size is not known
        teacher = of_one * sum(_parameters(each) for each in teachers if each is not None)
    if trained is not None:
        states = memory.parameters_bytes + of_one * trained + moments * trained // count
    return TrainingMemory(
        model=model,
        parameters=count,
        states=-(-states // processes) if trainer.strategy == "fsdp" else states,
        copies=copies,
        start=_FLOAT32 * count,
        activations=memory.activations_bytes,
        teacher=teacher,
        processes=processes,
    )


def _num_frozen(config: RunRequest, trained: Config, before: Config) -> int:
    """Return how many parameters of a training may stay out of the optimizer to its end."""
    growth = config.growth
    if growth is not None and (frozen := growth.kind.num_frozen(growth.options, trained)):
        return int(frozen)
    each = (one.kind.num_frozen(one.options, trained, before, config) for one in config.forgetting)
    return max(each, default=0)


def _copies(one: Component) -> int:
    """Return how many tensors as large as the model a method holds."""
    return int(one.kind.needs(one.options).copies)


def _parameters(config: Config) -> int:
    return family_of(config).count_parameters(config)


def _worst(
    config: RunRequest, source: Config, *, with_activations: bool = False
) -> tuple[TrainingMemory, Place] | None:
    """Return the training that is furthest above a limit, and where; None when all fit."""
    over = [
        (held, place)
        for held in trainings(config, source)
        for place in _places(config, held, held.activations if with_activations else 0)
        if place.needed > place.limit
    ]
    return max(over, key=lambda each: each[1].needed, default=None)


def _places(config: RunRequest, held: TrainingMemory, activations: int) -> Iterator[Place]:
    """Yield where a training is held, as far as it is known how much there is."""
    import torch

    machine, gpu, each = machine_memory(), None, held.device + activations
    if config.trainer.accelerator != "cpu" and torch.cuda.is_available():
        devices = range(min(config.trainer.devices, torch.cuda.device_count()))
        gpu = min(int(torch.cuda.get_device_properties(n).total_memory) for n in devices)
    if gpu is not None:
        yield Place("the GPU", gpu, each + held.teacher)
    if machine is not None:
        of_machine = held.processes * each + held.teacher if gpu is None else 0
        yield Place("this machine", machine, of_machine + held.start)


def _what_fits(config: RunRequest, source: Config) -> Iterator[str]:
    """Yield changes of the run, each of which alone lets it fit."""
    trainer = config.trainer
    others = tuple(
        one
        for one in config.forgetting
        if not _copies(one) and not one.kind.needs(one.options).teacher
    )
    names = ",".join(one.name for one in others) or "none"
    one = replace(trainer, strategy="auto", devices=1)
    fewer = replace(trainer, precision=_FEWER_BYTES)
    for words, changed in (
        ("trainer.strategy=auto trainer.devices=1", config.with_sections(trainer=one)),
        (f"'forgetting=[{names}]'", config.with_sections(forgetting=others)),
        (f"trainer.precision={_FEWER_BYTES}", config.with_sections(trainer=fewer)),
    ):
        if changed != config and _worst(changed, source) is None:
            yield f"with {words} it fits"
    if config.model.model_type == "hf":
        return
    for preset in sorted(PRESETS.values(), key=lambda each: -each.nominal_parameters):
        smaller = preset.config(vocab_size=config.data.vocab_size)
        if _parameters(smaller) >= _parameters(source):
            continue
        with suppress(RequestError):  # the sizes that are asked for can't be had from this one
            if _worst(config, smaller) is None:
                yield f"with model={preset.name} it fits"
                return


def _size(num_bytes: int) -> str:
    return _scaled(num_bytes, {" TB": 10**12, " GB": 10**9, " MB": 10**6}) or f"{num_bytes:,} bytes"


def _count(parameters: int) -> str:
    return _scaled(parameters, {"B": 10**9, "M": 10**6, "k": 10**3}) or str(parameters)


def _scaled(number: int, units: Mapping[str, int]) -> str | None:
    told = (f"{number / size:,.1f}{unit}" for unit, size in units.items() if number >= size)
    return next(told, None)
