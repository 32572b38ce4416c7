"""The specification's size guide (its appendix A), with parameters counted from shapes.

Its shapes name layers and hidden sizes only. What is missing is taken from the published model
that comes nearest, and every note says where the guide's own figure would need something else.
"""

from dataclasses import dataclass

from tritter.expansion import Dus, ExpansionSpec, Moe, Width, target_config
from tritter.families import Config, family_of, llama_config
from tritter.families.presets import PRESETS, VOCABULARY
from tritter.planning.shapes import count_parameters

_BILLION = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class GuideRow:
    """One row of the guide.

    Args:
        source: size as the guide calls it; `target` likewise.
        layers: of source and target, as the guide writes them; `hidden_size` likewise.
        stated: the guide's figure for the target.
        shape: what the count assumes besides.
        source_parameters: counted, as `target_parameters` is.
        note: where the figures do not follow, and what would give them.
    """

    source: str
    target: str
    method: str
    layers: str
    hidden_size: str
    stated: str
    shape: str
    source_parameters: int
    target_parameters: int
    note: str


def size_guide() -> tuple[GuideRow, ...]:
    """Return every row of the guide, for a vocabulary of 32,000 and an untied head."""
    return (_depth_3b(), _width_3b(), _depth_7b(), _width_7b(), _experts_7b())


def _depth_3b() -> GuideRow:
    source = _llama(layers=24, hidden_size=2048, intermediate_size=8192, heads=16)
    small_ffn = {**source, "intermediate_size": 5504}
    large_vocabulary = {**source, "vocab_size": 65_536}
    preset = PRESETS["tritter_3b"]
    doubled = _grown(preset.config(), Dus(target_layers=2 * preset.num_hidden_layers))
    return GuideRow(
        source="3B",
        target="7B",
        method="DUS",
        layers="24→48",
        hidden_size="2048",
        stated="6.7B",
        shape="FFN 8192, 16 heads",
        source_parameters=count_parameters(source),
        target_parameters=count_parameters(_grown(source, Dus(target_layers=48))),
        note=f"24 layers of 2048 are {_billions(source)} ({_billions(large_vocabulary)} with a "
        f"vocabulary of 65,536, {_billions(small_ffn)} with an FFN of 5504), not 3 B, and DUS "
        f"can't more than double that. From {preset.name} (28 layers of 3072, "
        f"{_billions(preset.config())}) one DUS reaches {_billions(doubled)}; 7 B takes two "
        "steps.",
    )


def _width_3b() -> GuideRow:
    source = _llama(layers=24, hidden_size=2048, intermediate_size=8192, heads=16)
    target = _grown(source, Width(hidden_size=3072))
    preset = PRESETS["tritter_3b"].config()
    wider = _grown(preset, Width(hidden_size=4608))
    return GuideRow(
        source="3B",
        target="7B",
        method="width",
        layers="24",
        hidden_size="2048→3072",
        stated="6.9B",
        shape="FFN 8192→12288, 16→24 heads",
        source_parameters=count_parameters(source),
        target_parameters=count_parameters(target),
        note=f"1.5 times the width is 2.25 times the layers' parameters: {_billions(target)}. From "
        f"tritter_3b, 3072→4608 gives {_billions(wider)}.",
    )


def _depth_7b() -> GuideRow:
    source = PRESETS["tritter_7b"].config()
    llama2 = _llama(layers=32, hidden_size=4096, intermediate_size=11_008, heads=32)
    return GuideRow(
        source="7B",
        target="10B",
        method="DUS",
        layers="32→48",
        hidden_size="4096",
        stated="10.7B",
        shape="FFN 14336, 32 heads, 8 key/value heads",
        source_parameters=count_parameters(source),
        target_parameters=count_parameters(_grown(source, Dus(target_layers=48))),
        note="Follows, but only with Mistral's 8 key/value heads and FFN of 14336 (SOLAR). The "
        f"shape of Llama 2 7B ({_billions(llama2)}) becomes "
        f"{_billions(_grown(llama2, Dus(target_layers=48)))}.",
    )


def _width_7b() -> GuideRow:
    source = PRESETS["tritter_7b"].config()
    target = _grown(source, Width(hidden_size=5120))
    plain_mlp = _llama(layers=32, hidden_size=5120, intermediate_size=4 * 5120, heads=40)
    preset = PRESETS["tritter_14b"]
    return GuideRow(
        source="7B",
        target="14B",
        method="width",
        layers="32",
        hidden_size="4096→5120",
        stated="13.8B",
        shape="FFN 14336→17920, 32→40 heads, 8→10 key/value heads",
        source_parameters=count_parameters(source),
        target_parameters=count_parameters(target),
        note=f"In the source's proportions {_billions(target)}. {_billions(plain_mlp)} takes an "
        "FFN of four times the hidden size (20480) and as many key/value heads as heads; at 5120, "
        f"14 B takes {preset.num_hidden_layers} layers ({preset.name}, "
        f"{_billions(preset.config())}).",
    )


def _experts_7b() -> GuideRow:
    source = PRESETS["tritter_7b"].config()
    target = _grown(source, Moe(num_experts=8, experts_per_token=2))
    active = family_of(target).count_active_parameters(target)
    return GuideRow(
        source="7B",
        target="70B",
        method="MoE (8x)",
        layers="32",
        hidden_size="4096",
        stated="8x7B experts",
        shape="FFN 14336 an expert, 8 experts, 2 per token",
        source_parameters=count_parameters(source),
        target_parameters=count_parameters(target),
        note=f"8x7B is neither 56 B nor 70 B: only the FFNs exist eight times, attention and "
        f"embeddings once (Mixtral). A token meets {active / _BILLION:.1f} B of them.",
    )


def _llama(*, layers: int, hidden_size: int, intermediate_size: int, heads: int) -> Config:
    return llama_config(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        max_position_embeddings=4096,
        initializer_range=0.02,
    )


def _grown(config: Config, spec: ExpansionSpec) -> Config:
    return target_config(config, [spec])


def _billions(config: Config) -> str:
    return f"{count_parameters(config) / _BILLION:.2f} B"
