"""`tritter validate`: the specification's five tests (section 9.1) on a pair of checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tritter.checkpoint import Lineage, read_lineage
from tritter.config.schema import TextSources
from tritter.data.documents import Document
from tritter.data.pretrained import PretrainedTokenizer, read_tokenizer
from tritter.data.sources import source_documents
from tritter.data.split import DomainDocuments, Earlier, part_documents
from tritter.data.tokens import pack, tokenise
from tritter.errors import RequestError
from tritter.evaluation.gate import (
    Check,
    flow_check,
    new_capability_check,
    retention_check,
)
from tritter.evaluation.losses import document_losses
from tritter.evaluation.paired_scores import PairedScores
from tritter.evaluation.validation import (
    equivalence_check,
    parameter_bytes,
    rounded_jump,
    scaling_check,
)
from tritter.families import Config, count_parameters, family_of, layout, position_limit
from tritter.models import load_model, read_config
from tritter.storage.tensors import TensorFolder
from tritter.training.gradient_flow import NewUnits, tried

RETENTION, CONFIDENCE = 0.05, 0.95  # of the specification, and of the gate's default
FLOW_STEPS = 3  # the last with what two steps have moved away from zero
DOCUMENT_CHARACTERS = 4000  # of a document, from its beginning
SEQUENCES, SEQUENCE_LENGTH, BATCH_SIZE = 8, 128, 16


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
class Side:
    """One of the two checkpoints, loaded.

    Args:
        dtypes: of its tensors on disk, as torch calls them.
    """

    config: Config
    lineage: Lineage | None
    model: nn.Module
    tokenizer: PretrainedTokenizer | None
    dtypes: frozenset[str]

    @classmethod
    def load(cls, folder: Path) -> "Side":
        """Load a checkpoint of a supported family, with or without a lineage and a tokenizer.

        Raises:
            TritterError: it is none, or damaged.
        """
        config, tokenizer = read_config(folder), None
        vocab_size = family_of(config).dimensions(config).vocab_size
        if (folder / "tokenizer.json").is_file():
            tokenizer = read_tokenizer(folder, vocab_size=vocab_size)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtypes = {header.dtype for header in TensorFolder.open(folder).headers.values()}
        model = load_model(folder).to(device)
        return cls(config, read_lineage(folder), model, tokenizer, frozenset(dtypes))

    @property
    def vocab_size(self) -> int:
        return family_of(self.config).dimensions(self.config).vocab_size

    @property
    def longest(self) -> int:
        return min(SEQUENCE_LENGTH, position_limit(self.config) or SEQUENCE_LENGTH)


def validate(source: Side, result: Side, text: ValidationText) -> list[Check]:
    """Return the answers to all five tests, in the specification's order.

    The weights of `result` are moved by the second of them, which is asked last.
    """
    domains = _Domains(source, result, text)
    kept, target = domains.read("kept"), domains.read("target")
    documents = [one for each in (*kept.values(), *target.values()) for one in each]
    ids = _sequences(source, result, documents)
    equivalence = _equivalence(source, result, ids)
    held = parameter_bytes(source.model), parameter_bytes(result.model)
    counted = count_parameters(source.config), count_parameters(result.config)
    memory = scaling_check(held, counted)
    scored = [
        *_compared(source, result, kept, name="benchmark_retention", why_not=domains.why["kept"]),
        *_compared(source, result, target, name="new_capability", why_not=domains.why["target"]),
    ]
    return [equivalence, _flow(source, result, documents), memory, *scored]


class _Domains:
    """The documents that are asked about, and why there are none.

    Recorded text is what the result's lineage holds out; text that is named is taken whole.
    """

    def __init__(self, source: Side, result: Side, text: ValidationText) -> None:
        self._source, self._lineage, self._text = source, result.lineage, text
        self.why: dict[str, str] = {}

    def read(self, kind: str) -> dict[str, list[Document]]:
        """Return documents by domain of what is `kept`, or of the `target`.

        Raises:
            RequestError: named text can't be read.
        """
        named: TextSources | None = getattr(self._text, kind)
        option = "--data" if kind == "kept" else "--target-data"
        if named is not None:
            self.why[kind] = f"{option} names no text"
            found: dict[str, Sequence[Document]] = {
                name: source_documents(paths, key=f"{option} {name}", text_field="text")
                for name, paths in named.items()
            }
            return self._limited(found)
        try:
            found, self.why[kind] = self._recorded(kind)
        except RequestError as error:
            found, self.why[kind] = {}, f"recorded text can't be read: {str(error).rstrip('.')}"
        if not found:
            self.why[kind] += f"; name it as {option}"
        return self._limited(found)

    def _recorded(self, kind: str) -> tuple[dict[str, Sequence[Document]], str]:
        """Return held-out documents of recorded domains, and what to say where there are none."""
        lineage = self._lineage
        if lineage is None or lineage.split is None or not lineage.domains:
            return {}, "the result records no text"
        is_trained = _is_trained(self._source.lineage, lineage)
        new = set(lineage.training_config.get("new") or ()) if is_trained else set()
        if kind == "target" and not is_trained:
            return {}, "the result was not trained on since the source"
        wanted = {
            name: domain
            for name, domain in lineage.domains.items()
            if (name in new) == (kind == "target") and domain.paths
        }
        documents = {
            name: DomainDocuments(
                source_documents(
                    domain.paths,
                    key=name,
                    text_field=domain.text_field,
                    is_ranked=bool(domain.ranked),
                ),
                domain.ranked,
            )
            for name, domain in wanted.items()
        }
        rule = replace(lineage.split.as_rule, rule="threshold")
        parted = part_documents(documents, rule=rule, earlier=Earlier(lineage.split.exceptions, ()))
        held_out: dict[str, Sequence[Document]] = {
            name: split.validation for name, split in parted.domains.items()
        }
        return held_out, "the result records no such domain"

    def _limited(self, found: Mapping[str, Sequence[Document]]) -> dict[str, list[Document]]:
        return {
            name: [
                replace(document, text=document.text[:DOCUMENT_CHARACTERS])
                for document in documents[: self._text.limit]
            ]
            for name, documents in found.items()
        }


def _is_trained(source: Lineage | None, result: Lineage) -> bool:
    """Say whether the result was trained after what the source is; an expansion changes nothing."""
    return dict(result.training_config) != dict(source.training_config if source else {})


def _equivalence(source: Side, result: Side, ids: Tensor | None) -> Check:
    if ids is None:
        reason = f"vocabularies of {source.vocab_size:,} and {result.vocab_size:,} tokens say "
        return _not_asked("forward_equivalence", "logits", f"{reason}nothing that compares")
    return equivalence_check(
        source.model,
        result.model,
        ids,
        reason_not_asked=_why_not_same(source, result),
        rounded=" and ".join(_rounded_to(source, result)),
        rounded_bound=rounded_jump(has_experts=family_of(result.config).has_experts),
    )


def _rounded_to(source: Side, result: Side) -> list[str]:
    """Return the types below float32 that weights were computed for since the source.

    Layers that are only copied, in the type of the source, lose nothing.
    """
    if result.lineage is not None and len(result.dtypes) == 1 and source.dtypes == result.dtypes:
        known = len(source.lineage.expansion_history) if source.lineage else 0
        made = result.lineage.expansion_history[known:]
        if all(record.expansion_type == "depth" for record in made):
            return []
    return [name for name in ("bfloat16", "float16") if name in result.dtypes]


def _why_not_same(source: Side, result: Side) -> str | None:
    """Return why the result need not say what the source says; None when it has to."""
    before, after = source.lineage, result.lineage
    sizes = [family_of(each.config).dimensions(each.config) for each in (source, result)]
    if after is None or (before and before.base_model_hash != after.base_model_hash):
        if sizes[0].num_hidden_layers == sizes[1].num_hidden_layers:
            return None
        return "no lineage says that the layers were added exactly"
    if _is_trained(before, after):
        return "the result was trained on since the source"
    made = after.expansion_history[len(before.expansion_history) if before else 0 :]
    lossy = [record.method for record in made if not record.claims_exact]
    return f"{' and '.join(lossy)} does not claim it" if lossy else None


def _flow(source: Side, result: Side, documents: Sequence[Document]) -> Check:
    new = _new_units(source.config, result.config)
    if not new:
        return _not_asked("gradient_flow", "parameters", "the result has no new parameters")
    ids = _sequences(result, result, documents)
    assert ids is not None
    device = next(result.model.parameters()).device
    flow = tried(result.model, ids.to(device), new, steps=FLOW_STEPS)
    check = flow_check(flow, least_steps=FLOW_STEPS)
    assert check is not None
    return check


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
            packed = pack(tokens, sequence_length=length, end_of_text_id=_end_of_text(tokenizer))
            return packed[:: max(1, len(packed) // SEQUENCES)][:SEQUENCES].long()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(source.vocab_size, (SEQUENCES, length), generator=generator)


def _compared(
    source: Side,
    result: Side,
    domains: Mapping[str, Sequence[Document]],
    *,
    name: str,
    why_not: str,
) -> Iterator[Check]:
    """Yield how the losses of domains changed, per byte: tokenizers may differ."""
    if not domains:
        yield _not_asked(name, "text", why_not)
    for domain, documents in domains.items():
        scores = [_scores(each, other, documents) for each, other in _pairs(source, result)]
        if None in scores:
            yield _not_asked(name, domain, "a checkpoint has no tokenizer, nor one that fits")
            continue
        before, after = (each for each in scores if each is not None)
        bounds = {"confidence": CONFIDENCE}
        if name == "benchmark_retention":
            check = retention_check(domain, before, after, bound=RETENTION, **bounds)
        else:
            check = new_capability_check(domain, before, after, **bounds)
        yield replace(check, name=name)


def _pairs(source: Side, result: Side) -> tuple[tuple[Side, Side], tuple[Side, Side]]:
    return (source, result), (result, source)


def _scores(side: Side, other: Side, documents: Sequence[Document]) -> PairedScores | None:
    """Score a model under its tokenizer, or under the other's where it has none and that fits."""
    tokenizer = side.tokenizer
    if tokenizer is None and side.vocab_size == other.vocab_size:
        tokenizer = other.tokenizer
    if tokenizer is None:
        return None
    return document_losses(
        side.model,
        tokenise(documents, tokenizer.tokenizer),
        sequence_length=side.longest,
        end_of_text_id=_end_of_text(tokenizer),
        batch_size=BATCH_SIZE,
    )


def _end_of_text(tokenizer: PretrainedTokenizer) -> int:
    token_id = tokenizer.tokenizer.token_to_id(tokenizer.end_of_text)
    assert token_id is not None  # it was found by its vocabulary
    return token_id


def _not_asked(name: str, subject: str, reason: str) -> Check:
    return Check(name, subject, "not_asked", reason)
