"""`tritter expand`: read the request, show what comes of it, write it."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tritter.checkpoint import Lineage
from tritter.cli.domain import print_domain, train_domain
from tritter.cli.expand_place import ExpandPlace
from tritter.cli.expand_request import ExpandRequest
from tritter.cli.expand_room import RoomTold, room_json
from tritter.cli.measure import Measurement, measure
from tritter.cli.output import (
    EXIT_NO,
    SHAPES,
    new_console,
    new_table,
    print_command,
    print_json,
    print_lines,
    progress_bars,
    says_if_written,
    shapes_of,
    short,
    shown_path,
)
from tritter.cli.request import choice, damage_is_a_wrong_request
from tritter.cli.values import spelled
from tritter.errors import show
from tritter.expand import (
    Expanded,
    PlannedExpansion,
    Room,
    expand,
    plan_expansion,
    room_for,
)
from tritter.expansion import ExpansionSpec, ResolvedExpansion
from tritter.families import Config, family_of, on_disk
from tritter.parameter_map.carry import POLICIES
from tritter.report.wording import count_text
from tritter.storage.tensors import WEIGHT_DTYPES
from tritter.terminal import Console, say

# Field, the value that leaves the function alone, and the words that ask for it.
_EXACT_CHOICES: tuple[tuple[str, Any, str], ...] = (
    ("noise", 0.0, "--noise 0"),
    ("identity_init", True, "--identity-init"),
    ("reinit_fraction", 0.0, "--reinit-fraction 0"),
    ("init", "fresh", "--width-init fresh"),
    ("head_strategy", "copy", "--head-strategy copy"),
)


def run_expand(
    request: ExpandRequest, place: ExpandPlace, *, dry_run: bool, overwrite: bool, as_json: bool
) -> int:
    """Carry the request out, or only plan it, and print what came of it.

    Raises:
        RequestError: an option or the destination cannot be had; nothing is written.
        TritterError: writing failed, or a tensor turned out damaged while it was read.
    """
    with says_if_written(place.destination):
        if request.domain.is_given and not dry_run:
            return _run_domain(request, place, overwrite=overwrite, as_json=as_json)
        return _run_map(request, place, dry_run=dry_run, overwrite=overwrite, as_json=as_json)


def _run_map(
    request: ExpandRequest, place: ExpandPlace, *, dry_run: bool, overwrite: bool, as_json: bool
) -> int:
    """Expand, or only plan it, and print what came of it."""
    moments = choice("moments", request.moments, POLICIES)
    dtype = None
    if request.dtype is not None:
        dtype = getattr(torch, choice("dtype", request.dtype, WEIGHT_DTYPES))
    lineage: Lineage | None = None
    measured: Measurement | None = None
    room: Room | None = None

    with request.speaks():
        plan = plan_expansion(place.source, place.specs, seed=request.seed)
        if dry_run:
            room = room_for(place.opened, plan, dtype=dtype, moments=moments)
    if not dry_run:
        with request.speaks(), progress_bars(is_shown=not as_json) as new_bar:

            def look(made: Expanded) -> None:
                nonlocal measured
                with damage_is_a_wrong_request():
                    wanted = request.is_measured is not False
                    bar = new_bar("MB checked") if wanted else None
                    measured = measure(place.source, made, is_wanted=wanted, progress=bar)

            made = expand(
                place.opened,
                place.destination,
                plan,
                dtype=dtype,
                max_shard_bytes=request.max_shard_bytes,
                overwrite=overwrite,
                moments=moments,
                progress=new_bar("tensors"),
                before_placing=look,
            )
            lineage = made.lineage
    if as_json:
        plain = _as_json(plan, lineage, place, request)
        error = measured.error if measured else None
        print_json({**plain, "step0_error": error, **room_json(room, place.destination)})
    else:
        _print(plan, lineage, place, request, measured, room)
    if measured is not None and measured.is_broken:
        say(
            "error: the method claims to keep the function, and the result does not: it parts from "
            f"the source at {measured.parting}; please report this with the output of "
            "`tritter inspect`.",
            is_error=True,
        )
        return EXIT_NO
    return 0


def _run_domain(
    request: ExpandRequest, place: ExpandPlace, *, overwrite: bool, as_json: bool
) -> int:
    """Expand, train the new experts on the domain, and print what came of it."""
    console = Console(quiet=True) if as_json else new_console()
    made = train_domain(
        request.domain,
        place.source,
        place.destination,
        place.specs,
        seed=request.seed,
        console=console,
        overwrite=overwrite,
    )
    plan, error = made.plan, made.lineage.expansion_history[-1].step0_error
    if as_json:
        plain = _as_json(plan, made.lineage, place, request)
        print_json({**plain, "step0_error": error, "experts": made.experts, "scores": made.scores})
        return 0
    text = "not finite" if error is None else f"{error:.1e} of the logits' deviation on its text"
    measured = Measurement(error, False, text)
    _print(plan, made.lineage, place, request, measured)
    print_domain(console, made.experts, made.scores)
    return 0


def _as_json(
    plan: PlannedExpansion, lineage: Lineage | None, place: ExpandPlace, request: ExpandRequest
) -> dict[str, Any]:
    first, last = plan.steps[0], plan.steps[-1]
    return {
        "source": str(place.source),
        "destination": str(place.destination),
        "written": lineage is not None,
        "shapes": {
            "before": shapes_of(first.source_config),
            "after": shapes_of(last.target_config),
        },
        "parameters": {"before": plan.parameters_before, "after": plan.parameters_after},
        "parameters_on_disk": {
            "before": _on_disk(first.source_config),
            "after": _on_disk(last.target_config),
        },
        "dtype": request.dtype,
        "seed": request.seed,
        "steps": [
            {
                "method": step.spec.name,
                "expansion_type": step.spec.expansion_type,
                "options": step.options,
                "layer_sources": list(step.parameter_map.layer_sources),
                "is_exact": step.spec.is_exact,
                "notes": list(step.notes),
                "map_digest": step.parameter_map.digest(),
            }
            for step in plan.steps
        ],
        "model_hash": lineage.model_hash if lineage else None,
        "parent_hash": lineage.parent_hash if lineage else None,
    }


def _on_disk(config: Config) -> int:
    return family_of(config).count_parameters(on_disk(config))


def _print(
    plan: PlannedExpansion,
    lineage: Lineage | None,
    place: ExpandPlace,
    request: ExpandRequest,
    measured: Measurement | None,
    room: Room | None = None,
) -> None:
    console = new_console()
    _print_shapes(console, plan)
    lines: list[tuple[str, str]] = []
    for position, step in enumerate(plan.steps):
        lines += _step_lines(step, is_first=position == 0)
    exactness = _exactness([step.spec for step in plan.steps], is_recipe=request.recipe is not None)
    since = " at step 0, before the new experts were trained" if request.domain.is_given else ""
    lines.append(("exact", exactness + since))
    if measured is not None:
        lines.append(("step 0", measured.text))
    if request.dtype is not None:
        lines.append(("dtype", spelled(request.dtype)))
    if lineage is not None:
        lines.append(("hash", short(lineage.model_hash)))
    obstacles = [place.obstacle]
    if room is not None:
        told = RoomTold.of(room, place.destination)
        lines += told.lines
        obstacles.append(told.obstacle)
    console.print()
    print_lines(console, lines)
    console.print()
    here = shlex.quote(shown_path(place.destination))
    if lineage is not None:
        print_command(console, "written", shown_path(place.destination))
        print_command(console, "next   ", f"tritter inspect {here}")
    else:
        print_command(console, "dry run", f"nothing was written; it would go to {here}")
        for obstacle in filter(None, obstacles):
            print_command(console, "refused", obstacle)


def _print_shapes(console: Console, plan: PlannedExpansion) -> None:
    before = shapes_of(plan.steps[0].source_config)
    after = shapes_of(plan.steps[-1].target_config)
    table = new_table("", "before", "after", "", numbers=("before", "after"))
    for name in (name for name in SHAPES if name in after):
        old, new = before.get(name), after[name]
        grown = f"{new / old:.3g} times" if old is not None and old != new else ""
        style = "dim" if old == new else "bold"
        table.add_row(SHAPES[name], "-" if old is None else str(old), str(new), grown, style=style)
    table.add_section()
    table.add_row(
        "parameters",
        count_text(plan.parameters_before),
        count_text(plan.parameters_after),
        f"{plan.parameters_after / plan.parameters_before:.3g} times",
        style="bold",
    )
    console.print(table)


def _step_lines(step: ResolvedExpansion, *, is_first: bool) -> list[tuple[str, str]]:
    """Say what one expansion does: its notes, where layers come from, the map's digest."""
    texts = list(step.notes)
    if step.spec.expansion_type == "depth":
        texts.append(f"layers from {' '.join(map(str, step.parameter_map.layer_sources))}")
    texts.append(f"map {short(step.parameter_map.digest())}")
    labels = [spelled(step.spec.name), *[""] * (len(texts) - 1)]
    return list(zip(labels, texts, strict=True))


def _exactness(specs: Sequence[ExpansionSpec], *, is_recipe: bool) -> str:
    lossy = [spec for spec in specs if not spec.is_exact]
    if not lossy:
        return "yes: the model computes what it computed before"
    named = ", ".join(spelled(s.name) + _made_exact_by(s, is_recipe=is_recipe) for s in lossy)
    return (
        f"no: {named} may change what the model computes; measure the jump on your own text, and "
        "train on"
    )


def _made_exact_by(spec: Any, *, is_recipe: bool) -> str:
    """Name the one option, if there is one, that alone would make a method exact."""
    for option, value, words in _EXACT_CHOICES:
        if hasattr(spec, option) and replace(spec, **{option: value}).is_exact:
            told = f"{option}: {show(value)}" if is_recipe else words
            return f" (exact with {told})"
    return ""
