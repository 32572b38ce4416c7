"""All tables of families, and the one that a config.json means."""

from tritter.errors import RequestError
from tritter.families.dimensions import Config
from tritter.families.family import Family
from tritter.families.gemma2 import GEMMA2
from tritter.families.gemma3 import GEMMA3_TEXT
from tritter.families.glm4 import GLM4
from tritter.families.gpt2 import GPT2
from tritter.families.gpt_neox import GPT_NEOX
from tritter.families.granite import GRANITE
from tritter.families.llama import LLAMA
from tritter.families.mistral import MISTRAL, MIXTRAL
from tritter.families.olmo2 import OLMO2
from tritter.families.phi3 import PHI3
from tritter.families.qwen2 import QWEN2, QWEN2_MOE
from tritter.families.qwen3 import QWEN3, QWEN3_MOE
from tritter.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        SMOLLM3,
        GRANITE,
        OLMO2,
        PHI3,
        GLM4,
        GEMMA2,
        GEMMA3_TEXT,
        GPT_NEOX,
        GPT2,
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
    )
}
# Why a family that people ask for has no table
_REASONS = {
    "gemma3": "it reads images besides; its text part alone, gemma3_text, has a table",
}


def family_of(config: Config) -> Family:
    """Return the family that a config.json names.

    Raises:
        RequestError: no table for its `model_type`; names the tables there are.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        reason = f" ({_REASONS[model_type]})" if model_type in _REASONS else ""
        raise RequestError(
            f"model_type '{model_type}' is not supported{reason}; supported are "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def position_limit(config: Config) -> int | None:
    """Return how many tokens a model of this config reads; None where it does not say."""
    stated = config.get(family_of(config).positions_key)
    return stated if isinstance(stated, int) else None


def count_parameters(config: Config) -> int:
    """Count a model's parameters from shapes; a tied head counts once."""
    return family_of(config).count_parameters(config)
