"""Sampling completions from a policy, with the log-probabilities of what is drawn."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessor

from ..mixture.compat import CACHE_NAME
from ..mixture.modeling_mixture import MixturePolicyModel
from .completions import Completions, pad_ids
from .normalizers import NormalizerSums
from .scoring import read_prompts, sum_over_tokens, token_logps


def draw_tokens(scores: torch.Tensor) -> torch.Tensor:
    """
    Draws a token for every row by one random number, from the cumulative distribution: first one of about √V blocks of
    tokens, then a token of it. `torch.multinomial` draws a random number for each token of the vocabulary, which takes an
    eighth of the time of a step of a small model on the CPU.

    Args:
        scores (`torch.Tensor` of shape `(N, vocab_size)`): logits.

    Returns:
        `torch.LongTensor` of shape `(N, 1)`.
    """
    size = math.isqrt(scores.shape[-1] - 1) + 1
    blocks = F.pad(scores.softmax(-1), (0, -scores.shape[-1] % size)).unflatten(-1, (-1, size))
    masses = blocks.sum(-1, dtype=torch.float64)
    number = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device)
    block, number = _invert(masses, number * masses.sum(-1, keepdim=True))
    inner, _ = _invert(blocks[torch.arange(len(blocks), device=scores.device), block[:, 0]].double(), number)
    return block * size + inner


def _invert(masses: torch.Tensor, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry of every row that a number from 0 to the sum of its masses falls on, and how far it is into that entry."""
    ends = masses.cumsum(-1)
    # below the last end, which rounding may reach: the entry has some mass then
    number = torch.minimum(number, torch.nextafter(ends[:, -1:], torch.zeros_like(number)))
    entry = torch.searchsorted(ends, number, right=True).clamp(max=masses.shape[-1] - 1)
    return entry, (number - (ends - masses).gather(-1, entry)).clamp(min=0)


class _TokenDrawer(LogitsProcessor):
    """
    Draws the tokens, and records their log-probabilities from the logits that decoding computes anyway.

    A processor sees the token of a step, which is padding for rows that have ended, in the next step; the last token is
    passed to [`~_TokenDrawer.finish`].
    """

    def __init__(
        self,
        temperature: float,
        normalizers: NormalizerSums | None = None,
        on_token: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.temperature, self._normalizers, self.on_token = temperature, normalizers, on_token
        self._scores: torch.Tensor | None = None
        self._scaled: torch.Tensor | None = None  # by the temperature
        # logits of components: those of the step being computed, and those that the next token is drawn from
        self._seen: dict[int, torch.Tensor] = {}
        self._components: dict[int, torch.Tensor] = {}
        self._pooled: list[torch.Tensor] = []
        self._proposal: list[torch.Tensor] = []
        self._by_component: list[dict[int, torch.Tensor]] = []

    def watch(self, active: Sequence[int], logits: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The hook of a mixture: keeps the logits of its components, and passes them on."""
        for k, component_logits in zip(
            active, logits, strict=True
        ):  # strict, so that the components come to their end
            self._seen[k] = component_logits[:, -1]
            yield component_logits

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._take(input_ids[:, -1])
        self._scores, self._scaled = scores, scores / self.temperature
        self._components, self._seen = self._seen, {}
        chosen = torch.full_like(scores, -torch.inf)  # which `generate` takes the highest of
        return cast(torch.FloatTensor, chosen.scatter_(-1, draw_tokens(self._scaled), 0))

    def _take(self, tokens: torch.Tensor) -> None:
        if self._scores is None or self._scaled is None:
            return
        # rows that have ended continue with padding, whose id may be outside the policies' vocabulary
        tokens = tokens.clamp(max=self._scores.shape[-1] - 1)
        self._pooled.append(self._scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
        self._proposal.append(token_logps([self._scaled], tokens))
        self._by_component.append({k: token_logps([logits], tokens) for k, logits in self._components.items()})
        if self._normalizers is not None:
            self._normalizers.add(self._components, self._scaled)
        if self.on_token is not None:
            self.on_token(tokens)

    def finish(self, sequences: torch.Tensor, mask: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
        """
        Sums over the tokens of every completion.

        Args:
            sequences (`torch.LongTensor` of shape `(N, prompt_length + completion_length)`): what `generate` returned.
            mask (`torch.LongTensor` of shape `(N, completion_length)`): 0 for padding.
            count (`int`): how many components the mixture has.
        """
        self._take(sequences[:, -1])
        sums = {"pooled_logps": _sum(self._pooled, mask), "proposal_logps": _sum(self._proposal, mask)}
        if all(len(step) == count for step in self._by_component):
            by_component = [_sum([step[k] for step in self._by_component], mask) for k in range(count)]
            sums["policy_logps"] = torch.stack(by_component, dim=-1)
        if self._normalizers is not None:
            pooled = sums["pooled_logps"] / self.temperature
            sums["normalizers"] = self._normalizers.sums(mask, pooled, sums["proposal_logps"])
        return sums


def _sum(steps: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    return sum_over_tokens(torch.stack([logps.to(mask.device) for logps in steps], dim=-1), mask)


def _for_one_call(model: MixturePolicyModel, config: GenerationConfig, hook: Callable) -> MixturePolicyModel:
    """
    A view of a model with a generation config and a hook of its own, which nobody else who uses the model sees. The model's
    own generation config would set every option that ours leaves unset.
    """
    view = copy.copy(model)
    view.generation_config = config
    view.component_hook = hook if len(model.policies) > 1 else None
    return view


@torch.no_grad()
def sample_completions(
    policy: MixturePolicyModel,
    prompt_ids: Sequence[Sequence[int]],
    num_generations: int,
    max_completion_length: int,
    pad_token_id: int,
    eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 1.0,
    mixture_weights: torch.Tensor | None = None,
    with_normalizers: bool = False,
    on_token: Callable[[torch.Tensor], None] | None = None,
) -> Completions:
    """
    Draws completions by plain multinomial sampling, without top-k, top-p or penalties. The model's own generation config is
    ignored, so that the log-probability of every completion is known exactly.

    Args:
        policy ([`MixturePolicyModel`]): the policy to draw from.
        prompt_ids (`Sequence[Sequence[int]]`): token ids of P prompts.
        num_generations (`int`): completions a prompt, m.
        max_completion_length (`int`): longest completion, in tokens.
        pad_token_id (`int`): token id to pad with.
        eos_token_id (`int` or `Sequence[int]`, *optional*): token ids that end a completion.
        temperature (`float`, *optional*, defaults to 1.0): sampling temperature.
        mixture_weights (`torch.Tensor` of shape `(K,)` or `(P, K)`, *optional*):
            Weights to use instead of the policy's own, the same for all prompts or one row for each. With N = P * m
            rows, one for each completion.
        with_normalizers (`bool`, *optional*, defaults to `False`):
            Whether to record the `normalizers` of the completions, from which their log-probabilities under nearby
            mixture weights follow; see [`~mpo_hf.estimation.LogNormalizer`].
        on_token (`Callable`, *optional*):
            Called with every token of the completions, shape `(N,)`, for instance to show the progress. Completions that have
            ended go on with padding.

    Returns:
        [`Completions`] of N = P * m rows.
    """
    padded, mask = (tensor.to(policy.device) for tensor in pad_ids(prompt_ids, pad_token_id, left=True))
    config = GenerationConfig(
        do_sample=False,  # the tokens are those that the processor has drawn
        max_new_tokens=max_completion_length,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )
    kwargs: dict[str, Any] = {} if mixture_weights is None else {"mixture_weights": mixture_weights}
    by_row = mixture_weights if mixture_weights is not None and mixture_weights.ndim == 2 else None
    if num_generations > 1:
        # keys and values do not depend on the weights, except that a component without weight in any row has none
        reading = kwargs if by_row is None else {"mixture_weights": by_row.mean(0)}
        cache = read_prompts(policy, padded, mask, **reading)
        if cache is not None:
            cache.batch_repeat_interleave(num_generations)
            kwargs[CACHE_NAME] = cache
        padded, mask = (tensor.repeat_interleave(num_generations, 0) for tensor in (padded, mask))
        if by_row is not None and len(by_row) < len(padded):
            kwargs["mixture_weights"] = by_row.repeat_interleave(num_generations, 0)
    weights = kwargs.get("mixture_weights", policy.mixture_weights)
    normalizers = NormalizerSums(torch.as_tensor(weights), temperature, len(padded)) if with_normalizers else None
    drawer = _TokenDrawer(temperature, normalizers, on_token)
    view = _for_one_call(policy, config, drawer.watch)
    sequences = view.generate(padded, attention_mask=mask, logits_processor=[drawer], **kwargs)
    completion_ids = sequences[:, padded.shape[1] :]
    completion_mask = _mask_after_end(completion_ids, eos_token_id)
    logps = drawer.finish(sequences, completion_mask, len(policy.policies))
    return Completions(padded, mask, completion_ids, completion_mask, **logps)


def _mask_after_end(completion_ids: torch.Tensor, eos_token_id: int | Sequence[int] | None) -> torch.Tensor:
    if eos_token_id is None:
        return torch.ones_like(completion_ids)
    ends = torch.isin(completion_ids, torch.as_tensor(eos_token_id, device=completion_ids.device)).long()
    return (ends.cumsum(-1) - ends == 0).long()
