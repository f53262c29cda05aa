"""Llama 2 and 3, SmolLM and other checkpoints of model_type `llama`."""

from anequant.architectures.spec import Architecture, Window, decoder_layer

LLAMA = Architecture(
    model_type="llama",
    linears=decoder_layer(
        query_key_value_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    head_norms=(),
    package_prefix="llama",
    head_split=8,
    window=Window.NO_LAYER,
)
