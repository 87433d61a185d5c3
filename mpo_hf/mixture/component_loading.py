"""Finding, checking and loading the components of a mixture."""

import copy
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub import is_offline_mode
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file, is_peft_available, logging

from .adapter_loading import check_adapter_kind, put_adapter, share_weights
from .component_checks import ALLOW_UNMATCHED, check_all_loaded, check_decoder
from .component_errors import errors_named
from .config_schema import blame, check_depth, is_text, reason_of, shown
from .configuration_mixture import MixtureComponent, MixturePolicyConfig
from .hub_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Location,
    cached_commit,
    explain_hub_error,
    file_kwargs,
    hub_kwargs,
    is_repo,
    require_safetensors,
)
from .tokenizer_loading import load_tokenizer
from .vocabulary import common_vocab_size


logger = logging.get_logger(__name__)

# What a user may give as a policy.
Policy = str | os.PathLike | dict | MixtureComponent | PreTrainedModel

# Arguments of `from_pretrained` that may differ between components: a dictionary with the keys `component_k`.
BY_COMPONENT = ("device_map", "dtype", "quantization_config")


@dataclass(frozen=True)
class PolicyHandle:
    """
    One policy among shared models.

    Args:
        backbone (`int`): index of the model that runs it.
        adapter (`str`, *optional*): name of the PEFT adapter that is active while it runs; `None` for none.
    """

    backbone: int
    adapter: str | None = None


def check_loading_kwargs(kwargs: dict[str, Any]) -> None:
    """Refuses loading arguments that would silently apply to every component alike."""
    for name in ("revision", "subfolder", "variant", "gguf_file"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"`{name}={kwargs[name]!r}` would be one {name} for all components. Describe the component instead: "
                f"{{'name_or_path': ..., '{name}': {kwargs[name]!r}}}."
            )
    if not isinstance(allowed := kwargs.get(ALLOW_UNMATCHED, False), bool):
        raise ValueError(f"`{ALLOW_UNMATCHED}` must be True or False, got {allowed!r}.")


def is_by_component(value: Any) -> bool:
    """Whether an argument is a dictionary with a value for each component."""
    return isinstance(value, dict) and any(re.fullmatch(r"component_\d+|reference", str(key)) for key in value)


def find_adapter_config(component: MixtureComponent, **kwargs) -> dict[str, Any] | None:
    """The `adapter_config.json` of a component's adapter, `None` when it does not exist or cannot be fetched."""
    kwargs = {**component.adapter_location.kwargs, **file_kwargs(kwargs)}
    lenient = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    try:
        path = cached_file(component.adapter, ADAPTER_CONFIG, **lenient, **kwargs)
    except (OSError, ValueError) as err:
        hint = explain_hub_error(err, component.adapter_revision) or "It is neither a folder nor a repo id. "
        raise OSError(f"{_describe(component)} cannot be opened. {hint}{err}") from err
    return None if path is None else _read_adapter_config(path, component)


def _read_adapter_config(path: str, component: MixtureComponent) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError, RecursionError) as err:
        raise OSError(f"The {ADAPTER_CONFIG} of {_describe(component)} cannot be read: {err}") from err
    if not isinstance(config, dict):
        raise ValueError(f"The {ADAPTER_CONFIG} of {_describe(component)} must hold a mapping, got {shown(config)}.")
    for name in ("base_model_name_or_path", "revision"):
        if config.get(name) and not is_text(config[name]):
            raise ValueError(
                f"`{name}` of the adapter {_describe(component)} must be a string, got {shown(config[name])}."
            )
    return config


def as_component(policy: str | os.PathLike | dict | MixtureComponent, **kwargs) -> MixtureComponent:
    """
    Describes a policy given as a repo id, a folder, a dictionary or a component.

    A repo or folder that holds a PEFT adapter is split into the adapter and the base that it names.
    """
    if not isinstance(policy, str | os.PathLike):
        component = MixtureComponent.from_dict(policy)
        if component.adapter is None and component.name_or_path is None:
            raise ValueError(f"A policy needs a `name_or_path` or an `adapter`, got {policy!r}.")
        if component.adapter is not None and component.name_or_path is None:
            component = replace(component, **_recorded_base(component, **kwargs))
        return _absolute(component)
    candidate = MixtureComponent(adapter=os.fspath(policy))
    if not os.path.isfile(os.path.join(candidate.adapter, "config.json")) and find_adapter_config(candidate, **kwargs):
        return _absolute(replace(candidate, **_recorded_base(candidate, **kwargs)))
    return _absolute(MixtureComponent(name_or_path=candidate.adapter))


def _recorded_base(component: MixtureComponent, **kwargs) -> dict[str, str | None]:
    adapter_config = find_adapter_config(component, **kwargs)
    if adapter_config is None:
        raise OSError(f"{component.adapter!r} is not a PEFT adapter: it has no adapter_config.json.")
    base = adapter_config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"The adapter {component.adapter!r} does not say which base it belongs to. Name it: "
            f"{{'adapter': {component.adapter!r}, 'name_or_path': ...}}."
        )
    if component.adapter is not None and not os.path.isdir(component.adapter) and not is_repo(base):
        raise ValueError(
            f"The adapter {component.adapter!r} was trained over {base!r}, a folder of whoever trained it. Name its base: "
            f"{{'adapter': {component.adapter!r}, 'name_or_path': ...}}."
        )
    return {"name_or_path": base, "revision": component.revision or adapter_config.get("revision")}


def _absolute(component: MixtureComponent) -> MixtureComponent:
    """Makes the paths of folders absolute, so that a mixture does not depend on the working directory."""
    changes = {}
    for name in ("name_or_path", "adapter"):
        path = getattr(component, name)
        if path is not None and os.path.isdir(path):
            changes[name] = os.path.abspath(path)
    return replace(component, **changes)


class ComponentLoader:
    """
    Loads components so that those with the same checkpoint share one model in memory.

    Args:
        load_kwargs (`dict`): arguments for every component's `from_pretrained`.
        backbones (`list[nn.Module]`, *optional*): models that are in memory already.
    """

    def __init__(self, load_kwargs: dict[str, Any], backbones: Sequence[nn.Module] = ()):
        check_loading_kwargs(load_kwargs)
        self.load_kwargs = load_kwargs
        self._own_kwargs: dict[tuple, dict[str, Any]] = {}
        self.allow_unmatched = bool(load_kwargs.get(ALLOW_UNMATCHED))
        self.backbones: list[nn.Module] = list(backbones)
        self._given = len(self.backbones)
        self._by_checkpoint: dict[tuple, int] = {}
        self._configs: dict[tuple, PreTrainedConfig] = {}

    def add(self, model: nn.Module) -> int:
        """Index of a model that is in memory already."""
        index = next((i for i, backbone in enumerate(self.backbones) if backbone is model), None)
        if index is None:
            index = len(self.backbones)
            self.backbones.append(model)
        return index

    def share(self, component: MixtureComponent, backbone: int) -> None:
        """Registers that the checkpoint of `component` is in memory already."""
        if component.name_or_path is not None:
            self._by_checkpoint[component.checkpoint] = backbone

    def assign(self, components: Sequence[MixtureComponent], reference: MixtureComponent | None = None) -> None:
        """
        Determines the arguments that each checkpoint is loaded with, where they are given by component.

        Components that share a model in memory are loaded once. A component that is not named is loaded without the
        argument; a reference that is not named goes to the device of the first component.

        Args:
            components (`Sequence[MixtureComponent]`): the components, in order.
            reference (`MixtureComponent`, *optional*): the reference.
        """
        parts = {f"component_{k}": component for k, component in enumerate(components)}
        for argument in BY_COMPONENT:
            given = self.load_kwargs.get(argument)
            if not is_by_component(given):
                continue
            if unknown := [key for key in given if key not in (*parts, "reference")]:
                raise ValueError(
                    f"`{argument}` is given by component, but {unknown} are none of {[*parts, 'reference']}."
                )
            values = {name: (component, given[name]) for name, component in parts.items() if name in given}
            if reference is not None:
                values["reference"] = (reference, given.get("reference"))
            for name, (component, value) in values.items():
                own = self._own_kwargs.setdefault(component.checkpoint, {})
                if component.name_or_path is None:
                    raise ValueError(f"`{argument}` of {name} cannot be chosen any more: it was given in memory.")
                if name == "reference" and value is None:
                    value = own.get(argument, given.get("component_0") if argument == "device_map" else None)
                if own.setdefault(argument, value) != value:
                    raise ValueError(
                        f"`{argument}` of {name} is {value!r}, but it shares its model in memory with a component for which "
                        f"{own[argument]!r} was given. Give both the same."
                    )

    def read_config(self, component: MixtureComponent) -> PreTrainedConfig:
        """
        Reads the configuration of a component, which shows that the component exists before any weights are loaded.
        """
        config = self._configs.get(component.checkpoint)
        if config is None:
            with errors_named(f"The component {_describe(component)} cannot be opened.", component.revision):
                config = self._fetch_config(component.location)
                check_depth(config)
            self._configs[component.checkpoint] = config
        if component.adapter is not None:
            self._check_adapter(component, config)
        return config

    def _fetch_config(self, location: Location) -> PreTrainedConfig:
        path = location.name_or_path
        if MixturePolicyConfig.model_type not in CONFIG_MAPPING and location.gguf_file is None:
            # this code came with a mixture, and the Auto classes do not know mixtures
            fields, _ = PreTrainedConfig.get_config_dict(path, **location.kwargs, **file_kwargs(self.load_kwargs))
            if fields.get("model_type") == MixturePolicyConfig.model_type:
                return MixturePolicyConfig.from_dict(fields)
        try:
            return AutoConfig.from_pretrained(path, **location.kwargs, **hub_kwargs(self.load_kwargs))
        except (OSError, ImportError):
            raise
        except Exception as err:
            fields, _ = PreTrainedConfig.get_config_dict(path, **location.kwargs, **file_kwargs(self.load_kwargs))
            raise ValueError(f"{blame(fields)}{reason_of(err)}") from err

    def _check_adapter(self, component: MixtureComponent, config: PreTrainedConfig) -> None:
        if not is_peft_available():
            raise _no_peft(component)
        adapter_config = find_adapter_config(component, **hub_kwargs(self.load_kwargs))
        if adapter_config is None:
            offline = is_offline_mode() and not os.path.isdir(component.adapter)
            where = " among the files that were downloaded before, and this is offline mode" if offline else ""
            raise OSError(
                f"The adapter of {_describe(component)} cannot be opened: it has no adapter_config.json{where}."
            )
        check_adapter_kind(adapter_config, repr(component.adapter))
        recorded = adapter_config.get("base_model_name_or_path")
        # a folder may be a copy of the recorded base; two different repo ids are two different models
        if recorded and not any(os.path.isabs(p) or os.path.exists(p) for p in (recorded, component.name_or_path)):
            if recorded != component.name_or_path:
                raise ValueError(
                    f"The adapter {component.adapter!r} was trained over {recorded!r}, not over "
                    f"{component.name_or_path!r}. Give it the base that it was trained over."
                )

    def read_vocab(self, component: MixtureComponent) -> dict[str, int] | None:
        """The token-to-id map of a component's tokenizer, `None` when it comes without one."""
        try:
            tokenizer = load_tokenizer([component.location], "It", **hub_kwargs(self.load_kwargs))
        except (ValueError, KeyError, AttributeError, ImportError) as err:
            logger.warning(f"The vocabulary of {_describe(component)} is not compared. {err}")
            return None
        return tokenizer.get_vocab() or None

    def load(self, component: MixtureComponent) -> PolicyHandle:
        """Loads a component and its adapter. A base that is in memory already is shared."""
        if component.checkpoint not in self._by_checkpoint:
            self._by_checkpoint[component.checkpoint] = len(self.backbones)
            self.backbones.append(self._load_checkpoint(component))
        index = self._by_checkpoint[component.checkpoint]
        return PolicyHandle(index, None if component.adapter is None else self._load_adapter(index, component))

    def _load_checkpoint(self, component: MixtureComponent) -> nn.Module:
        kwargs = {
            name: value
            for name, value in self.load_kwargs.items()
            if name != ALLOW_UNMATCHED and not is_by_component(value)
        }
        own = self._own_kwargs.get(component.checkpoint, {})
        kwargs |= {name: value for name, value in own.items() if value is not None} | component.location.kwargs
        for name in ("variant", "dtype"):
            if (value := getattr(component, name)) is not None:
                kwargs[name] = value
        if kwargs.get("device_map") == "disk":  # Transformers accepts a bare name for devices only
            kwargs["device_map"] = {"": "disk"}
        kwargs.setdefault("use_safetensors", None if component.gguf_file else True)
        if component.gguf_file and component.checkpoint in self._configs:
            kwargs["config"] = copy.deepcopy(self._configs[component.checkpoint])  # reading one takes seconds
        with errors_named(f"The component {_describe(component)} cannot be loaded.", component.revision):
            model, info = AutoModelForCausalLM.from_pretrained(
                component.name_or_path, **{**kwargs, "output_loading_info": True}
            )
        check_decoder(model, _describe(component))
        subject = f"The component {component.name_or_path!r}"
        check_all_loaded(subject, info, self.allow_unmatched, "Give a causal language model.")
        filename = component.gguf_file or "config.json"
        commit = cached_commit(component.location, filename, self.load_kwargs.get("cache_dir"))
        if commit is not None:  # a mixture is pinned to it when it is pushed to the Hub
            model.config._commit_hash = commit
        return model.eval()

    def _load_adapter(self, index: int, component: MixtureComponent) -> str:
        backbone = self.backbones[index]
        if any(parameter.is_meta for parameter in backbone.parameters()):
            raise ValueError(
                f"The adapter {component.adapter!r} cannot be put on {component.name_or_path!r}, whose weights are offloaded "
                "(`device_map`). Keep this base on a device, or merge the adapter (`merge_and_unload`), save the result, and "
                "mix that."
            )
        adapters = backbone.peft_config if hasattr(backbone, "get_base_model") else {}
        if not adapters and index < self._given:
            backbone = share_weights(backbone)  # another mixture, or a view of this one, may run it without adapters
        name = f"component_{len(adapters)}"
        folder = self._fetch_adapter(component)
        self.backbones[index] = put_adapter(backbone, folder, name, component, self.allow_unmatched)
        self.backbones[index].peft_config[name]._commit_hash = cached_commit(
            component.adapter_location, ADAPTER_CONFIG, self.load_kwargs.get("cache_dir")
        )
        return name

    def _fetch_adapter(self, component: MixtureComponent) -> str:
        """
        Folder of an adapter, downloaded where needed: PEFT does not find subfolders of a repository in offline mode.
        """
        kwargs = {**component.adapter_location.kwargs, **file_kwargs(self.load_kwargs)}
        if self.load_kwargs.get("use_safetensors", True):
            require_safetensors(component.adapter_location, self.load_kwargs)
        else:
            missing_ok = {"_raise_exceptions_for_missing_entries": False}
            if cached_file(component.adapter, ADAPTER_WEIGHTS, **missing_ok, **kwargs) is None:
                cached_file(component.adapter, "adapter_model.bin", **kwargs)
        return os.path.dirname(cached_file(component.adapter, ADAPTER_CONFIG, **kwargs))


def compare_vocabularies(
    loader: ComponentLoader,
    components: Sequence[MixtureComponent],
    names: Sequence[str],
    sizes: Sequence[int],
    claimed: int | None = None,
) -> int:
    """Number of token ids that components have in common, reading one tokenizer for each checkpoint among them."""
    vocabs: dict[tuple, dict[str, int] | None] = {}
    if len({component.checkpoint for component in components}) > 1:
        for component in components:
            if component.checkpoint not in vocabs:
                in_memory = component.name_or_path is None
                vocabs[component.checkpoint] = None if in_memory else loader.read_vocab(component)
    return common_vocab_size(names, sizes, [vocabs.get(component.checkpoint) for component in components], claimed)


def _no_peft(component: MixtureComponent) -> ImportError:
    return ImportError(f"The component {_describe(component)} is an adapter; `pip install peft` to load it.")


def _describe(component: MixtureComponent) -> str:
    return f"{component.source!r}" + (f" ({component.label})" if component.label else "")
