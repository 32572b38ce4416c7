"""Qwen3: Llama's block with an RMSNorm per head behind q and k."""

from tritter.families.decoder import DECODER_SPACES, decoder_tensors
from tritter.families.family import Family

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    heads_divide_hidden=False,
    per_layer_config_keys=("layer_types",),
    spaces=DECODER_SPACES,
    tensors=decoder_tensors(queries_are_normed=True, attention_bias="attention_bias"),
)
