"""Finding, checking and loading the components of a mixture."""

import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, is_peft_available, logging

from .configuration_mixture import MixtureComponent
from .vocabulary import common_vocab_size


logger = logging.get_logger(__name__)

# What a user may give as a policy.
Policy = str | os.PathLike | dict | MixtureComponent | PreTrainedModel

SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"

# What `from_pretrained` of configs, tokenizers and adapters understands; everything else concerns weights only.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "trust_remote_code")


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
    """Refuses loading arguments that would silently mean the same thing for every component."""
    for name in ("revision", "subfolder", "variant", "gguf_file"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"`{name}={kwargs[name]!r}` would be one {name} for all components. Describe the component instead: "
                f"{{'name_or_path': ..., '{name}': {kwargs[name]!r}}}."
            )


def hub_kwargs(load_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The part of loading arguments that configs, tokenizers and adapters understand too."""
    return {name: load_kwargs[name] for name in HUB_KWARGS if name in load_kwargs}


def find_adapter_config(component: MixtureComponent, **kwargs) -> dict[str, Any] | None:
    """The `adapter_config.json` of a component's adapter, `None` when there is no such file."""
    from transformers.utils.peft_utils import find_adapter_config_file

    kwargs.pop("trust_remote_code", None)
    path = find_adapter_config_file(
        component.adapter, revision=component.adapter_revision, subfolder=component.adapter_subfolder or "", **kwargs
    )
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def as_component(policy: str | os.PathLike | dict | MixtureComponent, **kwargs) -> MixtureComponent:
    """
    Describes a policy given as a repo id, a folder, a dictionary or a component.

    A repo or folder that holds a PEFT adapter is split into the adapter and the base that it names.
    """
    if not isinstance(policy, str | os.PathLike):
        component = MixtureComponent.from_dict(policy)
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
    return {"name_or_path": base, "revision": component.revision or adapter_config.get("revision")}


def _absolute(component: MixtureComponent) -> MixtureComponent:
    """Folders as absolute paths: a mixture must not change its meaning with the working directory."""
    changes = {}
    for name in ("name_or_path", "adapter"):
        path = getattr(component, name)
        if path is not None and os.path.isdir(path):
            changes[name] = os.path.abspath(path)
    return replace(component, **changes)


def resolve_relative(component: MixtureComponent, folder: str, revision: str | None = None) -> MixtureComponent:
    """
    Resolves paths that a saved config holds relative to itself.

    Args:
        component (`MixtureComponent`): as it stands in the config.
        folder (`str`): the folder, or the repo id, that the config was read from.
        revision (`str`, *optional*): the revision of that repo.
    """
    for name, prefix in (("name_or_path", ""), ("adapter", "adapter_")):
        path = getattr(component, name)
        if path is None or os.path.isabs(path):
            continue
        explicit = path.startswith(("./", "../")) or path in (".", "..")
        if os.path.isdir(folder):
            inside = os.path.normpath(os.path.join(folder, path))
            if os.path.isdir(inside):
                component = replace(component, **{name: os.path.abspath(inside)})
            elif explicit:
                raise OSError(
                    f"The mixture in {folder!r} refers to the folder {path!r} beside it, which does not exist."
                )
        elif explicit:
            subfolder = os.path.normpath(os.path.join(path, getattr(component, prefix + "subfolder") or ""))
            if subfolder.startswith(".."):
                raise OSError(f"The mixture in {folder!r} refers to {path!r}, which lies outside its repository.")
            changes = {name: folder, prefix + "revision": revision, prefix + "subfolder": subfolder}
            component = replace(component, **changes)
    return component


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
        self.backbones: list[nn.Module] = list(backbones)
        self._by_checkpoint: dict[tuple, int] = {}

    def add(self, model: nn.Module) -> int:
        """Index of a model that is in memory already."""
        index = next((i for i, backbone in enumerate(self.backbones) if backbone is model), None)
        if index is None:
            index = len(self.backbones)
            self.backbones.append(model)
        return index

    def share(self, component: MixtureComponent, backbone: int) -> None:
        """Makes known that the checkpoint of `component` is in memory already."""
        if component.name_or_path is not None:
            self._by_checkpoint[component.checkpoint] = backbone

    def read_config(self, component: MixtureComponent) -> PreTrainedConfig:
        """Reads the configuration of a component, and so finds out whether it exists before any weights are loaded."""
        kwargs = hub_kwargs(self.load_kwargs)
        try:
            config = AutoConfig.from_pretrained(component.name_or_path, **_location(component), **kwargs)
        except (OSError, ValueError) as err:
            raise type(err)(f"The component {_describe(component)} cannot be opened. {err}") from err
        if component.adapter is not None:
            self._check_adapter(component, config)
        return config

    def _check_adapter(self, component: MixtureComponent, config: PreTrainedConfig) -> None:
        if not is_peft_available():
            raise ImportError(f"The component {_describe(component)} is an adapter; `pip install peft` to load it.")
        adapter_config = find_adapter_config(component, **hub_kwargs(self.load_kwargs))
        if adapter_config is None:
            raise OSError(f"The adapter of {_describe(component)} cannot be opened: it has no adapter_config.json.")
        recorded = adapter_config.get("base_model_name_or_path")
        # a folder can be a copy of anything, two different repo ids are two different models
        if recorded and not any(os.path.isabs(p) or os.path.exists(p) for p in (recorded, component.name_or_path)):
            if recorded != component.name_or_path:
                raise ValueError(
                    f"The adapter {component.adapter!r} was trained over {recorded!r}, not over "
                    f"{component.name_or_path!r}. Give it the base that it was trained over."
                )

    def read_vocab(self, component: MixtureComponent) -> dict[str, int] | None:
        """The token-to-id map of a component's tokenizer, `None` when it comes without one."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                component.name_or_path, **_location(component), **hub_kwargs(self.load_kwargs)
            )
        except (OSError, ValueError, KeyError, AttributeError, ImportError) as err:
            logger.warning(f"The vocabulary of {_describe(component)} is not compared: it has no tokenizer ({err}).")
            return None
        return tokenizer.get_vocab() or None

    def load(self, component: MixtureComponent) -> PolicyHandle:
        """Loads a component, or finds its base among the models in memory, and adds its adapter."""
        if component.checkpoint not in self._by_checkpoint:
            self._by_checkpoint[component.checkpoint] = len(self.backbones)
            self.backbones.append(self._load_checkpoint(component))
        index = self._by_checkpoint[component.checkpoint]
        return PolicyHandle(index, None if component.adapter is None else self._load_adapter(index, component))

    def _load_checkpoint(self, component: MixtureComponent) -> nn.Module:
        kwargs = {**self.load_kwargs, **_location(component)}
        for name in ("variant", "dtype"):
            if (value := getattr(component, name)) is not None:
                kwargs[name] = value
        kwargs.setdefault("use_safetensors", None if component.gguf_file else True)
        try:
            model = AutoModelForCausalLM.from_pretrained(component.name_or_path, **kwargs)
        except (OSError, ValueError) as err:
            raise type(err)(f"The component {_describe(component)} cannot be loaded. {err}") from err
        check_decoder(model, _describe(component))
        return model.eval()

    def _load_adapter(self, index: int, component: MixtureComponent) -> str:
        from peft import PeftModel

        backbone = self.backbones[index]
        adapters = getattr(backbone, "peft_config", {}) if isinstance(backbone, PeftModel) else {}
        name = f"component_{len(adapters)}"
        kwargs = {k: v for k, v in hub_kwargs(self.load_kwargs).items() if k != "trust_remote_code"}
        kwargs |= {"revision": component.adapter_revision, "subfolder": component.adapter_subfolder}
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        if self.load_kwargs.get("use_safetensors", True):
            self._require_safetensors(component)
        try:
            if isinstance(backbone, PeftModel):
                backbone.load_adapter(component.adapter, name, **kwargs)
            else:
                self.backbones[index] = PeftModel.from_pretrained(backbone, component.adapter, name, **kwargs)
        except (RuntimeError, ValueError) as err:
            raise ValueError(
                f"The adapter {component.adapter!r} does not fit the base {component.name_or_path!r}: {err}"
            ) from err
        if self.backbones[index].peft_config[name].is_prompt_learning:
            raise ValueError(
                f"The adapter {component.adapter!r} learns a prompt ({self.backbones[index].peft_config[name].peft_type}), "
                "and cannot be mixed token by token. Adapters that change weights can: LoRA, IA3 and their kin."
            )
        return name

    def _require_safetensors(self, component: MixtureComponent) -> None:
        """PEFT falls back to pickled weights without a word; a mixture opens them only when told to."""
        path = cached_file(
            component.adapter,
            SAFETENSORS_WEIGHTS_NAME,
            revision=component.adapter_revision,
            subfolder=component.adapter_subfolder or "",
            _raise_exceptions_for_missing_entries=False,
            **{k: v for k, v in hub_kwargs(self.load_kwargs).items() if k != "trust_remote_code"},
        )
        if path is None:
            raise OSError(
                f"The adapter {component.adapter!r} has no {SAFETENSORS_WEIGHTS_NAME}. If you trust a pickled file from "
                "there, pass `use_safetensors=False`."
            )


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


def check_decoder(model: nn.Module, name: str) -> None:
    """Refuses models that cannot be decoded beside others over a cache of keys and values."""
    parameters = forward_parameters(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"The component {name} is an encoder-decoder; only causal language models can be mixed.")
    if "past_key_values" not in parameters:
        raise ValueError(
            f"The component {name} ({type(model).__name__}) keeps its state in a cache of its own kind instead of "
            "`past_key_values`, and cannot be mixed."
        )


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of a model's `forward`, seen through PEFT's wrapper."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return _parameters_of(type(base))


@lru_cache
def _parameters_of(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def _location(component: MixtureComponent) -> dict[str, str]:
    names = ("revision", "subfolder", "gguf_file")
    return {name: value for name in names if (value := getattr(component, name)) is not None}


def _describe(component: MixtureComponent) -> str:
    return f"{component.source!r}" + (f" ({component.label})" if component.label else "")
