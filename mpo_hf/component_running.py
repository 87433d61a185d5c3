"""How the components of a mixture run: one after another, or adapters over one base side by side in one pass."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .compat import activate_adapter, recomputes_layers
from .component_loading import PolicyHandle, forward_parameters
from .mixture_cache import bind_cache, component_views
from .stacked_cache import StackedCacheView, can_stack, join_static_layers
from .stacked_lora import AdapterStacks
from .stacked_rows import can_run_stacked, repeat_rows


class ComponentRunningMixin:
    """
    The part of [`MixturePolicyModel`] that runs its components on inputs they have in common.

    Attributes:
        backbones (`list[nn.Module]`): loaded models, each shared by one or more components.
        policies (`list[PolicyHandle]`): which backbone, with which adapter, every component runs on.
        stack_adapters (`bool`): whether adapters over one base run side by side where they can.
    """

    backbones: list[nn.Module]
    policies: list[PolicyHandle]
    stack_adapters: bool
    _stacks: dict[int, AdapterStacks]

    def _views(self, cache: Cache, active: Sequence[int]) -> tuple[Sequence[int], dict[int, Cache]]:
        """The components that a cache holds, and each one's view of it; a new cache is to hold those of `active`."""
        counts = [decoder.num_hidden_layers for decoder in self.config.decoder_configs]
        bound = bind_cache(cache, active, counts)
        return bound, component_views(cache, bound, counts)

    def _inputs_for_all(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
    ) -> dict[str, torch.Tensor | None]:
        """The inputs that mean the same to all components."""
        return {
            "input_ids": self._ids_for_all(input_ids, attention_mask),
            "attention_mask": attention_mask,
            "position_ids": _positions(position_ids, attention_mask, input_ids.shape[1]),
        }

    def _ids_for_all(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.LongTensor:
        """Replaces padding ids that some component has no embedding for; other ids of that kind are an error."""
        sizes = {decoder.vocab_size for decoder in self.config.decoder_configs}
        if sizes == {self.config.vocab_size}:
            return input_ids
        foreign = input_ids >= self.config.vocab_size
        if torch.compiler.is_compiling() and input_ids.shape[1] == 1:  # a step of `generate`, which has looked
            return input_ids.masked_fill(foreign, 0)
        if not foreign.any():
            return input_ids
        seen = foreign
        if attention_mask is not None and attention_mask.ndim == 2:
            seen = foreign & (attention_mask[:, -input_ids.shape[1] :] != 0)
        if seen.any():
            raise ValueError(
                f"The token id {input_ids[seen][0].item()} is not among the {self.config.vocab_size} that all components "
                "have in common."
            )
        return input_ids.masked_fill(foreign, 0)

    def _component_logits(
        self, active: Sequence[int], inputs: dict[str, Any], views: dict[int, Cache], extras: dict[str, list]
    ) -> Iterator[torch.Tensor]:
        """Logits of one component after another. Adapters that can run side by side do so when the first is due."""
        # the state of adapters is compared wherever something is computed anew, not at every step of decoding
        is_step = inputs["input_ids"].shape[1] == 1 and bool(views)
        groups = self._adapter_groups(active, inputs, views, check=not is_step)
        done: dict[int, torch.Tensor] = {}
        for k in active:
            if k in groups and k not in done:
                done.update(self._run_stacked(*groups[k], inputs, views))
            yield (
                done.pop(k) if k in done else self._run_policy(k, {**inputs, "past_key_values": views.get(k)}, extras)
            )
        if views and not is_step and not torch.compiler.is_compiling():
            self._prepare_steps([k for k in active if k not in groups], views, len(inputs["input_ids"]))

    def _adapter_groups(
        self, active: Sequence[int], inputs: dict[str, Any], views: dict[int, Cache], check: bool = True
    ) -> dict[int, tuple[list[int], nn.Module]]:
        """
        For components that run side by side in a call: all of their group, and the model that runs them. `check` is
        whether to look if the adapters have changed.
        """
        groups: dict[int, tuple[list[int], nn.Module]] = {}
        if not self.stack_adapters or hasattr(self, "peft_config") or not can_stack(views.values()):
            return groups
        for index in dict.fromkeys(self.policies[k].backbone for k in active):
            members = self._stackable(index, active)
            if len(members) > 1 and can_run_stacked(self.backbones[index], inputs, len(members)):
                stack = self._stacks[index].get([self.policies[k].adapter for k in members], check=check)
                if stack is not None:
                    groups |= dict.fromkeys(members, (members, stack))
        return groups

    def _prepare_steps(self, active: Sequence[int], views: dict[int, Cache], rows: int) -> None:
        """
        Has ready what steps of decoding need of adapters that a long prompt has run one after another. Steps do not look
        whether adapters have changed, and those that are compiled neither stack adapters nor gather their keys.
        """
        step = {"input_ids": torch.empty(rows, 1, dtype=torch.long, device=self.device)}
        for members, _ in self._adapter_groups(active, step, views).values():
            join_static_layers([views[k] for k in members])

    def _stackable(self, index: int, components: Sequence[int]) -> list[int]:
        """Which of some components run on a model by adapters that can run side by side."""
        members = [k for k in components if self.policies[k].backbone == index]
        if len(members) < 2:
            return []
        model = self.backbones[index]
        if index not in self._stacks or self._stacks[index].model is not model:
            if torch.compiler.is_compiling():
                return []  # stacks are made where nothing is compiled, such as before the first step of `generate`
            self._stacks[index] = AdapterStacks(model)
        return [k for k in members if self._stacks[index].allows(self.policies[k].adapter)]

    @property
    def stacked_components(self) -> list[list[int]]:
        """
        Components that are adapters over one base and run in one forward pass, where they have weight and nothing is
        trained. All others run one after another, with the same results; why is logged at the level `info`.
        """
        groups = [self._stackable(index, range(len(self.policies))) for index in range(self._num_backbones)]
        return [
            group
            for index, group in enumerate(groups)
            if len(group) > 1 and self._stacks[index].get([self.policies[k].adapter for k in group]) is not None
        ]

    def _run_stacked(
        self, members: list[int], stack: nn.Module, inputs: dict[str, Any], views: dict[int, Cache]
    ) -> dict[int, torch.Tensor]:
        """Logits of components that run side by side."""
        keep = inputs["logits_to_keep"]
        inputs = self._accepted_inputs(stack, inputs)
        if views:
            inputs["past_key_values"] = StackedCacheView([views[k] for k in members])
        logits = self._common_logits(stack(**repeat_rows(inputs, len(members)), return_dict=True).logits, inputs, keep)
        return dict(zip(members, logits.chunk(len(members))))

    def _run_policy(self, k: int, inputs: dict[str, Any], extras: dict[str, list]) -> torch.Tensor:
        """Logits of component `k` over the common token ids; hidden states and attentions are added to `extras`."""
        keep = inputs["logits_to_keep"]
        backbone, inputs = self._ready_policy(k, inputs)
        output = backbone(**inputs, return_dict=True)
        for name, collected in extras.items():
            collected.extend(getattr(output, name, None) or ())
        return self._common_logits(output.logits, inputs, keep)

    def _common_logits(self, logits: torch.Tensor, inputs: dict[str, Any], keep: int | torch.Tensor) -> torch.Tensor:
        """The part of a component's logits that was asked for, over the common token ids."""
        if "logits_to_keep" not in inputs:
            logits = logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return logits[..., : self.config.vocab_size]

    def _ready_policy(self, k: int, inputs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        """The model that runs component `k`, with its adapter active, and what it accepts of `inputs`, on its device."""
        handle = self.policies[k]
        backbone = self.backbones[handle.backbone]
        activate_adapter(backbone, handle.adapter)
        if self.training and torch.is_grad_enabled() and recomputes_layers(backbone) and self._is_shared(handle):
            raise ValueError(
                "With gradient checkpointing the layers run again when gradients are computed, and then with the adapter "
                "that ran last: those of the others would be wrong. Train adapters of one model without it."
            )
        return backbone, self._accepted_inputs(backbone, inputs)

    @staticmethod
    def _accepted_inputs(backbone: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """What a model accepts of `inputs`, on its device."""
        accepted = forward_parameters(backbone)
        inputs = {n: v for n, v in inputs.items() if n in accepted or n not in ("position_ids", "logits_to_keep")}
        device = execution_device(backbone)
        return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}

    def _is_shared(self, handle: PolicyHandle) -> bool:
        return len({other.adapter for other in self.policies if other.backbone == handle.backbone}) > 1


def execution_device(backbone: nn.Module) -> torch.device:
    """Where a model computes. Weights that Accelerate offloads are on `meta` until they are needed."""
    device = next((p.device for p in backbone.parameters() if p.device.type != "meta"), None)
    if device is None:
        base = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
        device = getattr(getattr(base, "_hf_hook", None), "execution_device", None)
    return torch.device("meta" if device is None else device)


def _positions(
    position_ids: torch.LongTensor | None, attention_mask: torch.Tensor | None, length: int
) -> torch.LongTensor | None:
    """Positions from a 2D attention mask: without them some architectures are silently wrong on left padding."""
    if position_ids is not None or attention_mask is None or attention_mask.ndim != 2:
        return position_ids
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
