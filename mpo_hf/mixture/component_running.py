"""How the components of a mixture run: one after another, or side by side in one pass."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .adapter_switching import call_with_adapter, lock_of
from .compat import (
    kinds_without_config,
    recomputes_layers,
    starts_anew,
    whole_property,
    without_peft,
)
from .component_loading import PolicyHandle
from .component_traits import crosses_switch, is_moved_by_padding, starts_with_padding, switch_lengths
from .configuration_mixture import MixturePolicyConfig
from .mixture_cache import bind_cache, component_views
from .mixture_inputs import (
    accepted_inputs,
    copy_to,
    execution_device,
    forward_parameters,
    positions_by_row,
    positions_from_mask,
    repeat_rows,
)
from .product_layouts import are_plain
from .stacked_cache import can_stack, join_static_layers, stack_views
from .stacked_lora import AdapterStacks
from .stacked_models import ModelStacks
from .stacked_rows import can_run_stacked, saves_time
from .tuned_modules import TunedModels


class ComponentRunningMixin:
    """
    The part of [`MixturePolicyModel`] that runs its components on inputs they have in common.

    Attributes:
        backbones (`list[nn.Module]`): loaded models, each shared by one or more components.
        policies (`list[PolicyHandle]`): which backbone, with which adapter, every component runs on.
        stack_adapters (`bool`): whether adapters over one base run side by side where they can.
        stack_models (`bool`, *optional*):
            Whether full models of one architecture do; by default, those on the CPU that were not given in memory.
    """

    config: MixturePolicyConfig
    backbones: list[nn.Module]
    policies: list[PolicyHandle]
    stack_adapters: bool
    stack_models: bool | None
    pooled_head: nn.Module
    layer_counts: list[int]
    _stacks: dict[int, AdapterStacks]
    _model_stacks: ModelStacks
    _tuned_models: TunedModels

    def _views(self, cache: Cache, active: Sequence[int]) -> tuple[Sequence[int], dict[int, Cache]]:
        """The components that a cache holds, and the view of each. A new cache is bound to those of `active`."""
        if not cache.layers and (kinds := kinds_without_config(self.config)):
            raise ValueError(
                "This cache was made without a config, for attention layers only, and components of this mixture have others "
                f"({', '.join(sorted(kinds))}). Make it from the config: `DynamicCache(config=model.config)`."
            )
        bound = bind_cache(cache, active, self.layer_counts)
        return bound, component_views(cache, bound, self.layer_counts)

    def _inputs_for_all(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
    ) -> dict[str, torch.Tensor | None]:
        """The inputs that all components have in common."""
        return {
            "input_ids": self._ids_for_all(input_ids, attention_mask),
            "attention_mask": attention_mask,
            "position_ids": positions_from_mask(position_ids, attention_mask, input_ids.shape[1]),
        }

    def _ids_for_all(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.LongTensor:
        """Replaces padding ids that some component has no embedding for; any other such id is an error."""
        sizes = {decoder.vocab_size for decoder in self.config.decoder_configs}
        if sizes == {self.config.vocab_size}:
            return input_ids
        foreign = input_ids >= self.config.vocab_size
        if (
            torch.compiler.is_compiling() and input_ids.shape[1] == 1
        ):  # a step of `generate`, which has checked the ids
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
        """Yields the logits of the components in order. Components of one stack run when the first of them is due."""
        # adapters and models are checked for changes at every prompt and full pass, not at every step of decoding
        is_step = inputs["input_ids"].shape[1] == 1 and bool(views)
        if not torch.compiler.is_compiling():
            self._check_text(active, inputs, views, is_step)
        if inputs["position_ids"] is None and (view := next((v for v in views.values() if not v.is_recurrent), None)):
            # some models would go on from positions that they remember from a text they read before
            inputs = {**inputs, "position_ids": positions_by_row(inputs["input_ids"], view.get_seq_length())}
        if torch.compiler.is_compiling():  # of code that is compiled, stacks are made before
            groups = self._groups(active, inputs, views, check=not is_step)
        else:
            with lock_of(self.pooled_head):  # stacks are made at first use; shallow copies of a mixture share them
                groups = self._groups(active, inputs, views, check=not is_step)
        backbones = self.backbones
        devices = {k: execution_device(backbones[self.policies[k].backbone]) for k in active}
        # copied before anything runs: a copy waits for the work on its source GPU, and would delay other devices
        own = {device: copy_to(device, inputs) for device in dict.fromkeys(devices.values())}
        done: dict[int, torch.Tensor] = {}
        for k in active:
            if k in groups and k not in done:
                done.update(self._run_stacked(*groups[k], own[devices[k]], views))
            if k in done:
                yield done.pop(k)
            else:
                yield self._run_policy(k, {**own[devices[k]], "cache": views.get(k)}, extras)
        if views and not is_step and not torch.compiler.is_compiling():
            alone = [k for k in active if k not in groups or len(groups[k][0]) == 1]
            self._prepare_steps(alone, views, len(inputs["input_ids"]))

    def _check_text(
        self, active: Sequence[int], inputs: dict[str, Any], views: dict[int, Cache], is_step: bool
    ) -> None:
        """Refuses padding, and texts that go on from a cache, which some component would silently read as another text."""
        mask = inputs["attention_mask"]
        for k in active:
            backbone = self.backbones[self.policies[k].backbone]
            if not is_step and "position_ids" not in forward_parameters(backbone) and starts_with_padding(mask):
                if is_moved_by_padding(backbone):
                    raise ValueError(
                        f"The component {self.config.labels[k]!r} ({type(without_peft(backbone)).__name__}) takes no positions, "
                        "and reads another text behind padding on the left. Run texts of one length together, or one at a time."
                    )
            if views and crosses_switch(backbone, inputs["position_ids"], inputs["input_ids"].shape[1], views[k]):
                raise ValueError(
                    f"The component {self.config.labels[k]!r} rotates keys by other frequencies beyond "
                    f"{sorted(switch_lengths(backbone))} tokens, and those in this cache are shorter. Start from a new cache."
                )

    def _groups(
        self,
        active: Sequence[int],
        inputs: dict[str, Any],
        views: dict[int, Cache],
        check: bool = True,
        with_single: bool = True,
    ) -> dict[int, tuple[list[int], nn.Module]]:
        """
        Maps each component that runs side by side with others in this call, or by itself on a tuned copy, to all members of
        its group and the model that runs them. `check` is whether to compare adapters and models with what that was made
        from, `with_single` whether to include components that run by themselves.
        """
        groups: dict[int, tuple[list[int], nn.Module]] = {}
        if hasattr(self, "peft_config") or not can_stack(views.values()):
            return groups
        for index in dict.fromkeys(self.policies[k].backbone for k in active) if self.stack_adapters else ():
            if not can_run_stacked(self.backbones[index], inputs):
                continue
            for members in self._adapter_groups(index, active, inputs, with_single):
                stack = self._stacks[index].get([self.policies[k].adapter for k in members], check=check)
                if stack is not None:
                    groups |= dict.fromkeys(members, (members, stack))
        full = self._full_models
        for members, models in self._model_stacks.groups(self._stackable_models(full), check):
            if set(members) <= set(active) and saves_time(inputs, len(members)):
                stack = models.get(check=check) if all(can_run_stacked(m, inputs) for m in models.models) else None
                if stack is not None:
                    groups |= dict.fromkeys(members, (members, stack))
        for k in active if with_single else ():
            model = full.get(k)
            if model is None or k in groups or hasattr(model, "get_base_model"):
                continue
            if self._is_tuned(model) and can_run_stacked(model, inputs):
                groups[k] = [k], self._tuned_models.get(model, check=check)
        return groups

    def _adapter_groups(
        self, index: int, active: Sequence[int], inputs: dict[str, Any], with_single: bool
    ) -> list[list[int]]:
        """Which components run side by side on a model with adapters, or alone on its stack of one."""
        members = self._stackable(index, active)
        if len(members) > 1 and saves_time(inputs, len(members)):
            return [members]
        return [[k] for k in members] if with_single and self._is_tuned(self.backbones[index]) else []

    @staticmethod
    def _is_tuned(backbone: nn.Module) -> bool:
        """Whether a model runs as a copy with other layers even by itself."""
        return not torch.compiler.is_compiling() and execution_device(backbone).type == "cpu" and not are_plain()

    def _prepare_steps(self, active: Sequence[int], views: dict[int, Cache], rows: int) -> None:
        """
        Prepares the stacks for the decoding steps that follow a prompt too long to run stacked. Steps do not check
        whether adapters have changed, and compiled steps can neither stack adapters nor gather their keys.
        """
        step = {"input_ids": torch.empty(rows, 1, dtype=torch.long, device=self.device)}
        for members, _ in self._groups(active, step, views, with_single=False).values():
            join_static_layers([views[k] for k in members])

    def _stackable(self, index: int, components: Sequence[int]) -> list[int]:
        """Which of `components` run on a model with adapters that can be stacked."""
        members = [k for k in components if self.policies[k].backbone == index]
        model = self.backbones[index]
        if not members or not hasattr(model, "get_base_model"):
            return []
        if torch.compiler.is_compiling() and (index not in self._stacks or self._stacks[index].model is not model):
            return []  # stacks are made outside of compiled code, such as before the first step of `generate`
        stacks = self._adapter_stacks(index)
        return [k for k in members if stacks.allows(self.policies[k].adapter)]

    def _adapter_stacks(self, index: int) -> AdapterStacks:
        """The stacks of a model with adapters."""
        model = self.backbones[index]
        if index not in self._stacks or self._stacks[index].model is not model:
            self._stacks[index] = AdapterStacks(model)
        return self._stacks[index]

    @whole_property
    def stacked_components(self) -> list[list[int]]:
        """
        Groups of components that run in one forward pass, as long as they have weight and nothing is trained: adapters
        over one base and full models of one architecture. All others run one after another, with the same results; the
        reason is logged at level `info`.
        """
        with lock_of(self.pooled_head):
            return self._stacked_components()

    def _stacked_components(self) -> list[list[int]]:
        found = []
        for index in range(self._num_backbones) if self.stack_adapters else ():
            group = self._stackable(index, range(len(self.policies)))
            if len(group) > 1 and self._stacks[index].get([self.policies[k].adapter for k in group]) is not None:
                found.append(group)
        full = self._model_stacks.groups(self._stackable_models(self._full_models))
        return found + [group for group, models in full if models.get() is not None]

    def _stackable_models(self, full: dict[int, nn.Module]) -> dict[int, nn.Module]:
        """Those of the full models that may run side by side."""
        if self.stack_models is not None:
            return full if self.stack_models else {}
        return {
            k: model
            for k, model in full.items()
            if self.config.components[k].name_or_path is not None and execution_device(model).type == "cpu"
        }

    @property
    def _full_models(self) -> dict[int, nn.Module]:
        """The models of the components without an adapter."""
        backbones = self.backbones
        return {k: backbones[handle.backbone] for k, handle in enumerate(self.policies) if handle.adapter is None}

    def _run_stacked(
        self, members: list[int], stack: nn.Module, inputs: dict[str, Any], views: dict[int, Cache]
    ) -> dict[int, torch.Tensor]:
        """Logits of components that run side by side."""
        keep = inputs["logits_to_keep"]
        if inputs["position_ids"] is None:
            inputs = {**inputs, "position_ids": positions_by_row(inputs["input_ids"])}
        if views:
            inputs = {**inputs, "cache": stack_views([views[k] for k in members])}
        inputs = accepted_inputs(stack, inputs)
        logits = self._common_logits(stack(**repeat_rows(inputs, len(members)), return_dict=True).logits, inputs, keep)
        return dict(zip(members, logits.chunk(len(members))))

    def _run_policy(self, k: int, inputs: dict[str, Any], extras: dict[str, list]) -> torch.Tensor:
        """Logits of component `k` over the common token ids; hidden states and attentions are added to `extras`."""
        keep, mask, view = inputs["logits_to_keep"], inputs["attention_mask"], inputs.get("cache")
        backbone, inputs = self._ready_policy(k, inputs)
        if view is not None and view.has_states:
            length = inputs["input_ids"].shape[1]
            if length > 1 and view.has_previous_state() and starts_anew(backbone):
                raise ValueError(
                    f"The component {self.config.labels[k]!r} ({type(without_peft(backbone)).__name__}) cannot go on from a "
                    f"cache with {length} new tokens: given several at once, it discards its state. Pass them one at a time, "
                    "start from a new cache, or leave out `prefill_chunk_size`."
                )
            if view.is_recurrent and mask is not None and mask.ndim == 2:
                # the past of such models is in their state, so that their mask covers the new tokens only
                inputs["attention_mask"] = inputs["attention_mask"][:, -length:]
        output = call_with_adapter(backbone, {**inputs, "return_dict": True}, backbone, self.policies[k].adapter)
        for name, collected in extras.items():
            collected.extend(getattr(output, name, None) or ())
        return self._common_logits(output.logits, inputs, keep)

    def _common_logits(self, logits: torch.Tensor, inputs: dict[str, Any], keep: int | torch.Tensor) -> torch.Tensor:
        """The positions of a component's logits that were asked for, over the common token ids."""
        if "logits_to_keep" not in inputs:
            logits = logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return logits[..., : self.config.vocab_size]

    def _ready_policy(self, k: int, inputs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        """The model that runs component `k`, and the inputs that it accepts, on its device."""
        handle = self.policies[k]
        backbone = self.backbones[handle.backbone]
        if self.training and torch.is_grad_enabled() and recomputes_layers(backbone) and self._is_shared(handle):
            raise ValueError(
                "With gradient checkpointing the layers run again when gradients are computed, and then with the adapter "
                "that ran last: those of the others would be wrong. Train adapters of one model without it."
            )
        return backbone, copy_to(execution_device(backbone), accepted_inputs(backbone, inputs))

    def _is_shared(self, handle: PolicyHandle) -> bool:
        return len({other.adapter for other in self.policies if other.backbone == handle.backbone}) > 1
