"""Qwen3: Llama with an RMSNorm on every query and key head, and a head size of its own."""

from anequant.architectures.spec import Architecture, Window, decoder_layer

QWEN3 = Architecture(
    model_type="qwen3",
    linears=decoder_layer(
        query_key_value_bias="attention_bias", output_bias="attention_bias", mlp_bias=False
    ),
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    package_prefix="qwen",
    head_split=16,
    window=Window.LISTED_LAYERS,
)
