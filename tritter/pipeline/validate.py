"""`tritter validate`: the specification's five tests (section 9.1) on a pair of checkpoints.

One model is in memory at a time: the source answers and goes before the result is loaded.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tritter.checkpoints import Lineage, read_lineage
from tritter.core.families import Config, count_parameters, family_of, layout, position_limit
from tritter.core.models import load_model, read_config
from tritter.data.documents import Document, notes_of
from tritter.data.options import TextSources
from tritter.data.sources import source_documents
from tritter.data.split import split_documents
from tritter.data.tokens import PretrainedTokenizer, pack, read_tokenizer, tokenise
from tritter.errors import Problem, RequestError
from tritter.evaluation.gate import (
    Check,
    equivalence_check,
    flow_check,
    new_capability_check,
    parameter_bytes,
    retention_check,
    rounded_jump,
    scaling_check,
)
from tritter.evaluation.jump import logits_of
from tritter.evaluation.losses import document_losses
from tritter.evaluation.statistics import PairedScores
from tritter.planning.memory import machine_memory
from tritter.storage.hashing import merkle_hash, tensor_digest
from tritter.storage.tensors import TensorFolder
from tritter.training.gradient_flow import NewUnits, tried

logger = logging.getLogger(__name__)

DOCUMENT_CHARACTERS = 4000  # of a document, from its beginning


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationText:
    """The text of a validation.

    Args:
        kept: domain → where the text lies that is to be kept; None: what the lineage recorded.
        target: domain → the same of what was to be learned.
        limit: documents of a domain.
    """

    kept: TextSources | None
    target: TextSources | None
    limit: int


@dataclass(frozen=True, slots=True, eq=False)
class _Domains:
    """Domain → documents that are asked about, and why there are none."""

    documents: Mapping[str, Sequence[Document]]
    why_not: str


def _recorded(kind: str, source: Lineage | None, result: Lineage | None) -> _Domains:
    """Return what the result's lineage holds out of the domains that it records.

    Raises:
        RequestError: they can't be read.
    """
    if result is None or result.split is None or not result.domains:
        return _Domains({}, "the result records no text")
    trained = is_trained(source, result)
    if kind == "target" and not trained:
        return _Domains({}, "the result was not trained on since the source")
    new = set(result.training_config.get("new") or ()) if trained else set()
    documents = {
        name: source_documents(
            domain.paths, key=name, text_field=domain.text_field, is_recorded=True
        )
        for name, domain in result.domains.items()
        if (name in new) == (kind == "target") and domain.paths
    }
    parted = split_documents(documents, rule=result.split)
    held_out = {name: split.validation for name, split in parted.items()}
    return _Domains(held_out, "the result records no such domain")


def _read(
    kind: str, source: Lineage | None, result: Lineage | None, text: ValidationText
) -> _Domains:
    """Return the documents of what is `kept`, or of the `target`, each up to its limit.

    Raises:
        RequestError: named text can't be read.
    """
    named: TextSources | None = getattr(text, kind)
    option = "--data" if kind == "kept" else "--target-data"
    if named is not None:
        whole = {
            name: source_documents(paths, key=f"{option} {name}", text_field="text")
            for name, paths in named.items()
        }
        for note in (note for documents in whole.values() for note in notes_of(documents)):
            logger.warning(note)
        found = _Domains(whole, f"{option} names no text")
    else:
        try:
            found = _recorded(kind, source, result)
        except RequestError as error:
            found = _Domains({}, f"recorded text can't be read: {str(error).rstrip('.')}")
        if not found.documents:
            found = replace(found, why_not=f"{found.why_not}; name it as {option}")
    limited = {
        name: [
            replace(each, text=each.text[:DOCUMENT_CHARACTERS]) for each in documents[: text.limit]
        ]
        for name, documents in found.documents.items()
    }
    return replace(found, documents=limited)


def is_trained(source: Lineage | None, result: Lineage) -> bool:
    """Say whether the result was trained after what the source is; an expansion changes nothing."""
    return dict(result.training_config) != dict(source.training_config if source else {})


RETENTION, CONFIDENCE = 0.05, 0.95  # of the specification, and of the gate's default
FLOW_STEPS = 3  # the last with what two steps have moved away from zero
SEQUENCES, SEQUENCE_LENGTH, BATCH_SIZE = 8, 128, 16
_FLOAT32 = 4  # bytes


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One of the two checkpoints, as it lies on disk.

    Args:
        dtypes: of its tensors, as torch calls them.
    """

    folder: Path
    config: Config
    lineage: Lineage | None
    tokenizer: PretrainedTokenizer | None
    dtypes: frozenset[str]

    @classmethod
    def open(cls, folder: Path) -> "Side":
        """Read all but the weights of a checkpoint of a supported family.

        It may have no lineage and no tokenizer.

        Raises:
            TritterError: it is none, or damaged.
        """
        config, tokenizer = read_config(folder), None
        vocab_size = family_of(config).dimensions(config).vocab_size
        if (folder / "tokenizer.json").is_file():
            tokenizer = read_tokenizer(folder, vocab_size=vocab_size)
        dtypes = TensorFolder.open(folder).dtypes
        return cls(folder, config, read_lineage(folder), tokenizer, dtypes)

    def load(self) -> nn.Module:
        """Return the model in float32, on the GPU where there is one.

        Raises:
            TritterError: it is damaged.
        """
        return load_model(self.folder).to("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def vocab_size(self) -> int:
        return family_of(self.config).dimensions(self.config).vocab_size

    @property
    def longest(self) -> int:
        return min(SEQUENCE_LENGTH, position_limit(self.config) or SEQUENCE_LENGTH)


@dataclass(frozen=True, slots=True, eq=False)
class _Answers:
    """What one model said.

    Args:
        logits: float32 [B, T, V], on sequences that both read.
        held: bytes of its parameters.
        scores: kind of text → domain → losses; None where no tokenizer fits.
    """

    logits: Tensor | None
    held: int
    scores: Mapping[str, Mapping[str, PairedScores | None]]


def validate(source: Side, result: Side, text: ValidationText) -> list[Check]:
    """Return the answers to all five tests, in the specification's order.

    Raises:
        RequestError: named text can't be read, or the machine has not the memory for one of both.
        TritterError: a checkpoint is damaged.
    """
    new = _new_units(source.config, result.config)
    _check_memory(source, is_tried=False, option="--source")
    _check_memory(result, is_tried=bool(new), option="--result")
    texts = {kind: _read(kind, source.lineage, result.lineage, text) for kind in ("kept", "target")}
    documents = [one for kind in texts.values() for each in kind.documents.values() for one in each]
    ids = _sequences(source, result, documents)
    before = _answers(source.load(), source, result, ids, texts)
    model = result.load()
    after = _answers(model, result, source, ids, texts)
    if new:  # are tried, which moves the weights of `model`
        own = _sequences(result, result, documents)
        assert own is not None
        gradients = tried(model, own.to(next(model.parameters()).device), new, steps=FLOW_STEPS)
        flow = flow_check(gradients, least_steps=FLOW_STEPS)
        assert flow is not None
    else:
        flow = _skipped("gradient_flow", "parameters", "the result has no new parameters")
    counted = count_parameters(source.config), count_parameters(result.config)
    return [
        _equivalence(source, result, before.logits, after.logits),
        flow,
        scaling_check((before.held, after.held), counted),
        *_compared("kept", before, after, why_not=texts["kept"].why_not),
        *_compared("target", before, after, why_not=texts["target"].why_not),
    ]


def _check_memory(side: Side, *, is_tried: bool, option: str) -> None:
    """Refuse a model that has no room: its parameters, and the gradients of a trial on a CPU."""
    has_gradients = is_tried and not torch.cuda.is_available()
    needed = _FLOAT32 * count_parameters(side.config) * (2 if has_gradients else 1)
    limit = machine_memory()
    if limit is not None and needed > limit:
        held = "parameters and gradients" if has_gradients else "parameters"
        reason = (
            f"its {held} take {needed / 1e9:.1f} GB in float32, and this machine has "
            f"{limit / 1e9:.1f} GB"
        )
        advice = "whether an expansion kept the function, tritter expand checks at any size"
        raise RequestError(Problem(option, str(side.folder), reason=reason, advice=advice))


def _answers(
    model: nn.Module,
    side: Side,
    other: Side,
    ids: Tensor | None,
    texts: Mapping[str, _Domains],
) -> _Answers:
    """Score a model under its tokenizer, or under the other's where it has none and that fits."""
    logits, held = None if ids is None else logits_of(model, ids), parameter_bytes(model)
    tokenizer = side.tokenizer
    if tokenizer is None and side.vocab_size == other.vocab_size:
        tokenizer = other.tokenizer
    scores: dict[str, dict[str, PairedScores | None]] = {}
    for kind, text in texts.items():
        scores[kind] = dict.fromkeys(text.documents)
        for domain, documents in text.documents.items():
            if tokenizer is None:
                continue
            scores[kind][domain] = document_losses(
                model,
                tokenise(documents, tokenizer.tokenizer),
                sequence_length=side.longest,
                end_of_text_id=tokenizer.end_of_text_id,
                batch_size=BATCH_SIZE,
            )
    return _Answers(logits, held, scores)


def _equivalence(source: Side, result: Side, before: Tensor | None, after: Tensor | None) -> Check:
    """Return whether both models say the same, and first when one was not made from the other."""
    if before is None or after is None:
        check = _skipped(
            "forward_equivalence",
            "logits",
            f"vocabularies of {source.vocab_size:,} and {result.vocab_size:,} tokens have no "
            "logits to compare",
        )
    else:
        # Types below float32 that weights were computed for since the source
        rounded = [name for name in ("bfloat16", "float16") if name in result.dtypes]
        is_one_type = len(result.dtypes) == 1 and source.dtypes == result.dtypes
        if result.lineage is not None and is_one_type:
            known = len(source.lineage.expansion_history) if source.lineage else 0
            made = result.lineage.expansion_history[known:]
            if all(record.expansion_type == "depth" for record in made):
                rounded = []  # layers that are only copied, in the type of the source
        check = equivalence_check(
            before,
            after,
            reason_not_asked=_why_not_same(source, result),
            rounded=" and ".join(rounded),
            rounded_bound=rounded_jump(has_experts=family_of(result.config).has_experts),
        )
    if check.verdict == "passed" or (reason := _why_unrelated(source, result)) is None:
        return check
    return replace(check, detail=f"{reason}; {check.detail}")


def _why_unrelated(source: Side, result: Side) -> str | None:
    """Return why the result does not count as made from the source; None: it was."""
    before, after = source.lineage, result.lineage
    if after is None:
        return "no lineage says that the result was made from the source"
    if before is None:
        tensors = TensorFolder.open(source.folder)
        found = merkle_hash({n: tensor_digest(n, tensors.get(n)) for n in tensors.files})
        is_root = found == after.base_model_hash
        return None if is_root else "unrelated checkpoints: the result starts from another model"
    if before.base_model_hash != after.base_model_hash:
        return "unrelated checkpoints: they start from different models"
    old, new = ([(r.method, r.timestamp) for r in x.expansion_history] for x in (before, after))
    if old == new[: len(old)]:
        return None
    if new == old[: len(new)]:
        return "the source was made from the result: swap the two"
    return "unrelated checkpoints: neither was made from the other"


def _why_not_same(source: Side, result: Side) -> str | None:
    """Return why the result need not say what the source says; None when it has to."""
    before, after = source.lineage, result.lineage
    sizes = [family_of(each.config).dimensions(each.config) for each in (source, result)]
    if after is None or (before and before.base_model_hash != after.base_model_hash):
        if sizes[0].num_hidden_layers == sizes[1].num_hidden_layers:
            return None
        return "no lineage says that the layers were added exactly"
    if is_trained(before, after):
        return "the result was trained on since the source"
    made = after.expansion_history[len(before.expansion_history) if before else 0 :]
    lossy = [record.method for record in made if not record.claims_exact]
    return f"{' and '.join(lossy)} does not claim it" if lossy else None


def _new_units(before: Config, after: Config) -> NewUnits:
    """Return, by parameter that is new or grew, its new coordinates; of a new one none by name.

    New tokens are not among them: a text has to hold them.
    """
    shapes = {stored.name: stored.shape for stored in layout(before, "live")}
    new: dict[str, tuple[Tensor | None, ...]] = {}
    for stored in layout(after, "live"):
        old = shapes.get(stored.name)
        if old == stored.shape:
            continue
        is_grown = old is not None and stored.is_whole
        new[stored.name] = tuple(
            torch.arange(size) >= was if was < size and axis.space.kind != "vocab" else None
            for size, was, axis in zip(stored.shape, old or (), stored.axes, strict=is_grown)
            if is_grown
        )
    return new


def _sequences(source: Side, result: Side, documents: Sequence[Document]) -> Tensor | None:
    """Return tokens that both read, int64 [B, T]: of the text, else at random.

    None where the vocabularies differ.
    """
    if source.vocab_size != result.vocab_size:
        return None
    length = min(source.longest, result.longest)
    tokenizer = result.tokenizer or source.tokenizer
    if tokenizer is not None and documents:
        tokens = tokenise(documents, tokenizer.tokenizer)
        if tokens.num_tokens + len(tokens) >= length:
            packed = pack(tokens, sequence_length=length, end_of_text_id=tokenizer.end_of_text_id)
            return packed[:: max(1, len(packed) // SEQUENCES)][:SEQUENCES].long()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(source.vocab_size, (SEQUENCES, length), generator=generator)


def _compared(kind: str, before: _Answers, after: _Answers, *, why_not: str) -> Iterator[Check]:
    """Yield how the losses of domains changed, per byte: tokenizers may differ."""
    name = {"kept": "benchmark_retention", "target": "new_capability"}[kind]
    if not before.scores[kind]:
        yield _skipped(name, "text", why_not)
    for domain, old in before.scores[kind].items():
        new = after.scores[kind][domain]
        if old is None or new is None:
            yield _skipped(name, domain, "a checkpoint has no tokenizer, nor one that fits")
            continue
        bounds = {"confidence": CONFIDENCE}
        if kind == "kept":
            check = retention_check(domain, old, new, bound=RETENTION, **bounds)
        else:
            check = new_capability_check(domain, old, new, **bounds)
        yield replace(check, name=name)


def _skipped(name: str, subject: str, reason: str) -> Check:
    return Check(name, subject, "not_asked", reason)
