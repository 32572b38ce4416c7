"""The model card: README.md of a checkpoint folder, in the Hugging Face Hub's format."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from tritter.checkpoints.record import Lineage, layers_text
from tritter.core.families import Config, Model
from tritter.errors import TritterError
from tritter.storage.reading import read_text, require_file
from tritter.terminal import harmless

_logger = logging.getLogger(__name__)

_MAX_CELL_CHARACTERS = 200
_ACCURACY = "/accuracy"  # suffix of a task that was scored by accuracy

# Metadata that stays true of every model that is made from another one
LICENCE_FILES = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY|COPYING)([-_.].*)?", re.IGNORECASE)
_KEPT = ("license", "license_name", "license_link", "language", "datasets", "base_model")
_METADATA = re.compile(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_MAX_VALUES = 500
_MAX_METADATA = 2**16
_NULL = {"null", "Null", "NULL", "~", ""}
_MAX_VALUE_CHARACTERS = 2_000  # of a `license_link`
_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_HUB_DATASET = re.compile(r"hf:(\w[\w.-]*/\w[\w.-]*)")


def licence_files(folder: Path) -> list[Path]:
    """Return the licence, notice and use policy files of a folder, checked."""
    named = sorted(path for path in folder.iterdir() if LICENCE_FILES.fullmatch(path.name))
    paths = [path for path in named if path.is_file()]
    for path in paths:
        require_file(path)
    return paths


class Card:
    """The card of a folder that is made from another one, whose metadata it keeps.

    Args:
        kept: licence, languages, data sets and base model of the other folder.
    """

    NAME: ClassVar[str] = "README.md"

    def __init__(self, kept: Mapping[str, Any]) -> None:
        self.kept = kept

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the metadata of the card in a folder; without a card, nothing is kept.

        Values of other forms are dropped, and so are base models that are no hub ids. Metadata that
        cannot be read is reported in the log.
        """
        path = folder / cls.NAME
        if not path.is_file():
            return cls({})
        try:
            found = _METADATA.match(read_text(path))
            text = found[1] if found else "{}"
            if len(text) > _MAX_METADATA:
                raise TritterError(f"it has more than {_MAX_METADATA:,} characters")
            # All scalars as text: `no` is a language
            stated = yaml.load(text, yaml.BaseLoader)
        except (TritterError, yaml.YAMLError, RecursionError, ValueError) as error:
            _logger.warning("%s: its metadata, such as the licence, is not kept: %s", path, error)
            return cls({})
        stated = stated if isinstance(stated, dict) else {}
        kept = {key: value for key in _KEPT if (value := _texts(stated.get(key)))}
        if not all(map(_HUB_ID.fullmatch, _listed(kept.get("base_model")))):
            del kept["base_model"]
        return cls(kept)

    def begin(self, folder: Path, *, source: Path) -> None:
        """Start the card of a folder that is being made from `source`, with the kept metadata."""
        kept, snapshots = self.kept, source.absolute().parent
        repository = snapshots.parent.name  # of a snapshot in the hub's cache
        if snapshots.name == "snapshots" and repository.startswith("models--"):
            hub_id = repository.removeprefix("models--").replace("--", "/", 1)
            kept = {**kept, "base_model": hub_id}
        if kept:
            (folder / self.NAME).write_text(_front_matter(kept), encoding="utf-8")

    def for_checkpoint(self, lineage: Lineage, config: Config) -> str:
        """Return the card's Markdown: metadata, architecture, expansion history and scores."""
        lines = [_front_matter(self._metadata(lineage))]
        lines += _introduction(
            Model(config), "Made with Tritter; `tritter.json` holds the lineage."
        )
        if lineage.experts:
            names = [_cell(name) for name in lineage.experts]
            listed = ", ".join(f"`{name}`" for name in names)
            lines += [
                "The snippet above loads the base model only. `experts/` contains LoRA adapters "
                f"that stock PEFT loads one at a time ({listed}). `state/experts.*` contains the "
                "router that mixes them for each token.",
                "",
                "```python",
                "from peft import PeftModel",
                "",
                f'one = PeftModel.from_pretrained(model, "PATH_OF_THIS_FOLDER/experts/{names[0]}")',
                "```",
                "",
                "To merge one into the base, export it first (`tritter export --format peft`): an "
                "adapter of a tied embedding or head is merged wrongly by PEFT itself.",
                "",
                "To use the whole mixture: `tritter generate --checkpoint PATH_OF_THIS_FOLDER "
                "--prompt TEXT`, or `tritter evaluate`.",
                "",
            ]
        lines += _history(lineage) + _scores(lineage)
        lines += [f"Model hash `{lineage.model_hash}`", ""]
        return "\n".join(lines)

    def for_export(
        self,
        model: Model,
        *,
        origin: str,
        origin_hash: str,
        model_hash: str,
        lineage: Lineage | None,
        notes: Sequence[str] = (),
    ) -> str:
        """Return the card of an exported folder, which is the only record of its origin.

        Args:
            origin: name of the checkpoint that was exported.
            origin_hash: its model hash, or the SHA-256 of its file.
            model_hash: Merkle hash over the exported tensors.
            lineage: lineage of the exported checkpoint, if it has one.
            notes: sentences that describe the conversion.
        """
        dtype = model.config["dtype"]
        lines = [_front_matter(self._metadata(lineage))]
        lines += _introduction(model, f"Exported with Tritter: all tensors in {dtype}.")
        for note in notes:
            lines += [" ".join(harmless(note).split()).replace("<", "&lt;"), ""]
        if lineage is not None:
            lines += _history(lineage) + _scores(lineage)
        lines += [
            "| | hash |",
            "|---|---|",
            f"| these tensors | `{model_hash}` |",
            f"| made from | `{origin_hash}` ({_cell(origin)}) |",
        ]
        if lineage is not None:
            lines.append(f"| start of its chain | `{lineage.base_model_hash}` |")
        return "\n".join([*lines, ""])

    def for_adapter(self, base: str) -> str:
        """Return the card of an exported LoRA adapter.

        Args:
            base: hub id or path of the model that it belongs to.
        """
        metadata = {**self._metadata(None), "library_name": "peft"}
        for key in ("base_model", "base_model_relation"):
            metadata.pop(key, None)
        place = "PATH_OF_BASE"
        if is_of_hub := _HUB_ID.fullmatch(base) is not None:
            place = base
            metadata |= {"base_model": base, "base_model_relation": "adapter"}
        lines = [
            _front_matter(metadata),
            "# LoRA adapter",
            "",
            f"Exported with Tritter{f' for {base}' if is_of_hub else ''}.",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{place}")',
            'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")',
            "```",
            "",
        ]
        return "\n".join(lines)

    def _metadata(self, lineage: Lineage | None) -> dict[str, Any]:
        """Return the metadata of a card, with the data sets of the hub that a lineage learned."""
        kept = self.kept
        own = {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["tritter"],
        }
        relation = {"base_model_relation": "finetune"} if "base_model" in kept else {}
        domains = () if lineage is None else lineage.domains.values()
        of_hub = [_HUB_DATASET.match(path) for domain in domains for path in domain.paths]
        datasets = [*_listed(kept.get("datasets")), *(found[1] for found in of_hub if found)]
        listed = {"datasets": list(dict.fromkeys(datasets))} if datasets else {}
        return {**own, **kept, **relation, **listed}


def _texts(value: object) -> str | list[str] | None:
    """Return a text or a short list of texts, cleaned; None for anything else."""
    if isinstance(value, list):
        return [each for each in map(_text, value[:_MAX_VALUES]) if each]
    return _text(value)


def _text(value: object) -> str | None:
    if not isinstance(value, str) or value in _NULL:
        return None
    return _line(value, most=_MAX_VALUE_CHARACTERS)


def _listed(value: str | list[str] | None) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []


def _line(text: str, *, most: int = _MAX_CELL_CHARACTERS) -> str:
    return " ".join(harmless(text).split())[:most]


def _front_matter(metadata: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{text}---\n"


def _introduction(model: Model, origin: str) -> list[str]:
    size, ffns = model.sizes, model.ffn_sizes
    ffn = f"{min(ffns)} to {max(ffns)}" if ffns else size.intermediate_size
    return [
        f"# {model.family.architecture}, {model.num_parameters:,} parameters",
        "",
        f"{size.num_hidden_layers} layers, hidden size {size.hidden_size}, FFN "
        f"{ffn}, {size.num_attention_heads} attention heads "
        f"({size.num_key_value_heads} key/value). {origin}",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")',
        "```",
        "",
    ]


def _history(lineage: Lineage) -> list[str]:
    if not lineage.expansion_history:
        return [f"Not expanded{'' if lineage.parent_hash else ': the start of its chain'}.", ""]
    warning = []
    if lineage.stock_loadable != "yes":
        warning = [
            "The gates of the appended experts are not fully open yet. Until further training "
            "opens them, only Tritter computes the correct function; the stock classes above "
            "compute a different one.",
            "",
        ]
    lines = ["| expansion | kind | step-0 error | steps after | source of each layer |"]
    lines += ["|---|---|---|---|---|"]
    for record in lineage.expansion_history:
        error = "not measured" if record.step0_error is None else f"{record.step0_error:.1e}"
        lines.append(
            f"| {_cell(record.method)} | {_cell(record.expansion_type)} | {error} | "
            f"{record.continued_training_steps} | {layers_text(record.layer_sources)} |"
        )
    return [*warning, *lines, ""]


def _scores(lineage: Lineage) -> list[str]:
    if not lineage.benchmark_scores:
        return []
    lines = ["| domain | loss (nats per token) |", "|---|---|"]
    accuracies = ["| task | accuracy |", "|---|---|"]
    num_header_lines = len(accuracies)
    for name, score in lineage.benchmark_scores.items():
        if name.endswith(_ACCURACY):
            accuracies.append(f"| {_cell(name.removesuffix(_ACCURACY))} | {score:.1%} |")
        else:
            lines.append(f"| {_cell(name)} | {score:.4f} |")
    tables = [table for table in (lines, accuracies) if len(table) > num_header_lines]
    return [line for table in tables for line in (*table, "")]


def _cell(name: str) -> str:
    """Return a name escaped for a Markdown table cell: one line, no markup, no HTML."""
    return re.sub(r"[\\`*\[\]|]", r"\\\g<0>", _line(name)).replace("<", "&lt;")
