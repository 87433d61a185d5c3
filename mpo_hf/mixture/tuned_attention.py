"""
Attention in half precision that is computed in float32 where that is faster, in copies of modules.

PyTorch's attention on the CPU takes several times as long in bfloat16 as in float32 on processors without matrix units, and
rounds more.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .product_layouts import PLAIN, choose_layout, current_layouts, name_of


NAME = "mpo_hf_sdpa"
_HALF = (torch.float16, torch.bfloat16)
# With fewer keys, the choice would take longer than all that it saves.
MIN_NUMEL = 2**13


class _AttentionConfig:
    """
    A model's config as a copy of an attention layer reads it: with another name for the attention of PyTorch.

    Args:
        config (`PreTrainedConfig`): the config. Changes of it are seen.
    """

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        return NAME if name == "_attn_implementation" and value == "sdpa" else value


def tuned_attention(twin: nn.Module) -> nn.Module:
    """Lets a copy of an attention layer in half precision choose how it computes; other modules stay as they are."""
    config = twin.__dict__.get("config")
    if getattr(config, "_attn_implementation", None) is not None and _asks_for_attention(type(twin)):
        if next(twin.parameters()).dtype in _HALF:
            twin.__dict__["config"] = _AttentionConfig(config)
    return twin


def _asks_for_attention(kind: type[nn.Module]) -> bool:
    """Whether the layers of a class call what is registered under the name of the attention, without knowing the name."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and "sdpa" not in code.co_consts


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if (
        not query.is_cpu
        or query.dtype not in _HALF
        or torch.compiler.is_compiling()
        or key.numel() < MIN_NUMEL
        or torch.is_grad_enabled()
    ):
        return plain(module, query, key, value, attention_mask, **kwargs)

    def in_half() -> torch.Tensor:
        return plain(module, query, key, value, attention_mask, **kwargs)[0]

    def in_float32() -> torch.Tensor:
        mask = attention_mask
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        states = [states.float() for states in (query, key, value)]
        return plain(module, *states, mask, **kwargs)[0].to(query.dtype)

    by_shape = current_layouts().by_shape
    # lengths up to the next power of two share a choice, and so do numbers of rows
    length = (key.shape[2] - 1).bit_length()
    shape = query.shape, query.dtype, key.shape[1], length, attention_mask is None, torch.get_num_threads()
    form = by_shape.get(shape)
    if form is None:
        rows, new = [2 ** (size - 1).bit_length() for size in (query.shape[0], query.shape[2])]
        sizes = f"{rows} x {query.shape[1]} of {key.shape[1]} x {new} x {2**length} x {query.shape[3]}"
        name = name_of(query.dtype, sizes, " attention" if attention_mask is None else " attention with a mask")
        forms = {PLAIN: in_half, "float32": in_float32}
        form = by_shape[shape] = choose_layout(name, query.shape[3] + key.shape[2], forms)
    return (in_half() if form == PLAIN else in_float32()), None


AttentionInterface.register(NAME, _attention)
