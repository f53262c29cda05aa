"""Text that a model writes itself: calibration data that is always at hand.

The model's own distribution is the one its activations are made for (LLM-QAT: Liu et al. 2023, section
3.1). Sampling needs all layers at every token, so this holds the whole model, in the dtype it is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from anequant.calibration.forward import transformers_config
from anequant.calibration.hooks import ATTENTION, attach, register_attention
from anequant.checkpoints.reader import Checkpoint
from anequant.progress import Progress, silent


@torch.no_grad()
def sample_windows(
    checkpoint: Checkpoint, first: int, *, count: int, length: int, seed: int, progress: Progress = silent
) -> Tensor:
    """`count` independent texts at temperature 1, each starting with token `first`: int64 [count, length]."""
    from transformers import AutoModelForCausalLM

    spec = checkpoint.spec
    config = transformers_config(spec)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    if checkpoint.online.r3 is not None:
        register_attention()
        config._attn_implementation = ATTENTION
    for number, layer in enumerate(model.model.layers if checkpoint.online.active else ()):
        attach(layer, number, spec, checkpoint.online)
    names = [f"{EMBEDDING}.weight", f"{FINAL_NORM}.weight"]
    names += [layer_prefix(layer) + name for layer in range(spec.num_layers) for name in spec.layer_tensors()]
    state = {name: checkpoint.read(name) for name in names}
    state[f"{HEAD}.weight"] = checkpoint.read(checkpoint.head_name)
    dtype = state[f"{EMBEDDING}.weight"].dtype
    dtype = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((count, length), first)
    cache = None
    for position in range(1, length):
        progress(f"sample token {position} of {length}", position / length)
        output = model(
            tokens[:, position - 1 : position], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
        chances = output.logits[:, -1].float().softmax(-1)
        tokens[:, position] = torch.multinomial(chances, 1, generator=generator).squeeze(-1)
    return tokens
