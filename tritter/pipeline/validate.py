"""`tritter validate`: five tests that compare an expanded checkpoint with its source.

Only one model is in memory at a time: the source is released before the result is loaded.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tritter.checkpoints import Lineage, Source
from tritter.checkpoints.record import window_length
from tritter.checkpoints.run_text import recorded_chat
from tritter.core.families import Model
from tritter.core.models import load_model, load_tokenizer, read_model
from tritter.data.chat import ChatChoice, ids_of
from tritter.data.documents import PIECE_CHARACTERS, Document
from tritter.data.options import TextSources
from tritter.data.sources import TextRequest
from tritter.data.tokens import PretrainedTokenizer, TokenisedDocuments
from tritter.errors import Problem, RequestError
from tritter.evaluation.gate import (
    Check,
    new_capability_check,
    retention_check,
    rounded_jump,
)
from tritter.evaluation.jump import Jump, logits_of, rounded_logits_of
from tritter.evaluation.losses import document_losses
from tritter.evaluation.statistics import PairedScores
from tritter.planning.memory import machine_memory
from tritter.report.table import mean_shift_text
from tritter.storage.hashing import merkle_hash, tensor_digest
from tritter.storage.reading import TOKENIZER_NAME
from tritter.terminal import NewBar, no_bar, waiting
from tritter.training.gradient_flow import NewUnits, run_trial_steps

_logger = logging.getLogger(__name__)

_DOCUMENT_CHARACTERS = 4000  # per text, from the start; conversations are whole
_RETENTION, _CONFIDENCE = 0.05, 0.95  # defaults of the gate
_FLOW_STEPS = 3  # two steps move zero-initialised weights away from zero
_SEQUENCE_LENGTH = 128
_SEQUENCES, _BATCH_SIZE = 8, 16
_FLOAT32 = 4  # bytes
_ROUNDED = ("bfloat16", "float16")
_Documents = Mapping[str, Sequence[Document]]  # by domain


def _load_recorded(
    kind: str, source: Lineage | None, result: Lineage | None
) -> tuple[_Documents, str]:
    """Return the held-out documents of the domains in the result's lineage, as `_read`."""
    if result is None or result.split is None or not result.domains:
        return {}, "the result's lineage records no data"
    trained = _is_trained(source, result)
    if kind == "target" and not trained:
        return {}, "the result was not trained after the source"
    new = set(result.training_config.get("new") or ()) if trained else set()
    documents = {
        name: domain.documents(result.split, key=name)
        for name, domain in result.domains.items()
        if (name in new) == (kind == "target") and domain.paths
    }
    parted = result.split.split(documents)
    held_out = {name: validation for name, (_, validation) in parted.items()}
    return held_out, "the result records no such domain"


def _read(
    kind: str,
    source: Lineage | None,
    result: Lineage | None,
    *,
    named: TextSources | None,
    limit: int,
) -> tuple[_Documents, str]:
    """Return the documents of the `kept` or `target` domains, and the reason if there are none."""
    option = "--data" if kind == "kept" else "--target-data"
    if named is not None:
        size = result.split.piece_characters if result and result.split else PIECE_CHARACTERS
        found: _Documents = {
            name: TextRequest(
                paths, key=f"{option} {name}", piece_characters=size
            ).noted_documents()
            for name, paths in named.items()
        }
        missing_reason = f"{option} contains no documents"
    else:
        try:
            found, missing_reason = _load_recorded(kind, source, result)
        except RequestError as error:
            found, missing_reason = {}, f"the recorded data can't be read: {str(error).rstrip('.')}"
        if not found:
            missing_reason += f"; pass {option}"
    for name, documents in found.items():
        if (number := len(documents)) > limit:
            _logger.warning("%s: %s", name, f"{limit:,} of {number:,} documents are scored.")
    limited = {
        name: [
            each if each.conversation else replace(each, text=each.text[:_DOCUMENT_CHARACTERS])
            for each in documents[:limit]
        ]
        for name, documents in found.items()
    }
    return limited, missing_reason


def _is_trained(source: Lineage | None, result: Lineage) -> bool:
    """Return True if the result was trained after the source; expansions do not count."""
    return dict(result.training_config) != dict(source.training_config if source else {})


class Side(Source):
    """One of the two checkpoints on disk."""

    @classmethod
    def of(cls, folder: Path) -> "Side":
        """Open a checkpoint of a supported family; its lineage and tokenizer are optional."""
        return cls(folder, read_model(folder), Lineage.read(folder))

    @cached_property
    def tokenizer(self) -> PretrainedTokenizer | None:
        """The tokenizer, if there is one."""
        if not (self.folder / TOKENIZER_NAME).is_file():
            return None
        return PretrainedTokenizer.read(self.folder, vocab_size=self.vocab_size)

    def load(self) -> nn.Module:
        """Return the model in float32, on the GPU if available."""
        return load_model(self.folder).to("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def vocab_size(self) -> int:
        """Return the size of the vocabulary."""
        return self.model.sizes.vocab_size

    @property
    def longest(self) -> int:
        """Return the length of windows of its documents."""
        return window_length(self.lineage, self.model.position_limit)


@dataclass(frozen=True, slots=True, eq=False)
class _Outputs:
    """Outputs of one model.

    Args:
        logits: float32 [B, T, V] on the shared sequences; None without any.
        rounded: those in bfloat16, as a yardstick for rounded weights; None without any.
        num_bytes: bytes of its parameters.
        scores: `kept` or `target` → domain → losses; None without a matching tokenizer.
    """

    logits: Tensor | None
    rounded: Tensor | None
    num_bytes: int
    scores: Mapping[str, Mapping[str, PairedScores | None]]


def validate(
    source: Side,
    result: Side,
    *,
    kept: TextSources | None,
    target: TextSources | None,
    limit: int,
    new_bar: NewBar = no_bar,
) -> list[Check]:
    """Return the checks of all five tests.

    Args:
        source: the checkpoint before the expansion.
        result: the checkpoint after it.
        kept: domain → paths of documents to retain; None uses the domains in the lineage.
        target: domain → paths of documents to learn; None uses the domains in the lineage.
        limit: maximum number of documents per domain.
        new_bar: makes the progress bars.

    Raises:
        RequestError: a file can't be read, or a model does not fit into memory.
        TritterError: a checkpoint is damaged.
    """
    new = _new_units(source.model, result.model)
    _check_memory(source, has_trial_steps=False, option="--source")
    _check_memory(result, has_trial_steps=bool(new), option="--result")
    texts, missing_reasons = dict[str, _Documents](), dict[str, str]()
    for kind, named in (("kept", kept), ("target", target)):
        texts[kind], missing_reasons[kind] = _read(
            kind, source.lineage, result.lineage, named=named, limit=limit
        )
    documents = [one for kind in texts.values() for each in kind.values() for one in each]
    ids = _sequences(source, result, documents)
    data = recorded_chat(result.lineage)
    with waiting(new_bar, "loading the source"):
        model = source.load()
    before = _evaluate_side(model, source, result, ids, texts, data, new_bar, has_yardstick=True)
    del model  # one at a time in memory
    with waiting(new_bar, "loading the result"):
        model = result.load()
    after = _evaluate_side(model, result, source, ids, texts, data, new_bar)
    if new:  # this changes the weights of `model`
        own = _sequences(result, result, documents)
        assert own is not None
        with waiting(new_bar, "gradients of new parameters"):
            gradients = run_trial_steps(
                model, own.to(next(model.parameters()).device), new, steps=_FLOW_STEPS
            )
        flow = Check.of_gradient_flow(gradients, min_steps=_FLOW_STEPS)
        assert flow is not None
    else:
        flow = _skipped_check("gradient_flow", "parameters", "the result has no new parameters")
    counted = source.model.num_parameters, result.model.num_parameters
    return [
        _equivalence(source, result, before, after),
        flow,
        Check.of_scaling((before.num_bytes, after.num_bytes), counted),
        *_compare("kept", before, after, missing_reason=missing_reasons["kept"]),
        *_compare("target", before, after, missing_reason=missing_reasons["target"]),
    ]


def _check_memory(side: Side, *, has_trial_steps: bool, option: str) -> None:
    """Reject a model that does not fit into memory, including gradients on a CPU."""
    has_gradients = has_trial_steps and not torch.cuda.is_available()
    needed = _FLOAT32 * side.model.num_parameters * (2 if has_gradients else 1)
    limit = machine_memory()
    if limit is not None and needed > limit:
        contents = "parameters and gradients" if has_gradients else "parameters"
        reason = (
            f"its {contents} require {needed / 1e9:.1f} GB in float32, but this machine has "
            f"{limit / 1e9:.1f} GB"
        )
        advice = "tritter expand checks function preservation for models of any size"
        raise RequestError(Problem(option, str(side.folder), reason=reason, advice=advice))


def _evaluate_side(
    model: nn.Module,
    side: Side,
    other: Side,
    ids: Tensor | None,
    texts: Mapping[str, _Documents],
    data: ChatChoice,
    new_bar: NewBar,
    *,
    has_yardstick: bool = False,
) -> _Outputs:
    """Score a model with its tokenizer, or with the other one if the vocabulary size matches.

    Conversations are rendered with the chat template of that tokenizer and the options `data`.
    """
    logits, num_bytes = None if ids is None else logits_of(model, ids), _parameter_bytes(model)
    has_yardstick = has_yardstick and not other.tensors.dtypes.isdisjoint(_ROUNDED)
    rounded = None if ids is None or not has_yardstick else rounded_logits_of(model, ids)
    tokenizer, owner = side.tokenizer, side
    if tokenizer is None and side.vocab_size == other.vocab_size:
        tokenizer, owner = other.tokenizer, other
    load = partial(load_tokenizer, owner.folder)
    scores: dict[str, dict[str, PairedScores | None]] = {}
    for kind, of_kind in texts.items():
        scores[kind] = dict.fromkeys(of_kind)
        for domain, documents in of_kind.items():
            if tokenizer is None:
                continue
            is_chat = any(each.conversation for each in documents)
            scores[kind][domain] = document_losses(
                model,
                TokenisedDocuments.of(
                    documents, tokenizer.tokenizer, chat=data.of_corpus(load, is_chat=is_chat)
                ),
                sequence_length=min(side.longest, other.longest),
                bounds=tokenizer.bounds,
                batch_size=_BATCH_SIZE,
                progress=new_bar(f"scoring {domain}"),
            )
    return _Outputs(logits, rounded, num_bytes, scores)


def _parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters, counting each storage once."""
    return sum({p.data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def _equivalence(source: Side, result: Side, before: _Outputs, after: _Outputs) -> Check:
    """Return the check of equal logits, with a note if the checkpoints are unrelated.

    After an expansion of the vocabulary, those of old tokens are compared.
    """
    if before.logits is None or after.logits is None:
        check = _skipped_check(
            "forward_equivalence",
            "logits",
            f"vocabularies of {source.vocab_size:,} and {result.vocab_size:,} tokens: the "
            "logits are not comparable",
        )
    else:
        dtypes = result.tensors.dtypes
        # Low-precision dtypes to which new weights were rounded
        rounded = [name for name in _ROUNDED if name in dtypes]
        is_one_type = len(dtypes) == 1 and source.tensors.dtypes == dtypes
        if result.lineage is not None and is_one_type:
            known = len(source.lineage.expansion_history) if source.lineage else 0
            made = result.lineage.expansion_history[known:]
            if all(record.expansion_type == "depth" for record in made):
                rounded = []  # layers were only copied, in the dtype of the source
        old = _old_ids(source, result)
        check = Check.of_equivalence(
            before.logits[..., old],
            after.logits[..., old],
            skip_reason=_inexact_reason(source, result),
            rounded=" and ".join(rounded),
            rounded_bound=rounded_jump(has_experts=result.model.family.has_experts),
        )
        yardstick = None if before.rounded is None else before.rounded[..., old]
        jump = Jump.of_logits([(before.logits[..., old], after.logits[..., old], yardstick)])
        check = replace(check, detail=check.detail + mean_shift_text(jump), jump=jump.to_dict())
    if check.verdict == "passed" or (reason := _unrelated_reason(source, result)) is None:
        return check
    return replace(check, detail=f"{reason}; {check.detail}")


def _old_ids(source: Side, result: Side) -> Tensor:
    """Return the ids of the source that are no new tokens of the result, ascending."""
    ids = torch.arange(source.vocab_size)
    if source.tokenizer is None or result.tokenizer is None:
        return ids
    known, all_ids = (
        torch.tensor([*own.tokenizer.get_vocab().values()])
        for own in (source.tokenizer, result.tokenizer)
    )
    return ids[~torch.isin(ids, all_ids[~torch.isin(all_ids, known)])]


def _unrelated_reason(source: Side, result: Side) -> str | None:
    """Return the reason why the result is not derived from the source; None if it is."""
    before, after = source.lineage, result.lineage
    if after is None:
        return "the result has no lineage that links it to the source"
    if before is None:
        found = merkle_hash({n: tensor_digest(n, each) for n, each in source.tensors.items()})
        is_root = found == after.base_model_hash
        return None if is_root else "unrelated checkpoints: the result starts from another model"
    if before.base_model_hash != after.base_model_hash:
        return "unrelated checkpoints: they start from different models"
    old, new = ([(r.method, r.timestamp) for r in x.expansion_history] for x in (before, after))
    if old == new[: len(old)]:
        return None
    if new == old[: len(new)]:
        return "the source is derived from the result: swap the two"
    return "unrelated checkpoints: neither is derived from the other"


def _inexact_reason(source: Side, result: Side) -> str | None:
    """Return the reason why logits may differ; None if they must be equal."""
    before, after = source.lineage, result.lineage
    sizes = [each.model.sizes for each in (source, result)]
    if after is None or (before and before.base_model_hash != after.base_model_hash):
        if sizes[0].num_hidden_layers == sizes[1].num_hidden_layers:
            return None
        return "there is no lineage, so the added layers may not be function-preserving"
    if _is_trained(before, after):
        return "the result was trained after the source"
    made = after.expansion_history[len(before.expansion_history) if before else 0 :]
    lossy = [record.method for record in made if not record.claims_exact]
    return f"{' and '.join(lossy)} is not function-preserving" if lossy else None


def _new_units(before: Model, after: Model) -> NewUnits:
    """Return new or enlarged parameter → its new coordinates per axis.

    A new parameter has none. New tokens are skipped, because the data may not contain them.
    """
    shapes = {stored.name: stored.shape for stored in before.layout("live")}
    new: dict[str, tuple[Tensor | None, ...]] = {}
    for stored in after.layout("live"):
        old = shapes.get(stored.name)
        if old == stored.shape:
            continue
        is_grown = old is not None and stored.is_whole
        new[stored.name] = tuple(
            torch.arange(size) >= before if before < size and axis.space.kind != "vocab" else None
            for size, before, axis in zip(stored.shape, old or (), stored.axes, strict=is_grown)
            if is_grown
        )
    return new


def _sequences(source: Side, result: Side, documents: Sequence[Document]) -> Tensor | None:
    """Return tokens for both models, int64 [B, T]: from the documents, otherwise random.

    None if the vocabularies differ, unless that of the source was expanded.
    """
    tokenizer = result.tokenizer or source.tokenizer
    if source.vocab_size != result.vocab_size:
        history = () if result.lineage is None else result.lineage.expansion_history
        if source.vocab_size > result.vocab_size or "vocab" not in [r.method for r in history]:
            return None
        tokenizer = source.tokenizer
    length = min(_SEQUENCE_LENGTH, source.longest, result.longest)
    if tokenizer is not None and documents:
        tokens = TokenisedDocuments.of(documents, tokenizer.tokenizer)
        if tokens.num_closed_tokens(tokenizer.bounds) >= length:
            packed = tokens.pack(sequence_length=length, bounds=tokenizer.bounds)
            return ids_of(packed[:: max(1, len(packed) // _SEQUENCES)][:_SEQUENCES]).long()
    generator = torch.Generator().manual_seed(0)
    ids = _old_ids(source, result)
    return ids[torch.randint(len(ids), (_SEQUENCES, length), generator=generator)]


def _compare(
    kind: str, before: _Outputs, after: _Outputs, *, missing_reason: str
) -> Iterator[Check]:
    """Yield checks of the change in loss per byte, which is comparable across tokenizers."""
    name = {"kept": "benchmark_retention", "target": "new_capability"}[kind]
    if not before.scores[kind]:
        yield _skipped_check(name, "text", missing_reason)
    for domain, old in before.scores[kind].items():
        new = after.scores[kind][domain]
        if old is None or new is None:
            yield _skipped_check(name, domain, "a checkpoint has no matching tokenizer")
            continue
        bounds = {"confidence": _CONFIDENCE}
        if kind == "kept":
            check = retention_check(domain, old, new, bound=_RETENTION, **bounds)
        else:
            check = new_capability_check(domain, old, new, **bounds)
        yield replace(check, name=name)


def _skipped_check(name: str, subject: str, reason: str) -> Check:
    return Check(name, subject, "not_asked", reason)
