"""Growth in depth of every causal language model in transformers, as a table.

    python -m tests.core.families.model_types [MODEL_TYPE ..]

writes docs/reference/model_types.md. Each row is measured: a tiny model of the type is saved with
random weights, expanded by `tritter.expand`, and both folders are loaded with the stock class.
"""

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tritter
from tritter.core.families import family_of, find_family
from tritter.core.families.discovery import DiscoveredFamily
from tritter.core.families.discovery.twin import build_twin
from tritter.core.models import read_config
from tritter.errors import TritterError

PAGE = Path(__file__).parents[3] / "docs/reference/model_types.md"
MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
EXACT = 1e-5  # largest logit difference in standard deviations, float32
# Settings without which the class's own defaults make no model
_EXAMPLES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
}
_HEAD = """\
# Model types without a table

Tritter grows the depth of model types that have no table in [families](families.md). It builds a \
tiny random model of the type, finds the tensors that write the residual stream, and checks in \
float64 that zeroing them makes a new layer the identity. Check your model:

```bash
tritter inspect base
```

The table lists the causal language models of transformers VERSION, each with the default config \
of its class. `python -m tests.core.families.model_types` writes it. Every *exact* type was \
expanded from files by [`llama_pro`](expansions.md#llama_pro); the stock class gave the same \
logits before and after.

- **exact**: `llama_pro` keeps the function. `dus`, `stack` and `interpolate` work too, but are \
not exact in any family.
- **copies only**: layers can be copied, but no new layer is the identity.
- **refused**: the depth can't grow, for the reason given.

Only the depth of these types grows: [`width`](expansions.md#width), [`moe`](expansions.md#moe) \
and [neuron growth](../concepts/growth.md) need a table. Training, forgetting mitigation, the \
[gate](../concepts/gate.md), [LoRA experts](../how-to/add_lora_experts.md) and export work as for \
other models; routing losses, document masks and 8-bit or 4-bit weights need a table too. In \
multimodal models the text decoder grows; the other parts are unchanged. FLOP counts leave out \
the scans of recurrent layers.

"""


_HEADER = "| `model_type` | depth | zeroed tensors of a new layer, or the reason |"


@dataclass(frozen=True, slots=True)
class Row:
    """What happens to the depth of a model type.

    Args:
        model_type: name in config.json.
        depth: `exact`, `copies only`, `refused`, `table`, or `WRONG`.
        note: the tensors that are zeroed, or the reason.
    """

    model_type: str
    depth: str
    note: str

    def __str__(self) -> str:
        return f"| `{self.model_type}` | {self.depth} | {self.note} |"


def example(model_type: str, **changes: Any) -> dict[str, Any]:
    """Return the config of a model type: the defaults of its class, completed if they can't run."""
    config: dict[str, Any] = CONFIG_MAPPING[model_type](**changes).to_dict()
    return {**config, **_EXAMPLES.get(model_type, {}), "model_type": model_type}


def measured(model_type: str, place: Path) -> Row:
    """Return the row of a model type, measured in an empty folder."""
    if find_family(model_type) is not None:
        return Row(model_type, "table", "see [families](families.md)")
    base = place / "base"
    try:
        config = example(model_type)
        build_twin(config).model.float().save_pretrained(base)
        saved = json.loads((base / "config.json").read_text())["model_type"]
    except Exception as error:  # a class may raise anything
        return Row(model_type, "refused", _short(error))
    if find_family(saved) is not None:
        return Row(model_type, "table", f"saved as `{saved}`; see [families](families.md)")
    try:
        tritter.expand(base, "llama_pro", output=place / "grown")
    except TritterError as error:
        return _copied(model_type, base, place / "grown", _short(error))
    before, after = (_logits(folder) for folder in (base, place / "grown"))
    difference = float((after - before).abs().max() / before.std())
    if difference > EXACT:
        return Row(model_type, "WRONG", f"logits differ by {difference:.1e} standard deviations")

    family = family_of(read_config(base))
    assert isinstance(family, DiscoveredFamily)
    return Row(model_type, "exact", ", ".join(f"`{name}`" for name in family.zeroed_names))


def _copied(model_type: str, base: Path, grown: Path, reason: str) -> Row:
    try:
        tritter.expand(base, "stack", output=grown)
        _logits(grown)
    except TritterError:
        return Row(model_type, "refused", reason)
    return Row(model_type, "copies only", reason)


def _logits(folder: Path) -> torch.Tensor:
    """Return the float32 logits [B, T, V] of fixed tokens, of the stock class."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    text = model.config.get_text_config(decoder=True)
    draws = torch.Generator().manual_seed(5)
    input_ids = torch.randint(3, min(text.vocab_size, 120), (2, 11), generator=draws)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/") or type(error).__name__
    text = re.sub(r"^(config\.json|method|\S+/config\.json is not a usable config): ", "", text)
    text = re.sub(r"^model_type '[^']+': |^model_type '[^']+' is not supported: ", "", text)
    return text[:160].rstrip(". ")


def main(model_types: Sequence[str]) -> None:
    """Write the page; measure some model types again, or all."""
    from transformers import __version__

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
                row = Row(model_type, "ERROR", _short(error))
        print(row, flush=True)
        rows[model_type] = str(row)
    counts = Counter(row.split(" | ")[1] for row in rows.values())
    order = ("table", "exact", "copies only", "refused")
    said = f"Of {len(rows)} types: {', '.join(f'{counts[depth]} {depth}' for depth in order)}."
    table = [_HEADER, "|---|---|---|", *(rows[name] for name in MODEL_TYPES)]
    head = _HEAD.replace("VERSION", __version__)
    PAGE.write_text("\n".join([head + said, "", *table]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
