"""What methods against forgetting need from before an expansion: made once, kept, carried on.

Asked of the methods themselves, and made for none that does not ask: state that a method prepares
at the weights that an arm starts from, state that an earlier training left beside them, masks of
what carries old knowledge, a teacher.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tritter.checkpoints.state import KeptSequences, LazyTensors, read_state, write_state
from tritter.core.models import disk_tensors, live_tensors, load_model
from tritter.core.parameter_map.carry import StateKind
from tritter.data.batches import read_sequences, sample_equally, write_sequences
from tritter.errors import RequestError
from tritter.methods.forgetting import build_methods, needs_of
from tritter.methods.forgetting.si import RECORDED
from tritter.pipeline.branch import Branch
from tritter.pipeline.context import RunContext
from tritter.pipeline.ledger import ImportanceFound, StageResult
from tritter.storage.atomic import atomic_folder
from tritter.storage.hub import locate
from tritter.storage.tensors import TensorFolder
from tritter.storage.writer import TensorStream
from tritter.training import Needs, Preparation, Task, Values
from tritter.transform import state_stream

WRITTEN = "written"  # by the model: stands for an old domain where there is none
_WRITTEN_FILE = "written.safetensors"


def is_needed(context: RunContext) -> bool:
    """Say whether a method of the run prepares anything."""
    return any(needs.prepares or needs.writes for needs in _needs(context))


def is_recorded(context: RunContext) -> bool:
    """Say whether a method of any attempt needs the path of the base's training."""
    asked = (needs for config in context.config.attempts for needs in needs_of(config.forgetting))
    return any(kind in needs.state for needs in asked for kind in RECORDED)


def prepare(context: RunContext, branch: Branch) -> StageResult:
    """Let methods look at the weights that an arm starts from, and keep what they make of it."""
    start = context.source(branch.start)
    config, beside = start.config, start.state
    model = context.reading(load_model(start.folder, config=config)).to(context.device)
    kinds: dict[str, TensorStream] = {}
    found: dict[str, Any] = {}
    notes: list[str] = []
    flops, seconds = {branch.label("importance"): 0.0}, dict[str, float]()
    written: Tensor | None = None
    methods = zip(build_methods(context.config.forgetting), _needs(context), strict=True)
    for method, needs in sorted(methods, key=lambda each: not each[1].writes):
        if not (needs.prepares or needs.writes):
            continue
        state = {
            kind: live_tensors(config, LazyTensors(held))
            for kind, held in (beside.kinds if beside else {}).items()
            if kind in needs.state
        }
        since = time.perf_counter()
        given = _preparation(context, branch, model, state, written)
        with context.progress_bars() as new_bar:
            prepared = method.prepare(replace(given, progress=new_bar(f"importance {method.name}")))
        for kind in needs.prepares:
            values = {name: value.cpu() for name, value in prepared.state[kind].items()}
            kinds[kind] = TensorStream.of(disk_tensors(config, values).items())
        found |= prepared.found
        notes += prepared.notes
        label = branch.label("importance")
        if needs.writes:
            label, written = branch.label(method.name), prepared.written
            seconds[label] = time.perf_counter() - since
        flops[label] = flops.get(label, 0.0) + prepared.flops
    stored = set(beside.kinds if beside else ())
    standing_in = [
        one.name
        for one, needs in zip(context.config.forgetting, _needs(context), strict=True)
        if needs.old_text and not (needs.instead and stored >= set(needs.instead))
    ]
    if standing_in and not context.old_of(branch) and not kept_text(context, branch).sequences:
        names = " and ".join(standing_in)
        notes.append(f"There is no old text: {names} had what the model itself wrote.")
    for note in notes:
        context.say("", note)
    with atomic_folder(_place(context, branch), overwrite=True) as temporary:
        write_state(temporary, kinds, step=0)
        if written is not None:
            write_sequences(temporary / _WRITTEN_FILE, {WRITTEN: written})
    return StageResult(
        ImportanceFound(notes=tuple(notes), methods=found),
        flops=flops,
        seconds=seconds,
        leaves=(_folder(branch),),
    )


def notes_of(context: RunContext, branch: Branch) -> tuple[str, ...]:
    """Return what is worth telling of what was prepared for an arm, a sentence each."""
    if context.ledger.get(key(branch)) is None:
        return ()
    return context.ledger.found(key(branch), ImportanceFound).notes


def _preparation(
    context: RunContext,
    branch: Branch,
    model: nn.Module,
    state: Mapping[str, Values],
    written: Tensor | None,
) -> Preparation:
    kept = kept_text(context, branch).sequences
    old = (*context.old_of(branch), *kept) or (() if written is None else (WRITTEN,))

    def draw(count: int, *purpose: str, domains: Iterable[str] | None = None) -> Tensor:
        sequences = _old_sequences(context, branch, written)
        drawing = Task(seed=_task_seed(context, branch), old_sequences=sequences)
        return drawing.draw(count, *purpose, domains=domains)

    return Preparation(
        model=model,
        domains=old,
        latest=_latest(context, branch),
        draw=draw,
        sequence_length=context.config.data.sequence_length,
        end_of_text_id=context.end_of_text_id,
        seed=lambda *words: context.seed(*words, *branch.purpose),
        state=state,
        say=partial(context.say, "importance"),
    )


def task(context: RunContext, branch: Branch, *, follow: Callable[[Values], Values]) -> Task:
    """Return what the methods of an arm's training are told.

    Args:
        follow: takes values by parameter name to the names that are trained.
    """
    needs, planned = _needs(context), context.planned(branch)
    # Each kind of state that the methods need, as it was before the expansion, and its rule
    prepared = {kind for each in needs for kind in each.prepares}
    earlier = {kind for each in needs for kind in each.state} - prepared
    found = (
        (prepared, read_state(_place(context, branch)) if prepared else None),
        (earlier, context.source(branch.start).state if earlier else None),
    )
    states = {
        kind: (state.kinds[kind], state.rules[kind])
        for kinds, state in found
        if state is not None
        for kind in sorted(kinds & state.kinds.keys())
    }

    def through(held: TensorFolder, rule: StateKind) -> Values:
        values = dict(state_stream(planned, rule, held).whole())
        return follow(live_tensors(planned.target_config, values))

    has_old, has_masks, has_teacher = (
        any(getattr(each, name) for each in needs) for name in ("old_text", "carried", "teacher")
    )
    written = None
    if any(each.writes for each in needs):
        written = read_sequences(_place(context, branch) / _WRITTEN_FILE)[WRITTEN]
    teacher = None  # the model that the training learns from, frozen
    if has_teacher:
        place, start = teacher_folder(context), context.source(branch.start)
        if place is None:
            model = load_model(start.folder, config=start.config)
        else:
            model = load_model(locate(place))
        teacher = context.reading(model).eval().requires_grad_(False)
    return Task(
        seed=_task_seed(context, branch),
        old_sequences=_old_sequences(context, branch, written) if has_old else {},
        old_losses=kept_text(context, branch).losses,
        written=written,
        latest=_latest(context, branch),
        carried=follow(planned.change.masks()) if has_masks else {},
        new_units=planned.change.new_units(),
        state={kind: through(*ruled) for kind, ruled in states.items()},
        state_before={kind: LazyTensors(held) for kind, (held, _) in states.items()},
        teacher=teacher,
    )


def teacher_folder(context: RunContext) -> str | None:
    """Return where the teacher lies that the run names; None: the model before the expansion.

    Raises:
        RequestError: methods name different ones.
    """
    places = {each.teacher_folder for each in _needs(context) if each.teacher}
    if len(places) > 1:
        teachers = " and ".join(
            sorted(place or "the model before the expansion" for place in places)
        )
        raise RequestError(f"forgetting: one teacher is held, and {teachers} are asked for.")
    return next(iter(places), None)


def _task_seed(context: RunContext, branch: Branch) -> int:
    return context.seed("forgetting", *branch.purpose)


def _needs(context: RunContext) -> tuple[Needs, ...]:
    return needs_of(context.config.forgetting)


def _old_sequences(
    context: RunContext, branch: Branch, written: Tensor | None
) -> Mapping[str, Tensor]:
    """Return old domain → sequences [N, T]; without one, what the model wrote, if it did."""
    text = context.training_sequences(context.old_of(branch))
    old = {**text, **kept_text(context, branch).sequences}
    return old if old or written is None else {WRITTEN: written}


def _latest(context: RunContext, branch: Branch) -> tuple[str, ...]:
    """Return the old domains that the start was trained on last; all where none is known to be."""
    old = context.old_of(branch)
    trained_on = context.source(branch.start).own_lineage.training_config.get("new")
    known = trained_on if isinstance(trained_on, Mapping) else {}
    return tuple(name for name in old if name in known) or old


def key(branch: Branch) -> str:
    """Return the ledger's name of the stage that prepares an arm."""
    return f"{branch.follows}.importance" if branch.follows else _folder(branch)


def _folder(branch: Branch) -> str:
    if branch.follows:
        return f"{branch.follows}/importance"
    return "importance" if branch.prepared_by == 1 else f"importance_{branch.prepared_by}"


def _place(context: RunContext, branch: Branch) -> Path:
    return context.folder / _folder(branch)


def kept_text(context: RunContext, branch: Branch) -> KeptSequences:
    """Return what lies beside an arm's start of domains whose text the run has not.

    Nothing where no method needs old text.

    Raises:
        RequestError: it does not fit the run's sequences or the model's vocabulary.
        TritterError: the file is damaged.
    """
    if not any(needs.old_text for needs in needs_of(context.config.forgetting)):
        return KeptSequences()
    start, data = context.source(branch.start), context.config.data
    kept = start.kept.without((*context.old_of(branch), *context.new_of(branch)))
    for problem in kept.misfits(
        sequence_length=data.sequence_length,
        packing=data.packing,
        vocab_size=start.family.dimensions(start.config).vocab_size,
    ):
        raise RequestError(problem)
    return kept


def kept_sequences_of(context: RunContext, branch: Branch) -> KeptSequences:
    """Return what an arm's training leaves of its text, and of what earlier ones kept.

    A uniform sample of each domain's training sequences, whose losses are measured later.
    """
    keep = max((needs.keeps for needs in needs_of(context.config.forgetting)), default=0)
    beside = context.source(branch.start).kept
    text = (*context.old_of(branch), *context.new_of(branch)) if keep else ()
    held, left = context.training_sequences(text), beside.without(text)
    sampled = {
        name: sample_equally({name: each}, keep, seed=lambda name: context.seed("kept", name)).int()
        for name, each in held.items()
    }
    is_masked = context.config.data.packing == "documents"
    return KeptSequences(
        {**left.sequences, **sampled},
        left.losses,
        {**left.num_seen, **{name: len(each) for name, each in held.items()}},
        left.of_documents.union(sampled if is_masked else ()),
    )
