"""The weights of a causal language model, read one tensor at a time, without loading the model where possible."""

import os
from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from ..mixture.component_loading import ComponentLoader, Policy, as_component
from ..mixture.configuration_mixture import MixturePolicyConfig
from ..mixture.hub_files import cached_commit, file_kwargs, hub_kwargs
from ..mixture.tokenizer_loading import load_tokenizer


logger = logging.get_logger(__name__)


class Checkpoint:
    """
    Weights of a model by the names of its parameters, read from safetensors on request.

    A model whose files have other names for the weights than its class is loaded whole, in the dtype of its files.

    Args:
        policy (`str`, `os.PathLike`, `dict`, [`MixtureComponent`] or `PreTrainedModel`): the model.
        load_kwargs (`dict`, *optional*): arguments for its `from_pretrained`, such as `token`.
    """

    def __init__(self, policy: Policy, load_kwargs: dict[str, Any] | None = None):
        self.component = None
        self.skeleton: nn.Module
        self._loader = ComponentLoader({"dtype": "auto", **(load_kwargs or {})})
        self._read: dict[str, Callable[[], torch.Tensor]] | None = None
        if isinstance(policy, nn.Module):
            if not isinstance(policy, PreTrainedModel) or hasattr(policy, "peft_config"):
                raise ValueError(f"Expected a model of Transformers without adapters, got a {type(policy).__name__}.")
            self._use(policy)
        else:
            self._open(policy)
        if self.config.model_type == MixturePolicyConfig.model_type:
            raise ValueError(f"{self} is a mixture. Choose one of its components.")

    def __str__(self) -> str:
        if self.component is not None:
            return repr(self.component.name_or_path)
        return repr(self.skeleton.config.name_or_path) if self.skeleton.config.name_or_path else "the model in memory"

    @property
    def name_or_path(self) -> str | None:
        """The name of the base for an adapter over this model."""
        return self.component.name_or_path if self.component else self.config.name_or_path or None

    @property
    def revision(self) -> str | None:
        """The commit that the model is read from, or the revision that was given."""
        if self.component is None:
            return getattr(self.config, "_commit_hash", None)
        filename = self.component.gguf_file or "config.json"
        commit = cached_commit(self.component.location, filename, self._loader.load_kwargs.get("cache_dir"))
        return commit or self.component.revision

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter. Tied weights have several names."""
        return {name: tensor.shape for name, tensor in self.skeleton.named_parameters(remove_duplicate=False)}

    def get(self, name: str) -> torch.Tensor:
        """A weight by the name of its parameter."""
        return self._read[self.tied.get(name, name)]()

    def load(self, device: str | torch.device | None = None) -> PreTrainedModel:
        """The model itself. A model in memory stays on its device, another is loaded to `device`."""
        if not self.skeleton.get_input_embeddings().weight.is_meta:
            return self.skeleton
        handle = self._loader.load(self.component)
        return self._loader.backbones[handle.backbone].to(device or "cpu")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """
        The tokenizer that is saved with the model.

        Raises:
            `ValueError`: when there is none.
        """
        if self.component is None:
            raise ValueError("A model in memory has no tokenizer. Give it as `processing_class`.")
        advice = "Give one as `processing_class`."
        return load_tokenizer([self.component.location], str(self), advice, **hub_kwargs(self._loader.load_kwargs))

    def _open(self, policy: Policy) -> None:
        self.component = as_component(policy, **hub_kwargs(self._loader.load_kwargs))
        if self.component.adapter is not None:
            raise ValueError(
                f"{self.component.adapter!r} is an adapter already, over {self.component.name_or_path!r}."
            )
        self.config = self._loader.read_config(self.component)
        quantization = getattr(self.config, "quantization_config", None)
        if quantization is not None and not self.component.gguf_file:
            raise ValueError(f"{self} is quantized, and has no weights to take a difference of: {quantization}.")
        if self.config.model_type == MixturePolicyConfig.model_type:
            return
        with torch.device("meta"):
            trust = self._loader.load_kwargs.get("trust_remote_code")
            self.skeleton = AutoModelForCausalLM.from_config(self.config, trust_remote_code=trust)
        self.tied = self.skeleton.all_tied_weights_keys
        self._read = self._readers()
        if self._read is None:
            logger.info(f"{self} is loaded as a whole, as its files do not have the parameter names of its class.")
            self._use(self.load())

    def _use(self, model: PreTrainedModel) -> None:
        self.skeleton, self.config, self.tied = model, model.config, {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in parameters.items():
            if parameter.is_meta or not parameter.is_floating_point() or hasattr(parameter, "__tensor_flatten__"):
                raise ValueError(
                    f"The weight {name} of {self} is offloaded or quantized ({type(parameter).__name__}, "
                    f"{parameter.dtype}, on {parameter.device}). Load the model without offloading and quantization, "
                    "or pass its folder."
                )
        self._read = {name: parameter.detach for name, parameter in parameters.items()}

    def _readers(self) -> dict[str, Callable[[], torch.Tensor]] | None:
        """Functions that read each parameter; `None` when some are not in the files, or these are not safetensors."""
        known = set(self.shapes)
        prefix = f"{self.skeleton.base_model_prefix}."
        readers: dict[str, Callable[[], torch.Tensor]] = {}
        for path in self._files():
            file = safe_open(path, framework="pt")
            for name in file.keys():
                # checkpoints of a class without a head lack the prefix of those with one
                parameter = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in known), None)
                if parameter is not None:
                    readers[parameter] = lambda file=file, name=name: file.get_tensor(name)
        return readers if known - set(self.tied) <= set(readers) else None

    def _files(self) -> list[str]:
        component = self.component
        if component.variant or component.gguf_file:
            return []
        kwargs = {**component.location.kwargs, **file_kwargs(self._loader.load_kwargs)}
        lenient = {"_raise_exceptions_for_missing_entries": False}
        if path := cached_file(component.name_or_path, SAFE_WEIGHTS_NAME, **lenient, **kwargs):
            return [path]
        index = cached_file(component.name_or_path, SAFE_WEIGHTS_INDEX_NAME, **lenient, **kwargs)
        if index is None:
            return []
        return get_checkpoint_shard_files(component.name_or_path, os.fspath(index), **kwargs)[0]
