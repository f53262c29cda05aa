"""Mistral 7B and its kin: Llama without biases; a sliding window is honoured by refusing longer contexts."""

from anequant.architectures.spec import Architecture, Window, decoder_layer

MISTRAL = Architecture(
    model_type="mistral",
    linears=decoder_layer(query_key_value_bias=False, output_bias=False, mlp_bias=False),
    head_norms=(),
    package_prefix="mistral",
    head_split=8,
    window=Window.EVERY_LAYER,
)
