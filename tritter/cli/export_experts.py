"""`tritter export` for LoRA experts: as stock PEFT adapters, or merged."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from tritter.checkpoints import Lineage, Source
from tritter.checkpoints.card import (
    LICENCE_FILES,
    Card,
    licence_files,
)
from tritter.checkpoints.expert_files import AdapterShape, ExpertFiles
from tritter.checkpoints.export import Weights
from tritter.checkpoints.history import Link
from tritter.checkpoints.location import check_output, is_within
from tritter.checkpoints.run_text import recorded_chat
from tritter.cli.output import (
    CommandConsole,
    display_path,
    note_if_written,
    print_json,
    refuse_damage,
)
from tritter.core.models import load_model, load_tokenizer, read_model, uninitialised_model
from tritter.data.chat import ids_of
from tritter.data.tokens import PretrainedTokenizer, TokenisedDocuments
from tritter.errors import RequestError, TritterError
from tritter.evaluation.gate import Check
from tritter.methods.experts.stored import ExpertFolder, LogitChange, StoredAdapter
from tritter.report.table import Table, count_text
from tritter.storage.atomic import atomic_folder
from tritter.storage.hub import locate

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OF_ADAPTER = {*AdapterShape.FILES, Card.NAME}
_SEQUENCES, _LENGTH, _DOCUMENTS = 8, 128, 16  # per domain, to measure a merge
_MAX_RANK = 1024  # of a readable adapter


@dataclass(frozen=True, slots=True)
class Merge:
    """The result of merging experts.

    Args:
        gates: expert → its fixed gate.
        gates_from: description of the gates' origin.
        adapter: the merged adapter.
        lost: share of the update that its rank drops, maximum over layers.
        change: difference between the logits of the merged adapter and of the mixture.
        text: description of the data for this measurement.
    """

    gates: Mapping[str, float]
    gates_from: str
    adapter: StoredAdapter
    lost: float
    change: LogitChange
    text: str

    @classmethod
    def of(
        cls, files: ExpertFiles, *, rank: int | None = None, max_rank: int | None = None
    ) -> Self:
        """Merge the experts of a folder by mean gates, and measure the logit shift.

        Args:
            files: the experts.
            rank: rank of the merged adapter; None for the lossless one, up to `max_rank`.
            max_rank: maximum rank; None for no limit.
        """
        experts = ExpertFolder.of_files(files)
        model = read_model(files.source)
        length = min(_LENGTH, model.position_limit or _LENGTH)
        vocab_size = model.sizes.vocab_size
        texts = _texts(files.source, length=length, vocab_size=vocab_size)
        mixture, stored = experts.apply(load_model(files.source)), files.mean_gates()
        if texts:
            input_ids, named = torch.cat(list(texts.values())), ", ".join(texts)
            gates, gates_from = mixture.mean_gates(list(texts.values())), f"means on {named}"
        else:
            generator, named = torch.Generator().manual_seed(0), "random data"
            input_ids = torch.randint(vocab_size, (_SEQUENCES, length), generator=generator)
            gates = stored or dict.fromkeys(files.head.names, 1 / len(files.head.names))
            gates_from = "equal: neither data nor recorded usage is available"
            if stored is not None:
                gates_from = f"recorded means on {', '.join(files.head.usage)}"
        adapter, lost = experts.merged(gates, rank=rank)
        if max_rank is not None and adapter.shape.rank > max_rank:
            adapter, lost = experts.merged(gates, rank=max_rank)
        change = adapter.logit_change(mixture, input_ids)
        return cls(gates, gates_from, adapter, lost, change, named)

    @property
    def sentence(self) -> str:
        change, lost = self.change, self.lost
        cut = f"; the limited rank drops up to {lost:.1%} of a layer's update" if lost else ""
        kind = "lossy" if change.largest > Check.EXACT_JUMP else "exact up to rounding"
        return (
            f"{kind}: logit shift up to {change.largest:.2g} σ, RMS {change.mean:.2g} σ; greedy "
            f"decoding agrees on {change.same_best:.1%} of {change.num_tokens:,} tokens of "
            f"{self.text}{cut}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "gates": dict(self.gates),
            "gates_from": self.gates_from,
            "rank": self.adapter.shape.rank,
            "lost_share": self.lost,
            "logit_change": asdict(self.change),
            "measured_on": self.text,
        }

    def lines(self) -> list[tuple[str, str]]:
        """Return the lines that describe it, each with a label."""
        shares = ", ".join(f"{name} {gate:.2f}" for name, gate in self.gates.items())
        return [("gates", f"{shares} ({self.gates_from})"), ("merged", self.sentence)]

    def added_to(self, weights: Weights) -> Weights:
        """Return the base's weights with the merged experts added."""
        shares = ", ".join(f"{name} {gate:.3g}" for name, gate in self.gates.items())
        note = f"LoRA experts are merged into these weights with gates {shares} ({self.gates_from})"
        added = weights.with_added(self.adapter.deltas())
        lineage = weights.lineage
        if lineage is not None and self.change.largest > Check.EXACT_JUMP:
            lineage = replace(lineage, benchmark_scores={})  # those of the mixture
        return replace(added, lineage=lineage, notes=(f"{note}; {self.sentence}.",))


def _texts(folder: Path, *, length: int, vocab_size: int) -> dict[str, Tensor]:
    """Return domain → tokens int64 [B, T] for each learned domain with available data."""
    found: dict[str, Tensor] = {}
    if not (folder / "tokenizer.json").is_file():
        return found
    tokenizer = PretrainedTokenizer.read(folder, vocab_size=vocab_size)
    inner, bounds = tokenizer.tokenizer, tokenizer.bounds
    lineage = Lineage.read(folder)
    if lineage is None:
        return found
    for name, domain in lineage.domains.items():
        try:
            documents = domain.documents(lineage.split, key="domains") if domain.paths else ()
            first = list(islice(documents, _DOCUMENTS))
            is_chat = any(each.conversation for each in first)
            load = partial(load_tokenizer, folder)
            chat = recorded_chat(lineage).of_corpus(load, is_chat=is_chat)
            tokens = TokenisedDocuments.of(first, inner, max_tokens_per_document=length, chat=chat)
        except TritterError:  # its data is unavailable or refused
            continue
        if tokens.num_closed_tokens(bounds) >= length:
            packed = tokens.pack(sequence_length=length, bounds=bounds)
            found[name] = ids_of(packed[:_SEQUENCES]).long()
    return found


def export_adapters(
    checkpoint: str,
    output: Path,
    *,
    is_merged: bool,
    rank: int | None,
    dtype: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write each expert as a stock adapter in a subfolder of `output`, or one merged adapter.

    A merged adapter is lossless without `rank`. Without `dtype`, factors keep theirs.
    """
    with refuse_damage():
        folder = locate(checkpoint, key="--checkpoint")
        check = partial(_check_adapters, source=folder)
        check_output(output, sources=[folder], overwrite=overwrite, check=check)
        source = Source.open(folder, read_model(folder)).intact()  # verifies its lineage
        if source.experts is None:
            raise RequestError(
                f"--format = peft: {folder} has no LoRA experts; must be hf, a plain folder."
            )
        merged = Merge.of(source.experts, rank=rank, max_rank=_MAX_RANK) if is_merged else None
    experts = ExpertFolder.of_files(source.experts)
    if not experts.adapters:
        raise RequestError(f"{folder} has no adapter to export: its only expert is the base.")
    base = _base_of(checkpoint, folder)
    adapters = dict(experts.adapters) if merged is None else {"": merged.adapter}
    if dtype is not None:
        to = getattr(torch, dtype)
        for name, adapter in adapters.items():
            factors = adapter.factors.items()
            rounded = {n: replace(f, down=f.down.to(to), up=f.up.to(to)) for n, f in factors}
            adapters[name] = replace(adapter, factors=rounded)
    records = [_record(name, adapter, output) for name, adapter in adapters.items()]
    with note_if_written(output):
        with atomic_folder(output, overwrite=overwrite, check=check) as temporary:
            for name, adapter in adapters.items():
                head = _untied_head(source, adapter)
                adapter.write(temporary / name, base=base, overwrite=not name, whole=head)
                for path in licence_files(folder):
                    shutil.copyfile(path, temporary / name / path.name)
                card = Card.read(folder).for_adapter(base)
                (temporary / name / Card.NAME).write_text(card, encoding="utf-8")
        if as_json:
            print_json(
                {
                    "source": str(folder),
                    "destination": str(output),
                    "format": "peft",
                    "base": base,
                    "adapters": records,
                    "merged": None if merged is None else merged.to_dict(),
                }
            )
            return
        heads = [_untied_head(source, adapter) for adapter in adapters.values()]
        _print_adapters(records, base=base, is_head_stored=any(heads), merged=merged)
        CommandConsole().print_command("written", display_path(output))


def _print_adapters(
    records: Sequence[Mapping[str, Any]], *, base: str, is_head_stored: bool, merged: Merge | None
) -> None:
    console, rows = CommandConsole(), []
    for each in records:
        numbers = (str(each["rank"]), f"{each['alpha']:g}", count_text(each["parameters"]))
        rows.append((each["name"], *numbers, " ".join(each["targets"])))
    header = ("adapter", "rank", "alpha", "parameters", "on")
    console.print_table(Table(header, tuple(rows), numbers=(1, 2, 3)), wrapped=("on",))
    console.print()
    lines = [("base", base)]
    if is_head_stored:
        reason = "stored whole: PEFT would merge its update into the embedding too"
        lines.append(("tied head", reason))
    console.print_lines(lines + ([] if merged is None else merged.lines()))
    console.print()


def _untied_head(source: Source, adapter: StoredAdapter) -> dict[str, Tensor]:
    """Return layer → weight of a tied head, if the adapter changes it or the embedding.

    `merge_and_unload` of PEFT adds the updates of both to the weight that they share.
    """
    if not source.model.is_tied:
        return {}
    with torch.device("meta"):
        model = uninitialised_model(source.config)
    names = {module: name for name, module in model.named_modules()}
    embedding, head = (
        names[getattr(model, each)()] for each in ("get_input_embeddings", "get_output_embeddings")
    )
    if not adapter.factors.keys() & {embedding, head}:
        return {}
    weight = source.read("embed")
    if (own := adapter.factors.get(head)) is not None:
        # Not rounded to the base's dtype, so that the head is as exact as the other factors
        dtype = torch.promote_types(weight.dtype, own.up.dtype)
        delta = own.scaling * (own.up.float() @ own.down.float())
        weight = (weight + delta).to(dtype)
    return {head: weight.contiguous()}


def _record(name: str, adapter: StoredAdapter, output: Path) -> dict[str, Any]:
    tensors = [tensor for each in adapter.factors.values() for tensor in (each.down, each.up)]
    return {
        "name": name or "merged",
        "folder": str(output / name),
        "rank": adapter.shape.rank,
        "alpha": adapter.shape.alpha,
        "targets": list(adapter.shape.targets),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtype": str(tensors[0].dtype).removeprefix("torch."),
    }


def _base_of(checkpoint: str, folder: Path) -> str:
    """Return the base of a folder's adapters: its hub id if known, otherwise its path."""
    if not Path(checkpoint).expanduser().exists():
        return checkpoint  # downloaded, with the base at its root
    links = Link.chain(folder)
    for link in links:
        settings = link.lineage.training_config if link.lineage is not None else {}
        path = settings.get("path") if settings.get("stage") == "given" else None
        is_same = link.model_hash == links[-1].model_hash
        if is_same and isinstance(path, str) and _HUB_ID.fullmatch(path):
            return path
    return str(folder.resolve())


def _check_adapters(folder: Path, *, source: Path) -> None:
    """Reject a folder that contains anything other than adapters. Opens no file."""
    if is_within(source, folder):
        raise RequestError(f"{folder} contains the source {source}.")
    strays = sorted(_unexpected_names(folder))
    if strays or not any(folder.rglob(AdapterShape.FILES[0])):
        what = f"contains other files ({strays[0]})" if strays else "contains no adapter"
        raise RequestError(f"{folder} {what}, and is not replaced. Choose another folder.")


def _unexpected_names(folder: Path, depth: int = 0) -> Iterator[str]:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False) and depth == 0:
            yield from _unexpected_names(folder / entry.name, depth=1)
        elif not entry.is_file(follow_symlinks=False) or not (
            entry.name in _OF_ADAPTER or LICENCE_FILES.fullmatch(entry.name)
        ):
            yield entry.name
