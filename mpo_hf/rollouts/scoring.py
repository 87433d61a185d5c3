"""
Log-probabilities of completions under several policies.

Each prompt is read once, and its completions continue from its keys and values. Completions of similar length share a
forward pass. Adapters over one base run side by side wherever the adapters of a mixture would.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig

from ..estimation.decoded import num_terms
from ..mixture.component_loading import PolicyHandle
from ..mixture.configuration_mixture import MixturePolicyConfig
from ..mixture.mixture_cache import component_views
from ..mixture.modeling_mixture import MixturePolicyModel
from ..mixture.pooling import log_linear_pool, log_normalizer, row_parts
from ..mixture.stacked_cache import can_stack
from .completions import Completions
from .normalizers import normalizer_moments, pack_normalizers


class CompletionScorer:
    """
    Computes log-probabilities of whole completions under several policies. Policies over one base are grouped once, when it is
    created.

    Args:
        policies (`Sequence[MixturePolicyModel]`): K policies, such as [`MixturePolicyModel.policy`] returns.
    """

    def __init__(self, policies: Sequence[MixturePolicyModel]):
        groups: dict[Any, list[int]] = {}
        for k, policy in enumerate(policies):
            groups.setdefault(_single_model(policy) or k, []).append(k)
        self._count = len(policies)
        # the policies that run together, the model whose components they are, and whether its components are pooled
        self._groups = [
            (members, _as_one([policies[k] for k in members]), isinstance(key, int)) for key, members in groups.items()
        ]

    def logps(self, completions: Completions, batch_size: int = 8) -> torch.Tensor:
        """See [`~mpo_hf.rollouts.completion_logps`]."""
        return self.mixture_logps(completions, [], batch_size=batch_size)[0]

    @torch.no_grad()
    def mixture_logps(
        self,
        completions: Completions,
        mixtures: Sequence[Sequence[float]],
        temperature: float = 1.0,
        batch_size: int = 8,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`~mpo_hf.rollouts.mixture_logps`]."""
        policy_logps = torch.zeros(len(completions), self._count, dtype=torch.float64)
        pooled_logps = torch.zeros(len(completions), len(mixtures), dtype=torch.float64)
        for batch, by_policy in self._batches(completions, batch_size, policy_logps, holds=bool(mixtures)):
            for s, weights in enumerate(mixtures):
                pooled_logps[batch.rows, s] = batch.logps(by_policy, weights, temperature)
        return policy_logps, pooled_logps

    @torch.no_grad()
    def normalizers(
        self, completions: Completions, weights: Sequence[float], temperature: float = 1.0, batch_size: int = 8
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Log-probabilities under every policy, and the normalizers of mixtures around given weights.

        Args:
            completions ([`Completions`]): N completions.
            weights (`Sequence[float]`): the mixture weights, K, around which the normalizers are expanded.
            temperature (`float`, *optional*, defaults to 1.0): temperature that mixtures are decoded at.
            batch_size (`int`, *optional*, defaults to 8): completions a forward pass.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: of shape `(N, K)`, and `(N, E)` as [`~mpo_hf.estimation.LogNormalizer`]
                packs them; float64, on the CPU.
        """
        policy_logps = torch.zeros(len(completions), self._count, dtype=torch.float64)
        packed = torch.zeros(len(completions), num_terms(self._count), dtype=torch.float64)
        anchor = torch.as_tensor(weights, dtype=torch.float64) / temperature
        for batch, by_policy in self._batches(completions, batch_size, policy_logps, holds=True):
            scores = log_linear_pool(by_policy, [weight / temperature for weight in weights])
            values = sum_over_tokens(log_normalizer(scores), batch.completion_mask.to(scores.device))
            moments = normalizer_moments(by_policy, scores)
            packed[batch.rows] = pack_normalizers(
                anchor.expand(len(batch.rows), -1), values, moments, batch.completion_mask
            )
        return policy_logps, packed

    def _batches(
        self, completions: Completions, batch_size: int, policy_logps: torch.Tensor, holds: bool
    ) -> "Iterator[tuple[_Batch, list[torch.Tensor]]]":
        """Batches of completions with the logits of all policies, if these are held; fills in `policy_logps`."""
        for prompts in _prompt_batches(completions, batch_size):
            caches = [read_prompts(model, prompts.ids, prompts.mask) for _, model, _ in self._groups]
            for batch in prompts.completions(completions, batch_size):
                held: dict[int, torch.Tensor] = {}
                for (members, model, pools), cache in zip(self._groups, caches):
                    for k, logits in zip(members, _logits(model, pools, batch, cache)):
                        policy_logps[batch.rows, k] = batch.logps([logits])
                        if holds:
                            held[k] = logits
                yield batch, [held[k] for k in sorted(held)]


def completion_logps(
    policies: Sequence[MixturePolicyModel], completions: Completions, batch_size: int = 8
) -> torch.Tensor:
    r"""
    Log-probabilities of whole completions under K policies.

    Args:
        policies (`Sequence[MixturePolicyModel]`): the policies, such as [`MixturePolicyModel.policy`] returns.
        completions ([`Completions`]): N completions.
        batch_size (`int`, *optional*, defaults to 8): completions a forward pass.

    Returns:
        `torch.Tensor`: \\(\log \pi_k(y)\\) of shape `(N, K)`, float64, on the CPU.
    """
    return CompletionScorer(policies).logps(completions, batch_size)


def mixture_logps(
    policies: Sequence[MixturePolicyModel],
    completions: Completions,
    mixtures: Sequence[Sequence[float]],
    temperature: float = 1.0,
    batch_size: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Log-probabilities of whole completions under K policies, and under S token-level mixtures of them, in one pass of
    each policy.

    Args:
        policies (`Sequence[MixturePolicyModel]`): the policies, such as [`MixturePolicyModel.policy`] returns.
        completions ([`Completions`]): N completions.
        mixtures (`Sequence[Sequence[float]]`): the mixture weights of each mixture, S of K.
        temperature (`float`, *optional*, defaults to 1.0): temperature that the mixtures are sampled at.
        batch_size (`int`, *optional*, defaults to 8): completions a forward pass.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: \\(\log \pi_k(y)\\) of shape `(N, K)`, and the log-probability of y when
        it is drawn from each mixture, of shape `(N, S)`; float64, on the CPU.
    """
    return CompletionScorer(policies).mixture_logps(completions, mixtures, temperature, batch_size)


def read_prompts(
    policy: MixturePolicyModel, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, **kwargs
) -> DynamicCache | None:
    """
    Keys and values of prompts without their last token, for their completions to continue from.

    Args:
        policy ([`MixturePolicyModel`]): the policy.
        prompt_ids (`torch.LongTensor` of shape `(P, prompt_length)`): prompts, padded on the left.
        prompt_mask (`torch.LongTensor` of shape `(P, prompt_length)`): 0 for padding.
        kwargs: further arguments for the policy, such as `mixture_weights`.

    Returns:
        [`~transformers.DynamicCache`], or `None` if all prompts have one token, or if the rows of the cache cannot be repeated.
    """
    cache = DynamicCache(config=policy.config)
    if prompt_ids.shape[1] < 2 or not can_stack([cache]):
        return None
    policy(prompt_ids[:, :-1], prompt_mask[:, :-1], cache=cache, use_cache=True, logits_to_keep=1, **kwargs)
    return cache


def token_logps(
    logits: Sequence[torch.Tensor],
    ids: torch.Tensor,
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    r"""
    Log-probabilities of tokens under one policy, or under a mixture of several.

    Args:
        logits (`Sequence[torch.Tensor]`): K tensors of shape `(..., vocab_size)`, one without `weights`.
        ids (`torch.LongTensor` of shape `(...)`): the tokens.
        weights (`Sequence[float]`, *optional*): mixture weights.
        temperature (`float`, *optional*, defaults to 1.0): temperature of the mixture.

    Returns:
        `torch.Tensor` of shape `(...)`, in float32 (float64 for float64 logits).
    """
    first = logits[0]
    logps = first.new_empty(ids.shape, dtype=torch.promote_types(first.dtype, torch.float32))
    ids = ids.to(first.device).unsqueeze(-1)
    for part in row_parts(first):
        if weights is None:
            scores = first[part].to(logps.dtype)
        else:
            scores = log_linear_pool([component[part] for component in logits], weights) / temperature
        logps[part] = scores.gather(-1, ids[part]).squeeze(-1) - torch.logsumexp(scores, dim=-1)
    return logps


def sum_over_tokens(logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of completions from those of their tokens: float64, on the CPU."""
    return torch.where(mask.bool(), logps.double(), 0).sum(-1).cpu()


# ---- batches ----


@dataclass
class _Prompts:
    """Some prompts, padded on the left, and the rows of each one's completions."""

    ids: torch.Tensor
    mask: torch.Tensor
    rows: list[list[int]]

    def completions(self, completions: Completions, size: int) -> "Iterator[_Batch]":
        """Batches of at most `size` of their completions, the longest first."""
        lengths = completions.completion_mask.sum(-1).tolist()
        pairs = [(row, prompt) for prompt, rows in enumerate(self.rows) for row in rows]
        pairs.sort(key=lambda pair: -lengths[pair[0]])
        for start in range(0, len(pairs), size):
            rows, prompts = map(list, zip(*pairs[start : start + size]))
            columns = slice(0, max(1, lengths[rows[0]]))
            ids, mask = _mask_padding(
                completions.completion_ids[rows, columns], completions.completion_mask[rows, columns]
            )
            yield _Batch(
                rows=rows,
                prompts=prompts,
                inputs=torch.cat([self.ids[prompts], ids[:, :-1]], dim=1),
                mask=torch.cat([self.mask[prompts], mask[:, :-1]], dim=1),
                completion_ids=ids,
                completion_mask=mask,
            )


@dataclass
class _Batch:
    """The inputs of one forward pass, and the rows and prompts of the completions that it predicts."""

    rows: list[int]
    prompts: list[int]
    inputs: torch.Tensor
    mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor

    def logps(self, logits: Sequence[torch.Tensor], *mixture) -> torch.Tensor:
        """Log-probabilities of whole completions; see [`token_logps`]."""
        logps = token_logps(logits, self.completion_ids, *mixture)
        return sum_over_tokens(logps, self.completion_mask.to(logps.device))


def _prompt_batches(completions: Completions, size: int) -> Iterator[_Prompts]:
    """Batches of at most `size` distinct prompts, the longest first."""
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, (ids, mask) in enumerate(zip(completions.prompt_ids.cpu(), completions.prompt_mask.bool().cpu())):
        rows_of.setdefault(tuple(ids[mask].tolist()), []).append(row)
    prompts = sorted(rows_of, key=len, reverse=True)
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        first, columns = [rows_of[prompt][0] for prompt in batch], slice(-max(1, len(batch[0])), None)
        ids, mask = _mask_padding(completions.prompt_ids[first, columns], completions.prompt_mask[first, columns])
        yield _Prompts(ids, mask, [rows_of[prompt] for prompt in batch])


def _mask_padding(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces padding by token 0, as some policy may have no embedding for the padding's id."""
    return ids.masked_fill(mask == 0, 0), mask


# ---- policies ----


def _single_model(policy: MixturePolicyModel) -> tuple[int, int | None] | None:
    """A key for a policy that is a single model; policies that run on the same model have equal keys. `None` for a mixture."""
    config = policy.config
    if config.mixture_weights != [1.0] or config.plausibility or hasattr(policy, "peft_config"):
        return None
    return id(policy.backbones[policy.policies[0].backbone]), config.vocab_size


def _as_one(policies: Sequence[MixturePolicyModel]) -> MixturePolicyModel:
    """Policies on one model as the components of a mixture."""
    if len(policies) == 1:
        return policies[0]
    backbone = policies[0].backbones[policies[0].policies[0].backbone]
    config = MixturePolicyConfig(
        component_configs=[cast(PreTrainedConfig, backbone.config)] * len(policies),
        vocab_size=policies[0].config.vocab_size,
    )
    handles = [PolicyHandle(0, policy.policies[0].adapter) for policy in policies]
    return MixturePolicyModel(config, [backbone], handles).eval()


def _logits(
    model: MixturePolicyModel, pools: bool, batch: _Batch, cache: DynamicCache | None
) -> Iterator[torch.Tensor]:
    """Logits of a batch's completions, shape `(rows, completion_length, vocab_size)`: of every component, or pooled."""
    ids, keep = batch.inputs, batch.completion_ids.shape[1]
    if cache is not None:
        ids, cache = ids[:, cache.get_seq_length() :], _rows(cache, batch.prompts)
    common = {"use_cache": cache is not None, "logits_to_keep": keep}
    if pools:
        yield model(ids, batch.mask, cache=cache, **common).logits
        return
    inputs = model._inputs_for_all(cast(torch.LongTensor, ids), batch.mask, None) | common
    components = range(len(model.policies))
    views: dict[int, Cache] = {} if cache is None else dict(component_views(cache, components, model.layer_counts))
    yield from model._component_logits(components, inputs, views, {})


def _rows(cache: DynamicCache, rows: list[int]) -> DynamicCache:
    """A new cache with some rows of a cache."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    part.batch_select_indices(torch.tensor(rows))
    return part
