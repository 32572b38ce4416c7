"""Preparation of forgetting methods before an expansion, carried over to the expanded model.

Each method declares its needs: state computed at the initial weights, state stored by an earlier
training run, masks of parameters with old knowledge, or a teacher. Only needed parts are prepared.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from tritter.checkpoints.state import KeptSequences, State, write_state
from tritter.core.models import load_model
from tritter.core.parameter_map.carry import StateKind
from tritter.data.batches import lengthened, read_sequences, sample_equally, write_sequences
from tritter.data.vocabulary import retokenised
from tritter.errors import RequestError
from tritter.methods.forgetting import build_methods, needs_of
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import StageResult
from tritter.pipeline.run import Run
from tritter.pipeline.stage import Stage
from tritter.storage.atomic import atomic_folder
from tritter.storage.hub import locate
from tritter.storage.records import record
from tritter.storage.tensors import TensorFolder
from tritter.storage.writer import TensorStream
from tritter.training import Needs, Preparation, Task, Values
from tritter.training.forgetting_method import WRITTEN
from tritter.training.parameters import disk_values

_WRITTEN_FILE = "written.safetensors"


@record
class _ImportanceFound:
    """Results of preparing the forgetting methods.

    Args:
        notes: lines for the report.
        methods: method → its results as plain data.
    """

    notes: tuple[str, ...] = ()
    methods: Mapping[str, Any] = field(default_factory=dict)


class Importance(Stage):
    """Prepare the forgetting methods at the initial weights of a branch, before its expansion."""

    name = "importance"
    found = _ImportanceFound

    def is_needed(self, run: Run, branch: Branch) -> bool:
        """Return True if a method prepares anything; the control starts as the attempt did."""
        is_prepared = branch.is_control and not branch.follows
        return not is_prepared and any(each.prepares or each.writes for each in _needs(run))

    def key(self, branch: Branch) -> str:
        """Return its name in the ledger; attempts share what the same methods prepare."""
        return f"{branch.follows}.importance" if branch.follows else branch.preparation

    def notes(self, run: Run, branch: Branch) -> tuple[str, ...]:
        """Return the notes of a branch's preparation, a sentence each."""
        key = self.key(branch)
        return () if run.ledger.get(key) is None else run.ledger.found(key, _ImportanceFound).notes

    def work(self, run: Run, branch: Branch) -> StageResult:
        """Prepare each method that needs it, and store the results."""
        start = run.source(branch.start)
        stored_state = start.state
        with run.waiting("loading the model"):
            model = run.load(branch.start).to(run.device)
        kinds: dict[str, TensorStream] = {}
        found: dict[str, Any] = {}
        notes: list[str] = []
        flops, seconds = {branch.label("importance"): 0.0}, dict[str, float]()
        written: Tensor | None = None
        methods = zip(build_methods(run.config.forgetting), _needs(run), strict=True)
        for method, needs in sorted(methods, key=lambda each: not each[1].writes):
            if not (needs.prepares or needs.writes):
                continue
            state = dict[str, Values]()
            for kind, tensors in (stored_state.kinds if stored_state else {}).items():
                if kind in needs.state:
                    state[kind] = start.model.live_tensors(tensors)
            since = time.perf_counter()
            preparation = _preparation(run, branch, model, state, written)
            work = "writing text" if needs.writes else "importance of each parameter"
            with run.progress_bars() as new_bar:
                progress = new_bar(f"{method.name}: {work}")
                prepared = method.prepare(replace(preparation, progress=progress))
            for kind in needs.prepares:
                kinds[kind] = TensorStream.of(disk_values(model, prepared.state[kind]))
            found |= {method.name: prepared.found} if prepared.found else {}
            notes += prepared.notes
            label = branch.label("importance")
            if needs.writes:
                label, written = branch.label(method.name), prepared.written
                seconds[label] = time.perf_counter() - since
            flops[label] = flops.get(label, 0.0) + prepared.flops
        kinds_stored = set(stored_state.kinds if stored_state else ())
        using_generated = [
            one.name
            for one, needs in zip(run.config.forgetting, _needs(run), strict=True)
            if needs.old_text and not (needs.instead and kinds_stored >= set(needs.instead))
        ]
        if (
            using_generated
            and not run.data.old_domains_of(branch)
            and not _kept_text(run, branch).sequences
        ):
            names = " and ".join(using_generated)
            notes.append(f"There is no old data: {names} used data generated by the model.")
        for note in notes:
            run.say("", note)
        with atomic_folder(run.folder / branch.preparation, overwrite=True) as temporary:
            write_state(temporary, kinds, step=0)
            if written is not None:
                write_sequences(temporary / _WRITTEN_FILE, {WRITTEN: written})
        return StageResult(
            _ImportanceFound(notes=tuple(notes), methods=found),
            flops=flops,
            seconds=seconds,
            leaves=(branch.preparation,),
        )


def _preparation(
    run: Run, branch: Branch, model: nn.Module, state: Mapping[str, Values], written: Tensor | None
) -> Preparation:
    start, kept_sequences = run.reading(branch.start).data, _kept_text(run, branch).sequences
    old = (*run.data.old_domains_of(branch), *kept_sequences) or (
        () if written is None else (WRITTEN,)
    )

    def draw(count: int, *purpose: str, domains: Iterable[str] | None = None) -> Tensor:
        sequences = _old_sequences(run, branch, written)
        drawing = Task(seed=run.seed("forgetting", *branch.purpose), old_sequences=sequences)
        return drawing.draw(count, *purpose, domains=domains)

    # Conversations can't be tokenised again for an extended vocabulary
    chat, is_same = run.data.corpus.chat, start.has_tokens_of(run.data)
    return Preparation(
        model=model,
        domains=old,
        latest=_latest(run, branch),
        draw=draw,
        sequence_length=run.data.sequence_length,
        bounds=run.data.bounds,
        turns=chat.turns() if chat is not None and is_same else (),
        seed=lambda *purpose: run.seed(*purpose, *branch.purpose),
        state=state,
        log=partial(run.say, "importance"),
    )


def task(run: Run, branch: Branch, *, follow: Callable[[Values], Values]) -> Task:
    """Return the inputs of a branch's forgetting methods during training.

    Args:
        follow: maps values by parameter name to the names used during training.
    """
    needs, planned = _needs(run), run.planned(branch)
    # The needed kinds of state before the expansion, with their mapping rules
    prepared = {kind for each in needs for kind in each.prepares}
    earlier = {kind for each in needs for kind in each.state} - prepared
    found = (
        (prepared, State.read(run.folder / branch.preparation) if prepared else None),
        (earlier, run.source(branch.start).state if earlier else None),
    )
    states = {
        kind: (state.kinds[kind], state.rules[kind])
        for kinds, state in found
        if state is not None
        for kind in sorted(kinds & state.kinds.keys())
    }

    def through(tensors: TensorFolder, rule: StateKind) -> Values:
        values = dict(planned.state_stream(rule, tensors).whole())
        return follow(planned.target.live_tensors(values))

    has_old, has_masks, has_teacher = (
        any(getattr(each, name) for each in needs) for name in ("old_text", "carried", "teacher")
    )
    written = None
    if any(each.writes for each in needs):
        found_text = read_sequences(run.folder / branch.preparation / _WRITTEN_FILE)[WRITTEN]
        written = _as_read(run, branch, found_text)
    teacher = None  # the frozen teacher model
    if has_teacher:
        folder, start = teacher_folder(run), run.source(branch.start)
        with run.waiting("loading the teacher"):
            if folder is None:
                model = load_model(start.folder, model=start.model)
            else:
                model = load_model(locate(folder, key="forgetting.distill.teacher"))
        teacher = run.data.masked(model).eval().requires_grad_(False)
    return Task(
        seed=run.seed("forgetting", *branch.purpose),
        old_sequences=_old_sequences(run, branch, written) if has_old else {},
        old_losses=_kept_text(run, branch).losses,
        written=written,
        latest=_latest(run, branch),
        carried=follow(planned.change.masks()) if has_masks else {},
        new_units=planned.change.new_units(),
        state={kind: through(*ruled) for kind, ruled in states.items()},
        state_before={kind: tensors for kind, (tensors, _) in states.items()},
        teacher=teacher,
    )


def teacher_folder(run: Run) -> str | None:
    """Return the folder of the configured teacher; None for the model before the expansion."""
    folders = {each.teacher_folder for each in _needs(run) if each.teacher}
    if len(folders) > 1:
        teachers = " and ".join(
            sorted(folder or "the model before the expansion" for folder in folders)
        )
        raise RequestError(f"forgetting: only one teacher is supported, but {teachers} are set.")
    return next(iter(folders), None)


def _needs(run: Run) -> tuple[Needs, ...]:
    return needs_of(run.config.forgetting)


def _old_sequences(run: Run, branch: Branch, written: Tensor | None) -> Mapping[str, Tensor]:
    """Return old domain → sequences [N, T]; without old data, the generated sequences, if any."""
    text = run.data.training_sequences(run.data.old_domains_of(branch))
    old = {**text, **_kept_text(run, branch).sequences}
    return old if old or written is None else {WRITTEN: written}


def _latest(run: Run, branch: Branch) -> tuple[str, ...]:
    """Return the old domains of the latest training run; all of them if it is unknown."""
    old = run.data.old_domains_of(branch)
    trained_on = run.source(branch.start).own_lineage.training_config.get("new")
    known = trained_on if isinstance(trained_on, Mapping) else {}
    return tuple(name for name in old if name in known) or old


def _kept_text(run: Run, branch: Branch) -> KeptSequences:
    """Return sequences stored with the initial checkpoint, for domains whose data is missing.

    Empty if no method needs old data.
    """
    if not any(needs.old_text for needs in _needs(run)):
        return KeptSequences()
    start = run.source(branch.start)
    kept_sequences = start.kept_sequences.without(
        (*run.data.old_domains_of(branch), *run.data.new_domains_of(branch))
    )
    for problem in kept_sequences.problems(
        sequence_length=run.reading(branch.start).data.sequence_length,
        packing=run.data.packing,
        vocab_size=start.model.sizes.vocab_size,
    ):
        raise RequestError(problem)
    return kept_sequences.mapped(lambda each, _: _as_read(run, branch, each))


def _as_read(run: Run, branch: Branch, sequences: Tensor) -> Tensor:
    """Return sequences of a branch's start as the run reads them now: its tokens, its length."""
    start, own, length = run.reading(branch.start).data, run.data, run.data.sequence_length
    if start is not own and sequences.shape[1] != length:
        sequences = lengthened(sequences, length)
    if start.has_tokens_of(own):
        return own.bounds.begun(sequences)
    return retokenised(
        sequences,
        start.corpus.tokenizer,
        own.corpus.tokenizer,
        bounds=own.bounds,
        packing=own.packing,
    )


def kept_sequences_of(run: Run, branch: Branch) -> KeptSequences:
    """Return the sequences that a branch stores for later runs, including earlier ones.

    Each domain contributes a uniform sample of its training sequences; losses are measured later.
    """
    keep = max((needs.keeps for needs in _needs(run)), default=0)
    earlier = run.source(branch.start).kept_sequences.mapped(
        lambda each, _: _as_read(run, branch, each)
    )
    text = (*run.data.old_domains_of(branch), *run.data.new_domains_of(branch)) if keep else ()
    sequences, others = run.data.training_sequences(text), earlier.without(text)
    sampled = {
        name: sample_equally({name: each}, keep, seed=lambda name: run.seed("kept", name)).int()
        for name, each in sequences.items()
    }
    is_masked = run.data.packing == "documents"
    return KeptSequences(
        {**others.sequences, **sampled},
        others.losses,
        {**others.num_seen, **{name: len(each) for name, each in sequences.items()}},
        others.of_documents.union(sampled if is_masked else ()),
    )
