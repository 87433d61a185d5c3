r"""
What mixtures of the policies at hand reach, whether or not these are optimal for their rewards.

The theorem behind MPO takes every policy to be the best one for its reward. Real ones are not, and what their mixture reaches
is then another function of the weights,

$$ G(\lambda) = U\big(E_{\pi_\lambda}[r_1] - d_1, \dots\big)/\beta - E_x \mathrm{KL}(\pi_\lambda \| \pi_{ref}) \le \min_{\lambda'} F(\lambda') $$

with \\(\pi_\lambda \propto \prod_k \pi_k^{\lambda_k}\\) for whole completions. It is estimated from the same completions as F, for
any λ. The inequality is weak duality: its right-hand side bounds what any policy at all can reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .dual import (
    Certificate,
    DualTable,
    bootstrap_counts,
    certify,
    effective_fractions,
    segment_logsumexp,
    sums_by_prompt,
)
from .welfare import Polyhedral, Welfare


# in nats: a kink of the welfare is rounded off by less and less
_SMOOTHING = (1.0, 0.1, 0.01, 1e-3, 1e-4)


@dataclass
class MixtureTable:
    r"""
    N completions of P prompts, and what their importance weights under any mixture depend on.

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): which prompt, 0 to P - 1, every row belongs to.
        gains (`torch.Tensor` of shape `(N, K)`): \\((r_k(x, y_j) - d_k)/\beta\\).
        policy_log_ratios (`torch.Tensor` of shape `(N, M)`): \\(\log \pi_i(y_j) - \log q(y_j)\\) for every component.
        reference_log_ratios (`torch.Tensor` of shape `(N,)`): \\(\log \pi_{ref}(y_j) - \log q(y_j)\\).
        rows (`torch.LongTensor` of shape `(N,)`, *optional*):
            Which rows of the table of the dual objective these are, where that has further prompts, whose completions are not
            scored under the policies. Defaults to all of them.
    """

    prompt: torch.Tensor
    gains: torch.Tensor
    policy_log_ratios: torch.Tensor
    reference_log_ratios: torch.Tensor
    rows: torch.Tensor | None = None

    def shares(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Args:
            weights (`torch.Tensor` of shape `(M,)`): mixture weights of the components.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the shares that the completions have in the mixture, shape `(N,)`, with sum 1
            over each prompt, and its divergence \\(\mathrm{KL}(\pi_\lambda \| \pi_{ref})\\) by prompt, shape `(P,)`.
        """
        counts = torch.bincount(self.prompt)
        ratios = (self.policy_log_ratios @ weights).unsqueeze(-1)
        log_sums = segment_logsumexp(ratios, self.prompt, len(counts))
        shares = (ratios - log_sums[self.prompt]).exp()
        divergence = sums_by_prompt(
            self.prompt, shares * (ratios - self.reference_log_ratios.unsqueeze(-1)), len(counts)
        )
        log_normalizers = log_sums - counts.to(ratios).log().unsqueeze(-1)
        return shares.squeeze(-1), (divergence - log_normalizers).squeeze(-1)

    def measure(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expected gains of a mixture by prompt, shape `(P, K)`, and its divergence, shape `(P,)`."""
        shares, divergence = self.shares(weights)
        return sums_by_prompt(self.prompt, shares.unsqueeze(-1) * self.gains, len(divergence)), divergence

    def effective_sample_size(self, weights: torch.Tensor) -> torch.Tensor:
        """Effective sample size for a mixture: the mean over the prompts, as a fraction of a prompt's completions."""
        shares, _ = self.shares(weights)
        return effective_fractions(self.prompt, shares).mean()


def achieved_welfare(
    table: MixtureTable, weights: torch.Tensor, welfare: Welfare, prompt_weights: torch.Tensor | None = None
) -> torch.Tensor:
    r"""
    \\(\hat G(\lambda)\\), in nats.

    Args:
        table ([`MixtureTable`]): the completions.
        weights (`torch.Tensor` of shape `(M,)`): mixture weights of the components.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`]): the welfare function U.
        prompt_weights (`torch.Tensor` of shape `(B, P)`, *optional*):
            Weights of the prompts, rows with sum 1, for B values at a time. Defaults to equal weights and one value.

    Returns:
        `torch.Tensor` of shape `(B,)`, or a scalar.
    """
    gains, divergence = table.measure(weights)
    if prompt_weights is None:
        return welfare.value(gains.mean(0)) - divergence.mean()
    return welfare.value(prompt_weights @ gains) - prompt_weights @ divergence


def maximize_achieved(
    table: MixtureTable,
    welfare: Polyhedral,
    starts: Sequence[torch.Tensor],
    prompt_weights: torch.Tensor | None = None,
    smoothing: Sequence[float] = _SMOOTHING,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The weights on the simplex at which \\(\hat G\\) is largest. It is not concave, and has kinks where the welfare has some:
    L-BFGS climbs from several starts, on a welfare whose kinks are rounded off (Nesterov, 2005) by less and less.

    Args:
        table ([`MixtureTable`]): the completions.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`]): a max-min, weighted sum or CVaR, with constraints or without.
        starts (`Sequence[torch.Tensor]`): where to start, `(M,)` each.
        prompt_weights (`torch.Tensor` of shape `(P,)`, *optional*): weights of the prompts. Defaults to equal ones.
        smoothing (`Sequence[float]`, *optional*): how far kinks are rounded off, in nats, one round after another.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the weights, shape `(M,)`, and what they achieve.
    """
    num_prompts = int(table.prompt.max()) + 1
    if prompt_weights is None:
        prompt_weights = table.gains.new_full((num_prompts,), 1 / num_prompts)
    found = [_climb(table, welfare, start, prompt_weights, smoothing) for start in starts]
    values = torch.stack([achieved_welfare(table, w, welfare, prompt_weights.unsqueeze(0))[0] for w in found])
    return found[values.argmax()], values.max()


def _climb(
    table: MixtureTable,
    welfare: Polyhedral,
    start: torch.Tensor,
    prompt_weights: torch.Tensor,
    smoothing: Sequence[float],
) -> torch.Tensor:
    # a weight of 0 has no slope in its logarithm
    logits = (0.99 * start.double() + 0.01 / len(start)).log().requires_grad_()
    center = welfare.start(table.gains.shape[-1])

    def negative(scale: float) -> torch.Tensor:
        gains, divergence = table.measure(logits.softmax(-1))
        gains = prompt_weights @ gains
        prices = welfare.project(center - gains.detach() / scale)  # those that attain the rounded minimum
        return prompt_weights @ divergence - prices @ gains - scale / 2 * ((prices - center) ** 2).sum()

    for scale in smoothing:
        optimizer = torch.optim.LBFGS(
            [logits], max_iter=60, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def closure(scale: float = scale, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = negative(scale)
                loss.backward()
            return loss

        optimizer.step(closure)
    return logits.detach().softmax(-1)


def certify_achieved(
    table: DualTable,
    mixture: MixtureTable,
    weights: torch.Tensor,
    welfare: Polyhedral,
    rewards: torch.Tensor | None = None,
    num_resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> Certificate:
    r"""
    A certificate of weights that were fitted by [`maximize_achieved`]: its duality gap is what any policy at all could have
    above what this mixture has.

    Args:
        table ([`~mpo_hf.estimation.DualTable`]): the completions, for F.
        mixture ([`MixtureTable`]): the same completions, for G.
        weights (`torch.Tensor` of shape `(M,)`): the mixture weights in question.
        welfare ([`~mpo_hf.estimation.welfare.Welfare`]): the welfare function.
        rewards (`torch.Tensor` of shape `(N, K)`, *optional*): rewards of the completions, on their own scale.
        num_resamples (`int`, *optional*, defaults to 200):
            Bootstrap replicates. The standard errors of the weights are from the first 20 of them.
        confidence (`float`, *optional*, defaults to 0.95): level of the bound.
        seed (`int`, *optional*, defaults to 0): seed of the replicates.
    """
    options = {"num_resamples": num_resamples, "confidence": confidence, "seed": seed, "welfare": welfare}
    certificate = certify(table, rewards=rewards, **options, mixture=mixture, mixture_weights=weights)
    replicates = torch.stack(
        [
            maximize_achieved(mixture, welfare, [weights], counts, _SMOOTHING[-1:])[0]
            for counts in bootstrap_counts(table.num_prompts, min(20, num_resamples), seed)
        ]
    )
    certificate.of_mixture = True
    certificate.weights, certificate.standard_errors = weights, replicates.std(0)
    certificate.active = (replicates > 1e-3).double().mean(0)
    certificate.effective_sample_size = mixture.effective_sample_size(weights).item()
    certificate.duality_gap = max(0.0, certificate.shortfall)
    # one-sided, from the normal distribution: the shortfall is a mean over prompts
    quantile = torch.distributions.Normal(0, 1).icdf(torch.tensor(confidence)).item()
    certificate.duality_gap_bound = max(0.0, certificate.shortfall + quantile * certificate.shortfall_error)
    return certificate
