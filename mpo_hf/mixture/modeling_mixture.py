"""A log-linear mixture of causal language models that is itself a causal language model."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .adapter_switching import held, lock_of
from .compat import (
    CACHE_NAME,
    correct_parallel_plans,
    correct_tied_weights,
    layer_types_of,
    no_progress_bar,
    parse_to,
    pick_cache,
    whole_property,
    without_peft,
)
from .component_checks import ALLOW_UNMATCHED, check_all_loaded, check_can_be_opened, check_decoder
from .component_errors import build_from_config, errors_named
from .component_loading import ComponentLoader, Policy, PolicyHandle, is_by_component
from .component_running import ComponentRunningMixin
from .configuration_mixture import MixtureComponent, MixturePolicyConfig
from .hub import PUSH_ARGUMENTS, MixtureSharingMixin, code_alongside
from .invalid_logits import keep_peaks, watch_peaks
from .mixture_building import build_mixture, load_mixture, read_mixture_config, without_weights
from .mixture_cache import StepCache
from .mixture_generation import MixtureGenerationMixin
from .mixture_inputs import execution_device
from .mixture_weights import check_mixture_weights
from .pooled_head import PooledBackbone, PooledHead
from .pooling import log_linear_pool
from .presets import PresetMixin
from .stacked_lora import AdapterStacks
from .stacked_models import ModelStacks
from .tuned_modules import TunedModels


logger = logging.get_logger(__name__)


class MixturePolicyModel(
    PresetMixin, MixtureSharingMixin, MixtureGenerationMixin, ComponentRunningMixin, PreTrainedModel
):
    r"""
    A log-linear mixture of causal language models, \\(\pi(v|s) \propto \prod_k \pi_k(v|s)^{\lambda_k}\\) at every step: the
    decoding rule of [Mixing Preference Optimization](https://huggingface.co/papers/2502.18699).

    Create one with [`~MixturePolicyModel.from_policies`] or load a saved one with
    [`~transformers.AutoModelForCausalLM.from_pretrained`]. Components that are adapters over one base share a single
    copy of it. Saving writes a config that says where the components are stored, and no weights; a mixture whose
    models were all given in memory is saved like any other model.

    Args:
        config ([`MixturePolicyConfig`]):
            The configuration. Without `backbones`, randomly initialized components are built from it.
        backbones (`list[nn.Module]`, *optional*):
            Loaded models, each shared by one or more policies.
        policies (`list[PolicyHandle]`, *optional*):
            The backbone and the adapter of every component. Defaults to one backbone for each component.
        reference (`PolicyHandle`, *optional*):
            The backbone and the adapter of the reference policy, if it is in memory.
        load_kwargs (`dict`, *optional*):
            Arguments for `from_pretrained` of a reference that is loaded later.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from mpo_hf import MixturePolicyModel

    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> model = MixturePolicyModel.from_policies(
    ...     [LlamaForCausalLM(config), LlamaForCausalLM(config)], weights=[0.3, 0.7]
    ... )
    >>> model.mixture_weights
    tensor([0.3000, 0.7000])

    >>> model.generate(torch.tensor([[1, 5, 9]]), min_new_tokens=4, max_new_tokens=4, do_sample=False).shape
    torch.Size([1, 7])
    ```
    """

    config_class = MixturePolicyConfig
    config: MixturePolicyConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(
        self,
        config: MixturePolicyConfig,
        backbones: Sequence[nn.Module] | None = None,
        policies: Sequence[PolicyHandle] | None = None,
        reference: PolicyHandle | None = None,
        load_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self._built_from_config = backbones is None
        if backbones is None:
            backbones = [
                build_from_config(f"`component_configs[{k}]`", part) for k, part in enumerate(config.component_configs)
            ]
            for label, backbone in zip(config.labels, backbones):
                check_decoder(backbone, repr(label))
        if not backbones:
            raise ValueError("A mixture needs at least one component; see `MixturePolicyModel.from_policies`.")
        # direct children, as Transformers collects tied weights and parallelism plans from those only
        self._num_backbones = 0
        for backbone in backbones:
            self._add_backbone(backbone)
        self.policies = list(policies) if policies is not None else [PolicyHandle(k) for k in range(len(backbones))]
        if len(self.policies) != len(config.components):
            raise ValueError(f"Got {len(self.policies)} policies for a config of {len(config.components)} components.")
        self._reference_handle = reference
        self._load_kwargs = load_kwargs or {}
        # layers of each component in a cache; kept, as every step of decoding asks for them
        self.layer_counts = [len(layer_types_of(decoder)) for decoder in config.decoder_configs]
        # whether adapters over one base run side by side where possible, and full models, which moves their weights; by
        # default, on the CPU, those that the mixture has opened itself
        self.stack_adapters: bool = True
        self.stack_models: bool | None = None
        self._stacks: dict[int, AdapterStacks] = {}
        self._model_stacks = ModelStacks()
        self._tuned_models = TunedModels()
        # given the active components and their logits in order, returns the logits to pool
        self.component_hook: Callable[[Sequence[int], Iterator[torch.Tensor]], Iterator[torch.Tensor]] | None = None
        self.pooled_head = PooledHead(self)
        self._fits_weights_only = False
        # read by Transformers: whether drafted tokens cannot be taken back
        self._is_stateful = any(getattr(without_peft(backbone), "_is_stateful", False) for backbone in backbones)
        self.post_init()

    def _add_backbone(self, backbone: nn.Module) -> None:
        self.add_module(f"backbone_{self._num_backbones}", backbone)
        self._num_backbones += 1

    @property
    def backbones(self) -> list[nn.Module]:
        """The models in memory. Adapters over one base share a model."""
        return [getattr(self, f"backbone_{i}") for i in range(self._num_backbones)]

    @property
    def device(self) -> torch.device:
        """The device for inputs: that of the first weights that are not offloaded."""
        return next((d for b in self.backbones if (d := execution_device(b)).type != "meta"), torch.device("meta"))

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """The devices of the parts of the components; there is no such attribute when all are on one device."""
        if "_dispatched" in self.__dict__:
            return self._dispatched
        parts: dict[str, Any] = {}
        for i, backbone in enumerate(self.backbones):
            own = getattr(backbone, "hf_device_map", None) or {"": str(backbone.device)}
            parts |= {f"backbone_{i}.{name}".rstrip("."): device for name, device in own.items()}
        if len(set(map(str, parts.values()))) < 2:
            raise AttributeError("hf_device_map")
        return dict(sorted(parts.items(), key=lambda part: part[1] == "disk"))  # pipelines run on the first device

    @hf_device_map.setter
    def hf_device_map(self, parts: dict[str, Any]) -> None:
        # set by Accelerate for a mixture that is loaded from one checkpoint
        self._dispatched = parts

    def to(self, *args, **kwargs) -> "MixturePolicyModel":
        if self.device.type != "meta" and any(parameter.is_meta for parameter in self.parameters()):
            device, dtype = parse_to(*args, **kwargs)
            if device != self.device or dtype is not None:
                raise ValueError(
                    f"Components of this mixture are offloaded, so that it cannot be moved to {dtype or device}. Choose devices and "
                    "dtype when it is loaded: `device_map=`, `dtype=`."
                )
            return self
        return super().to(*args, **kwargs)

    def init_weights(self):
        if self._built_from_config:
            super().init_weights()
        else:
            # models in memory are initialized and tied; PEFT's wrapper passes on tied names without its own prefix
            self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        return correct_tied_weights(self, super().get_expanded_tied_weights_keys(all_submodels))

    def init_parallel_plans(self):
        super().init_parallel_plans()
        correct_parallel_plans(self)

    # ---- weights and policies ----

    @property
    def mixture_weights(self) -> torch.Tensor:
        """The mixture weights λ, shape `(K,)`, float32. Assign a sequence of K numbers to change them."""
        return torch.tensor(self.config.mixture_weights, dtype=torch.float32, device=self.device)

    @mixture_weights.setter
    def mixture_weights(self, weights: Sequence[float] | torch.Tensor) -> None:
        self.config.mixture_weights = weights

    @whole_property
    def reference_policy(self) -> "MixturePolicyModel | None":
        """
        The reference policy as a model of its own, which shares its weights with this one where possible; `None` when
        the mixture has no reference. It is loaded at first use.
        """
        with lock_of(self.pooled_head):
            if self._reference_handle is None and self.config.reference is not None:
                self._reference_handle = self._load_reference()
        if self._reference_handle is None:
            return None
        return self._policy_view(self._reference_handle, self.config.reference)

    def policy(self, k: int) -> "MixturePolicyModel":
        """Component `k` as a model of its own, which shares its weights with this one."""
        return self._policy_view(self.policies[k], self.config.components[k])

    def _policy_view(self, handle: PolicyHandle, component: MixtureComponent | None) -> "MixturePolicyModel":
        backbone = self.backbones[handle.backbone]
        config = MixturePolicyConfig(
            components=[component or {}],
            component_configs=[backbone.config],
            vocab_size=self.config.vocab_size,
            **{name: getattr(self.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )
        view = MixturePolicyModel(config, [backbone], [PolicyHandle(0, handle.adapter)])
        view._tuned_models = self._tuned_models
        if hasattr(backbone, "get_base_model"):
            view._stacks[0] = self._adapter_stacks(handle.backbone)
        view.generation_config = without_weights(self.generation_config)
        return view.eval()

    def _load_reference(self) -> PolicyHandle:
        loader = ComponentLoader(self._load_kwargs, self.backbones)
        loader.assign(self.config.components, self.config.reference)
        for handle, component in zip(self.policies, self.config.components):
            loader.share(component, handle.backbone)
        with held(self.backbones):
            handle = loader.load(self.config.reference)
        # loading an adapter wraps its base, so that earlier backbones may have been replaced
        for i, backbone in enumerate(loader.backbones):
            if i < self._num_backbones:
                setattr(self, f"backbone_{i}", backbone)
            else:
                self._add_backbone(backbone.to(self.device) if "device_map" not in self._load_kwargs else backbone)
        return handle

    # ---- forward ----

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mixture_weights: torch.Tensor | Sequence[float] | None = None,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Token ids, from the vocabulary that all components have in common.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
                0 for padding, 1 elsewhere.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions. Derived from `attention_mask` when they are not given.
            cache (`Cache`, *optional*):
                Keys, values and other states of all components, as returned by this model.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Labels for the language modeling loss of the mixture; -100 is ignored.
            use_cache (`bool`, *optional*):
                Whether to return the cache.
            output_attentions (`bool`, *optional*):
                Whether to return the attentions of the components that run, one component's layers after another's.
            output_hidden_states (`bool` or `list[int]`, *optional*):
                Whether to return the hidden states of the components that run, one after another; or the indices of
                those to return.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Number of last positions to compute logits for, or the positions; 0 for all.
            mixture_weights (`torch.Tensor` of shape `(K,)` or `(batch_size, K)`, *optional*):
                Weights for this call, or for each row of it, instead of the model's own.
            return_dict (`bool`, *optional*):
                Whether to return a [`~transformers.modeling_outputs.CausalLMOutputWithPast`] instead of a tuple.
            past_key_values (`Cache`, *optional*):
                The name of `cache` before version 5.24 of Transformers.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`]: `logits` are the pooled log-probabilities
            Σ λ_k log π_k in float32, not renormalized: their `softmax` is the mixture, their `logsumexp` is log Z. Tokens
            that a component of nonzero weight rules out, or that are not plausible, have `-inf`.
        """
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        return_dict = config.return_dict if return_dict is None else return_dict
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states or False
        cache = pick_cache({"cache": cache, "past_key_values": past_key_values}, "MixturePolicyModel.forward")
        weights, active = self._weights_for(mixture_weights, len(input_ids), cache)
        views: dict[int, Cache | None] = {}
        if use_cache or cache is not None:
            if cache is None:
                cache = DynamicCache(config=config)
            active, views = self._views(cache, active)
            if isinstance(cache, StepCache):
                cache = cache.cache
        loss_kwargs = {n: kwargs.pop(n) for n in ("num_items_in_batch", "shift_labels") if n in kwargs}
        inputs = {
            **self._inputs_for_all(input_ids, attention_mask, position_ids),
            "use_cache": bool(views) and use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states is not False,
            "logits_to_keep": logits_to_keep,
            **kwargs,
        }
        extras: dict[str, list] = {"hidden_states": [], "attentions": []}
        component_logits = self._component_logits(active, inputs, views, extras)
        if self.component_hook is not None:
            component_logits = self.component_hook(active, component_logits)
        peaks: dict[int, torch.Tensor] = {}
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            component_logits = watch_peaks(active, component_logits, peaks)
        logits = log_linear_pool(component_logits, [weights[k] for k in active], config.plausibility)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: cache if use_cache else None},
            hidden_states=_keep_layers(extras["hidden_states"], output_hidden_states) or None,
            attentions=tuple(extras["attentions"]) or None,
        )
        if not torch.compiler.is_compiling():
            keep_peaks(output, peaks)
        return output if return_dict else output.to_tuple()

    def _weights_for(
        self,
        mixture_weights: torch.Tensor | Sequence[float] | None,
        batch_size: int,
        cache: Cache | None = None,
    ) -> tuple[Sequence[float | torch.Tensor], Sequence[int]]:
        """
        Checked weights for one call, by component, and the components with nonzero weight. The latter must be known
        without a device synchronization; for the model's own weights no tensor is read.
        """
        config = self.config
        if mixture_weights is None:
            own = config.mixture_weights
            if config.plausibility and own[0] <= 0:
                raise ValueError(f"`plausibility` is judged by the first component, whose weight is {own[0]}.")
            return own, [k for k, w in enumerate(own) if w != 0]
        if (
            torch.compiler.is_compiling()
            and isinstance(mixture_weights, torch.Tensor)
            and hasattr(cache, "mixture_components")
        ):  # compiled code cannot read the values of a tensor; the prompt that filled the cache was not compiled
            return mixture_weights.unbind(-1), cache.mixture_components
        weights = check_mixture_weights(mixture_weights, len(self.policies), config.allow_off_simplex)
        if config.plausibility and (weights[..., 0] <= 0).any():
            raise ValueError(f"`plausibility` is judged by the first component, whose weight is {weights[..., 0]}.")
        if weights.ndim == 2 and len(weights) != batch_size:
            raise ValueError(f"Got mixture weights for {len(weights)} rows, but the batch has {batch_size}.")
        active = (weights != 0).reshape(-1, weights.shape[-1]).any(0).nonzero().flatten().tolist()
        return weights.unbind(-1), active

    def train(self, mode: bool = True) -> "MixturePolicyModel":
        """
        Puts the mixture into training mode.

        Raises:
            `ValueError`: for a mixture whose components are referred to: their weights are not saved with it, so that
                training would be lost. Adapters over the mixture as a whole may be trained.
        """
        elsewhere = any(component.name_or_path is not None for component in self.config.components)
        if mode and elsewhere and not self._fits_weights_only and not hasattr(self, "peft_config"):
            raise ValueError(
                "A mixture is saved as references to its components, so their weights cannot be trained in it. Fit the "
                "mixture weights with `MPOTrainer`, train a policy before it is mixed, or distill the mixture: train one "
                "model with it as the teacher."
            )
        return super().train(mode)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbones[self.policies[0].backbone].get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbones[self.policies[0].backbone].set_input_embeddings(value)

    def get_output_embeddings(self) -> PooledHead:
        """The heads of the components as one linear layer over the hidden states of `base_model`."""
        return self.pooled_head

    @property
    def base_model(self) -> PooledBackbone:
        """The components without their heads as one model, which TRL's trainers run in place of `forward`."""
        return PooledBackbone(self)

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError(
            "A mixture has no embeddings of its own to resize. Resize those of every component, then mix."
        )

    # ---- building, loading, saving ----

    @classmethod
    def from_policies(
        cls,
        policies: Sequence[Policy],
        weights: Sequence[float] | torch.Tensor | None = None,
        *,
        reference: Policy | None = None,
        labels: Sequence[str] | None = None,
        vocab_size: int | None = None,
        allow_off_simplex: bool = False,
        plausibility: float = 0.0,
        allow_unmatched_weights: bool = False,
        **kwargs,
    ) -> "MixturePolicyModel":
        r"""
        Mixes policies.

        Args:
            policies (`Sequence`):
                The policies, each one of: a repo id or folder of a causal language model or of a PEFT adapter; a
                dictionary or [`MixtureComponent`] with its revision, subfolder, adapter and so on; a model in memory.
                Mixtures among them are flattened into their components, which keep their labels. A vocabulary that is
                claimed for such a mixture, and the plausibility of the first policy, hold for all. A model in memory is
                put into evaluation mode; a `PeftModel` runs with the adapter that is active now.
            weights (`Sequence[float]`, *optional*):
                Mixture weights, one a policy, >= 0 with sum 1. Defaults to uniform weights.
            reference (*optional*):
                The reference policy, given like a policy. Defaults to the base when all policies are adapters over one,
                and to that of the mixtures when all policies are mixtures with the same one.
            labels (`Sequence[str]`, *optional*):
                Names of the objectives, one a policy.
            vocab_size (`int`, *optional*):
                Number of leading token ids that all policies have in common. It is found by comparing their
                tokenizers, and needed only for models in memory whose vocabularies differ in size.
            allow_off_simplex (`bool`, *optional*, defaults to `False`):
                Whether to accept negative weights and sums other than 1.
            plausibility (`float`, *optional*, defaults to 0.0):
                Excludes tokens whose probability under the first policy, which must not be a mixture of several, is less
                than this fraction of that of its most likely token; see [`MixturePolicyModel.from_contrast`].
            allow_unmatched_weights (`bool`, *optional*, defaults to `False`):
                Whether to accept checkpoints and adapters which lack weights of their models, so that these are random,
                or have weights that are not used. No config can set it.
            kwargs:
                Arguments of every component's `from_pretrained`: `dtype`, `device_map`, `token` and so on. Those that
                differ between components, such as `revision`, belong in their dictionaries. `attn_implementation`,
                `device_map`, `dtype` and `quantization_config` may be dictionaries with the value for component k
                under the key `component_k`.

        Returns:
            [`MixturePolicyModel`], in evaluation mode.

        Raises:
            `ValueError`: for bad weights, and for policies that do not share a vocabulary.
            `OSError`: for a policy that cannot be found.

        Example:

        ```python
        >>> from mpo_hf import MixturePolicyModel

        >>> model = MixturePolicyModel.from_policies(
        ...     ["org/helpful", {"name_or_path": "org/sft", "adapter": "org/harmless-lora"}],
        ...     weights=[0.5, 0.5],
        ...     reference="org/sft",
        ... )  # doctest: +SKIP
        ```
        """
        attention = _take_attention_by_component(kwargs)
        if allow_unmatched_weights is not False:
            kwargs[ALLOW_UNMATCHED] = allow_unmatched_weights
        model = build_mixture(
            cls, policies, weights, reference, labels, vocab_size, allow_off_simplex, plausibility, kwargs
        )
        if attention:
            model.set_attn_implementation(attention)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args, **kwargs):
        r"""
        Loads a saved mixture: reads its config, then loads every component from its own folder or repo.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Repo id or folder of the mixture.
            kwargs:
                `revision` and `subfolder` locate the mixture's config. Other arguments go to every component's
                `from_pretrained`, except `trust_remote_code`: trusting the code in a mixture's repo does not imply
                trusting that of every repo it refers to. To trust these too, pass
                `component_kwargs={"trust_remote_code": True}`. `allow_unmatched_weights=True` accepts components whose
                weights do not match their models, as in [`~MixturePolicyModel.from_policies`].

        Returns:
            [`MixturePolicyModel`], in evaluation mode.
        """
        if pretrained_model_name_or_path is None:  # the weights are passed as a `state_dict`
            return super().from_pretrained(None, *model_args, **kwargs)
        folder = os.fspath(pretrained_model_name_or_path)
        config = read_mixture_config(folder, kwargs.pop("config", None), kwargs)
        output_loading_info = kwargs.pop("output_loading_info", False)
        if all(component.name_or_path is None for component in config.components):
            if is_by_component(device_map := kwargs.get("device_map")):
                kwargs["device_map"] = {name.replace("component_", "backbone_"): d for name, d in device_map.items()}
            allow_unmatched = kwargs.pop(ALLOW_UNMATCHED, False)
            kwargs["output_loading_info"] = True
            with errors_named(f"The mixture {folder!r} cannot be loaded."):
                model, info = super().from_pretrained(folder, *model_args, config=config, **kwargs)
            if output_loading_info:  # for the caller to look at
                return model, info
            check_all_loaded(f"The mixture {folder!r}", info, allow_unmatched, "Save it again.")
            return model
        attention = _take_attention_by_component(kwargs)
        model = load_mixture(cls, folder, config, kwargs)
        if attention:
            model.set_attn_implementation(attention)
        if output_loading_info:
            return model, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, *, with_code: bool | None = None, **kwargs) -> None:
        """
        Saves the mixture's config and generation config. Components are saved as references, without their weights;
        only a mixture whose components were all given in memory is saved whole, like any other model.

        Args:
            save_directory (`str` or `os.PathLike`): folder to save to; it is created where needed.
            with_code (`bool`, *optional*):
                Whether to save the code of this class too, so that
                [`~transformers.AutoModelForCausalLM.from_pretrained`] with `trust_remote_code=True` loads the mixture
                where mpo_hf is not installed. Defaults to whether the mixture was loaded with its code.
            kwargs: see [`~transformers.PreTrainedModel.save_pretrained`]. With `push_to_hub=True`, arguments of
                [`~MixturePolicyModel.push_to_hub`] too; `repo_id` defaults to the name of the folder.

        Raises:
            `ValueError`: when some components, but not all, were given in memory, or when what would be saved could not be
                opened again.
        """
        names = [name for name in ("repo_id", *PUSH_ARGUMENTS) if name in kwargs]
        push_kwargs = {name: kwargs[name] for name in names}
        for name in set(names) - {"token", "max_shard_size"}:  # these two are also arguments of saving
            del kwargs[name]
        push = kwargs.pop("push_to_hub", False) and kwargs.get("is_main_process", True)
        in_memory = [label for label, c in zip(self.config.labels, self.config.components) if c.name_or_path is None]
        with code_alongside(self, with_code):
            if len(in_memory) == len(self.policies):
                self._save_whole(save_directory, **kwargs)
            elif in_memory:
                raise ValueError(
                    f"The components {in_memory} were given in memory, so that a config cannot refer to them. Save "
                    "them, and mix them by their folders or repo ids."
                )
            else:
                # with an empty state dict, only the configs are written
                with no_progress_bar():
                    super().save_pretrained(save_directory, **{**kwargs, "state_dict": {}})
        if push:
            push_kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(**push_kwargs, with_code=with_code)

    def _save_whole(self, save_directory: str | os.PathLike, state_dict: dict | None = None, **kwargs) -> None:
        used = [handle.backbone for handle in self.policies]
        if used != list(range(len(used))) or any(handle.adapter is not None for handle in self.policies):
            raise ValueError(
                "Adapters, and components that share one model in memory, cannot be written into one checkpoint. Save the adapters or "
                "models, and mix them by their folders or repo ids."
            )
        if len(dtypes := {backbone.dtype for backbone in self.backbones[: len(used)]}) > 1:
            raise ValueError(
                f"A checkpoint is loaded in one dtype, but the components have {sorted(map(str, dtypes))}. Convert the "
                "mixture (`model.to(torch.bfloat16)`), or save the models and mix them by their folders or repo ids."
            )
        if not getattr(self, "_hf_peft_config_loaded", False):  # else Transformers saves the adapter over the mixture
            check_can_be_opened(dict(zip(self.config.labels, self.backbones)))
        if state_dict is None and self._num_backbones > len(used):
            logger.warning("The reference policy was given in memory and is not part of the saved mixture.")
            names = tuple(f"backbone_{k}." for k in used)
            state_dict = {key: value for key, value in self.state_dict().items() if key.startswith(names)}
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)


def _take_attention_by_component(kwargs: dict[str, Any]) -> dict[str, str]:
    """Removes an `attn_implementation` by component from the arguments that apply to all components alike."""
    by_component = isinstance(kwargs.get("attn_implementation"), dict)
    return kwargs.pop("attn_implementation") if by_component else {}


def _keep_layers(hidden_states: list[torch.Tensor], wanted: bool | int | list[int]) -> tuple[torch.Tensor | None, ...]:
    """All hidden states, or those at the indices `wanted` with `None` in place of the others."""
    if isinstance(wanted, bool):
        return tuple(hidden_states)
    count = len(hidden_states)
    kept = {i % count for i in ([wanted] if isinstance(wanted, int) else wanted) if -count <= i < count}
    return tuple(state if i in kept else None for i, state in enumerate(hidden_states))
