"""Growth of every causal language model in transformers, as a table.

    python -m tests.core.families.model_types [MODEL_TYPE ..]

writes docs/reference/model_types.md. Each row is measured: a tiny model of the type is saved with
random weights, expanded by `tritter expand` with its default check, and both folders are loaded
with the stock class. For growth in width it has one layer of each kind.
"""

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tritter.cli import main as tritter
from tritter.cli.methods import ExpansionMethods
from tritter.cli.output import EXIT_NO
from tritter.core import streamed
from tritter.core.expansions import ExpansionSpec, LlamaPro, Stack, target_model
from tritter.core.expansions.targets import growth_examples
from tritter.core.families import Config, Model, family_of, find_family
from tritter.core.families.discovery import DiscoveredFamily
from tritter.core.families.discovery.family import shallow
from tritter.core.families.discovery.twin import Twin
from tritter.core.models import read_model
from tritter.errors import RequestError, TritterError
from tritter.methods.growth.growable import GrowableCausalLM

PAGE = Path(__file__).parents[3] / "docs/reference/model_types.md"
MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TOKENS = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(5))
_BLOCK_BYTES = 4 * 64 * 50  # the check multiplies in blocks of rows, as in large models
EXACT = 1e-4  # largest logit difference in standard deviations, float32
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
# Settings without which the class's own defaults make no model
_EXAMPLES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 5e5, "kv_n_heads": 8, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
}
_HEAD = """\
# Model types without a table

Model types that have no table in [families](families.md) grow too. Tritter builds a tiny random \
model of the type and finds out by experiment which tensors write the residual stream, and along \
which axes neurons, heads and the residual stream lie: a layer computes the same function if they \
are permuted along all of them. Each growth is verified in float64 on the tiny model before \
anything is written, and then on your checkpoint. Check your model:

```bash
tritter inspect base --family
```

The table lists the causal language models of transformers VERSION, each with the default config \
of its class; `tests/core/families/model_types.py` writes it. Each *exact* was measured: \
`tritter expand` expanded a tiny model and found no difference, and the stock class gave the same \
logits before and after.

Depth:

- **exact**: [`llama_pro`](expansions.md#llama_pro) keeps the function. `dus`, `stack` and \
`interpolate` work too, and are exact with `identity_init=true` where such copies fit.
- **with options**: exact with the options in the note, because not every layer can be copied.
- **copies only**: layers can be copied, but no new layer is the identity.
- **refused**: the depth can't grow, for the reason given.

FFN, heads and hidden size, by [`width`](expansions.md#width); experts, by \
[`moe_add`](expansions.md#moe_add) with `addition=replicate`:

- **exact**: any larger size. Heads grow by whole groups, one group per key/value head.
- **multiples**: exact for whole copies (`init=net2net`, twice or three times the size).
- **with hidden**: heads grow with the hidden size only.
- **none**: there is no such size in the config.

Neurons, in single layers during training, by [growth](../concepts/growth.md):

- **exact**: FFNs are down(σ(gate(x)) · up(x)) or down(σ(up(x))), with matrices of their own.
- **none**: there are experts in place of FFNs, or no such size.

Refused in all of them: `aki`, `split` and `gqa`, appended experts, [`moe`](expansions.md#moe), \
routing losses and 8-bit or 4-bit weights. \
`data.packing=documents` is refused if a token depends on earlier documents, which is measured. \
Training, forgetting mitigation, the [gate](../concepts/gate.md), [LoRA \
experts](../how-to/add_lora_experts.md) and export work as for other models, but experts need \
layers named `layers.N`, `h.N` or `blocks.N`, which BERT and its relatives do not have. In \
multimodal models the text decoder grows; the other parts are unchanged, and LoRA experts are \
refused. Where `AutoModelForCausalLM` loads the text alone (Qwen3.5), the result has only that. \
Tensors that the model class does not read, such as heads for multi-token prediction, are left out \
and listed. FLOP counts leave out the scans of recurrent layers.

"""


_NOTE = "zeroed tensors of a new layer, or the reason"
_HEADER = f"| `model_type` | depth | FFN | heads | hidden size | experts | neurons | {_NOTE} |"
_SIZES = ("FFN", "heads", "hidden size", "experts", "neurons")


@dataclass(frozen=True, slots=True)
class Row:
    """What can grow in a model type.

    Args:
        model_type: name in config.json.
        depth: `exact`, `with options`, `copies only`, `refused`, `table`, or `WRONG` if the stock
            class differs, `CAUGHT` if the check of `tritter expand` found a difference.
        sizes: of `_SIZES`: `exact`, `multiples`, `with hidden`, `refused`, `none`, or as above.
        note: the tensors that are zeroed in a new layer, or the reason; then the reasons of sizes.
    """

    model_type: str
    depth: str
    sizes: tuple[str, ...]
    note: str

    def __str__(self) -> str:
        return f"| `{self.model_type}` | {self.depth} | {' | '.join(self.sizes)} | {self.note} |"


def is_possible(source: Model, spec: ExpansionSpec) -> bool:
    """Return True if a model can be expanded by `spec`."""
    try:
        target_model(source, [spec])
    except RequestError:
        return False
    return True


def example(model_type: str, **changes: Any) -> dict[str, Any]:
    """Return the config of a model type: the defaults of its class, completed if they can't run."""
    config: dict[str, Any] = CONFIG_MAPPING[model_type](**changes).to_dict()
    for key, value in _EXAMPLES.get(model_type, {}).items():
        inner = config.get(key)
        both = isinstance(value, dict) and isinstance(inner, dict)
        config[key] = {**inner, **value} if both else value
    return {**config, "model_type": model_type}


def measured(model_type: str, place: Path) -> Row:
    """Return the row of a model type, measured in an empty folder."""
    nothing = ("none",) * len(_SIZES)
    if find_family(model_type) is not None:
        return Row(model_type, "table", nothing, "see [families](families.md)")
    base = place / "base"
    try:
        config = example(model_type)
        Twin.of(config).model.float().save_pretrained(base)
        saved = json.loads((base / "config.json").read_text())["model_type"]
    except Exception as error:  # a class may raise anything
        return Row(model_type, "refused", nothing, _short(error))
    if find_family(saved) is not None:
        note = f"saved as `{saved}`; see [families](families.md)"
        return Row(model_type, "table", nothing, note)
    depth, note = _depth(base, place / "grown")
    if depth == "refused":
        return Row(model_type, depth, nothing, note)
    few = place / "few"
    Twin.of(shallow(read_model(base).config)).model.float().save_pretrained(few)
    return Row(model_type, depth, *_widths(few, place, note))


def _depth(base: Path, grown: Path) -> tuple[str, str]:
    """Return what happens to the depth, and the zeroed tensors or the reason."""
    try:
        config, reason = read_model(base).config, ""
    except TritterError as error:
        return "refused", _short(error)
    for request, note in depth_requests(config):
        try:
            word = _grown(base, grown, request, "with options" if note else "exact")
        except TritterError as error:
            reason = reason or _short(error)
            continue
        family = family_of(config)
        assert isinstance(family, DiscoveredFamily)
        return word, ", ".join(f"`{name}`" for name in family.zeroed_names) + note
    return _copied(base, grown, reason)


def depth_requests(config: Config) -> Iterator[tuple[ExpansionSpec, str]]:
    """Yield requests of exact growth in depth with their notes, the simplest first."""
    yield LlamaPro(), ""
    layers = Model(config).sizes.num_hidden_layers
    fit = [
        layer for layer in range(layers) if is_possible(Model(config), LlamaPro(positions=(layer,)))
    ]
    if 0 < len(fit) < layers:
        others = [layer for layer in range(layers) if layer not in fit]
        note = f"from {fit}" if len(fit) < len(others) else f"without {others}"
        yield LlamaPro(positions=tuple(fit[1::2] or fit)), f"; with `positions` {note}"
    yield Stack(identity_init=True), "; only `stack` with `identity_init=true`"


def _copied(base: Path, grown: Path, reason: str) -> tuple[str, str]:
    try:
        expanded(base, grown, Stack())
        _logits(grown)
    except TritterError as error:
        return "refused", f"{reason.removesuffix('; use dus or stack')}; copies: {_short(error)}"
    return "copies only", reason


def _widths(base: Path, place: Path, note: str) -> tuple[tuple[str, ...], str]:
    """Return what happens to each size, and the note with further reasons."""
    sizes, notes, family = [], [note], family_of(read_model(base).config)
    try:
        requests = growth_examples(read_model(base))
    except TritterError as error:
        return ("refused",) * len(_SIZES), f"{note}; {_short(error)}"
    for name, examples in requests.items():
        for word, example in zip(("exact", "multiples"), examples, strict=False):
            try:
                word, reason = _grown(base, place / name, example, word), ""
                break
            except TritterError as error:
                word, reason = "refused", _short(error)
        if "no config key" in reason or "has no experts" in reason:
            word = "none"
        elif name == "heads" and "follows from the hidden size" in reason:
            word = "with hidden"
        elif word == "refused":
            notes.append(f"{name}: {reason.removeprefix(f'{family.model_type}: ')}")
        sizes.append(word)
    word, reason = _with_neurons(base, place / "neurons")
    notes += [f"neurons: {reason.removeprefix(f'{family.model_type}: ')}"] if reason else []
    return (*sizes, word), "; ".join(notes)


def _with_neurons(base: Path, grown: Path) -> tuple[str, str]:
    """Return what happens to neurons in a training step that changes no weights, and the reason."""
    config = read_model(base).config
    family = family_of(config)
    if reason := family.fixed_neurons(config):
        is_none = family.has_experts or "no config key" in reason
        return ("none", "") if is_none else ("refused", reason.partition("; use")[0])
    model = GrowableCausalLM(
        base, trigger="schedule", growth_cooldown=1, initialiser="random", max_new_parameters=2000
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(input_ids=TOKENS, use_cache=False).logits.sum().backward()
    optimizer.step()
    if not model.check_and_grow()["born"]:
        return "WRONG", "nothing grew"
    model.save_pretrained(grown)
    return ("exact" if _is_exact(base, grown) else "WRONG"), ""


def _grown(base: Path, grown: Path, request: ExpansionSpec, word: str) -> str:
    """Return the word if a request preserves the function, or else how that was found.

    Raises:
        TritterError: it was refused.
    """
    if not expanded(base, grown, request):
        return "CAUGHT"
    return word if _is_exact(base, grown) else "WRONG"


def expanded(base: Path, grown: Path, request: ExpansionSpec) -> bool:
    """Expand a folder by the plain command; return False if its check finds a difference.

    Raises:
        TritterError: it was refused, or failed.
    """
    words = [
        "expand",
        "--checkpoint",
        str(base),
        *ExpansionMethods.current().words(request),
        "--output",
        str(grown),
    ]
    blocks = patch.object(streamed, "_BLOCK_BYTES", _BLOCK_BYTES)
    with blocks, redirect_stdout(StringIO()), redirect_stderr(StringIO()) as said:
        code = tritter([*words, "--overwrite"])
    if code not in (0, EXIT_NO):
        text = said.getvalue().removeprefix("error: ").partition("\nNothing was written.")[0]
        raise TritterError(text)
    return code == 0


def _is_exact(base: Path, grown: Path) -> bool:
    before, after = (_logits(folder) for folder in (base, grown))
    return float((after - before).abs().max() / before.std()) <= EXACT


def _logits(folder: Path) -> torch.Tensor:
    """Return the float32 logits [B, T, V] of fixed tokens, of the stock class."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return logits


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()).translate({ord("|"): "/", ord("`"): "'"})
    text = text or type(error).__name__
    text = re.sub(r"^(config\.json|method|\S+\.safetensors): ", "", text)
    text = re.sub(r"^\S+/config\.json is not a usable config: ", "", text)
    text = re.sub(r"^--[\w-]+( = [^:]*| [\w-]+)?: ", "", text)
    text = re.sub(r"^model_type '[^']+': |^model_type '[^']+' is not supported: ", "", text)
    return text[:160].rstrip(". ")


def main(model_types: Sequence[str]) -> None:
    """Write the page; measure some model types again, or all."""
    rows = {}
    if model_types:
        lines = PAGE.read_text(encoding="utf-8").splitlines()
        rows = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
        rows = {name: row for name, row in rows.items() if name in MODEL_TYPES}
    for model_type in model_types or MODEL_TYPES:
        with tempfile.TemporaryDirectory() as place:
            try:
                row = measured(model_type, Path(place))
            except Exception as error:  # a fault of ours, which the suite reports
                row = Row(model_type, "ERROR", ("none",) * len(_SIZES), _short(error))
        print(row, flush=True)
        rows[model_type] = str(row)
    write_page(rows)


def write_page(rows: Mapping[str, str]) -> None:
    """Write the page of the rows of all model types."""
    from transformers import __version__

    said = [f"Of {len(rows)} types:", ""]
    words = ("table", "exact", "with options", "multiples", "with hidden", "copies only")
    words += ("refused", "none")
    for column, name in enumerate(("depth", *_SIZES), start=1):
        counts = Counter(row.split(" | ")[column] for row in rows.values())
        said.append(f"- {name}: " + ", ".join(f"{counts[w]} {w}" for w in words if counts[w]))
    table = [_HEADER, "|---" * 8 + "|", *(rows[name] for name in MODEL_TYPES)]
    head = _HEAD.replace("VERSION", __version__)
    PAGE.write_text("\n".join([head + "\n".join(said), "", *table]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
