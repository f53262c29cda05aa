"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from anequant.architectures.spec import Architecture, Window, decoder_layer

QWEN2 = Architecture(
    model_type="qwen2",
    linears=decoder_layer(query_key_value_bias=True, output_bias=False, mlp_bias=False),
    head_norms=(),
    package_prefix="qwen25",
    head_split=16,
    window=Window.LISTED_LAYERS,
)
