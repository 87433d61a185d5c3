"""Building a mixture from policies, and loading a saved one: all components are checked before any is loaded."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from .adapter_loading import active_adapter_of
from .component_checks import check_decoder
from .component_errors import errors_named
from .component_loading import (
    ComponentLoader,
    Policy,
    PolicyHandle,
    as_component,
    compare_vocabularies,
)
from .component_paths import resolve_relative
from .configuration_mixture import MixtureComponent, MixturePolicyConfig
from .hub_files import Location, file_kwargs, hub_kwargs
from .mixture_generation import why_endless
from .mixture_weights import check_mixture_weights


logger = logging.get_logger(__name__)


@dataclass
class _Inner:
    """What a mixture that is flattened into its components says beside them."""

    vocab_size: int | None
    plausibility: float
    generation_config: GenerationConfig | None
    reference: tuple[MixtureComponent, PolicyHandle | None] | None


@dataclass
class _Entry:
    """
    A future component of a mixture: in memory already (`handle`), or described by its `component` only; from an `inner`
    mixture or not.
    """

    component: MixtureComponent
    config: PreTrainedConfig
    weight: float = 1.0
    handle: PolicyHandle | None = None
    inner: _Inner | None = None


def build_mixture(
    cls,
    policies: Sequence[Policy],
    weights: Sequence[float] | torch.Tensor | None,
    reference: Policy | None,
    labels: Sequence[str] | None,
    vocab_size: int | None,
    allow_off_simplex: bool,
    plausibility: float,
    load_kwargs: dict[str, Any],
):
    """See [`MixturePolicyModel.from_policies`]."""
    if isinstance(policies, str | os.PathLike | dict | nn.Module) or not len(policies):
        raise ValueError(f"`policies` must be a list of at least one policy, got {policies!r}.")
    if weights is None:
        weights = [1 / len(policies)] * len(policies)
    checked = check_mixture_weights(weights, len(policies), allow_off_simplex)
    if checked.ndim != 1:
        raise ValueError(f"A mixture has one weight a policy, got shape {tuple(checked.shape)}.")
    if labels is not None and len(labels) != len(policies):
        raise ValueError(f"Got {len(labels)} labels for {len(policies)} policies.")

    loader = ComponentLoader(load_kwargs)
    entries: list[_Entry] = []
    groups = []
    for i, (policy, weight) in enumerate(zip(policies, checked.tolist())):
        expanded = _expand(cls, policy, loader)
        for entry in expanded:
            entry.weight *= weight
        if labels is not None and len(expanded) == 1:
            expanded[0].component = replace(expanded[0].component, label=labels[i])
        entries.extend(expanded)
        groups.append(expanded)

    plausibility = _check_plausibility(groups, plausibility)
    reference_entry = _describe_reference(cls, reference, entries, loader)
    config = MixturePolicyConfig(
        components=[entry.component for entry in entries],
        mixture_weights=[entry.weight for entry in entries],
        reference=None if reference_entry is None or _is_in_memory(reference_entry) else reference_entry.component,
        component_configs=[entry.config for entry in entries],
        vocab_size=_check_vocabulary(loader, entries, reference_entry, vocab_size),
        allow_off_simplex=allow_off_simplex,
        plausibility=plausibility,
    )
    model = _assemble(cls, config, entries, loader, reference_entry and reference_entry.handle)
    generation_config = entries[0].inner and entries[0].inner.generation_config
    if generation_config is not None:
        alone = len(groups) == 1
        generation_config = copy.deepcopy(generation_config) if alone else without_weights(generation_config)
    _set_generation_config(model, generation_config)
    return model


def _set_generation_config(model, generation_config: GenerationConfig | None) -> None:
    """Gives a mixture its own generation config, if there is one, and warns of one by which no text would end."""
    if generation_config is not None:
        model.generation_config = generation_config
    if reason := why_endless(model.generation_config, model.config):
        logger.warning(reason)


def without_weights(config: GenerationConfig) -> GenerationConfig:
    """A copy of a mixture's generation config without what is about its own weights, for other components."""
    config = copy.deepcopy(config)
    for name in ("mixture_weights", "prune_below"):
        config.__dict__.pop(name, None)
    return config


def _check_plausibility(groups: Sequence[Sequence[_Entry]], plausibility: float) -> float:
    """The plausibility of a mixture of policies, each with its components: it is judged by the first component."""
    inner = [group[0].inner.plausibility if group[0].inner is not None else 0.0 for group in groups]
    if behind := [i for i, value in enumerate(inner) if value and i]:
        raise ValueError(
            f"The policy {behind[0]} is a mixture with `plausibility={inner[behind[0]]}`, which the first component of a mixture "
            "judges. Put this policy first, one such mixture at most, or set its `config.plausibility = 0` if you mean to mix it "
            "without."
        )
    if plausibility and (inner[0] or len(groups[0]) > 1):
        raise ValueError(
            f"`plausibility={plausibility}` is judged by one policy, but the first one here is a mixture of {len(groups[0])} "
            f"with `plausibility={inner[0]}`. Pass a single policy, or `plausibility=0`."
        )
    return plausibility or inner[0]


def _is_in_memory(entry: _Entry) -> bool:
    return entry.handle is not None and entry.component.name_or_path is None


def read_mixture_config(
    folder: str, config: PreTrainedConfig | str | None, kwargs: dict[str, Any]
) -> MixturePolicyConfig:
    """Reads and checks the config of a saved mixture. Arguments that override its fields are removed from `kwargs`."""
    if not isinstance(config, PreTrainedConfig):
        names = ("mixture_weights", "allow_off_simplex")
        overrides = {name: kwargs.pop(name) for name in names if name in kwargs}
        location = {name: kwargs[name] for name in ("revision", "subfolder") if name in kwargs}
        fields, _ = MixturePolicyConfig.get_config_dict(config or folder, **location, **hub_kwargs(kwargs))
        _check_model_type(folder, fields.get("model_type"))
        config = MixturePolicyConfig.from_dict(fields, **overrides)
    _check_model_type(folder, config.model_type)
    if not config.components:
        raise ValueError(f"The config of {folder!r} lists no components.")
    return config


def _check_model_type(folder: str, model_type: str | None) -> None:
    if model_type != MixturePolicyConfig.model_type:
        raise ValueError(
            f"{folder!r} holds a model of type {model_type!r}, not a mixture. Open it with AutoModelForCausalLM, or mix it "
            "with others by `MixturePolicyModel.from_policies`."
        )


def load_mixture(cls, folder: str, config: MixturePolicyConfig, kwargs: dict[str, Any]):
    """Loads a saved mixture: the components that its config refers to."""
    revision, subfolder = kwargs.pop("revision", None), kwargs.pop("subfolder", None)
    generation_config = kwargs.pop("generation_config", None)
    if generation_config is None:
        generation_config = _read_generation_config(folder, revision, subfolder, kwargs)
    for name in ("attn_implementation", "experts_implementation"):  # the Auto classes put them into the config
        if (value := getattr(config, f"_{name}")) is not None:
            kwargs.setdefault(name, value)
    loader = ComponentLoader(_component_kwargs(kwargs))
    entries = []
    for label, component in zip(config.labels, config.components):
        if component.name_or_path is None:
            raise ValueError(
                f"The component {label!r} of {folder!r} does not say where it is stored (`name_or_path`)."
            )
        component = resolve_relative(component, folder, revision, subfolder)
        entries.append(_Entry(component, _read_policy_config(loader, component)))
    config = copy.deepcopy(config)
    config.components = [entry.component for entry in entries]
    if config.reference is not None:
        config.reference = resolve_relative(config.reference, folder, revision, subfolder)
    config.vocab_size = _check_vocabulary(loader, entries, None, config.vocab_size)
    model = _assemble(cls, config, entries, loader, None)
    _set_generation_config(model, generation_config)
    model.name_or_path = config.name_or_path = folder
    return model


def _component_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments for the components: those that the Auto classes add for the mixture itself are removed."""
    own = ("trust_remote_code", "code_revision", "adapter_kwargs", "_from_auto", "_commit_hash", "_from_pipeline")
    passed_on = {name: value for name, value in kwargs.items() if name not in own}
    for_components = passed_on.pop("component_kwargs", {})
    return {**passed_on, **for_components}


def _expand(cls, policy: Policy, loader: ComponentLoader) -> list[_Entry]:
    """The components of a policy: those of a mixture, or the policy itself."""
    if isinstance(policy, nn.Module):
        return _expand_module(policy, loader)
    component = as_component(policy, **hub_kwargs(loader.load_kwargs))
    config = loader.read_config(component)
    if config.model_type != MixturePolicyConfig.model_type:
        return [_Entry(component, config)]
    if component.adapter is not None:
        raise ValueError(
            f"The adapter {component.adapter!r} lies over the mixture {component.name_or_path!r}, not a model."
        )
    if any(inner.name_or_path is None for inner in config.components):
        model = cls.from_pretrained(component.name_or_path, **component.location.kwargs, **loader.load_kwargs)
        return _expand_module(model, loader)
    location = (component.name_or_path, component.revision, component.subfolder)
    generation_config = _read_generation_config(*location, dict(loader.load_kwargs))
    reference = None if config.reference is None else resolve_relative(config.reference, *location)
    inner = _Inner(config.vocab_size, config.plausibility, generation_config, reference and (reference, None))
    components = [resolve_relative(c, *location) for c in config.components]
    return [
        _Entry(c, _read_policy_config(loader, c), weight, inner=inner)
        for c, weight in zip(components, config.mixture_weights)
    ]


def _read_policy_config(loader: ComponentLoader, component: MixtureComponent) -> PreTrainedConfig:
    config = loader.read_config(component)
    if config.model_type == MixturePolicyConfig.model_type:
        raise ValueError(
            f"A component of a saved mixture is a mixture again: {component.source!r}. Mixing it by "
            "`MixturePolicyModel.from_policies` makes one mixture of all their components."
        )
    return config


def _expand_module(model: nn.Module, loader: ComponentLoader) -> list[_Entry]:
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "get_base_model"):
        raise ValueError(f"A policy in memory must be a PreTrainedModel or a PeftModel, got {type(model).__name__}.")
    if getattr(model.config, "model_type", None) == MixturePolicyConfig.model_type:
        return _expand_mixture(model, loader)
    check_decoder(model, type(model).__name__)
    adapter = active_adapter_of(model) if hasattr(model, "get_base_model") else None
    return [_Entry(MixtureComponent(), model.config, handle=PolicyHandle(loader.add(model), adapter))]


def _expand_mixture(model: nn.Module, loader: ComponentLoader) -> list[_Entry]:
    if hasattr(model, "peft_config"):
        raise ValueError(
            "An adapter lies over this mixture as a whole, and would be lost among its components. Merge it "
            "(`merge_and_unload()`), or mix the mixture without it (`unload()`)."
        )

    def add(handle: PolicyHandle) -> PolicyHandle:
        return PolicyHandle(loader.add(model.backbones[handle.backbone]), handle.adapter)

    config, handle = model.config, model._reference_handle
    reference = None
    if handle is not None or config.reference is not None:
        reference = config.reference or MixtureComponent(), handle and add(handle)
    inner = _Inner(config.vocab_size, config.plausibility, model.generation_config, reference)
    parts = zip(config.components, config.component_configs, config.mixture_weights, model.policies)
    return [_Entry(c, own, weight, add(handle), inner) for c, own, weight, handle in parts]


def _describe_reference(
    cls, reference: Policy | None, entries: Sequence[_Entry], loader: ComponentLoader
) -> _Entry | None:
    inherited = [entry.inner and entry.inner.reference for entry in entries]
    if reference is None and inherited[0] is not None and all(other == inherited[0] for other in inherited):
        component, handle = inherited[0]
        config = loader.backbones[handle.backbone].config if handle else _read_policy_config(loader, component)
        return _Entry(component, config, handle=handle, inner=entries[0].inner)
    if reference is None:
        bases = {entry.component.checkpoint for entry in entries}
        if len(bases) > 1 or any(entry.component.adapter is None for entry in entries):
            return None
        base = replace(entries[0].component, adapter=None, adapter_revision=None, adapter_subfolder=None, label=None)
        return _Entry(base, entries[0].config)
    expanded = _expand(cls, reference, loader)
    if len(expanded) != 1:
        raise ValueError("The reference must be one policy, not a mixture of several.")
    return expanded[0]


def _check_vocabulary(
    loader: ComponentLoader, entries: Sequence[_Entry], reference: _Entry | None, vocab_size: int | None
) -> int:
    every = [*entries, reference] if reference is not None else list(entries)
    names = [entry.component.label or entry.component.source for entry in every]
    sizes = [entry.config.get_text_config(decoder=True).vocab_size for entry in every]
    # an inner mixture may have been told that fewer ids are common
    sizes = [min(size, entry.inner and entry.inner.vocab_size or size) for size, entry in zip(sizes, every)]
    return compare_vocabularies(loader, [entry.component for entry in every], names, sizes, vocab_size)


def _assemble(
    cls,
    config: MixturePolicyConfig,
    entries: Sequence[_Entry],
    loader: ComponentLoader,
    reference: PolicyHandle | None,
):
    loader.assign([entry.component for entry in entries], config.reference)
    handles = [entry.handle or loader.load(entry.component) for entry in entries]
    # a loaded config has more than the saved one, such as the dtype and the attention implementation
    config.component_configs = [loader.backbones[handle.backbone].config for handle in handles]
    config.dtype = loader.backbones[handles[0].backbone].dtype
    attention = {component._attn_implementation for component in config.component_configs}
    if len(attention) == 1:
        # of the mixture only: that of the components, and of their parts, stays
        config._attn_implementation = {"": attention.pop(), **dict.fromkeys(config.sub_configs, {})}
    model = cls(config, loader.backbones, handles, reference, loader.load_kwargs)
    first = loader.backbones[handles[0].backbone]
    model.generation_config = copy.deepcopy(first.generation_config)
    return model.eval()


def _read_generation_config(
    folder: str, revision: str | None, subfolder: str | None, kwargs: dict[str, Any]
) -> GenerationConfig | None:
    location = Location(folder, revision, subfolder)
    kwargs = {**location.kwargs, **file_kwargs(kwargs)}
    lenient = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    if cached_file(folder, "generation_config.json", **lenient, **kwargs) is None:
        return None  # a mixture without one has that of its first component
    with errors_named(f"The generation config of the mixture {folder!r} cannot be read."):
        return GenerationConfig.from_pretrained(folder, **kwargs)
