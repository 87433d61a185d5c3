"""Log-linear mixing inside a `generate()` call on a model of the user's own."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessor
from transformers.cache_utils import Cache

from ..mixture.compat import activate_adapter
from ..mixture.component_loading import Policy
from ..mixture.configuration_mixture import MixtureComponent, check_mixture_weights
from ..mixture.modeling_mixture import MixturePolicyModel
from ..mixture.pooling import log_linear_pool


HIDDEN = -1  # stands for a token that the attention mask hides
# layers whose keys and values a cache can hold for every token, so that it can go back
CROPPABLE_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


class MixtureLogitsProcessor(LogitsProcessor):
    r"""
    [`~transformers.LogitsProcessor`] that mixes the calling model log-linearly with other policies,
    \\(\pi(v|s) \propto \prod_k \pi_k(v|s)^{\lambda_k}\\), during a `generate()` call on any causal language model. The
    tokens are those of a [`MixturePolicyModel`] of the same policies.

    It keeps keys and values of the other policies, and tells from the token ids of each step what becomes of them:
    they are extended, reordered for beams, cut back when drafted tokens are refused, or computed anew for a new prompt.
    So one processor may serve many calls, one after another. Drafts save time of the calling model only.

    `generate()` tells no processor about padding: for left-padded prompts pass `attention_mask` or `pad_token_id`, or
    every token counts.

    Processors that `generate()` makes of its own arguments run before this one, and act on the calling model only.
    Repetition penalties, sequence biases and length decays so count with its weight: to penalise the mixture, put their
    processors behind this one in `logits_processor`. What is ruled out by a score of `-inf` (`bad_words_ids`,
    `min_length`, `suppress_tokens`) stays ruled out, whatever the weights. Temperature, top-k and top-p run later, on
    the mixture.

    Args:
        others (`Sequence` of policies, or one policy):
            The policies to mix the calling model with, given as to [`MixturePolicyModel.from_policies`]: a model in
            memory, a repo id, a folder, an adapter, a dictionary. A mixture is one policy, whatever it is made of.
        weights (`Sequence[float]` or `torch.Tensor`, *optional*):
            Mixture weights, `1 + len(others)` of them, that of the calling model first; >= 0 with sum 1. Defaults to
            uniform weights.
        attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`, *optional*):
            Attention mask of the prompts, as given to `generate()`: 0 for padding, 1 elsewhere. It belongs to the
            prompts of the next call; before a call with others, assign `processor.attention_mask` anew.
        pad_token_id (`int`, *optional*):
            Takes the leading run of this token in every row for padding, in any number of calls, unless there is an
            `attention_mask`. Not for prompts that begin with that very token. Name it as well where it fills up rows
            that have ended, and is not among the common ids.
        vocab_size (`int`, *optional*):
            How many leading token ids all policies have in common, for policies whose output layers differ in size.
            Ids beyond are never generated.
        allow_off_simplex (`bool`, *optional*, defaults to `False`):
            Accept negative weights and other sums than 1.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether to keep keys and values, or to run the other policies over the whole text at each step.
        kwargs:
            Arguments of every other policy's `from_pretrained`: `dtype`, `device_map`, `token` and so on.

    Raises:
        `ValueError`: for bad weights, before any policy is loaded; for policies, scores, prompts or masks that do not fit.
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

    # its rows come packed, and not in the order of the last step
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
            rest, share = (rest, 1.0) if rest.any() else (None, 0.0)  # no mixture has weights of zero only
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
        self._masked_prompts: torch.Tensor | None = None  # those that the mask belongs to, once seen

    def reset(self) -> None:
        """
        Forgets keys and values of earlier calls, and frees their memory. Needed only after the weights of the other
        policies have changed. An attention mask stays with the prompts that it belongs to.
        """
        self._cache: Cache | None = None
        self._seen: torch.Tensor | None = None  # the tokens in the cache, padding hidden
        self._prompt_length = 0

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Log-probabilities of the mixture, from the calling model's `scores` for the token that follows `input_ids`."""
        self._check_vocabulary(scores)
        own = scores[..., : self.vocab_size]
        terms = [own]
        if self._pool_weights[1] != 0:
            terms.append(self._pooled_others(input_ids)[..., : self.vocab_size])
        pooled = log_linear_pool(terms, self._pool_weights)
        # a weight <= 0 would lift the ban
        pooled = pooled.masked_fill(torch.isneginf(own), -torch.inf)
        logps = torch.log_softmax(pooled, dim=-1)  # beam search adds up scores as they come
        return nn.functional.pad(logps, (0, scores.shape[-1] - self.vocab_size), value=-torch.inf)

    def _check_vocabulary(self, scores: torch.Tensor) -> None:
        size = scores.shape[-1]
        if size < self.vocab_size or (size > self.vocab_size and not self._vocab_size_given):
            raise ValueError(
                f"The calling model scores {size} token ids, the other policies have {self.vocab_size}. Only policies of "
                "one tokenizer can be mixed. If their first ids mean the same tokens, say how many with `vocab_size=`."
            )

    def _pooled_others(self, input_ids: torch.LongTensor) -> torch.Tensor:
        tokens = self._hide_padding(input_ids.to(self.others.device))
        cache, kept = self._take_cache(tokens) if self.use_cache else (None, 0)
        with _adapters_left_alone(self.others.backbones):
            output = self.others(
                self._known_ids(tokens[:, kept:]),
                attention_mask=(tokens != HIDDEN).long(),
                cache=cache,
                use_cache=self.use_cache,
                logits_to_keep=1,
                return_dict=True,
            )
        if self.use_cache:
            self._cache, self._seen = cache, tokens
            self._prompt_length = self._prompt_length if kept else tokens.shape[1]
        return output.logits[:, -1]

    def _known_ids(self, tokens: torch.LongTensor) -> torch.LongTensor:
        """The tokens without ids that the other policies have no embedding for, which only padding may have."""
        foreign = tokens >= self.vocab_size
        ended = _leading_run(tokens.flip(-1), self.pad_token_id).flip(-1)
        if (unknown := tokens[foreign & ~ended]).numel():
            raise ValueError(
                f"The token id {unknown[0].item()} is not among the {self.vocab_size} that all policies have in common. "
                "If it fills up rows that have ended, pass it as `pad_token_id`."
            )
        return tokens.masked_fill(foreign, 0).clamp(min=0)

    def _hide_padding(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """The token ids, with `HIDDEN` in place of padding: what tells two texts, and so their caches, apart."""
        if not input_ids.shape[1]:
            raise ValueError("The other policies need `input_ids`: they cannot be shown a prompt of `inputs_embeds`.")
        if self._attention_mask is not None:
            return input_ids.masked_fill(self._masked_by_caller(input_ids), HIDDEN)
        padding = _leading_run(input_ids, self.pad_token_id)
        if padding.all(-1).any():
            raise ValueError(
                f"A row holds nothing but the padding token {self.pad_token_id}. Is it the prompt? Pass `attention_mask`."
            )
        return input_ids.masked_fill(padding, HIDDEN)

    def _masked_by_caller(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """Which tokens the attention mask hides, its rows repeated for beams and several sequences a prompt."""
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
        """A cache for the rows of `tokens`, and how many of them it holds; at least one is left to feed."""
        cache, seen, prompt_length = self._cache, self._seen, self._prompt_length
        self.reset()  # should the next forward pass be interrupted, what it leaves in the cache is not trusted
        if cache is None:
            return self._new_cache(), 0
        rows, kept = _match_rows(tokens, seen)
        surplus = seen.shape[1] - kept
        step_by_step = not surplus and tokens.shape[1] - kept == 1
        # a new prompt may begin like the last, but every `generate()` on it shall do the same arithmetic
        if kept < prompt_length or not (self._croppable or step_by_step):
            return self._new_cache(), 0
        if surplus:
            cache.crop(-surplus)
        if rows is not None:
            cache.reorder_cache(rows)
        self._prompt_length = prompt_length
        return cache, kept

    def _new_cache(self) -> Cache:
        # made from a config, it would keep no more than the window of sliding layers, which cannot be cropped
        return DynamicCache() if self._croppable else DynamicCache(config=self.others.config)


def _leading_run(tokens: torch.LongTensor, token_id: int | None) -> torch.BoolTensor:
    if token_id is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    return (tokens == token_id).cumprod(-1).bool()


def _match_rows(tokens: torch.LongTensor, seen: torch.LongTensor) -> tuple[torch.LongTensor | None, int]:
    """
    For each row of `tokens` the row of `seen` that it has the longest prefix in common with (`None`: its own), and how
    long a prefix all rows have in common with theirs, the last token aside.
    """
    length = min(tokens.shape[1] - 1, seen.shape[1])
    if len(tokens) == len(seen) and torch.equal(tokens[:, :length], seen[:, :length]):
        return None, length
    same = tokens[:, None, :length] == seen[None, :, :length]
    lengths, rows = same.cumprod(-1, dtype=torch.uint8).sum(-1).max(-1)
    return rows, int(lengths.min())


@contextmanager
def _adapters_left_alone(backbones: Sequence[nn.Module]) -> Iterator[None]:
    """Puts adapters back as they were: the calling model may be another adapter of one of these models."""
    adapted = [b for b in backbones if hasattr(b, "get_base_model")]
    active = [b.active_adapter for b in adapted]
    # a property of PEFT's layers, a method of models
    disabled = [any(getattr(m, "disable_adapters", None) is True for m in b.modules()) for b in adapted]
    try:
        yield
    finally:
        for k, backbone in enumerate(adapted):
            activate_adapter(backbone, active[k])
            if disabled[k]:
                activate_adapter(backbone, None)
