"""`tritter plan`: plan the expansions to a target size, with their costs and commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tritter.cli.methods import ExpansionMethods
from tritter.cli.options import AsJson, flag, flops_rate, option, parameter_count, with_dashes
from tritter.cli.output import (
    CommandConsole,
    display_path,
    print_json,
    refuse_damage,
    shapes_of,
)
from tritter.errors import Names, Problem, RequestError, nearest
from tritter.report.table import Table, count_text, si_text
from tritter.storage.hub import locate

if TYPE_CHECKING:
    from tritter.core.families import Model
    from tritter.planning.memory import TrainingMemory
    from tritter.planning.plan import Assumptions, ExpansionStep, GrowthPlan

# Tokens per target parameter; experiments/2026-11-22_one_layer
_SMALL_MODEL_BEATEN_FROM = 10.0
_MEASURED = (
    "measured below 0.3 M parameters, three seeds; on SmolLM2-135M no expansion paid within 77 "
    "thousand tokens"
)
_NAMES = Names.of(
    {
        key: f"--{with_dashes(key)}"
        for key in (
            *("source", "target", "gpu_hours", "strategy", "device_flops", "mfu", "optimizer"),
            *("tokens_per_parameter", "precision", "batch_size", "sequence_length"),
        )
    }
)
_COST = "Cost"
_MEMORY = "Memory"

_Source = Annotated[
    str | None,
    option(
        "--source",
        "3B|DIR",
        "Number of parameters such as 3B (the nearest preset), preset, folder or hub id.",
    ),
]
_Target = Annotated[
    str | None, option("--target", "10B", "Number of parameters such as 10B, or a preset.")
]
_GpuHours = Annotated[float | None, option("--gpu-hours", "H", "Budget in GPU-hours.")]
_Strategy = Annotated[
    str,
    option(
        "--strategy",
        "auto|depth_first|width_first|balanced",
        "Order of growth; auto: lowest predicted loss for the budget.",
    ),
]
_DeviceFlops = Annotated[
    int,
    option(
        "--device-flops",
        "F",
        "Peak FLOPs per second of one GPU, such as 989T. Default: 312T (A100, bf16).",
        parser=flops_rate,
        shows_default=False,
        panel=_COST,
    ),
]
_Mfu = Annotated[
    float, option("--mfu", "U", "Model FLOPs utilisation (share of the peak).", panel=_COST)
]
_TokensPerParameter = Annotated[
    float,
    option("--tokens-per-parameter", "X", "Training tokens per added parameter.", panel=_COST),
]
_SourceTokens = Annotated[
    int | None,
    option(
        "--source-tokens",
        "N",
        "Tokens that the source was trained on, such as 9T. Default: --tokens-per-parameter for "
        "each of its parameters.",
        parser=parameter_count,
        panel=_COST,
    ),
]
_Precision = Annotated[
    str,
    option("--precision", "TYPE", "A value of trainer.precision, such as 32-true.", panel=_MEMORY),
]
_Optimizer = Annotated[str, option("--optimizer", "adamw|adamw8bit", "Optimizer.", panel=_MEMORY)]
_FreezeAttention = Annotated[
    bool, flag("--freeze-attention", "Freeze the attention.", panel=_MEMORY)
]
_BatchSize = Annotated[
    int,
    option("--batch-size", "N", "Sequences per GPU and step.", least=1, most=10**6, panel=_MEMORY),
]
_SequenceLength = Annotated[
    int | None,
    option(
        "--sequence-length",
        "N",
        "Tokens per sequence. Default: 2048, or fewer if the model has fewer positions.",
        least=1,
        most=10**7,
        panel=_MEMORY,
    ),
]
_GradientCheckpointing = Annotated[
    bool,
    flag("--gradient-checkpointing", "Recompute activations in the backward pass.", panel=_MEMORY),
]
_Guide = Annotated[bool, flag("--guide", "Print the size guide instead of a plan.")]


def plan(
    source: _Source = None,
    target: _Target = None,
    gpu_hours: _GpuHours = None,
    strategy: _Strategy = "auto",
    device_flops: _DeviceFlops = 312 * 10**12,
    mfu: _Mfu = 0.4,
    tokens_per_parameter: _TokensPerParameter = 20.0,
    source_tokens: _SourceTokens = None,
    precision: _Precision = "bf16-mixed",
    optimizer: _Optimizer = "adamw",
    freeze_attention: _FreezeAttention = False,
    batch_size: _BatchSize = 1,
    sequence_length: _SequenceLength = None,
    gradient_checkpointing: _GradientCheckpointing = False,
    guide: _Guide = False,
    as_json: AsJson = False,
) -> int:
    """Plan the expansions from one size to another: shapes, tokens, GPU-hours, memory.

    tritter plan --source 3B --target 10B --gpu-hours 5000
    """
    if guide:
        return _print_guide(as_json=as_json)
    if source is None or target is None or gpu_hours is None:
        needed = {"--source": source, "--target": target, "--gpu-hours": gpu_hours}
        missing = [name for name, value in needed.items() if value is None]
        raise RequestError(
            f"{' and '.join(missing)}: a plan needs --source, --target and --gpu-hours; "
            "`tritter plan --guide` needs nothing."
        )
    from tritter.planning.memory import TrainingSetup
    from tritter.planning.plan import Assumptions, plan_growth
    from tritter.planning.serving import serving_notes
    from tritter.planning.upcycling import Upcycling

    with _NAMES.in_use():
        name, start = _read_source(source)
        setup = TrainingSetup(
            precision=precision,
            optimizer=optimizer,
            is_attention_frozen=freeze_attention,
            batch_size=batch_size,
            sequence_length=_sequence_length(sequence_length, name, start),
            is_checkpointed=gradient_checkpointing,
        )
        assumptions = Assumptions(
            device_flops=device_flops,
            mfu=mfu,
            tokens_per_parameter=tokens_per_parameter,
            source_tokens=source_tokens,
            setup=setup,
        )
        preset = _preset(target)
        made = plan_growth(
            start,
            _count("target", target) if preset is None else preset[1].num_parameters,
            gpu_hours=gpu_hours,
            strategy=strategy.replace("-", "_"),
            assumptions=assumptions,
        )
    commands = list(_expand_commands(made, source, name))
    notes = list(_command_notes(commands))
    found = serving_notes(made.steps[-1].target, made.source)
    notes += [f"Shape of the result: {note}." for note in found]
    upcycling = Upcycling.of_budget(
        start,
        dense_tokens=float(source_tokens or tokens_per_parameter * start.num_parameters),
        gpu_flops=assumptions.flops(gpu_hours),
        sequence_length=setup.sequence_length,
    )
    if upcycling is not None:
        notes.append(f"Upcycling the source instead (expansion moe): {upcycling.text}.")
    if as_json:
        print_json(_as_json(made, name, commands, assumptions) | {"notes": notes})
    else:
        _print(made, name, commands, notes, assumptions)
    return 0


def _sequence_length(requested: int | None, name: str, model: Model) -> int:
    """Return the sequence length, limited by the model's positions."""
    from tritter.planning.memory import TrainingSetup

    limit = model.position_limit or 0
    if requested is not None and 0 < limit < requested:
        key = model.positions_key
        reason = f"{name} has {key} = {limit} positions; must be at most that"
        raise RequestError(Problem("sequence_length", requested, reason))
    default = TrainingSetup().sequence_length
    return requested or min(default, limit or default)


def _expand_commands(plan: GrowthPlan, text: str, name: str) -> Iterator[str]:
    """Yield the `tritter expand` command of each step; each reads the output of the last one.

    Args:
        plan: the plan.
        text: the typed value of --source.
        name: of its shape. Without a checkpoint, the first command reads a folder of that name.
    """
    name = Path(name).resolve().name.replace(" ", "-")
    checkpoint = text if _is_checkpoint(text) else name
    for step in plan.steps:
        spec = step.spec
        size = count_text(step.target_parameters).replace(" ", "")  # 4.42B, 213k
        output = f"{name}-{size}"
        words = [
            "tritter",
            "expand",
            "--checkpoint",
            checkpoint,
            *ExpansionMethods.current().words(spec),
        ]
        yield shlex.join([*words, "--output", output])
        checkpoint = output


def _command_notes(commands: Sequence[str]) -> Iterator[str]:
    """Yield notes on manual steps between the commands of a plan."""
    words = shlex.split(commands[0])
    source, result = words[words.index("--checkpoint") + 1], words[-1]
    if not _is_checkpoint(source):
        yield f"{source} is a shape, not a checkpoint: replace it with a folder or hub id."
    train = shlex.join(["tritter", "train", "--checkpoint", result, "--data", "PATH"])
    trained = shlex.quote(f"{result}-continued/checkpoint")
    if len(commands) == 1:
        yield f"Train the result: {train} writes it to {trained}."
    else:
        yield (
            f"Train each result before the next step: {train} writes it to {trained}. Use that "
            "folder as --checkpoint of the next step."
        )


def _is_checkpoint(source: str) -> bool:
    return Path(source).is_dir() or "/" in source


def _read_source(text: str) -> tuple[str, Model]:
    """Return name and model of `--source`."""
    from tritter.checkpoints.location import require_plain
    from tritter.core.families.config_file import read_model_file
    from tritter.planning.shapes import nearest_preset

    if _is_checkpoint(text):
        with refuse_damage():
            folder = locate(text, key="--source")
            require_plain(folder, doing="an expansion", key="--source")
            return display_path(folder), read_model_file(folder)
    if (preset := _preset(text)) is not None:
        return preset
    folders = [entry.name for entry in Path.cwd().iterdir() if entry.is_dir()]
    return nearest_preset(_count("source", text, near=folders))


def _preset(text: str) -> tuple[str, Model] | None:
    """Return name and model of a preset."""
    from tritter.core.families import Model
    from tritter.core.families.presets import PRESETS

    name = text.lower().replace("-", "_")
    return (name, Model(PRESETS[name].config())) if name in PRESETS else None


def _count(key: str, text: str, *, near: Sequence[str] = ()) -> int:
    from tritter.core.families.presets import PRESETS

    try:
        return parameter_count(text)
    except typer.BadParameter as error:
        folder = ", a checkpoint folder" if key == "source" else ""
        reason = f"give a count of parameters such as 3B{folder} or a preset: {', '.join(PRESETS)}"
        close = nearest(text.lower().replace("-", "_"), [*PRESETS, *near])
        raise RequestError(Problem(key, text, reason, nearest=close)) from error


def _print_guide(*, as_json: bool) -> int:
    from tritter.planning.guide import size_guide

    rows = size_guide()
    if as_json:
        print_json({"rows": [asdict(row) for row in rows]})
        return 0
    console = CommandConsole()
    cells = [
        (
            f"{row.source} → {row.target}",
            row.method,
            row.layers,
            row.hidden_size,
            row.stated,
            f"{count_text(row.source_parameters)} → {count_text(row.target_parameters)}",
        )
        for row in rows
    ]
    header = ("", "method", "layers", "hidden size", "stated", "counted")
    console.print_table(Table(header, tuple(cells), numbers=(5,)))
    console.print()
    lines = [(f"{row.source} → {row.target}", f"{row.shape}. {row.note}.") for row in rows]
    console.print_lines(lines)
    console.print("\ndocs/reference/planning.md explains the differences.")
    return 0


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(shapes: Mapping[str, int]) -> str:
    return f"{shapes['num_hidden_layers']} layers of {shapes['hidden_size']}"


def _print(
    plan: GrowthPlan,
    name: str,
    commands: list[str],
    notes: list[str],
    assumptions: Assumptions,
) -> None:
    console = CommandConsole()
    size = f"{_size(shapes_of(plan.source))}, {count_text(plan.source_parameters)} parameters"
    lines = [
        ("source", f"{name}: {size}"),
        ("target", f"{count_text(plan.target_parameters)} parameters"),
        ("strategy", plan.strategy),
    ]
    if plan.alternatives:
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in plan.alternatives.items())
        chosen = (
            f"lowest predicted loss for the budget: {losses}; ties within "
            f"{assumptions.law.resolution:g} go to the best proportions"
        )
        lines.append(("", chosen))
    console.print_lines(lines)
    console.print()
    console.print_table(_step_table(plan))
    console.print()
    console.print_table(_memory_table(plan))
    setup = assumptions.setup
    frozen = ", attention frozen" if setup.is_attention_frozen else ""
    checkpointing = ", gradient checkpointing" if setup.is_checkpointed else ""
    console.print(
        f"training in {setup.precision} with {setup.optimizer}{frozen}, {setup.batch_size} x "
        f"{setup.sequence_length} tokens per micro-batch{checkpointing}"
    )
    console.print()
    console.print_lines(_verdict(plan, assumptions))
    console.print()
    console.print("Commands:")
    for number, command in enumerate(commands, start=1):
        console.print_command(f"{number:<2}", command)
    for note in notes:
        console.print(note, soft_wrap=True)


def _step_table(plan: GrowthPlan) -> Table:
    rows = []
    for position, step in enumerate(plan.steps, start=1):
        shapes = shapes_of(step.target)
        cells = (
            str(position),
            with_dashes(step.method),
            str(shapes["num_hidden_layers"]),
            str(shapes["hidden_size"]),
            count_text(step.target_parameters),
            count_text(step.num_tokens),
            _hours(step.gpu_hours),
            _hours(step.total_gpu_hours),
            f"{step.predicted_loss:.3f}",
            "within" if step.is_affordable else "beyond",
        )
        rows.append(cells)
    numbers = ("layers", "hidden", "size", "tokens", "GPU-hours", "in total", "loss")
    return Table(("", "method", *numbers, "budget"), tuple(rows), numbers=tuple(range(2, 9)))


def _memory_table(plan: GrowthPlan) -> Table:
    models = [(plan.source_parameters, plan.source_memory)]
    models += [(step.target_parameters, step.memory) for step in plan.steps]
    rows = []
    for parameters, memory in models:
        known = (memory.parameters_bytes, memory.gradients_bytes, memory.optimizer_bytes)
        estimated = (memory.activations_bytes, memory.total_bytes)
        sizes = [f"{si_text(size)}B" for size in known]
        sizes += [f"~{si_text(size)}B" for size in estimated]
        rows.append((count_text(parameters), *sizes))
    numbers = ("parameters", "gradients", "optimizer", "activations", "in total")
    return Table(("memory", *numbers), tuple(rows), numbers=tuple(range(1, 6)))


def _saving(plan: GrowthPlan) -> str:
    """Compare the cost of a plan with training from scratch, in words where it costs more."""
    needed_hours = (plan.needed_gpu_hours, plan.needed_gpu_hours + plan.source_gpu_hours)
    sunk, counted = (1 - hours / plan.from_scratch_gpu_hours for hours in needed_hours)
    if sunk <= 0:
        return "the plan costs more than that"
    text = f"the plan saves {sunk:.0%} of them"
    if counted <= 0:
        return f"{text}, which does not repay the training of the source"
    return f"{text}, or {counted:.0%} if the training of the source is counted"


def _verdict(plan: GrowthPlan, assumptions: Assumptions) -> list[tuple[str, str]]:
    """Return lines on the budget, the alternatives to the plan and its assumptions."""
    budget, needed = _hours(plan.gpu_hours), _hours(plan.needed_gpu_hours)
    if plan.reaches_target:
        text = f"{budget} GPU-hours reach the target, which needs {needed}; "
        text += f"the other {_hours(plan.spare_gpu_hours)} can train on more tokens"
    else:
        text = f"{budget} GPU-hours reach {count_text(plan.reached_parameters)} parameters"
        text += f", not the target, which needs {needed}"
        if (reached := plan.reached) is not None:
            shape = _size(shapes_of(reached.target))
            first_missing = 1 + sum(step.is_affordable for step in plan.steps)
            text += f": {with_dashes(reached.method)} to {shape} instead of step {first_missing}"
        elif plan.reached_parameters == plan.source_parameters:
            text += ": they cover no expansion, only continued training of the source"
    gap = plan.control_loss - plan.predicted_loss
    difference = "the same as the plan's"
    if abs(gap) >= assumptions.law.resolution:
        difference = f"{abs(gap):.3f} {'above' if gap > 0 else 'below'} the plan's"
    start = "does not pay off at any budget"
    if (hours := plan.pays_from_gpu_hours) is not None:
        start = f"pays off from {_hours(hours)} GPU-hours" if hours else "pays off at any budget"
    scratch, of_source, extrapolated = "with as many tokens per parameter", "", ""
    if assumptions.source_tokens is not None:
        scratch = "to the same predicted loss"
        of_source = f"{si_text(assumptions.source_tokens)} tokens for the source; "
    if plan.source_parameters < assumptions.law.smallest_model:
        extrapolated = ", and the source is smaller than any model it was fitted to"
    return [
        ("budget", text),
        (
            "scratch",
            f"training the last shape from scratch, {scratch}: "
            f"{_hours(plan.from_scratch_gpu_hours)} GPU-hours; {_saving(plan)}",
        ),
        (
            "alone",
            f"continued training of the source for the whole budget: loss "
            f"{plan.control_loss:.3f}, {difference}; {with_dashes(plan.steps[0].method)} {start}",
        ),
        ("advice", _advice(assumptions.tokens_per_parameter)),
        (
            "assumed",
            f"{assumptions.device_flops:.3g} FLOPs per second at {assumptions.mfu:.0%} "
            "utilisation; "
            f"{of_source}{assumptions.tokens_per_parameter:g} tokens for each parameter "
            f"{'of the source and each parameter ' if not of_source else ''}that a step adds. "
            f"Losses are predictions of a published scaling law, not measured{extrapolated}",
        ),
    ]


def _advice(tokens_per_parameter: float) -> str:
    """Return the advice from our experiments for this number of tokens per parameter."""
    if tokens_per_parameter < _SMALL_MODEL_BEATEN_FROM:
        return (
            "continue training the source if both predictions are equal: one layer grown to "
            f"eight, with fewer than {_SMALL_MODEL_BEATEN_FROM:g} tokens per parameter of the "
            "eight, had a higher loss than a single layer trained with the same FLOPs "
            f"({_MEASURED})"
        )
    return (
        "keep steps small: doublings saved 10 to 26% of the FLOPs from scratch (5 to 15 tokens "
        "per parameter); growing one layer to eight at once saved nothing (20 to 60 tokens per "
        f"parameter) ({_MEASURED})"
    )


def _as_json(
    plan: GrowthPlan, name: str, commands: list[str], assumptions: Assumptions
) -> dict[str, Any]:
    return {
        "source": {
            "name": name,
            "parameters": plan.source_parameters,
            "shapes": shapes_of(plan.source),
            "memory_bytes": _memory_json(plan.source_memory),
        },
        "target_parameters": plan.target_parameters,
        "strategy": plan.strategy,
        "alternatives": plan.alternatives,
        "steps": [
            {**_step_json(step), "command": command}
            for step, command in zip(plan.steps, commands, strict=True)
        ],
        "gpu_hours": plan.gpu_hours,
        "needed_gpu_hours": plan.needed_gpu_hours,
        "spare_gpu_hours": plan.spare_gpu_hours,
        "from_scratch_gpu_hours": plan.from_scratch_gpu_hours,
        "source_gpu_hours": plan.source_gpu_hours,
        "ungrown_loss": plan.control_loss,
        "pays_from_gpu_hours": plan.pays_from_gpu_hours,
        "reaches_target": plan.reaches_target,
        "reached_parameters": plan.reached_parameters,
        "reached_instead": None if plan.reached is None else _step_json(plan.reached),
        "predicted_loss": plan.predicted_loss,
        "assumptions": {
            "device_flops": assumptions.device_flops,
            "mfu": assumptions.mfu,
            "tokens_per_parameter": assumptions.tokens_per_parameter,
            "training": asdict(assumptions.setup),
            "scaling_law": asdict(assumptions.law),
        },
    }


def _step_json(step: ExpansionStep) -> dict[str, Any]:
    return {
        "method": step.method,
        "options": asdict(step.spec),  # type: ignore[call-overload]
        "is_exact": step.spec.is_exact,
        "shapes": shapes_of(step.target),
        "parameters": step.target_parameters,
        "tokens": step.num_tokens,
        "gpu_hours": step.gpu_hours,
        "total_gpu_hours": step.total_gpu_hours,
        "is_affordable": step.is_affordable,
        "predicted_loss": step.predicted_loss,
        "memory_bytes": _memory_json(step.memory),
    }


def _memory_json(memory: TrainingMemory) -> dict[str, int]:
    return {
        "parameters": memory.parameters_bytes,
        "gradients": memory.gradients_bytes,
        "optimiser": memory.optimizer_bytes,
        "activations_estimate": memory.activations_bytes,
        "total_estimate": memory.total_bytes,
    }
