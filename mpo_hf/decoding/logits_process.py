"""Log-linear mixing inside a `generate()` call on a model of the user's own."""

import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessor
from transformers.cache_utils import Cache

from ..mixture.adapter_switching import with_own_switch
from ..mixture.component_loading import Policy
from ..mixture.component_traits import crosses_switch
from ..mixture.configuration_mixture import MixtureComponent
from ..mixture.invalid_logits import check_numbers, peaks_of
from ..mixture.mixture_weights import check_mixture_weights
from ..mixture.modeling_mixture import MixturePolicyModel
from ..mixture.pooling import log_linear_pool


MASKED = -1  # replaces tokens under the attention mask
# types of layers whose cache can keep every token, so that it can be cropped
CROPPABLE_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


class _Held(threading.local):
    """What a processor keeps between two steps, for each thread that generates."""

    cache: Cache | None = None
    seen: torch.Tensor | None = None  # the tokens in the cache, with padding masked
    prompt_length: int = 0

    def __reduce__(self) -> tuple:
        return _Held, ()  # a copy starts anew


class MixtureLogitsProcessor(LogitsProcessor):
    r"""
    [`~transformers.LogitsProcessor`] that mixes the calling model log-linearly with other policies,
    \\(\pi(v|s) \propto \prod_k \pi_k(v|s)^{\lambda_k}\\), during a `generate()` call on any causal language model. The
    tokens are those of a [`MixturePolicyModel`] of the same policies.

    The processor keeps keys and values of the other policies, and compares the token ids of each step with those of
    the last one: the cache is extended, reordered for beams, cropped when drafted tokens are rejected, or recomputed
    for a new prompt. So one processor can be used for many calls, also from several threads, each of which has a cache of
    its own. Drafts save time of the calling
    model only.

    `generate()` does not pass its attention mask to processors: for left-padded prompts pass `attention_mask` or
    `pad_token_id`, or padding counts as text.

    The processors that `generate()` creates from its own arguments run before this one, and act on the calling model
    only. Repetition penalties, sequence biases and length decays are thus scaled by its weight: to apply them to the
    mixture, put their processors after this one in `logits_processor`. Tokens that are excluded by a score of `-inf`
    (`bad_words_ids`, `min_length`, `suppress_tokens`) stay excluded, whatever the weights. Temperature, top-k and
    top-p run later, on the mixture.

    Args:
        others (`Sequence` of policies, or one policy):
            The policies to mix the calling model with, given as to [`MixturePolicyModel.from_policies`]: a model in
            memory, a repo id, a folder, an adapter, a dictionary. A mixture counts as one policy.
        weights (`Sequence[float]` or `torch.Tensor`, *optional*):
            Mixture weights, `1 + len(others)` of them, that of the calling model first; >= 0 with sum 1. Defaults to
            uniform weights.
        attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`, *optional*):
            Attention mask of the prompts, as given to `generate()`: 0 for padding, 1 elsewhere. It belongs to the
            prompts of the next call; before a call with others, assign a new `processor.attention_mask`.
        pad_token_id (`int`, *optional*):
            Without `attention_mask`, the leading run of this token in every row is treated as padding, in all calls.
            Not for prompts that begin with the token itself. Also needed when finished rows are padded with an id that
            is not among the common ones.
        vocab_size (`int`, *optional*):
            Number of leading token ids that all policies have in common, for policies whose output layers differ in
            size. Ids beyond it are never generated.
        allow_off_simplex (`bool`, *optional*, defaults to `False`):
            Whether to accept negative weights and sums other than 1.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether to cache keys and values. If not, the other policies run over the whole text at each step.
        kwargs:
            Arguments of every other policy's `from_pretrained`: `dtype`, `device_map`, `token` and so on.

    Raises:
        `ValueError`: for bad weights, before any policy is loaded; for mismatched policies, scores, prompts or masks.
        `OSError`: for a policy that cannot be found.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from mpo_hf import MixturePolicyModel
    >>> from mpo_hf.decoding.logits_process import MixtureLogitsProcessor

    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> policy, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    >>> input_ids = torch.tensor([[1, 5, 9]])

    >>> processor = MixtureLogitsProcessor([other], weights=[0.3, 0.7])
    >>> mixed = policy.generate(input_ids, logits_processor=[processor], max_new_tokens=4, do_sample=False)

    >>> model = MixturePolicyModel.from_policies([policy, other], weights=[0.3, 0.7])
    >>> torch.equal(mixed, model.generate(input_ids, max_new_tokens=4, do_sample=False))
    True
    ```
    """

    # its rows are packed, and in another order at each step
    supports_continuous_batching = False

    def __init__(
        self,
        others: Policy | Sequence[Policy],
        weights: Sequence[float] | torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        pad_token_id: int | None = None,
        vocab_size: int | None = None,
        allow_off_simplex: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        if isinstance(others, str | os.PathLike | dict | MixtureComponent | nn.Module):
            others = [others]
        if not len(others):
            raise ValueError("`others` must hold at least one policy to mix the calling model with.")
        count = 1 + len(others)
        weights = [1 / count] * count if weights is None else weights
        self.mixture_weights = check_mixture_weights(weights, count, allow_off_simplex)
        if self.mixture_weights.ndim != 1:
            raise ValueError(f"Expected one weight a policy, got shape {tuple(self.mixture_weights.shape)}.")
        self.attention_mask = attention_mask
        self.pad_token_id = pad_token_id
        self.use_cache = use_cache
        if len(others) == 1 and isinstance(others[0], MixturePolicyModel):
            self.others, self._pool_weights = others[0].eval(), self.mixture_weights
        else:
            own, rest = self.mixture_weights[0], self.mixture_weights[1:]
            # the calling model may be another adapter of one of these, and run in another thread
            others = [with_own_switch(o) if hasattr(o, "get_base_model") else o for o in others]
            rest, share = (rest, 1.0) if rest.any() else (None, 0.0)  # a mixture of zero weights only does not exist
            self.others = MixturePolicyModel.from_policies(
                others, rest, vocab_size=vocab_size, allow_off_simplex=True, **kwargs
            )
            self._pool_weights = torch.tensor([own, share], dtype=torch.float64, device="cpu")
        self._croppable = CROPPABLE_LAYER_TYPES.issuperset(self.others.config.layer_types)
        self._vocab_size_given = vocab_size is not None
        self.vocab_size = self.others.config.vocab_size if vocab_size is None else vocab_size
        if self.vocab_size > self.others.config.vocab_size:
            raise ValueError(f"`vocab_size={vocab_size}`, but others have {self.others.config.vocab_size} token ids.")
        self.reset()

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """Attention mask of the prompts. Assign that of the next prompts before a call with them."""
        return self._attention_mask

    @attention_mask.setter
    def attention_mask(self, attention_mask: torch.Tensor | None) -> None:
        if attention_mask is not None:
            attention_mask = torch.as_tensor(attention_mask)
            if attention_mask.ndim != 2:
                got = tuple(attention_mask.shape)
                raise ValueError(f"`attention_mask` must have the shape (batch_size, prompt_length), got {got}.")
        self._attention_mask = attention_mask
        self._masked_prompts: torch.Tensor | None = None  # the prompts of the mask, from the first call on

    def reset(self) -> None:
        """
        Discards keys and values of earlier calls, and frees their memory. Needed only after the parameters of the
        other policies have changed. The attention mask is kept.
        """
        self._held = _Held()

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Log-probabilities of the mixture, from the calling model's `scores` for the token that follows `input_ids`."""
        self._check_vocabulary(scores)
        own = scores[..., : self.vocab_size]
        terms = [own]
        if self._pool_weights[1] != 0:
            terms.append(self._pooled_others(input_ids)[..., : self.vocab_size])
        pooled = log_linear_pool(terms, self._pool_weights)
        check_numbers(pooled, {0: own.amax(-1)}, ["calling model"])
        # a weight <= 0 would let excluded tokens back in
        pooled = pooled.masked_fill(torch.isneginf(own), -torch.inf)
        stuck = torch.isneginf(pooled.amax(-1, keepdim=True))
        if stuck.all():
            raise ValueError(
                f"The policies rule out every token between them (scores of -inf) after {input_ids.shape[1]} tokens, so that the "
                "mixture cannot go on. Let all of them, and the processors before this one, allow the same tokens."
            )
        # beam search sums scores without normalizing them
        logps = torch.log_softmax(pooled, dim=-1).masked_fill(stuck, -torch.inf)
        return nn.functional.pad(logps, (0, scores.shape[-1] - self.vocab_size), value=-torch.inf)

    def _check_vocabulary(self, scores: torch.Tensor) -> None:
        size = scores.shape[-1]
        if size < self.vocab_size or (size > self.vocab_size and not self._vocab_size_given):
            raise ValueError(
                f"The calling model scores {size} token ids, the other policies have {self.vocab_size}. Only policies of "
                "one tokenizer can be mixed. If their first ids mean the same tokens, say how many with `vocab_size=`."
            )

    def _pooled_others(self, input_ids: torch.LongTensor) -> torch.Tensor:
        tokens = self._mask_padding(input_ids.to(self.others.device))
        cache, kept = self._take_cache(tokens) if self.use_cache else (None, 0)
        output = self.others(
            self._known_ids(tokens[:, kept:]),
            attention_mask=(tokens != MASKED).long(),
            cache=cache,
            use_cache=self.use_cache,
            logits_to_keep=1,
            return_dict=True,
        )
        if self.use_cache:
            held = self._held
            held.cache, held.seen = cache, tokens
            held.prompt_length = held.prompt_length if kept else tokens.shape[1]
        logits = output.logits[:, -1]
        check_numbers(logits, peaks_of(output), self.others.config.labels)
        return logits

    def _known_ids(self, tokens: torch.LongTensor) -> torch.LongTensor:
        """Replaces ids that the other policies have no embedding for, which are allowed as padding only."""
        foreign = tokens >= self.vocab_size
        ended = _leading_run(tokens.flip(-1), self.pad_token_id).flip(-1)
        if (unknown := tokens[foreign & ~ended]).numel():
            raise ValueError(
                f"The token id {unknown[0].item()} is not among the {self.vocab_size} that all policies have in common. "
                "If it fills up rows that have ended, pass it as `pad_token_id`."
            )
        return tokens.masked_fill(foreign, 0).clamp(min=0)

    def _mask_padding(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """The token ids with `MASKED` in place of padding, by which texts are matched with the rows of the cache."""
        if not input_ids.shape[1]:
            raise ValueError("The other policies need `input_ids`: they cannot be shown a prompt of `inputs_embeds`.")
        if self._attention_mask is not None:
            return input_ids.masked_fill(self._masked_by_caller(input_ids), MASKED)
        padding = _leading_run(input_ids, self.pad_token_id)
        if padding.all(-1).any():
            raise ValueError(
                f"A row holds nothing but the padding token {self.pad_token_id}. Is it the prompt? Pass `attention_mask`."
            )
        return input_ids.masked_fill(padding, MASKED)

    def _masked_by_caller(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """The tokens under the attention mask, whose rows are repeated for beams and several sequences per prompt."""
        mask = self._attention_mask.to(input_ids.device)
        (rows, length), (batch_size, total) = mask.shape, input_ids.shape
        repeats = batch_size // rows if rows else 0
        fits = repeats > 0 and repeats * rows == batch_size and total >= length
        prompts = self._masked_prompts
        if fits and prompts is None:
            prompts = input_ids[::repeats, :length].clone()
        if not fits or not torch.equal(input_ids[:, :length], prompts.repeat_interleave(repeats, 0)):
            raise ValueError(
                f"The `attention_mask` of shape {tuple(mask.shape)} does not belong to these prompts ({batch_size} rows of "
                f"{total} ids). Set `processor.attention_mask` anew before a call with other prompts, or to `None`."
            )
        self._masked_prompts = prompts
        return nn.functional.pad((mask == 0).repeat_interleave(repeats, 0), (0, total - length), value=False)

    def _take_cache(self, tokens: torch.LongTensor) -> tuple[Cache, int]:
        """A cache for the rows of `tokens`, and the number of tokens that it holds, at most all but the last."""
        held = self._held
        cache, seen, prompt_length = held.cache, held.seen, held.prompt_length
        held.cache = held.seen = None  # if the next forward pass is interrupted, its cache is not used again
        if cache is None:
            return self._new_cache(), 0
        rows, kept = _match_rows(tokens, seen)
        surplus = seen.shape[1] - kept
        step_by_step = not surplus and tokens.shape[1] - kept == 1
        # a new prompt that begins like the last one starts with an empty cache, for the same rounding in every call
        if kept < prompt_length or not (self._croppable or step_by_step):
            return self._new_cache(), 0
        if surplus:
            cache.crop(-surplus)
        if rows is not None:
            cache.reorder_cache(rows)
        positions, new = (tokens != MASKED).long().cumsum(-1) - 1, tokens.shape[1] - kept
        if any(crosses_switch(model, positions, new, cache) for model in self.others.backbones):
            return self._new_cache(), 0
        return cache, kept

    def _new_cache(self) -> Cache:
        # with a config, sliding layers would keep their window only, and could not be cropped
        return DynamicCache() if self._croppable else DynamicCache(config=self.others.config)


def _leading_run(tokens: torch.LongTensor, token_id: int | None) -> torch.BoolTensor:
    if token_id is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    return (tokens == token_id).cumprod(-1).bool()


def _match_rows(tokens: torch.LongTensor, seen: torch.LongTensor) -> tuple[torch.LongTensor | None, int]:
    """
    For each row of `tokens`, the row of `seen` with the longest common prefix (`None`: the row of the same index), and
    the length of the prefix that all rows have in common with theirs, without the last token.
    """
    length = min(tokens.shape[1] - 1, seen.shape[1])
    if len(tokens) == len(seen) and torch.equal(tokens[:, :length], seen[:, :length]):
        return None, length
    same = tokens[:, None, :length] == seen[None, :, :length]
    lengths, rows = same.cumprod(-1, dtype=torch.uint8).sum(-1).max(-1)
    return rows, int(lengths.min())
