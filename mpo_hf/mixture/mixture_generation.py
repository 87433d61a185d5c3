"""What `generate()` does differently for a mixture: weights for one call, and errors for unsupported modes."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.utils import ModelOutput

from .adapter_switching import held
from .compat import CACHE_NAME, CACHE_NAMES, has_recurrent_layers, kinds_not_static, pick_cache, without_peft
from .component_traits import crosses_switch, switch_lengths
from .configuration_mixture import MixturePolicyConfig
from .invalid_logits import NoTokenLeft, check_numbers, peaks_of
from .mixture_cache import bind_cache, check_cache, check_room
from .mixture_inputs import positions_from_mask
from .mixture_weights import check_mixture_weights, prune_mixture_weights
from .stacked_cache import prepare_step


# Options of a generation config that need something which a mixture does not have, and what to do instead.
REFUSED_OPTIONS = {
    "assistant_early_exit": "the first layers of a mixture are no model; draft with `assistant_model=model.policy(k)`",
    "use_mtp": "a mixture has no multi-token prediction heads; draft with `assistant_model=model.policy(k)`",
    "speculation_type": "such drafts are made from the hidden states and the head of one model, and a mixture has one "
    "for each component; draft with `assistant_model=model.policy(k)`",
    "dola_layers": "DoLa contrasts layers of one model; call it on one component, `model.policy(k).backbones[0]`",
}
NO_PAGED_CACHE = (
    "Continuous batching (`generate_batch`, `cache_implementation='paged'`) is not available for a mixture: its paged cache "
    "has one layer for each layer index, and components use the same indices. Call `generate` on a padded batch."
)
REFUSED_ARGUMENTS = {
    "inputs_embeds": "each component of a mixture has embeddings of its own. Pass `input_ids`",
    "return_dict": "pass `return_dict_in_generate`",
}


def ids_of(tokens: int | list[int] | torch.Tensor | None) -> list[int]:
    """The ids in a field of a generation config."""
    return [] if tokens is None else torch.as_tensor(tokens).flatten().tolist()


def why_endless(generation_config: GenerationConfig, config: MixturePolicyConfig) -> str | None:
    """Why no token ends a text, and what to do; `None` where one does, or none is meant to."""
    ends = ids_of(generation_config.eos_token_id)
    # an id that not even a component has is how some say that nothing should end a text
    known = max(decoder.vocab_size for decoder in config.decoder_configs)
    if not ends or min(ends) < config.vocab_size or min(ends) >= known:
        return None
    return (
        f"`eos_token_id={ends}` is beyond the {config.vocab_size} token ids that all components have in common, so that no "
        "text would ever end. Name one that they have in common (`model.generation_config.eos_token_id = ...`), or `[]` to "
        "generate `max_new_tokens`."
    )


class MixtureGenerationMixin(GenerationMixin):
    """The part of [`MixturePolicyModel`] that `generate()` calls before the first token."""

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        compiled = super().get_compiled_call(compile_config)

        def call(*args, **kwargs):
            with held(self.backbones):  # compiled code switches adapters too, and can hold no lock
                return compiled(*args, **kwargs)

        return call

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(NO_PAGED_CACHE)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if any(name in model_kwargs for name in CACHE_NAMES):
            model_kwargs[CACHE_NAME] = pick_cache(model_kwargs, "MixturePolicyModel.generate")
        # weights in a generation config are for this call only, and not for an assistant, which gets the config too
        weights = generation_config.__dict__.pop("mixture_weights", None)
        if weights is not None:
            model_kwargs["mixture_weights"] = weights
        prune_below = generation_config.__dict__.pop("prune_below", None)
        if below := model_kwargs.pop("prune_below", prune_below):
            weights = model_kwargs.get("mixture_weights")
            weights = self.config.mixture_weights if weights is None else weights
            model_kwargs["mixture_weights"] = prune_mixture_weights(weights, below)
        for name, reason in REFUSED_OPTIONS.items():
            if value := getattr(generation_config, name, None):
                raise ValueError(f"`{name}={value!r}` is not available for a mixture: {reason}.")
        self._check_ids(generation_config)
        self._check_modes(generation_config, has_weights=model_kwargs.get("mixture_weights") is not None)
        return generation_config, model_kwargs

    def _check_ids(self, generation_config: GenerationConfig) -> None:
        """Refuses ids that a text should end with or be forced to, and that not all components have."""
        reason, size = why_endless(generation_config, self.config), self.config.vocab_size
        if reason and not generation_config.is_assistant:  # which is told by its target where a text ends
            raise ValueError(reason)
        ends = ids_of(generation_config.eos_token_id)
        if common := [token for token in ends if token < size]:
            generation_config.eos_token_id = common  # of a copy; the others never come, and are beyond the scores
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            if any(token >= size for token in ids_of(getattr(generation_config, name))):
                raise ValueError(
                    f"`{name}={getattr(generation_config, name)}` is beyond the {size} token ids that all components have in "
                    "common, and cannot be forced. Set it to one that they have, or to `None`."
                )

    def _check_modes(self, generation_config: GenerationConfig, has_weights: bool) -> None:
        cache = generation_config.cache_implementation or ""
        if cache == "paged":
            raise ValueError(NO_PAGED_CACHE)
        if "offloaded" in cache and self.device.type == "cpu":
            raise ValueError(
                f"`cache_implementation={cache!r}` moves keys and values from an accelerator to the CPU, but this "
                "mixture runs on the CPU. Leave it out."
            )
        if "static" in cache and (kinds := kinds_not_static(self.config)):
            raise ValueError(
                f"`cache_implementation={cache!r}`: static caches have no layers of the kinds {sorted(kinds)}, which components "
                "of this mixture have. Leave it out."
            )
        if generation_config.prefill_chunk_size:
            self._check_chunks(generation_config.prefill_chunk_size)
        if generation_config.penalty_alpha and generation_config.get_generation_mode() == (
            GenerationMode.CONTRASTIVE_SEARCH
        ):
            raise ValueError(
                f"`penalty_alpha={generation_config.penalty_alpha}` is contrastive search, which compares the last hidden "
                "states of one model, and a mixture has one for each component. To contrast policies, see "
                "`MixturePolicyModel.from_contrast`."
            )
        if generation_config.token_healing and has_weights:
            raise ValueError(
                "`token_healing` generates with the weights of the model, and `mixture_weights` are for this call only. "
                "Assign them: `model.mixture_weights = ...`."
            )

    def _check_chunks(self, size: int) -> None:
        if set(self.config.layer_types) == {"linear_attention"}:
            raise ValueError(
                f"`prefill_chunk_size={size}` needs a cache that records how many tokens it holds, which the states of "
                "recurrent components do not. Leave it out."
            )
        if size == 1 and has_recurrent_layers(self.config):
            raise ValueError(
                "`prefill_chunk_size=1`: recurrent components ignore the mask of a single token, so that padding would count "
                "as text. Use larger chunks."
            )

    def _get_static_cache_init_shape(self):
        # states of recurrent components have no heads; their layers are initialized at their first use
        return None if has_recurrent_layers(self.config) else super()._get_static_cache_init_shape()

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        # as for each component alone: the kernels of some quantization methods cannot be compiled
        quantizers = [getattr(without_peft(backbone), "hf_quantizer", None) for backbone in self.backbones]
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config) and all(
            quantizer is None or quantizer.is_compileable for quantizer in quantizers
        )

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs) -> None:
        assistant = generation_mode_kwargs.get("assistant_model")
        if any(assistant is backbone for backbone in self.backbones):
            if assistant.config.get_text_config().vocab_size != self.config.vocab_size:
                # Transformers would treat it as a model with another tokenizer, and prune the mixture's head
                raise ValueError(
                    f"The assistant is a component of this mixture, with token ids beyond the {self.config.vocab_size} that "
                    "all components have in common. Pass it as `assistant_model=model.policy(k)`, without tokenizers."
                )
        if generation_config.do_sample and "assistant_tokenizer" in generation_mode_kwargs:
            # Transformers (5.24) pairs the assistant's logits with the wrong tokens, so that samples are biased
            raise ValueError(
                "With `assistant_tokenizer`, a mixture is decoded greedily only: sampling would not draw from the mixture. "
                "Leave the assistant out, or take one with the tokenizer of the mixture."
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        for name, reason in REFUSED_ARGUMENTS.items():
            if model_kwargs.get(name) is not None:
                raise ValueError(f"`{name}` is not available in `generate` of a mixture: {reason}.")
        super()._validate_model_kwargs(model_kwargs)
        if (weights := model_kwargs.get("mixture_weights")) is not None:
            check_mixture_weights(weights, len(self.policies), self.config.allow_off_simplex)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        cache = model_kwargs.get(CACHE_NAME)
        if cache is not None and not isinstance(cache, tuple):
            mask = model_kwargs.get("attention_mask")
            length = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            check_cache(cache)
            check_room(cache, rows, length, max_cache_length)
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _expand_inputs_for_generation(self, expand_size: int = 1, mixture_weights=None, **kwargs):
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        if mixture_weights is not None:
            weights = check_mixture_weights(mixture_weights, len(self.policies), self.config.allow_off_simplex)
            # weights by row follow their row; (K,) is not a batch of K rows
            model_kwargs["mixture_weights"] = (
                weights.repeat_interleave(expand_size, 0) if weights.ndim == 2 else weights
            )
        return input_ids, model_kwargs

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        input_ids_seq_length: int | None = None,
        *args,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        processors = super()._get_logits_processor(
            generation_config, input_ids_seq_length, *args, model_kwargs=model_kwargs, **kwargs
        )
        weights = (model_kwargs or {}).get("mixture_weights")
        for processor in processors:
            # guidance runs the model a second time, which must be with the same weights
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is self:
                processor.model = functools.partial(self, mixture_weights=weights)
        ends, beams = generation_config._eos_token_tensor, generation_config.num_beams or 1
        processors.insert(0, NoTokenLeft(input_ids_seq_length or 0, ends, beams))
        return processors

    def _update_model_kwargs_for_generation(self, outputs: ModelOutput, *args, **kwargs) -> dict[str, Any]:
        check_numbers(outputs.logits[:, -1], peaks_of(outputs), self.config.labels)
        return super()._update_model_kwargs_for_generation(outputs, *args, **kwargs)

    def _get_candidate_generator(self, *args, model_kwargs: dict[str, Any], **kwargs):
        # the weights of a call are for the target; an assistant has its own, or none
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != "mixture_weights"}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> torch.Tensor | None:
        # Every component builds the masks of its own layers from the 2D mask. It is padded to the length of the cache,
        # so that compiled code sees one shape at all steps; positions that are still empty are masked by causality.
        # Not for several tokens at once with recurrent layers, which take the last columns of the mask for those of
        # the tokens.
        if attention_mask is None or (inputs_embeds.shape[1] > 1 and has_recurrent_layers(config)):
            return attention_mask
        to_come = pick_cache(kwargs, "create_masks_for_generate").get_max_length() - attention_mask.shape[1]
        return nn.functional.pad(attention_mask, (0, max(to_come, 0)), value=1)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, is_first_iteration: bool | None = False, **kwargs
    ) -> dict[str, Any]:
        # no `inputs_embeds` among the arguments: each component has embeddings of its own
        cache = pick_cache(kwargs, "MixturePolicyModel.prepare_inputs_for_generation")
        if cache is not None:
            kwargs[CACHE_NAME] = cache
            if self._reads_anew(input_ids, cache, kwargs):
                cache.reset()
                kwargs["next_sequence_length"] = None
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration:
            inputs["input_ids"] = self._ids_for_all(inputs["input_ids"], kwargs.get("attention_mask"))
        else:
            # finished rows are continued with padding, with 1 in the mask, even if some component has no such id
            foreign = inputs["input_ids"] >= self.config.vocab_size
            inputs["input_ids"] = inputs["input_ids"].masked_fill(foreign, 0)
        # from the mask as it was given: the one for a static cache is padded
        inputs["position_ids"] = positions_from_mask(
            inputs.get("position_ids"), kwargs.get("attention_mask"), inputs["input_ids"].shape[1]
        )
        if cache is not None and cache.is_compileable:
            inputs["mixture_weights"] = self._weights_for_compiled_code(inputs, cache, is_first_iteration)
            inputs[CACHE_NAME] = prepare_step(cache)
        return inputs

    def _reads_anew(self, input_ids: torch.LongTensor, cache: Cache, inputs: dict[str, Any]) -> bool:
        """Whether the keys of some component in a cache are rotated by other frequencies than those of the longer text."""
        if not any(map(switch_lengths, self.backbones)):
            return False
        filled = int(cache.get_seq_length())
        is_chunk = input_ids.shape[1] <= filled
        new = input_ids.shape[1] if is_chunk else input_ids.shape[1] - filled
        crossing = any(crosses_switch(model, inputs.get("position_ids"), new, cache) for model in self.backbones)
        if crossing and is_chunk:
            raise ValueError(
                "`prefill_chunk_size`: the prompt grows beyond a length where a component rotates all keys by other "
                "frequencies, so that it must be read at once. Leave it out."
            )
        return crossing

    def _weights_for_compiled_code(
        self, inputs: dict[str, Any], cache: Cache, is_first_iteration: bool | None
    ) -> torch.Tensor:
        """
        Checked weights as a tensor. Compiled code cannot read its values, and would be recompiled for every new Python
        number. It takes the components to run from the cache; their stacks are made here.
        """
        weights, rows = inputs.get("mixture_weights"), len(inputs["input_ids"])
        if is_first_iteration or not hasattr(cache, "mixture_components"):
            _, active = self._weights_for(weights, rows)
            active, views = self._views(cache, active)
            if is_first_iteration and cache.is_initialized:  # chunks of a prompt may be compiled too
                self._prepare_steps(active, views, rows)
        elif weights is None:  # the model's own weights may have been changed since the last step
            bind_cache(cache, self._weights_for(None, rows)[1], cache.mixture_layer_counts)
        dtype = torch.promote_types(self.dtype, torch.float32)
        weights = torch.as_tensor(self.config.mixture_weights if weights is None else weights, dtype=dtype)
        return weights.to(self.device, non_blocking=True)
