"""Configuration of a mixture of policies: its components, their weights, and the reference policy."""

import copy
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging

from .compat import layer_types_of, sharing_modes_of
from .config_schema import (
    FORMAT,
    MAX_COMPONENTS,
    MODEL_TYPE,
    TRANSFORMERS_FIELDS,
    blame,
    check_fields,
    check_format,
    check_language_model,
    check_part,
    is_integer,
    reason_of,
    shown,
)
from .mixture_component import MixtureComponent
from .mixture_weights import check_mixture_weights, prune_mixture_weights


logger = logging.get_logger(__name__)

__all__ = ["COMPUTED_FIELDS", "MixtureComponent", "MixturePolicyConfig", "prune_mixture_weights"]

# The fields of a mixture that are computed from its components.
COMPUTED_FIELDS = (
    "num_hidden_layers",
    "layer_types",
    "kv_sharing_modes",
    "per_layer_config",
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "labels",
    "decoder_configs",
)
PART_NAME = re.compile(r"component_\d+")


class _ComponentSubConfigs:
    """
    `sub_configs` of a mixture's config: `component_k` for an instance, nothing for the class, which has no components.

    Components that share a model share its config, and form one part under the name of the first of them.
    """

    def __get__(self, config: "MixturePolicyConfig | None", owner: type | None = None) -> dict[str, type]:
        parts = [] if config is None else config.__dict__.get("component_configs", [])
        first = {id(part): k for k, part in reversed(list(enumerate(parts)))}
        return {f"component_{k}": type(parts[k]) for k in sorted(first.values())}


class MixturePolicyConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MixturePolicyModel`]: a log-linear mixture \\(\pi(y|x) \propto \prod_k \pi_k(y|x)^{\lambda_k}\\)
    of causal language models.

    For `generate()` and its caches it describes one decoder with the layers of all components, one after another:
    `num_hidden_layers`, `layer_types`, `kv_sharing_modes` and `per_layer_config` are computed from the components.

    Args:
        components (`list[dict]` or `list[MixtureComponent]`, *optional*):
            The components in order; see [`MixtureComponent`] for the keys.
        mixture_weights (`list[float]`, *optional*):
            The mixture weights λ. Defaults to uniform weights.
        reference (`dict` or `MixtureComponent`, *optional*):
            The reference policy that the components were aligned from. It is not part of the mixture, and is loaded
            when it is first used.
        component_configs (`list[PreTrainedConfig]` or `list[dict]`, *optional*):
            The configurations of the components themselves. Filled in when components are loaded.
        vocab_size (`int`, *optional*):
            Number of token ids that all components have in common. Defaults to the smallest vocabulary.
        allow_off_simplex (`bool`, *optional*, defaults to `False`):
            Whether weights may be negative or sum to something other than 1.
        plausibility (`float`, *optional*, defaults to 0.0):
            Excludes tokens whose probability under the first component is less than this fraction of that of its most
            likely token; see [`MixturePolicyModel.from_contrast`]. 0 excludes none.
        mixture_format (`int`, *optional*):
            The format of the config, written when it is saved. Configs of later formats are refused.
        kwargs:
            Fields that Transformers, or a library that trains its models, keeps in any config; see
            [`~transformers.PreTrainedConfig`].

    Raises:
        `ValueError`: for invalid weights, components or vocabulary sizes, for a field that is not known, and for a value
            of another type.

    Example:

    ```python
    >>> from mpo_hf import MixturePolicyConfig

    >>> config = MixturePolicyConfig(
    ...     components=[
    ...         {"label": "helpful", "name_or_path": "org/sft", "adapter": "org/helpful-lora"},
    ...         {"label": "harmless", "name_or_path": "org/harmless", "revision": "v1.0"},
    ...     ],
    ...     mixture_weights=[0.25, 0.75],
    ...     reference={"name_or_path": "org/sft"},
    ... )
    >>> config.labels
    ['helpful', 'harmless']
    ```
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
    ]  # both names, as `Trainer` looks for the one of its version
    sub_configs = _ComponentSubConfigs()

    def __init__(
        self,
        components: list[dict | MixtureComponent] | None = None,
        mixture_weights: Sequence[float] | None = None,
        reference: dict | MixtureComponent | None = None,
        component_configs: list[PreTrainedConfig | dict] | None = None,
        vocab_size: int | None = None,
        allow_off_simplex: bool = False,
        plausibility: float = 0.0,
        mixture_format: int = FORMAT,
        **kwargs,
    ):
        check_format(mixture_format)
        if kwargs.pop("model_type", self.model_type) != self.model_type:
            raise ValueError(f"The `model_type` of a mixture is {self.model_type!r}.")
        if given := [name for name in COMPUTED_FIELDS if kwargs.pop(name, None) is not None]:
            raise ValueError(f"{given} of a mixture follow from its components, and cannot be set.")
        kwargs = check_fields(kwargs, OWN_FIELDS)
        self.component_configs = [] if component_configs is None else component_configs
        parts = self.component_configs
        self.components = [{} for _ in parts] if components is None else components
        if parts and len(parts) != len(self.components):
            raise ValueError(f"Got {len(parts)} `component_configs` for {len(self.components)} `components`.")
        self.reference = reference
        self.allow_off_simplex = allow_off_simplex
        self.plausibility = plausibility
        self.mixture_weights = mixture_weights
        self.vocab_size = self._smallest("vocab_size") if vocab_size is None else vocab_size
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, self._first_of(name))
        kwargs.setdefault("tie_word_embeddings", False)
        self.use_cache = kwargs.pop("use_cache", True)
        backends = {name: kwargs.get(name) for name in ("attn_implementation", "experts_implementation")}
        for name, value in backends.items():
            # None would override what the components have; an empty mapping for each leaves it, and that of their parts
            backends[name] = kwargs[name] = dict.fromkeys(self.sub_configs, {}) if value is None else value
        # Transformers would go through the layers of all components several times
        self.component_configs = []
        super().__init__(**kwargs)
        self.component_configs = parts
        for name, value in backends.items():
            setattr(self, f"_{name}", value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "MixturePolicyConfig":
        # PreTrainedConfig assigns overrides one by one, to whatever attribute has their name. Here they pass the same
        # checks as the fields that they override.
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if cls._is_field(name)}
        overrides = {
            name: value for name, value in overrides.items() if value is not None or name.endswith("_token_id")
        }
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    @classmethod
    def _is_field(cls, name: str) -> bool:
        """Whether an argument of `from_pretrained` concerns this config, and not how files are read."""
        if name in ("dtype", "torch_dtype", "max_position_embeddings"):  # have a meaning of their own there
            return False
        if name.startswith("_"):
            return name not in ("_from_auto", "_from_pipeline", "_commit_hash")
        return name in (*OWN_FIELDS, *TRANSFORMERS_FIELDS) or hasattr(cls, name) or bool(PART_NAME.fullmatch(name))

    def __setattr__(self, name: str, value: Any) -> None:
        # whoever assigns a field: the constructor, `update`, an override or a user
        check = _CHECKS.get(name)
        super().__setattr__(name, value if check is None else check(self, value))

    @property
    def mixture_weights(self) -> list[float]:
        """The mixture weights λ, one a component. Assigning checks them."""
        return list(self._mixture_weights)

    @mixture_weights.setter
    def mixture_weights(self, weights: Sequence[float] | torch.Tensor | None) -> None:
        count = len(self.components)
        if weights is None:
            weights = [1 / max(count, 1)] * count
        # Transformers compares every config with one built without arguments, which has neither components nor weights
        empty = not count and isinstance(weights, list) and not weights
        try:
            checked = torch.empty(0) if empty else check_mixture_weights(weights, count, self.allow_off_simplex)
        except ValueError as err:
            raise ValueError(f"`mixture_weights`: {err}") from err
        if checked.ndim != 1:
            raise ValueError(f"`mixture_weights` of a config are one weight a component, got {shown(weights)}.")
        self._mixture_weights = checked.tolist()

    def __getattr__(self, name: str) -> PreTrainedConfig:
        prefix, _, k = name.partition("_")
        parts = self.__dict__.get("component_configs", [])
        if prefix == "component" and k.isdecimal() and int(k) < len(parts):
            return parts[int(k)]
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        if name == "auto_map":  # TRL reads it when a trainer is given the name of a model of an unknown type
            message += (
                ". This mixture came without code, and cannot be trained. A trainer that takes it as reference or teacher "
                "needs the model, not its name: open it by `AutoModelForCausalLM.from_pretrained`."
            )
        raise AttributeError(message)

    def _first_of(self, name: str) -> Any:
        return next((v for c in self.decoder_configs if (v := getattr(c, name, None)) is not None), None)

    def _smallest(self, name: str) -> int | None:
        values = (getattr(config, name, None) for config in self.decoder_configs)
        return min(
            (value for value in values if isinstance(value, int) or value and math.isfinite(value)), default=None
        )

    def _largest(self, name: str) -> int | None:
        values = (getattr(config, name, None) for config in self.decoder_configs)
        return max((value for value in values if value is not None), default=None)

    @property
    def labels(self) -> list[str]:
        """Unique names of the components: their labels, or `policy_k` for a component without one."""
        labels: dict[str, None] = {}
        for k, component in enumerate(self.components):
            label = component.label or f"policy_{k}"
            while label in labels:
                label = f"{label}_{k}"
            labels[label] = None
        return list(labels)

    @property
    def decoder_configs(self) -> list[PreTrainedConfig]:
        """The part of each component's configuration that describes its text decoder."""
        return [config.get_text_config(decoder=True) for config in self.component_configs]

    # The fields below describe the mixture as one decoder; see `COMPUTED_FIELDS`.

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def layer_types(self) -> list[str]:
        return [layer_type for config in self.decoder_configs for layer_type in layer_types_of(config)]

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        return [mode for config in self.decoder_configs for mode in sharing_modes_of(config)]

    @property
    def per_layer_config(self) -> list[PreTrainedConfig]:
        return [
            layer
            for config in self.decoder_configs
            for layer in list(config.per_layer_config)[: len(layer_types_of(config))]
        ]

    @per_layer_config.setter
    def per_layer_config(self, value: Any) -> None:
        if value is not None:
            raise ValueError("The layers of a mixture are those of its components; change the components instead.")

    @property
    def hidden_size(self) -> int | None:
        return self._largest("hidden_size")

    @property
    def num_attention_heads(self) -> int | None:
        return self._largest("num_attention_heads")

    @property
    def max_position_embeddings(self) -> int | None:
        """The shortest context length of the components that have one. Assigning sets it for all of these."""
        return self._smallest("max_position_embeddings")

    @max_position_embeddings.setter
    def max_position_embeddings(self, length: int) -> None:
        if not is_integer(length, 1):
            raise ValueError(f"`max_position_embeddings` must be a positive integer, got {shown(length)}.")
        for config in self.decoder_configs:
            if getattr(config, "max_position_embeddings", None) is not None:
                config.max_position_embeddings = length

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output = {name: value for name, value in output.items() if name in _SAVED}
        output["mixture_format"] = FORMAT
        output["mixture_weights"] = self.mixture_weights
        output["components"] = [component.to_dict() for component in self.components]
        output["reference"] = self.reference.to_dict() if self.reference is not None else None
        output["component_configs"] = [_slim_dict(config) for config in self._readable_configs()]
        return output

    def _readable_configs(self) -> list[PreTrainedConfig]:
        """The configs of the components, unless one needs code that comes with its component: all are read there then."""
        known = all(config.model_type in CONFIG_MAPPING for config in self.component_configs)
        in_memory = any(component.name_or_path is None for component in self.components)
        return self.component_configs if known or in_memory else []

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        if unknown := [name for name in vars(self) if name not in _SAVED and not name.startswith("_")]:
            logger.warning(f"{unknown} are no fields of a mixture's config, and are not saved.")
        super().save_pretrained(save_directory, push_to_hub, **kwargs)


def _to_components(config: MixturePolicyConfig, components: Any) -> list[MixtureComponent]:
    if not isinstance(components, list | tuple):
        raise ValueError(f"`components` must be a list of dictionaries, got {shown(components)}.")
    if len(components) > MAX_COMPONENTS:
        raise ValueError(f"`components` lists {len(components)} policies; a mixture has at most {MAX_COMPONENTS}.")
    return [_to_component(f"components[{k}]", component) for k, component in enumerate(components)]


def _to_component(name: str, spec: Any) -> MixtureComponent:
    try:
        return MixtureComponent.from_dict(spec)
    except ValueError as err:
        raise ValueError(f"`{name}`: {err}") from err


def _to_reference(config: MixturePolicyConfig, spec: Any) -> MixtureComponent | None:
    reference = None if spec is None else _to_component("reference", spec)
    if reference is not None and reference.name_or_path is None:
        raise ValueError(f"The reference must say where it lives (`name_or_path`), got {shown(spec)}.")
    return reference


def _to_configs(config: MixturePolicyConfig, entries: Any) -> list[PreTrainedConfig]:
    if not isinstance(entries, list | tuple):
        raise ValueError(f"`component_configs` must be a list, one a component, got {shown(entries)}.")
    if len(entries) > MAX_COMPONENTS:
        raise ValueError(
            f"`component_configs` has {len(entries)} entries; a mixture has at most {MAX_COMPONENTS} components."
        )
    return [_to_config(f"component_configs[{k}]", entry) for k, entry in enumerate(entries)]


def _to_config(name: str, entry: Any) -> PreTrainedConfig:
    try:
        config = entry if isinstance(entry, PreTrainedConfig) else _build(entry)
        check_language_model(config)
    except Exception as err:  # each architecture validates its fields in its own way
        kind = entry.get("model_type") if isinstance(entry, dict) else getattr(entry, "model_type", entry)
        raise ValueError(f"`{name}` ({shown(kind)}) does not describe a language model. {err}") from err
    return config


def _build(entry: Any) -> PreTrainedConfig:
    check_part(entry)
    try:
        return AutoConfig.for_model(**copy.deepcopy(entry))
    except Exception as err:
        raise ValueError(f"{blame(entry)}{reason_of(err)}") from err


def _to_vocab_size(config: MixturePolicyConfig, value: Any) -> int | None:
    if value is None:
        return None
    if not is_integer(value, 1):
        raise ValueError(f"`vocab_size` must be a positive integer, got {shown(value)}.")
    if value > (smallest := config._smallest("vocab_size") or value):
        raise ValueError(f"`vocab_size={value}` is more than the {smallest} token ids of a component.")
    return value


def _to_plausibility(config: MixturePolicyConfig, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"`plausibility` must be a number from 0 up to, but not including, 1, got {shown(value)}.")
    return float(value)


def _to_off_simplex(config: MixturePolicyConfig, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"`allow_off_simplex` must be true or false, got {shown(value)}.")
    if not value and (weights := config.__dict__.get("_mixture_weights")):
        check_mixture_weights(weights, len(weights))
    return value


# What an assignment goes through: a function that returns the value to keep, or refuses it.
_CHECKS = {
    "components": _to_components,
    "component_configs": _to_configs,
    "reference": _to_reference,
    "vocab_size": _to_vocab_size,
    "plausibility": _to_plausibility,
    "allow_off_simplex": _to_off_simplex,
}
OWN_FIELDS = (*_CHECKS, "mixture_weights", "mixture_format")
_SAVED = {*OWN_FIELDS, *TRANSFORMERS_FIELDS, "_name_or_path", "model_type"}


def _slim_dict(config: PreTrainedConfig) -> dict[str, Any]:
    slim = config.to_diff_dict()
    slim.pop("transformers_version", None)
    return slim
