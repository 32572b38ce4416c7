"""OLMo 2: norms behind attention and FFN and none before; one norm over the queries of all heads.

That norm takes the mean square over all heads, and so does the one over the keys. Copies of all of
them leave it as it is; other heads beside the old ones would change what the old ones compute.
"""

from tritter.families.decoder import attention, decoder_tensors, dense_ffn
from tritter.families.family import Family

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    heads_divide_hidden=False,
    tensors=decoder_tensors(
        *attention(
            has_input_norm=False,
            query_norm="all heads",
            output_norm="post_attention_layernorm",
            biases="qkvo",
            bias_key="attention_bias",
        ),
        *dense_ffn(output_norm="post_feedforward_layernorm"),
    ),
)
