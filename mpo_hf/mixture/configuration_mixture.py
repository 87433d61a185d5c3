"""Configuration of a mixture of policies: its components, their weights, and the reference policy."""

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from .compat import layer_types_of, sharing_modes_of
from .hub_files import Location
from .mixture_weights import check_mixture_weights, prune_mixture_weights


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


@dataclass
class MixtureComponent:
    """
    Where one policy of a mixture is stored.

    Args:
        name_or_path (`str`, *optional*):
            Repo id or folder of a causal language model; with an `adapter`, of the adapter's base. In a saved config, a
            path that starts with `./` or `../`, or that exists in the folder of the config, is relative to that
            folder. `None` for a model that was given in memory.
        revision (`str`, *optional*):
            Branch, tag or commit of `name_or_path`.
        subfolder (`str`, *optional*):
            Folder inside `name_or_path`.
        variant (`str`, *optional*):
            Variant of the weight files, such as `"fp16"`.
        dtype (`str`, *optional*):
            dtype to load this component in, such as `"bfloat16"`.
        gguf_file (`str`, *optional*):
            GGUF file inside `name_or_path` to load the model from.
        adapter (`str`, *optional*):
            Repo id or folder of a PEFT adapter over `name_or_path`.
        adapter_revision (`str`, *optional*):
            Branch, tag or commit of `adapter`; independent of `revision`.
        adapter_subfolder (`str`, *optional*):
            Folder inside `adapter`.
        label (`str`, *optional*):
            Name of the objective that this policy is aligned to.
    """

    name_or_path: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    dtype: str | None = None
    gguf_file: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    adapter_subfolder: str | None = None
    label: str | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, os.PathLike):
                setattr(self, field.name, os.fspath(value))
            elif isinstance(value, torch.dtype):
                setattr(self, field.name, str(value).removeprefix("torch."))
            elif value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"`{field.name}` of a component must be a non-empty string, got {value!r}.")
        if (
            self.dtype is not None
            and self.dtype != "auto"
            and not isinstance(getattr(torch, self.dtype, None), torch.dtype)
        ):
            raise ValueError(
                f"`dtype` of a component must name a torch dtype, such as 'bfloat16', got {self.dtype!r}."
            )
        if self.adapter is None and (self.adapter_revision or self.adapter_subfolder):
            raise ValueError("`adapter_revision` and `adapter_subfolder` need an `adapter`.")

    @classmethod
    def from_dict(cls, spec: "dict[str, Any] | MixtureComponent") -> "MixtureComponent":
        """Builds a component from a dictionary. Unknown keys are an error."""
        if isinstance(spec, cls):
            return replace(spec)
        if is_dataclass(spec) and type(spec).__name__ == cls.__name__:
            spec = asdict(spec)  # an instance of another copy of this class, which came with the code of a mixture
        known = [field.name for field in fields(cls)]
        if not isinstance(spec, dict) or (unknown := sorted(set(spec) - set(known))):
            what = f"the unknown keys {unknown}" if isinstance(spec, dict) else repr(spec)
            raise ValueError(f"A component is described by a dictionary with the keys {known}, got {what}.")
        return cls(**spec)

    def to_dict(self) -> dict[str, str]:
        """The component as a dictionary, without the fields that are not set."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def checkpoint(self) -> tuple[str | None, ...]:
        """
        The fields that determine which weights are loaded, adapters aside: components that agree in them share a
        model.
        """
        return (self.name_or_path, self.revision, self.subfolder, self.variant, self.dtype, self.gguf_file)

    @property
    def location(self) -> Location | None:
        """Where the model is stored, or the base of an adapter; `None` for a model that was given in memory."""
        if self.name_or_path is None:
            return None
        return Location(self.name_or_path, self.revision, self.subfolder, self.gguf_file)

    @property
    def adapter_location(self) -> Location | None:
        """Where the adapter is stored; `None` without one."""
        if self.adapter is None:
            return None
        return Location(self.adapter, self.adapter_revision, self.adapter_subfolder)

    @property
    def source(self) -> str:
        """The adapter or model of the component, for messages."""
        return self.adapter or self.name_or_path or "a model in memory"


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
        kwargs:
            Passed on to [`~transformers.PreTrainedConfig`].

    Raises:
        `ValueError`: for invalid weights, components or vocabulary sizes.

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

    model_type = "mpo_mixture"
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
        **kwargs,
    ):
        if component_configs is not None and not isinstance(component_configs, list | tuple):
            raise ValueError(f"`component_configs` must be a list, one a component, got {component_configs!r}.")
        self.component_configs = [_to_config(config) for config in component_configs or []]
        if components is None:
            components = [{} for _ in self.component_configs]
        elif not isinstance(components, list | tuple):
            raise ValueError(f"`components` must be a list of dictionaries, got {components!r}.")
        self.components = [MixtureComponent.from_dict(component) for component in components]
        if self.component_configs and len(self.component_configs) != len(self.components):
            raise ValueError(
                f"Got {len(self.component_configs)} `component_configs` for {len(self.components)} `components`."
            )
        self.reference = None if reference is None else MixtureComponent.from_dict(reference)
        if self.reference is not None and self.reference.name_or_path is None:
            raise ValueError(f"The reference must say where it lives (`name_or_path`), got {reference!r}.")
        if not isinstance(allow_off_simplex, bool):
            raise ValueError(f"`allow_off_simplex` must be true or false, got {allow_off_simplex!r}.")
        self.allow_off_simplex = allow_off_simplex
        self.plausibility = plausibility
        self.mixture_weights = mixture_weights
        smallest = min((config.vocab_size for config in self.decoder_configs), default=None)
        if vocab_size is None:
            vocab_size = smallest
        elif type(vocab_size) is not int or vocab_size < 1:
            raise ValueError(f"`vocab_size` must be a positive integer, got {vocab_size!r}.")
        elif smallest is not None and vocab_size > smallest:
            raise ValueError(f"`vocab_size={vocab_size}` is more than the {smallest} token ids of a component.")
        self.vocab_size = vocab_size
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, self._first_of(name))
        kwargs.setdefault("tie_word_embeddings", False)
        self.use_cache = kwargs.pop("use_cache", True)
        if given := [name for name in COMPUTED_FIELDS if kwargs.pop(name, None) is not None]:
            raise ValueError(f"{given} of a mixture follow from its components, and cannot be set.")
        for name in ("attn_implementation", "experts_implementation"):
            # None would override what the components have; an empty mapping for each leaves it, and that of their parts
            kwargs[name] = dict.fromkeys(self.sub_configs, {}) if kwargs.get(name) is None else kwargs[name]
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "MixturePolicyConfig":
        # PreTrainedConfig assigns overrides one by one, and would check weights before `allow_off_simplex` is set
        names = ("mixture_weights", "allow_off_simplex")
        overrides = {name: value for name in names if (value := kwargs.pop(name, None)) is not None}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    @property
    def plausibility(self) -> float:
        """Tokens below this fraction of the first component's highest probability are excluded."""
        return self._plausibility

    @plausibility.setter
    def plausibility(self, value: float) -> None:
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"`plausibility` must be a number from 0 up to, but not including, 1, got {value!r}.")
        self._plausibility = float(value)

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
        checked = check_mixture_weights(weights, count, self.allow_off_simplex) if count else torch.empty(0)
        if checked.ndim != 1:
            raise ValueError(f"A config holds one weight a component, got {weights!r}.")
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

    def _largest(self, name: str) -> int | None:
        values = (getattr(config, name, None) for config in self.decoder_configs)
        return max((value for value in values if value is not None), default=None)

    @property
    def labels(self) -> list[str]:
        """Unique names of the components: their labels, or `policy_k` for a component without one."""
        labels: list[str] = []
        for k, component in enumerate(self.components):
            label = component.label or f"policy_{k}"
            labels.append(label if label not in labels else f"{label}_{k}")
        return labels

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
        lengths = [getattr(config, "max_position_embeddings", None) for config in self.decoder_configs]
        return min((length for length in lengths if length is not None and math.isfinite(length)), default=None)

    @max_position_embeddings.setter
    def max_position_embeddings(self, length: int) -> None:
        for config in self.decoder_configs:
            if getattr(config, "max_position_embeddings", None) is not None:
                config.max_position_embeddings = length

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["mixture_weights"] = output.pop("_mixture_weights")
        output["plausibility"] = output.pop("_plausibility")
        output["components"] = [component.to_dict() for component in self.components]
        output["reference"] = self.reference.to_dict() if self.reference is not None else None
        output["component_configs"] = [_slim_dict(config) for config in self.component_configs]
        return output


def _to_config(config: PreTrainedConfig | dict) -> PreTrainedConfig:
    given = config
    if not isinstance(config, PreTrainedConfig):
        if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
            raise ValueError(f"Every entry of `component_configs` needs a `model_type`, got {config!r}.")
        config = copy.deepcopy(config)
        try:
            config = AutoConfig.for_model(config.pop("model_type"), **config)
        except Exception as err:  # each architecture validates its fields in its own way
            raise ValueError(
                f"The entry {given!r} of `component_configs` is not a valid configuration: {err}"
            ) from err
    decoder = config.get_text_config(decoder=True)
    for name in ("vocab_size", "num_hidden_layers"):
        if not isinstance(value := getattr(decoder, name, None), int) or value < 1:
            entry = type(given).__name__ if isinstance(given, PreTrainedConfig) else repr(given)
            raise ValueError(
                f"The entry {entry} of `component_configs` does not describe a language model: `{name}` is {value!r}."
            )
    return config


def _slim_dict(config: PreTrainedConfig) -> dict[str, Any]:
    slim = config.to_diff_dict()
    slim.pop("transformers_version", None)
    return slim
