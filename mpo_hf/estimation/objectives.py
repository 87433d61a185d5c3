r"""
The dual objective of MPO, estimated from completions of one proposal, m for each prompt.

Notation, as in [Mixing Preference Optimization](https://huggingface.co/papers/2502.18699): P prompts with m
completions each, K objectives, mixture weights λ on the simplex, and advantages \\(a_{jk} = P(r_k)(x, y_j)/\beta\\),
so that

$$ F(\lambda) = E_x \log E_{y \sim \pi_{ref}} \exp\Big(\sum_k \lambda_k a_k(x, y)\Big), \qquad
   \frac{\partial F}{\partial \lambda_k} = E_x E_{y \sim \pi_\lambda} [a_k(x, y)] $$

where \\(\pi_\lambda \propto \prod_k \pi_k^{\lambda_k}\\). With implicit rewards,
\\(a_k = \log \pi_k - \log \pi_{ref}\\), the reference cancels:
\\(F(\lambda) = E_x \log \sum_y \prod_k \pi_k(y|x)^{\lambda_k}\\).
"""

import math
from collections.abc import Sequence

import torch

from .tables import log_product


def effective_sample_size(log_weights: torch.Tensor) -> torch.Tensor:
    r"""
    Effective sample size \\((\sum_j w_j)^2 / \sum_j w_j^2\\) of importance weights (Kish), between 1 and m.

    Args:
        log_weights (`torch.Tensor`): log-weights of shape `(..., m)`, up to a constant of each row.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    log_weights = torch.log_softmax(log_weights, dim=-1)
    return torch.exp(-torch.logsumexp(2 * log_weights, dim=-1))


def dual_objective(
    weights: torch.Tensor, advantages: torch.Tensor, log_ratio: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The dual objective F(λ) by importance sampling, differentiable in `weights`:

    $$ \hat F(\lambda) = \frac1P \sum_x \log \sum_j \frac{\rho_j}{\sum_i \rho_i} \exp\Big(\sum_k \lambda_k a_{jk}\Big),
       \qquad \rho_j = \frac{\pi_{ref}(y_j)}{q(y_j)} $$

    Its gradient is the self-normalized estimate of Algorithm 2 in the paper. The bias falls as 1/m.

    Args:
        weights (`torch.Tensor`): mixture weights λ, shape `(K,)`.
        advantages (`torch.Tensor`): \\(a_{jk}\\), shape `(P, m, K)`.
        log_ratio (`torch.Tensor`, *optional*):
            \\(\log \rho_j\\), shape `(P, m)`. Defaults to 0: completions drawn from the reference.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: F̂, a scalar, and the log importance weights of the completions, up to a
        constant of each prompt, shape `(P, m)`.
    """
    if log_ratio is None:
        log_ratio = advantages.new_zeros(advantages.shape[:-1])
    log_weights = torch.log_softmax(log_ratio, dim=-1) + advantages @ weights
    return torch.logsumexp(log_weights, dim=-1).mean(), log_weights


def implicit_dual_objective(
    weights: torch.Tensor,
    policy_logps: torch.Tensor,
    proposal_logps: torch.Tensor,
    objective_names: Sequence[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The dual objective with implicit rewards,
    \\(F(\lambda) = E_x \log E_{y \sim q} \prod_k \pi_k(y)^{\lambda_k} / q(y)\\), differentiable in `weights`. It does
    not depend on the reference policy. When q is the token-level mixture at the same λ, the importance weight is
    \\(W(y) = \prod_t Z_t\\), which varies far less than any ratio to the reference.

    Args:
        weights (`torch.Tensor`): mixture weights λ, shape `(K,)`.
        policy_logps (`torch.Tensor`): \\(\log \pi_k(y_j)\\) of whole completions, shape `(P, m, K)`, finite or -inf.
        proposal_logps (`torch.Tensor`): \\(\log q(y_j)\\), shape `(P, m)`.
        objective_names (`Sequence[str]`, *optional*): names of the policies, for error messages.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: F̂, a scalar, and the log importance weights, shape `(P, m)`.

    Raises:
        `ValueError`: a log-probability is NaN, or the policies together exclude all completions of a prompt, whose mixture
            is not known.
    """

    def name(objective: int) -> str:
        return f"objective {objective}" if objective_names is None else repr(objective_names[objective])

    if policy_logps.isnan().any():
        broken = int(policy_logps.isnan().flatten(0, -2).any(0).nonzero()[0])
        raise ValueError(
            f"The policy of {name(broken)} gives NaN as the log-probability of a completion. Check its weights and its "
            "dtype, as float16 overflows."
        )
    excluded = policy_logps == -torch.inf
    log_weights = log_product(policy_logps, weights, excluded if excluded.any() else None) - proposal_logps
    empty = (log_weights == -torch.inf).all(-1)
    if empty.any():
        guilty = (excluded[empty][0].any(0) & (weights > 0)).nonzero().squeeze(-1).tolist()
        raise ValueError(
            f"No completion of a prompt has a probability above 0 under all policies: each is excluded by the policy of "
            f"{' or '.join(map(name, guilty))}, and the mixture is not known there. Draw more completions (`num_generations`), draw "
            'them from the mixture (`proposal="mixture"`), or leave out that policy or this prompt.'
        )
    return _log_mean_exp(log_weights).mean(), log_weights


def on_policy_objective(
    weights: torch.Tensor,
    advantages: torch.Tensor,
    pooled_logps: torch.Tensor,
    proposal_logps: torch.Tensor,
    reference_logps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The dual objective from completions of the mixture itself, and their rewards.

    The gradient is the paper's, \\(E_{y \sim \pi_\lambda}[a_k]\\), with π_λ the sequence-level mixture of the given
    policies (completions reweighted by \\(\prod_k \pi_k(y)^{\lambda_k} / q(y)\\)). The value is the Lagrangian at
    that policy,

    $$ E_{y \sim \pi_\lambda} \sum_k \lambda_k a_k(x, y) - \mathrm{KL}(\pi_\lambda \| \pi_{ref}) \le F(\lambda) $$

    with equality when every policy is optimal for its reward. For policies that are not, the gradient is that of the
    actual mixture, not of the optimal policy of the theorem: it vanishes where all objectives have equal expected
    advantages.

    Args:
        weights (`torch.Tensor`): mixture weights λ, shape `(K,)`.
        advantages (`torch.Tensor`): \\(a_{jk}\\), shape `(P, m, K)`.
        pooled_logps (`torch.Tensor`): \\(\sum_k \lambda_k \log \pi_k(y_j)\\) at these weights, shape `(P, m)`.
        proposal_logps (`torch.Tensor`): \\(\log q(y_j)\\), shape `(P, m)`.
        reference_logps (`torch.Tensor`): \\(\log \pi_{ref}(y_j)\\), shape `(P, m)`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the value, a scalar with the above gradient in `weights`, and the log
        importance weights, shape `(P, m)`.
    """
    with torch.no_grad():
        log_weights = pooled_logps - proposal_logps
        sample_weights = torch.softmax(log_weights, dim=-1)
        over_reference = (pooled_logps - reference_logps).masked_fill(sample_weights == 0, 0)  # inf * 0 would be NaN
        kl = (sample_weights * over_reference).sum(-1) - _log_mean_exp(log_weights)
    expected_advantages = torch.einsum("pm,pmk->k", sample_weights, advantages) / len(advantages)
    return expected_advantages @ weights - kl.mean(), log_weights


def _log_mean_exp(values: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(values, dim=-1) - math.log(values.shape[-1])
