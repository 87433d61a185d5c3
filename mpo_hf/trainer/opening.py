"""What a trainer is given, opened and checked: policies, tokenizer, prompts, the names of the objectives."""

import os
from collections.abc import Sequence

from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..mixture.component_loading import Policy, hub_kwargs
from ..mixture.configuration_mixture import MixturePolicyConfig
from ..mixture.modeling_mixture import MixturePolicyModel
from .mpo_config import MPOConfig


def check_prompts(name: str, dataset: Dataset | IterableDataset | None, required: bool = True) -> None:
    if dataset is None:
        if required:
            raise ValueError(f"`{name}` is needed: prompts, in TRL's prompt-only format.")
        return
    if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    columns = getattr(dataset, "column_names", None) or list(next(iter(dataset)))
    if "prompt" not in columns:
        raise ValueError(f"`{name}` needs a column 'prompt', it has {columns}.")


def open_policies(
    model: MixturePolicyModel | str | Sequence[Policy], ref_model: Policy | None, args: MPOConfig
) -> tuple[MixturePolicyModel, MixturePolicyModel | None]:
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


def open_tokenizer(model: MixturePolicyModel, args: MPOConfig) -> PreTrainedTokenizerBase:
    component = model.config.components[0]
    location = {
        name: value
        for name in ("revision", "subfolder", "gguf_file")
        if (value := getattr(component, name)) is not None
    }
    for source, kwargs in ((model.name_or_path, {}), (component.name_or_path, location)):
        if source:
            try:
                return AutoTokenizer.from_pretrained(source, **kwargs, **hub_kwargs(model._load_kwargs))
            except (OSError, ValueError):
                continue
    raise ValueError("The policies come without a tokenizer. Pass it as `processing_class`.")


def objective_names(config: MixturePolicyConfig, reward_names: list[str]) -> list[str]:
    """Labels of the policies, where they have one; otherwise names of the rewards, otherwise `policy_k`."""
    if not reward_names or all(component.label for component in config.components):
        return config.labels
    return [component.label or name for component, name in zip(config.components, reward_names)]
