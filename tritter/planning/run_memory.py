"""Memory check of a run: compares the requirements of each training run with the available memory.

A run is refused for exact requirements: parameters, gradients, optimizer states, and copies for
the start and for forgetting mitigation. Activations are an estimate: they cause a note, and a
refusal only if the run would exceed the memory twice.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, count
from typing import Literal

from tritter.checkpoints.location import checkpoint_model
from tritter.core.expansions import target_model
from tritter.core.families import Model
from tritter.core.families.presets import PRESETS
from tritter.errors import Problem, RequestError
from tritter.launched import Launch
from tritter.options import RunRequest
from tritter.planning.memory import TrainingSetup, machine_memory, training_memory
from tritter.planning.strategy import planned_rounds

_FLOAT32 = 4
_GPU, _MACHINE = "the GPU", "this machine"
_LIBRARIES = 540_000_000  # resident bytes of torch, transformers and Lightning, measured
_TOO_MUCH = 2  # times the memory, by estimate
_MANY_TOKENS = 0.1  # per batch, relative
_PATH_COPIES = 4  # ω, the weights at the start and before a step, and gradients
_FEWER_BYTES: Literal["bf16-true"] = "bf16-true"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Need:
    """Memory requirements of one training run, in bytes.

    Args:
        model: description of the trained model.
        parameters: number of its parameters.
        states: parameters, gradients and optimizer states; exact.
        copies: weights and gradients for forgetting mitigation, on the model's device; exact.
        start: the initial weights, in host memory.
        activations: activations; an estimate.
        sequence_length: tokens of a training sequence.
        teacher: weights of a teacher, on the model's device; shared between processes in host
            memory.
        processes: number of processes on this machine; each needs all of the above except `start`.
    """

    model: str
    parameters: int
    states: int
    copies: int
    start: int
    activations: int
    sequence_length: int
    teacher: int = 0
    processes: int = 1

    @property
    def device(self) -> int:
        """Bytes of one process on the model's device."""
        return self.states + self.copies


class RunMemory:
    """The memory check of a run.

    Args:
        config: the run.
        source: its starting model.
    """

    def __init__(self, config: RunRequest, source: Model) -> None:
        self.config, self.source = config, source

    @cached_property
    def limits(self) -> dict[str, int]:
        """The bytes of the GPU and of the machine, where they are known."""
        import torch

        limits, trainer = dict[str, int](), self.config.trainer
        if trainer.accelerator != "cpu" and torch.cuda.is_available():
            devices = range(min(trainer.devices, torch.cuda.device_count()))
            sizes = (torch.cuda.get_device_properties(n).total_memory for n in devices)
            limits[_GPU] = min(map(int, sizes))
        if (machine := machine_memory()) is not None:
            limits[_MACHINE] = machine
        return limits

    def needed(self, need: _Need, name: str, *, with_activations: bool = False) -> int:
        """Return the bytes that a training run requires of a memory, by its name in `limits`."""
        of_process = need.device + with_activations * need.activations
        if name == _GPU:
            return of_process + need.teacher
        of_model = 0 if _GPU in self.limits else need.processes * of_process + need.teacher
        return of_model + need.start

    def needs(self) -> Iterator[_Need]:
        """Yield the memory requirements of training the base, the grown model and the control."""
        config, source = self.config, self.source
        if config.model.model_type != "hf":
            yield _training_need(config, source, name="the base")
        name = "the grown model"
        if config.pipeline.target_params is not None:
            before = source
            for shape in planned_rounds(config, source):
                new = shape.parameters - before.num_parameters
                trained = new if shape.spec.new_blocks_only else None
                yield _training_need(config, shape.model, name=name, before=before, trained=trained)
                before = shape.model
        elif config.expansion:
            grown, trained = target_model(source, config.expansion), self._trained()
            yield _training_need(config, grown, name=name, before=source, trained=trained)
        else:
            yield _training_need(config, source, name="the model", before=source)
        if config.control:
            of_control = config.with_sections(growth=None, experts=None)
            yield _training_need(of_control, source, name="the control", before=source)

    def problems(self) -> list[Problem]:
        """Return the problem of a run that exceeds the memory; empty if it fits or is unchecked."""
        if not self.config.trainer.check_memory:
            return []
        worst = self._worst()
        if worst is None:
            return self._estimate_problems()
        need, name = worst
        limit, needed = self.limits[name], self.needed(need, name)
        fitting = need.parameters * limit // needed
        copied = need.copies + need.start + need.teacher
        advice = [*self._smaller_runs(), "trainer.check_memory=false disables this check"]
        each = f"; for each of {need.processes} processes" if need.processes > 1 else ""
        reason = (
            f"training {need.model} with {_count(need.parameters)} parameters requires "
            f"{_size(needed)} without activations (weights, gradients and optimizer "
            f"{_size(need.states)}, copies {_size(copied)}{each}), but "
            f"{name} has {_size(limit)}; at most about {_count(fitting)} parameters fit"
        )
        return [Problem("trainer.check_memory", True, reason, "; ".join(advice))]

    def _estimate_problems(self) -> list[Problem]:
        """Return the problem of a run that exceeds the memory twice by estimated activations."""
        config = self.config
        worst = self._worst(with_activations=True)
        if worst is None:
            return []
        need, name = worst
        limit, needed = self.limits[name], self.needed(need, name, with_activations=True)
        if needed <= _TOO_MUCH * limit:
            return []
        length, advice = need.sequence_length, self._smaller_batches(need)
        reason = (
            f"training {need.model} on {batch_size_at(length, config):,} sequences of {length:,} "
            f"tokens requires about {_size(needed)}, {_size(need.activations)} of it for "
            f"activations, but {name} has {_size(limit)}"
        )
        advice += "; trainer.check_memory=false disables this check"
        return [Problem("data.batch_size", config.data.batch_size, reason, advice)]

    def line(self) -> str:
        """Return one line on the memory of the largest training run and that of the machine."""
        need = max(self.needs(), key=lambda each: each.device + each.activations)
        activations, copies = need.activations, need.copies + need.teacher
        limits = self.limits
        uses = {name: self.needed(need, name, with_activations=True) for name in limits}
        name = max(uses, key=lambda each: uses[each] / limits[each], default=_MACHINE)
        needed = self.needed(need, name, with_activations=True)
        where = f" of the {_size(limits[name])} of {name}" if limits else ""
        parts = [f"weights, gradients and optimizer {_size(need.states)}"]
        parts += [f"copies {_size(copies)}"] if copies else []
        parts += [f"activations {_size(activations)}", f"start {_size(need.start)}"]
        each = f"; for each of {need.processes} processes" if need.processes > 1 else ""
        if name != _GPU:
            needed += _LIBRARIES
            parts.append(f"libraries {_size(_LIBRARIES)}")
        return f"training {need.model}: about {_size(needed)}{where} ({', '.join(parts)}{each})"

    def notes(self) -> tuple[str, ...]:
        """Return a note on a run that may exceed the memory with estimated activations."""
        worst = self._worst(with_activations=True)
        if worst is None:
            return ()
        need, name = worst
        needed = self.needed(need, name, with_activations=True)
        return (
            f"memory: training {need.model} may require {_size(needed)} with activations "
            f"(estimated), but {name} has {_size(self.limits[name])}; "
            f"{self._smaller_batches(need)}",
        )

    def _smaller_batches(self, need: _Need) -> str:
        """Return advice for a run whose activations do not fit."""
        config = self.config
        is_own = need.sequence_length == config.data.sequence_length
        key = "data.sequence_length" if is_own else "expansion.context.target_length"
        advice = f"reduce data.batch_size or {key}"
        again = config.with_sections(trainer=replace(config.trainer, activation_checkpointing=True))
        if again != config and RunMemory(again, self.source)._worst(with_activations=True) is None:
            advice += ", or set trainer.activation_checkpointing=true, with which it fits"
        return advice

    def _trained(self) -> int | None:
        """Return the number of trained parameters if only new blocks are trained; else None."""
        source, specs = self.source, self.config.expansion
        if not any(spec.new_blocks_only for spec in specs):
            return None
        layers = [
            grown.sizes.num_hidden_layers
            for grown in (target_model(source, specs[:number]) for number in range(len(specs) + 1))
        ]
        new = sum(layers[n + 1] - layers[n] for n, spec in enumerate(specs) if spec.new_blocks_only)
        grown = target_model(source, specs)
        without = grown.with_layers(range(layers[-1] - new))
        return grown.num_parameters - without.num_parameters

    def _worst(self, *, with_activations: bool = False) -> tuple[_Need, str] | None:
        """Return the training run with the largest excess and the memory; None if all fit."""

        def needed(each: tuple[_Need, str]) -> int:
            return self.needed(*each, with_activations=with_activations)

        over = [
            (need, name)
            for need in self.needs()
            for name, limit in self.limits.items()
            if needed((need, name)) > limit
        ]
        return max(over, key=needed, default=None)

    def _smaller_runs(self) -> Iterator[str]:
        """Yield single changes with which the run fits."""
        config, source = self.config, self.source
        trainer = config.trainer
        others = tuple(
            one
            for one in config.forgetting
            if not one.kind.needs(one.options).copies and not one.kind.needs(one.options).teacher
        )
        names = ",".join(one.name for one in others) or "none"
        one = replace(trainer, strategy="auto", devices=1)
        fewer = replace(trainer, precision=_FEWER_BYTES)
        for overrides, changed in (
            ("trainer.strategy=auto trainer.devices=1", config.with_sections(trainer=one)),
            (f"'forgetting=[{names}]'", config.with_sections(forgetting=others)),
            (f"trainer.precision={_FEWER_BYTES}", config.with_sections(trainer=fewer)),
        ):
            if changed != config and RunMemory(changed, source)._worst() is None:
                yield f"it fits with {overrides}"
        if config.model.model_type == "hf":
            return
        for name, preset in reversed(PRESETS.items()):
            smaller = Model(preset.config(vocab_size=config.data.vocab_size))
            if smaller.num_parameters >= source.num_parameters:
                continue
            with suppress(RequestError):  # this model can't reach the requested sizes
                if RunMemory(config, smaller)._worst() is None:
                    yield f"it fits with model={name}"
                    return


def side_by_side_problems(
    jobs: Iterable[RunMemory], *, launcher: str, num_parallel: int
) -> list[Problem]:
    """Return the problem of a sweep whose largest jobs exceed the memory together; else empty.

    Args:
        jobs: the checks of runs that fit on their own.
        launcher: name of the launcher, for messages.
        num_parallel: number of parallel jobs on this machine.
    """
    checked = [job for job in jobs if job.config.trainer.check_memory]
    if num_parallel == 1 or not checked:
        return []
    needed: dict[str, list[int]] = {}
    limits: dict[str, int] = {}
    for job in checked:
        most: dict[str, int] = {}
        limits |= job.limits
        for need in job.needs():
            for name in job.limits:
                most[name] = max(most.get(name, 0), job.needed(need, name))
        for name, each in most.items():
            needed.setdefault(name, []).append(each)
    for name, of_jobs in needed.items():
        largest = sorted(of_jobs, reverse=True)
        if sum(largest[:num_parallel]) > limits[name]:
            fits = max(1, sum(total <= limits[name] for total in accumulate(largest)))
            reason = (
                f"{num_parallel} parallel jobs require {_size(sum(largest[:num_parallel]))} "
                f"without activations, but {name} has {_size(limits[name])}; {fits} in parallel "
                "fit; trainer.check_memory=false disables this check"
            )
            return [Problem("hydra/launcher", launcher, reason=reason)]
    return []


def grown_model(config: RunRequest, source: Model) -> Model:
    """Return the model that a run ends with, unless its neurons grow."""
    if config.pipeline.target_params is not None:
        *_, last = planned_rounds(config, source)
        return last.model
    return target_model(source, config.expansion) if config.expansion else source


def _num_processes(config: RunRequest) -> int:
    """Return the number of processes of training, on all machines."""
    trainer, launch = config.trainer, Launch.of()
    processes = trainer.devices if trainer.strategy != "auto" else 1
    return processes if launch is None else processes * launch.num_nodes


def batch_size_at(length: int, config: RunRequest, batch_size: int | None = None) -> int:
    """Return the sequences per batch for sequences of another length: about as many tokens.

    It is a multiple of the number of processes: at least one for each.

    Args:
        length: tokens per sequence.
        config: the run.
        batch_size: sequences of the usual length. Default: those of the run.
    """
    processes, batch_size = _num_processes(config), batch_size or config.data.batch_size
    of_each = batch_size * config.data.sequence_length / (length * processes)
    return processes * max(1, round(of_each))


def tokens_note(length: int, config: RunRequest) -> str:
    """Return a note if batches of sequences of another length have other numbers of tokens.

    Args:
        length: tokens per sequence.
        config: the run.
    """
    data, step = config.data, _num_processes(config)

    def change(batch_size: int) -> float:
        now = batch_size_at(length, config, batch_size) * length
        return now / (batch_size * data.sequence_length) - 1

    if abs(found := change(data.batch_size)) <= _MANY_TOKENS:
        return ""
    larger = count(data.batch_size + step - data.batch_size % step, step)
    fits = next(size for size in larger if abs(change(size)) <= _MANY_TOKENS)
    now = batch_size_at(length, config)
    return (
        f"long windows change the tokens per batch by {found:+.0%} ({now} of {length} tokens "
        f"instead of {data.batch_size} of {data.sequence_length}); about as many: "
        f"data.batch_size={fits}"
    )


def _training_need(
    config: RunRequest,
    model: Model,
    *,
    name: str,
    before: Model | None = None,
    trained: int | None = None,
) -> _Need:
    trainer = config.trainer
    processes, shares = trainer.devices if trainer.strategy != "auto" else 1, _num_processes(config)
    length, limit = config.data.sequence_length, model.position_limit
    if before is not None and limit is not None and limit != before.position_limit:
        length = limit  # a longer context is trained on windows of its length
    setup = TrainingSetup(
        optimizer="adamw8bit" if "8bit" in config.optimizer.target else "adamw",
        precision=trainer.precision,
        batch_size=max(1, batch_size_at(length, config) // shares),
        sequence_length=length,
        is_checkpointed=trainer.activation_checkpointing,
    )
    kept = config.optimizer.kept_per_parameter()
    memory = training_memory(model, setup, kept_per_parameter=kept)
    count = model.num_parameters
    of_one = memory.parameters_bytes // count
    states, moments = memory.states_bytes, memory.optimizer_bytes
    teacher = 0
    if before is None:  # a base records state for the run's methods
        kinds = {kind for one in config.forgetting for kind in one.kind.needs(one.options).state}
        copies = _PATH_COPIES * memory.parameters_bytes if "path_integral" in kinds else 0
    else:
        frozen = 0
        for _, one in config.methods():
            frozen = max(frozen, one.kind.num_frozen(one.options, model, before, config))
        if frozen:
            trained = max(0, (count if trained is None else trained) - frozen)
        needs = [one.kind.needs(one.options) for one in config.forgetting]
        copies = sum(int(each.copies) for each in needs) * memory.parameters_bytes
        folders = {each.teacher_folder for each in needs if each.teacher}
        teachers = (before if folder is None else checkpoint_model(folder) for folder in folders)
        # The size of an undownloaded hub model is unknown
        teacher = of_one * sum(each.num_parameters for each in teachers if each is not None)
    if before is not None and config.experts is not None:  # the base is frozen
        kind, options = config.experts.kind, config.experts.options
        states = memory.parameters_bytes - kind.saved_bytes(options, model, of_one=of_one)
        states += kind.num_trained(options, model) * (2 * of_one + moments // count)
    elif trained is not None:
        states = memory.parameters_bytes + of_one * trained + moments * trained // count
    return _Need(
        model=name,
        parameters=count,
        states=-(-states // shares) if trainer.strategy == "fsdp" else states,
        copies=copies,
        start=_FLOAT32 * count,
        activations=memory.activations_bytes,
        sequence_length=length,
        teacher=teacher,
        processes=processes,
    )


def _size(num_bytes: int) -> str:
    return _scaled(num_bytes, {" TB": 10**12, " GB": 10**9, " MB": 10**6}) or f"{num_bytes:,} bytes"


def _count(parameters: int) -> str:
    return _scaled(parameters, {"B": 10**9, "M": 10**6, "k": 10**3}) or str(parameters)


def _scaled(number: int, units: Mapping[str, int]) -> str | None:
    scaled = (f"{number / size:,.1f}{unit}" for unit, size in units.items() if number >= size)
    return next(scaled, None)
