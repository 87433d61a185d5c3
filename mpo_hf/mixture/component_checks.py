"""What is checked of a component: that it can be decoded with others, was loaded as a whole, and opens when saved."""

import copy
import re
from collections.abc import Collection, Mapping

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .compat import CACHE_NAME, cache_name_of, without_peft
from .component_traits import why_not_decoded
from .configuration_mixture import MixturePolicyConfig
from .mixture_inputs import forward_parameters


# The loading argument that accepts weights which are missing or not used.
ALLOW_UNMATCHED = "allow_unmatched_weights"
# What older versions of Transformers saved and newer ones compute, where the models do not declare it themselves.
_CONSTANTS = re.compile(r"(masked_bias|inv_freq|position_ids)$")


def check_decoder(model: nn.Module, name: str) -> None:
    """Refuses models that cannot be decoded together with others over one cache."""
    parameters = forward_parameters(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"The component {name} is an encoder-decoder; only causal language models can be mixed.")
    if model.config.model_type == MixturePolicyConfig.model_type:
        raise ValueError(f"The component {name} is itself a mixture. Mix its components instead.")
    base = without_peft(model)
    if not base.can_generate():
        raise ValueError(f"The component {name} ({type(base).__name__}) is not a causal language model.")
    if cache_name_of(parameters) is None or not base._supports_default_dynamic_cache():
        raise ValueError(
            f"The component {name} ({type(base).__name__}) keeps its state in a cache of its own instead of a "
            f"`DynamicCache` that its `forward` takes as `{CACHE_NAME}`, and cannot be mixed."
            + (" Mamba can, from Transformers 5.24 on." if "cache_params" in parameters else "")
        )
    if reason := why_not_decoded(base):
        raise ValueError(f"The component {name} ({type(base).__name__}) cannot be mixed: it {reason}.")


def check_all_loaded(subject: str, info: Mapping[str, Collection], allow_unmatched: bool, way_out: str) -> None:
    """
    Refuses weights that the file lacks or has in another shape, which would be random, and those that go nowhere.

    Args:
        subject (`str`): how an error calls the checkpoint or adapter.
        info (`Mapping`): `missing_keys`, `unexpected_keys` and `mismatched_keys`, as Transformers reports them.
        allow_unmatched (`bool`): whether to accept them.
        way_out (`str`): what to do about it.
    """
    if allow_unmatched:
        return
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info.get("mismatched_keys", ()))})
    unused = sorted(key for key in info["unexpected_keys"] if not _CONSTANTS.search(key))
    found = []
    if missing:
        found.append(f"the file lacks {missing[0]!r}, or has it in another shape ({_count(missing)})")
    if unused:
        found.append(f"the model has no place for {unused[0]!r} ({_count(unused)})")
    if found:
        raise ValueError(
            f"{subject} does not fit the model that it is loaded into: {'; '.join(found)}. {way_out} To accept random and "
            f"unused weights all the same: `{ALLOW_UNMATCHED}=True`."
        )


def _count(keys: Collection[str]) -> str:
    return "1 weight" if len(keys) == 1 else f"the first of {len(keys)} weights"


def check_can_be_opened(models: Mapping[str, PreTrainedModel]) -> None:
    """Refuses to save models, by their labels, of which the config alone would make other ones, or none."""
    for label, model in models.items():
        subject = f"The component {label!r} ({type(model).__name__}) cannot be saved with the mixture"
        try:
            with torch.device("meta"):  # without memory for weights
                opened = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
        except Exception as err:
            reason = str(err).partition("\n")[0]  # the rest lists all architectures there are
            raise ValueError(
                f"{subject}: `AutoModelForCausalLM` cannot open it again, so that it is mixed in memory only. {reason}"
            ) from err
        own, found = (
            {key: getattr(value, "shape", None) for key, value in m.state_dict().items()} for m in (model, opened)
        )
        apart = sorted(key for key in own.keys() | found.keys() if own.get(key) != found.get(key))
        if type(opened) is not type(model) or apart:
            difference = f", in which {apart[0]!r} differs" if apart else ""
            raise ValueError(
                f"{subject}: its config would open as a {type(opened).__name__}{difference}. Save it by itself, and mix it by "
                "its folder or repo id; if it carries adapters, by those of the adapters."
            )
