"""`tritter plan`: the steps to a size, what each costs, and the commands that carry them out."""

from dataclasses import asdict
from typing import Any

from tritter.cli.output import (
    new_console,
    new_table,
    print_command,
    print_json,
    print_lines,
    shapes_of,
    signs_of,
)
from tritter.cli.plan_request import (
    PlanRequest,
    command_notes,
    expand_commands,
    in_plan_options,
    read_source,
    read_target,
    training_setup,
)
from tritter.cli.values import spelled
from tritter.errors import RequestError
from tritter.planning import (
    Assumptions,
    Device,
    ExpansionStep,
    GrowthPlan,
    NamedShape,
    TrainingMemory,
    TrainingSetup,
    plan_growth,
)
from tritter.planning.guide import size_guide
from tritter.planning.plan import LAW_RESOLUTION, SMALL_MODEL_BEATEN_FROM, SMALLEST_MODEL
from tritter.report.wording import count_text, si_text
from tritter.terminal import Console

_MEASURED = "measured below 0.3 M parameters, three seeds"


def run_plan(request: PlanRequest, *, as_json: bool) -> int:
    """Print a plan.

    Raises:
        RequestError: an option is missing or not allowed, the target is not larger than the
            source, or can't be reached.
    """
    if request.source is None or request.target is None or request.gpu_hours is None:
        missing = [
            f"--{spelled(name)}"
            for name in ("source", "target", "gpu_hours")
            if getattr(request, name) is None
        ]
        raise RequestError(
            f"{' and '.join(missing)}: a plan needs --source, --target and --gpu-hours; "
            "`tritter plan --guide` needs nothing."
        )
    with in_plan_options():
        source = read_source(request.source)
        assumptions = Assumptions(
            device=Device(flops_per_second=request.device_flops, mfu=request.mfu),
            tokens_per_parameter=request.tokens_per_parameter,
            setup=training_setup(request, source),
        )
        plan = plan_growth(
            source.config,
            read_target(request.target),
            gpu_hours=request.gpu_hours,
            strategy=request.strategy.replace("-", "_"),
            assumptions=assumptions,
        )
    commands = list(expand_commands(plan, request.source, source))
    notes = list(command_notes(commands))
    if as_json:
        print_json(_as_json(plan, source, commands, assumptions) | {"notes": notes})
    else:
        _print(plan, source, commands, notes, assumptions)
    return 0


def print_guide(*, as_json: bool) -> int:
    """Print the size guide."""
    rows = size_guide()
    if as_json:
        print_json({"rows": [asdict(row) for row in rows]})
        return 0
    console = new_console()
    arrow = signs_of(console).arrow
    table = new_table(
        "", "method", "layers", "hidden size", "stated", "counted", numbers=("counted",)
    )
    for row in rows:
        table.add_row(
            f"{row.source} {arrow} {row.target}",
            row.method,
            row.layers.replace("→", arrow),
            row.hidden_size.replace("→", arrow),
            row.stated,
            f"{count_text(row.source_parameters)} {arrow} {count_text(row.target_parameters)}",
        )
    console.print(table)
    console.print()
    print_lines(
        console,
        [(f"{row.source} → {row.target}", f"{row.shape}. {row.note}") for row in rows],
    )
    return 0


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(value: int) -> str:
    return f"{si_text(value)}B"


def _print(
    plan: GrowthPlan,
    source: NamedShape,
    commands: list[str],
    notes: list[str],
    assumptions: Assumptions,
) -> None:
    console = new_console()
    print_lines(console, _heading(plan, source))
    console.print()
    _print_steps(console, plan)
    console.print()
    _print_memory(console, plan, assumptions.setup)
    console.print()
    print_lines(console, _verdict(plan, assumptions))
    console.print()
    console.print("Carry it out:")
    for number, command in enumerate(commands, start=1):
        print_command(console, f"{number:<2}", command)
    for note in notes:
        console.print(note, soft_wrap=True)


def _heading(plan: GrowthPlan, source: NamedShape) -> list[tuple[str, str]]:
    shapes = shapes_of(plan.source_config)
    size = f"{shapes['num_hidden_layers']} layers of {shapes['hidden_size']}"
    lines = [
        ("source", f"{source.name}: {size}, {count_text(source.parameters)} parameters"),
        ("target", f"{count_text(plan.target_parameters)} parameters"),
        ("strategy", plan.strategy),
    ]
    if plan.alternatives:
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in plan.alternatives.items())
        lines.append(
            (
                "",
                f"chosen by predicted loss once the budget is spent: {losses}; within "
                f"{LAW_RESOLUTION:g} the best proportioned",
            )
        )
    return lines


def _print_steps(console: Console, plan: GrowthPlan) -> None:
    numbers = ("layers", "hidden", "size", "tokens", "GPU-hours", "in total", "loss")
    table = new_table("", "method", *numbers, "budget", numbers=numbers)
    for position, step in enumerate(plan.steps, start=1):
        shapes = shapes_of(step.target_config)
        table.add_row(
            str(position),
            spelled(step.method),
            str(shapes["num_hidden_layers"]),
            str(shapes["hidden_size"]),
            count_text(step.target_parameters),
            count_text(step.num_tokens),
            _hours(step.gpu_hours),
            _hours(step.total_gpu_hours),
            f"{step.predicted_loss:.3f}",
            "within" if step.is_affordable else "beyond",
        )
    console.print(table)


def _print_memory(console: Console, plan: GrowthPlan, setup: TrainingSetup) -> None:
    numbers = ("parameters", "gradients", "optimizer", "activations", "in total")
    table = new_table("memory", *numbers, numbers=numbers)
    rows = [(plan.source_parameters, plan.source_memory)]
    rows += [(step.target_parameters, step.memory) for step in plan.steps]
    for parameters, memory in rows:
        table.add_row(
            count_text(parameters),
            _bytes(memory.parameters_bytes),
            _bytes(memory.gradients_bytes),
            _bytes(memory.optimizer_bytes),
            f"~{_bytes(memory.activations_bytes)}",
            f"~{_bytes(memory.total_bytes)}",
        )
    console.print(table)
    frozen = ", attention frozen" if setup.is_attention_frozen else ""
    again = ", activations computed again" if setup.is_checkpointed else ""
    console.print(
        f"training in {setup.precision} with {setup.optimizer}{frozen}, {setup.batch_size} x "
        f"{setup.sequence_length} tokens at once{again}",
        highlight=False,
    )


def _verdict(plan: GrowthPlan, assumptions: Assumptions) -> list[tuple[str, str]]:
    device = assumptions.device
    budget, needed = _hours(plan.gpu_hours), _hours(plan.needed_gpu_hours)
    if plan.reaches_target:
        text = f"{budget} GPU-hours reach the target, which needs {needed}; "
        text += f"{_hours(plan.spare_gpu_hours)} are left for more tokens"
    else:
        text = f"{budget} GPU-hours reach {count_text(plan.reached_parameters)} parameters"
        text += f", not the target, which needs {needed}"
        if plan.reached is not None:
            text += f": {_shape_text(plan.reached)} in place of step {_first_missing(plan)}"
        elif plan.reached_parameters == plan.source_parameters:
            text += ": they pay for no expansion at all, only for training the source on"
    stretched = ""
    if plan.source_parameters < SMALLEST_MODEL:
        stretched = ", and the source is smaller than any model behind it"
    needed_hours = (plan.needed_gpu_hours, plan.needed_gpu_hours + plan.source_gpu_hours)
    sunk, counted = (1 - hours / plan.from_scratch_gpu_hours for hours in needed_hours)
    return [
        ("budget", text),
        (
            "scratch",
            f"the last shape from nothing, for as many tokens a parameter: "
            f"{_hours(plan.from_scratch_gpu_hours)} GPU-hours; the plan saves {sunk:.0%}, or "
            f"{counted:.0%} with what the source cost",
        ),
        ("alone", _alone(plan)),
        ("advice", _advice(assumptions.tokens_per_parameter)),
        (
            "assumed",
            f"{device.flops_per_second:.3g} FLOPs per second at {device.mfu:.0%} utilisation; "
            f"{assumptions.tokens_per_parameter:g} tokens for each parameter of the source, and "
            "that a step adds. "
            f"Losses are predictions of a published scaling law, not measured{stretched}",
        ),
    ]


def _alone(plan: GrowthPlan) -> str:
    """Say what the control comes to: spending the budget on the source as it is."""
    gap = plan.ungrown_loss - plan.predicted_loss
    beside = "no other than the plan's"
    if abs(gap) >= LAW_RESOLUTION:
        beside = f"{abs(gap):.3f} {'above' if gap > 0 else 'below'} the plan's"
    if plan.pays_from_gpu_hours is None:
        start = "for no budget"
    elif plan.pays_from_gpu_hours == 0:
        start = "from the first hour on"
    else:
        start = f"from {_hours(plan.pays_from_gpu_hours)} GPU-hours on"
    return (
        f"the source as it is, trained on for the whole budget: loss {plan.ungrown_loss:.3f}, "
        f"{beside}; {spelled(plan.steps[0].method)} pays {start}"
    )


def _advice(tokens_per_parameter: float) -> str:
    """Say what our experiments measured of growth with so many tokens a parameter."""
    if tokens_per_parameter < SMALL_MODEL_BEATEN_FROM:
        return (
            "train the source on where that comes out level: one layer grown to eight, with "
            f"fewer than {SMALL_MODEL_BEATEN_FROM:g} tokens for each parameter of the eight, ended "
            f"above one layer alone of the same FLOPs ({_MEASURED})"
        )
    return (
        "keep steps small: doublings saved 10 to 26% of the FLOPs from scratch, at 5 to 15 tokens "
        f"a parameter, one layer grown to eight at once nothing, at 20 to 60 ({_MEASURED})"
    )


def _shape_text(step: ExpansionStep) -> str:
    shapes = shapes_of(step.target_config)
    return (
        f"{spelled(step.method)} to {shapes['num_hidden_layers']} layers of {shapes['hidden_size']}"
    )


def _first_missing(plan: GrowthPlan) -> int:
    return 1 + sum(step.is_affordable for step in plan.steps)


def _as_json(
    plan: GrowthPlan, source: NamedShape, commands: list[str], assumptions: Assumptions
) -> dict[str, Any]:
    return {
        "source": {
            "name": source.name,
            "parameters": source.parameters,
            "shapes": shapes_of(source.config),
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
        "ungrown_loss": plan.ungrown_loss,
        "pays_from_gpu_hours": plan.pays_from_gpu_hours,
        "reaches_target": plan.reaches_target,
        "reached_parameters": plan.reached_parameters,
        "reached_instead": None if plan.reached is None else _step_json(plan.reached),
        "predicted_loss": plan.predicted_loss,
        "assumptions": {
            "device_flops": assumptions.device.flops_per_second,
            "mfu": assumptions.device.mfu,
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
        "shapes": shapes_of(step.target_config),
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
