"""
What a model needs for being decoded token by token with others, beside its `forward`: where its positions start, whether
padding moves them, where its frequencies change, and what it would do itself between the steps of `generate()`.
"""

from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache

from .compat import CACHE_NAME, without_peft
from .mixture_inputs import execution_device, forward_parameters


# What was found out about a model by running it, or by looking at all of its modules.
_MOVED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_SWITCHES: WeakKeyDictionary[nn.Module, frozenset[int]] = WeakKeyDictionary()


def why_not_decoded(model: nn.Module) -> str | None:
    """Why a model cannot be decoded token by token with others; `None` for one that can."""
    base = without_peft(model)
    if "text" not in base.output_modalities:
        return f"generates {' and '.join(base.output_modalities)}, not text"
    if reads_ahead(base):
        return (
            "reads its text in both directions, so that no token can be predicted from those before it. If it was trained "
            "as a decoder, say so in its config (`is_decoder=True`)"
        )
    if any(hasattr(module, "_setup_cache") for module in base.modules()):
        return "keeps a state in its own modules, where other policies and other texts would overwrite it"
    if own := inputs_of_its_own(base):
        return f"needs inputs of its own at every step of decoding: {own}"
    return None


def reads_ahead(base: nn.Module) -> bool:
    """Whether a model attends to tokens that come later, by its config."""
    config = base.config.get_text_config(decoder=True)
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None) in (
        True,
        "all",
    ):
        return True
    # GPT-NeoX has such a field too, which nothing in it reads
    return getattr(config, "is_decoder", True) is False and any(
        getattr(module, "is_decoder", True) is False for module in base.modules()
    )


def inputs_of_its_own(base: nn.Module) -> str | None:
    """
    What `generate()` would give to the `forward` of a model beyond the newest token, its position and the mask, in words.
    The model is asked: it prepares the inputs of a step after two tokens.
    """
    if type(base).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
        return None
    cache, states = DynamicCache(), torch.zeros(1, 1, 2, 1, device="cpu")  # even where a model is made on "meta"
    cache.update(states, states, 0)
    ids = torch.ones(1, 3, dtype=torch.long, device="cpu")
    given = {CACHE_NAME: cache, "attention_mask": ids, "position_ids": ids.cumsum(1) - 1, "use_cache": True}
    try:
        inputs = base.prepare_inputs_for_generation(ids, next_sequence_length=1, is_first_iteration=False, **given)
    except Exception:  # code that did not come with Transformers may ask for anything
        return None
    if inputs["input_ids"].shape[1] != 1:
        return "tokens that are in its cache already"
    positions = inputs.get("position_ids")
    if positions is not None and positions.flatten()[-1] != 2:
        return "positions that it counts in another way"
    known = {"input_ids", *given}
    others = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and name not in known]
    return ", ".join(map(repr, others)) or None


def is_moved_by_padding(model: nn.Module) -> bool:
    """
    Whether padding on the left changes what a model reads behind it. That of a model which takes no positions, and has
    learned them, does. It is found out by running two tokens with and without padding.
    """
    base = without_peft(model)
    if base not in _MOVED:
        if "position_ids" in forward_parameters(base) or base.training:
            return False
        device = execution_device(base)
        ids, mask = torch.tensor([[0, 1, 2]], device=device), torch.tensor([[0, 1, 1]], device=device)
        with torch.no_grad():
            padded = base(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, -1].float()
            plain = base(input_ids=ids[:, 1:], attention_mask=mask[:, 1:], use_cache=False).logits[0, -1].float()
        _MOVED[base] = ((padded - plain).abs().max() > 0.05 * plain.std()).item()
    return _MOVED[base]


def switch_lengths(model: nn.Module) -> frozenset[int]:
    """
    Lengths of text beyond which a model rotates all keys by other frequencies (`"longrope"`). Those in a cache keep the
    ones that they were computed with.
    """
    base = without_peft(model)
    if base not in _SWITCHES:
        lengths = set()
        for module in base.modules():
            kinds = getattr(module, "rope_type", None)
            for layer_type, kind in kinds.items() if isinstance(kinds, dict) else ((None, kinds),):
                if kind == "longrope":
                    parameters = module.config.rope_parameters
                    parameters = parameters if layer_type is None else parameters[layer_type]
                    lengths.add(parameters["original_max_position_embeddings"])
        _SWITCHES[base] = frozenset(lengths)
    return _SWITCHES[base]


def crosses_switch(model: nn.Module, position_ids: torch.Tensor | None, new: int, cache: Cache) -> bool:
    """
    Whether the longest text of a batch grows beyond one of [`switch_lengths`] by the `new` tokens, with those before them
    in a cache.
    """
    lengths = switch_lengths(model)
    if not lengths or (filled := int(cache.get_seq_length())) == 0 or filled + new <= min(lengths):
        return False
    length = filled + new if position_ids is None else int(position_ids[..., -1].max()) + 1
    return any(length - new <= switch < length for switch in lengths)


def starts_with_padding(attention_mask: torch.Tensor | None) -> bool:
    """Whether some row of a 2D mask begins with padding."""
    return attention_mask is not None and attention_mask.ndim == 2 and bool((attention_mask[:, 0] == 0).any())
