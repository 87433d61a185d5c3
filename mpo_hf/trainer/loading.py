"""The mixture and the reference policy of a trainer, and the names of its objectives."""

import os
from collections.abc import Sequence

from transformers import PreTrainedModel

from ..mixture.component_loading import Policy
from ..mixture.configuration_mixture import MixturePolicyConfig
from ..mixture.modeling_mixture import MixturePolicyModel
from .mpo_config import MPOConfig


def load_policies(
    model: MixturePolicyModel | str | Sequence[Policy], ref_model: Policy | None, args: MPOConfig
) -> tuple[MixturePolicyModel, MixturePolicyModel | None]:
    """The mixture of the policies that a trainer is given, and its reference policy."""
    kwargs = args.model_init_kwargs or {}
    if isinstance(model, str | os.PathLike):
        model = MixturePolicyModel.from_pretrained(model, **kwargs)
    elif not isinstance(model, PreTrainedModel):
        model, ref_model = MixturePolicyModel.from_policies(model, reference=ref_model, **kwargs), None
    if getattr(model.config, "model_type", None) != MixturePolicyConfig.model_type:
        raise ValueError(f"`model` must be a mixture or a list of policies, got a {type(model).__name__}.")
    if ref_model is not None:
        return model, MixturePolicyModel.from_policies([ref_model], vocab_size=model.config.vocab_size)
    return model, model.reference_policy


def objective_names(config: MixturePolicyConfig, reward_names: list[str]) -> list[str]:
    """Names of the objectives: the labels of the policies, else the names of the rewards, else `policy_k`."""
    if not reward_names or all(component.label for component in config.components):
        return config.labels
    return [component.label or name for component, name in zip(config.components, reward_names)]
