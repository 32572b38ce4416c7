"""A size guide of common expansions, with parameters counted from shapes.

The guide states only layers and hidden sizes. Missing sizes are those of the most similar
published model; docs/reference/planning.md lists the stated figures that require other sizes.
"""

from dataclasses import dataclass

from tritter.core.expansions import Dus, ExpansionSpec, Moe, Width, target_model
from tritter.core.families import Model
from tritter.core.families.presets import PRESETS, ModelConfig


@dataclass(frozen=True, slots=True)
class _GuideRow:
    """One row of the guide.

    Args:
        source: name of the source size.
        target: name of the target size.
        method: expansion method.
        layers: layers of source and target.
        hidden_size: hidden sizes of source and target.
        stated: parameters of the target as stated by the guide.
        shape: further sizes that the count assumes.
        source_parameters: counted parameters of the source.
        target_parameters: counted parameters of the target.
        note: comparison of stated and counted parameters.
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


def size_guide() -> tuple[_GuideRow, ...]:
    """Return all rows of the guide, for a vocabulary of 32,000 and untied embeddings."""
    small = _llama(layers=24, hidden_size=2048, intermediate_size=8192, heads=16)
    medium = Model(PRESETS["tritter_7b"].config())
    deeper, experts = Dus(target_layers=48), Moe(num_experts=8, experts_per_token=2)
    return (
        _GuideRow(
            *("3B", "7B", "DUS", "24→48", "2048", "6.7B", "FFN 8192, 16 heads"),
            *_counts(small, deeper),
            "The source is not 3 B, and DUS at most doubles it",
        ),
        _GuideRow(
            *("3B", "7B", "width", "24", "2048→3072", "6.9B", "FFN 8192→12288, 16→24 heads"),
            *_counts(small, Width(hidden_size=3072)),
            "1.5 times the width has 2.25 times the parameters",
        ),
        _GuideRow(
            *("7B", "10B", "DUS", "32→48", "4096", "10.7B"),
            "FFN 14336, 32 heads, 8 key/value heads",
            *_counts(medium, deeper),
            "Correct with Mistral's key/value heads and FFN",
        ),
        _GuideRow(
            *("7B", "14B", "width", "32", "4096→5120", "13.8B"),
            "FFN 14336→17920, 32→40 heads, 8→10 key/value heads",
            *_counts(medium, Width(hidden_size=5120)),
            "14 B requires 40 layers",
        ),
        _GuideRow(
            *("7B", "70B", "MoE (8x)", "32", "4096", "8x7B experts"),
            "FFN 14336 per expert, 8 experts, 2 per token",
            *_counts(medium, experts),
            "Only the FFNs are replicated eight times",
        ),
    )


def _counts(model: Model, spec: ExpansionSpec) -> tuple[int, int]:
    """Return the parameters before and after an expansion."""
    return model.num_parameters, target_model(model, [spec]).num_parameters


def _llama(*, layers: int, hidden_size: int, intermediate_size: int, heads: int) -> Model:
    """Return a Llama of the guide, without grouped-query attention."""
    sizes = ModelConfig(
        model_type="llama",
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
    return Model(sizes.config())
