"""The model card: README.md of a checkpoint folder, in the Hugging Face Hub's format."""

import re
from collections.abc import Sequence

from tritter.checkpoints.record import Lineage
from tritter.core.families import Config, family_of, ffn_sizes
from tritter.terminal import harmless

_MAX_CELL_CHARACTERS = 200
_ACCURACY = "/accuracy"  # suffix of a task that was scored by accuracy


def model_card(lineage: Lineage, config: Config, *, experts: Sequence[str] = ()) -> str:
    """Return the card's Markdown: architecture, expansion history and scores.

    Args:
        experts: names of the adapters in `experts/`.
    """
    lines = _introduction(config, "Made with Tritter; `tritter.json` holds the lineage.")
    if experts:
        names = [_cell(name) for name in experts]
        listed = ", ".join(f"`{name}`" for name in names)
        lines += [
            "The snippet above loads the base model only. `experts/` contains LoRA adapters that "
            f"stock PEFT loads one at a time ({listed}). `state/experts.*` contains the router "
            "that mixes them for each token.",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            f'one = PeftModel.from_pretrained(model, "PATH_OF_THIS_FOLDER/experts/{names[0]}")',
            "```",
            "",
            "To use the whole mixture: `tritter generate --checkpoint PATH_OF_THIS_FOLDER "
            "--prompt TEXT`, or `tritter evaluate`.",
            "",
        ]
    lines += _history(lineage) + _scores(lineage)
    lines += [f"Model hash `{lineage.model_hash}`", ""]
    return "\n".join(lines)


def export_card(
    config: Config,
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
    dtype = config["dtype"]
    lines = _introduction(config, f"Exported with Tritter: all tensors in {dtype}.")
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


def _introduction(config: Config, origin: str) -> list[str]:
    family = family_of(config)
    size, ffns = family.dimensions(config), ffn_sizes(config)
    ffn = f"{min(ffns)} to {max(ffns)}" if ffns else size.intermediate_size
    return [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [tritter]",
        "---",
        "",
        f"# {family.architecture}, {family.count_parameters(config):,} parameters",
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
        return ["Not expanded: this checkpoint is the start of its chain.", ""]
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
        layers = " ".join(map(str, record.layer_sources))
        lines.append(
            f"| {_cell(record.method)} | {_cell(record.expansion_type)} | {error} | "
            f"{record.continued_training_steps} | {layers} |"
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
    text = " ".join(harmless(name).split())[:_MAX_CELL_CHARACTERS]
    return re.sub(r"[\\`*\[\]|]", r"\\\g<0>", text).replace("<", "&lt;")
