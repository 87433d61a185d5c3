r"""
Tables of completions, from which the objectives of MPO are estimated by multiple importance sampling.

A row j of a table is one completion of a prompt x. Every form of the dual objective is

$$ \hat F(\lambda) = \frac1P \sum_x \log \sum_{j \in x} \exp\Big(b_j + \sum_k \lambda_k a_{jk}\Big) $$

where \\(a_{jk} = P(r_k)(x, y_j)/\beta\\) and \\(b_j\\) is the logarithm of a self-normalized importance weight
\\(\pi_{ref}(y_j)/q(y_j)\\), or, with implicit rewards, \\(a_{jk} = \log \pi_k(y_j)\\) and
\\(b_j = -\log q(y_j) - \log m_x\\). [`DualTable`] holds these numbers. [`MixtureTable`] holds those that the expected
rewards of mixtures of the given policies depend on.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


# The largest advantage or gain: second derivatives contain its square, whose sum over the rows must not overflow.
LARGEST_ADVANTAGE = 1e100


@dataclass
class DualTable:
    r"""
    The dual objective of a table of N completions of P prompts.

    A policy may give a completion the probability 0. With implicit rewards, its advantage is then -inf: such a
    completion has no share while the weight of this policy is above 0. A weight of 0 removes the policy entirely, as it
    does in a mixture, so that F̂ may jump there; see [`~DualTable.closed`].

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row, 0 to P - 1.
        offsets (`torch.Tensor` of shape `(N,)`): \\(b_j\\), float64; -inf for a row without any share.
        advantages (`torch.Tensor` of shape `(N, K)`): \\(a_{jk}\\), float64, or -inf.
        objective_names (`Sequence[str]`, *optional*): names of the objectives, for error messages.
        excluding (`torch.BoolTensor` of shape `(K,)`, *optional*):
            For a table without the completions that some policies exclude: these policies, whose weights must not be 0.

    Raises:
        `ValueError`: the table is empty, a prompt has no completion with a share, or a number is NaN, positive infinity
            or above 1e100.
    """

    prompt: torch.Tensor
    offsets: torch.Tensor
    advantages: torch.Tensor
    objective_names: Sequence[str] | None = None
    excluding: torch.Tensor | None = None

    def __post_init__(self):
        if len(self.prompt) == 0:
            raise ValueError("A table needs at least one completion, got none.")
        bad = self.offsets.isnan() | (self.offsets == torch.inf)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"`offsets` contains NaN or infinity: {self.offsets[row].item()} in row {row}, of prompt "
                f"{self.prompt[row].item()}. The log-probability of a completion under the proposal that drew it must be "
                "a finite number, and the reference must give some completion of each prompt a probability above 0."
            )
        bad = ~(self.advantages.abs() < LARGEST_ADVANTAGE) & (self.advantages != -torch.inf)
        if bad.any():
            row, k = bad.nonzero()[0].tolist()
            raise ValueError(
                f"`advantages` of {self.name(k)} contains {self.advantages[row, k].item()} in row {row}, which is NaN, "
                "infinite or too large. Check the log-probabilities and rewards for values that are not finite. Rewards "
                "over β must be finite, too: rescale the reward, or raise `beta`."
            )
        counts = torch.bincount(self.prompt[self.offsets > -torch.inf], minlength=self.num_prompts)
        if (counts == 0).any():
            raise ValueError(
                f"The prompt {int((counts == 0).nonzero()[0])} has no completion with a probability above 0. Prompts are "
                "numbered from 0 without a gap, and each needs such a completion: draw more of them, or leave the prompt "
                "out."
            )
        excluded = self.advantages == -torch.inf
        self._excluded = excluded if excluded.any() else None

    @property
    def num_prompts(self) -> int:
        return int(self.prompt.max()) + 1

    @property
    def num_objectives(self) -> int:
        return self.advantages.shape[-1]

    def by_prompt(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The terms of F̂ of every prompt, and the shares of the completions in them.

        Args:
            weights (`torch.Tensor` of shape `(B, K)`): B vectors of mixture weights.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the terms, shape `(P, B)`, and the shares, shape `(N, B)`, which sum
                to 1 over each prompt.
        """
        exponents = self.offsets.unsqueeze(-1) + log_product(self.advantages, weights, self._excluded)
        values = segment_logsumexp(exponents, self.prompt, self.num_prompts)
        # -inf for a prompt whose completions are all excluded: they have no shares then, rather than NaN
        finite = values.clamp(min=torch.finfo(values.dtype).min)
        return values, (exponents - finite[self.prompt]).exp_()

    def name(self, objective: int) -> str:
        """What error messages call an objective."""
        return f"objective {objective}" if self.objective_names is None else repr(self.objective_names[objective])

    def closed(self, can_have_weight: torch.Tensor) -> "DualTable":
        r"""
        The table whose F̂ is the limit of this one's from within the set of weights: without the completions that some
        policy excludes. It differs where the weight of such a policy is 0. It is continuous, convex and nowhere above,
        and its minimum is the infimum of this table's F̂.

        Args:
            can_have_weight (`torch.BoolTensor` of shape `(K,)`): which weights are not 0 throughout.

        Raises:
            `ValueError`: no completion of a prompt has a probability above 0 under all policies.
        """
        if self._excluded is None:
            return self
        out = (self._excluded & can_have_weight).any(-1)
        offsets = self.offsets.masked_fill(out, -torch.inf)
        left = torch.bincount(self.prompt[offsets > -torch.inf], minlength=self.num_prompts)
        if (left == 0).any():
            self._refuse_empty(int((left == 0).nonzero()[0]), int((left == 0).sum()), can_have_weight)
        excluding = self._excluded.any(0) & can_have_weight
        advantages = self.advantages.masked_fill(self._excluded, 0)
        return DualTable(self.prompt, offsets, advantages, self.objective_names, excluding)

    def _refuse_empty(self, prompt: int, count: int, can_have_weight: torch.Tensor) -> None:
        assert self._excluded is not None
        rows = self.prompt == prompt
        guilty = (self._excluded[rows].any(0) & can_have_weight).nonzero().squeeze(-1).tolist()
        raise ValueError(
            f"No completion of prompt {prompt} has a probability above 0 under all policies{f', as of {count} prompts' * (count > 1)}: "
            f"each of its {int(rows.sum())} is excluded by the policy of {' or '.join(map(self.name, guilty))}, and the "
            'mixture is not known there. Draw more completions, draw them from the mixture (`proposal="mixture"`), or '
            "leave out that policy or this prompt."
        )

    def part(self, rows: torch.Tensor, prompt: torch.Tensor) -> "DualTable":
        """
        A table of some of the prompts.

        Args:
            rows (`torch.LongTensor` of shape `(n,)`): all rows of these prompts.
            prompt (`torch.LongTensor` of shape `(n,)`): the new index of the prompt of each of these rows, from 0 on.
        """
        return DualTable(prompt, self.offsets[rows], self.advantages[rows], self.objective_names, self.excluding)

    def effective_sample_fractions(self, weights: torch.Tensor) -> torch.Tensor:
        """Effective sample size of every prompt, as a fraction of its completions, shape `(P,)`."""
        _, shares = self.by_prompt(weights.unsqueeze(0))
        return effective_sample_fractions(self.prompt, shares[:, 0])


@dataclass
class MixtureTable:
    r"""
    N completions of P prompts, with the numbers that their importance weights under any mixture depend on.

    Log-ratios may be -inf: a component with a weight other than 0 that gives a completion the probability 0 excludes it.
    The divergence from a reference that excludes a completion of the mixture is infinite, and so is that of a mixture
    that excludes all completions of a prompt, whose expected gains are NaN.

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row, 0 to P - 1.
        gains (`torch.Tensor` of shape `(N, K)`): \\((r_k(x, y_j) - d_k)/\beta\\).
        policy_log_ratios (`torch.Tensor` of shape `(N, M)`): \\(\log \pi_i(y_j) - \log q(y_j)\\) for every component.
        reference_log_ratios (`torch.Tensor` of shape `(N,)`): \\(\log \pi_{ref}(y_j) - \log q(y_j)\\).
        rows (`torch.LongTensor` of shape `(N,)`, *optional*):
            Indices of these rows in the table of the dual objective, where that table has further prompts whose
            completions are not scored under the policies. Defaults to all of its rows.

    Raises:
        `ValueError`: a number is NaN or positive infinity, or a gain is not finite.
    """

    prompt: torch.Tensor
    gains: torch.Tensor
    policy_log_ratios: torch.Tensor
    reference_log_ratios: torch.Tensor
    rows: torch.Tensor | None = None

    def __post_init__(self):
        for name in ("gains", "policy_log_ratios", "reference_log_ratios"):
            values = getattr(self, name)
            bad = values.isnan() | (values == torch.inf) | ((values == -torch.inf) & (name == "gains"))
            if bad.any():
                at = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"`{name}` contains {values[tuple(at)].item()} in row {at[0]}. Check the log-probabilities and "
                    "rewards for values that are not finite."
                )
        excluded = self.policy_log_ratios == -torch.inf
        self._excluded = excluded if excluded.any() else None
        self._has_zeros = self._excluded is not None or bool((self.reference_log_ratios == -torch.inf).any())

    def shares(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        The normalized importance weights of the completions under a mixture, and its divergence from the reference.

        Args:
            weights (`torch.Tensor` of shape `(M,)`): mixture weights of the components.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the shares of the completions, shape `(N,)`, which sum to 1 over each
                prompt, and \\(\mathrm{KL}(\pi_\lambda \| \pi_{ref})\\) by prompt, shape `(P,)`.
        """
        counts = torch.bincount(self.prompt)
        ratios = log_product(self.policy_log_ratios, weights, self._excluded).unsqueeze(-1)
        log_sums = segment_logsumexp(ratios, self.prompt, len(counts))
        shares = (ratios - log_sums[self.prompt]).exp()
        over_reference = ratios - self.reference_log_ratios.unsqueeze(-1)
        if self._has_zeros:  # 0 * inf would be NaN
            over_reference = over_reference.masked_fill(shares == 0, 0)
        divergence = sums_by_prompt(self.prompt, shares * over_reference, len(counts))
        divergence = divergence - (log_sums - counts.to(ratios).log().unsqueeze(-1))
        if self._has_zeros:
            divergence = divergence.masked_fill(self._is_undefined(weights, log_sums), torch.inf)
        return shares.squeeze(-1), divergence.squeeze(-1)

    def _is_undefined(self, weights: torch.Tensor, log_sums: torch.Tensor) -> torch.Tensor:
        """Prompts of which a mixture excludes all completions, or gives one an infinite weight: shape `(P, 1)`."""
        undefined = log_sums == -torch.inf
        if self._excluded is not None:  # a negative power of 0
            infinite = (self._excluded & (weights < 0)).any(-1) & ~(self._excluded & (weights > 0)).any(-1)
            undefined[self.prompt[infinite]] = True
        return undefined

    def faces(self) -> list[list[int]]:
        """
        Sets of components, all together first. Within each, no mixture whose weights are above 0 excludes other completions
        than another.
        """
        members = range(self.policy_log_ratios.shape[-1])
        excluding = [] if self._excluded is None else self._excluded.any(0).nonzero().squeeze(-1).tolist()
        left_out = itertools.chain.from_iterable(
            itertools.combinations(excluding, count) for count in range(len(excluding) + 1)
        )
        return [[i for i in members if i not in out] for out in left_out if len(out) < len(members)]

    def of_components(self, members: list[int]) -> "MixtureTable":
        """The table of the mixtures of some components."""
        if len(members) == self.policy_log_ratios.shape[-1]:
            return self
        ratios = self.policy_log_ratios[:, members]
        return MixtureTable(self.prompt, self.gains, ratios, self.reference_log_ratios, self.rows)

    def measure(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expected gains of a mixture by prompt, shape `(P, K)`, and its divergence from the reference, `(P,)`."""
        shares, divergence = self.shares(weights)
        return sums_by_prompt(self.prompt, shares.unsqueeze(-1) * self.gains, len(divergence)), divergence

    def effective_sample_fraction(self, weights: torch.Tensor) -> torch.Tensor:
        """Effective sample size for a mixture as a fraction of a prompt's completions, the mean over the prompts."""
        shares, _ = self.shares(weights)
        return effective_sample_fractions(self.prompt, shares).mean()


# ---- making tables ----


def reward_table(
    prompt: torch.Tensor,
    advantages: torch.Tensor,
    reference_logps: torch.Tensor,
    proposal_logps: torch.Tensor,
    normalize: bool = True,
    objective_names: Sequence[str] | None = None,
) -> DualTable:
    r"""
    The table of the dual objective with rewards, \\(E_x \log E_{y \sim \pi_{ref}} \exp(\sum_k \lambda_k a_k)\\).

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row.
        advantages (`torch.Tensor` of shape `(N, K)`): \\(r_k(x, y_j)/\beta\\).
        reference_logps (`torch.Tensor` of shape `(N,)`): \\(\log \pi_{ref}(y_j)\\).
        proposal_logps (`torch.Tensor` of shape `(N,)`): \\(\log q(y_j)\\); see [`balance_heuristic`].
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to apply the paper's P: an advantage is then relative to what the optimal policy of its objective
            attains.
        objective_names (`Sequence[str]`, *optional*): names of the objectives, for error messages.
    """
    offsets = log_shares(prompt, reference_logps - proposal_logps)
    if normalize:
        advantages = normalize_by_prompt(advantages, offsets, prompt, int(prompt.max()) + 1)
    return DualTable(prompt, offsets, advantages, objective_names)


def implicit_table(
    prompt: torch.Tensor,
    policy_logps: torch.Tensor,
    proposal_logps: torch.Tensor,
    objective_names: Sequence[str] | None = None,
) -> DualTable:
    r"""
    The table of the dual objective with implicit rewards,
    \\(E_x \log E_{y \sim q} \prod_k \pi_k(y)^{\lambda_k}/q(y)\\).

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row.
        policy_logps (`torch.Tensor` of shape `(N, K)`): \\(\log \pi_k(y_j)\\).
        proposal_logps (`torch.Tensor` of shape `(N,)`): \\(\log q(y_j)\\); see [`balance_heuristic`].
        objective_names (`Sequence[str]`, *optional*): names of the objectives, for error messages.
    """
    counts = torch.bincount(prompt).to(proposal_logps)
    return DualTable(prompt, -proposal_logps - counts.log()[prompt], policy_logps, objective_names)


def balance_heuristic(prompt: torch.Tensor, proposal: torch.Tensor, proposal_logps: torch.Tensor) -> torch.Tensor:
    r"""
    The density of the mixture of proposals that the completions of each prompt were drawn from,
    \\(q(y) = \sum_s \frac{m_{xs}}{m_x} q_s(y)\\), with \\(m_{xs}\\) of the \\(m_x\\) completions of prompt x drawn
    from \\(q_s\\) (the balance heuristic of multiple importance sampling; Veach and Guibas, 1995).

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row.
        proposal (`torch.LongTensor` of shape `(N,)`): index of the proposal, of S, that drew every row.
        proposal_logps (`torch.Tensor` of shape `(N, S)`):
            \\(\log q_s(y_j)\\) under every proposal; not used for proposals that drew nothing for the prompt.

    Returns:
        `torch.Tensor`: \\(\log q(y_j)\\), shape `(N,)`.
    """
    counts = proposal_logps.new_zeros(int(prompt.max()) + 1, proposal_logps.shape[-1])
    counts.index_put_((prompt, proposal), proposal_logps.new_ones(()), accumulate=True)
    shares = (counts / counts.sum(-1, keepdim=True))[prompt]
    return torch.where(shares > 0, shares.log() + proposal_logps, -torch.inf).logsumexp(-1)


def known_densities(
    prompt: torch.Tensor, proposal: torch.Tensor, proposal_logps: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    """
    The log-density of every row under all proposals of its prompt together; see [`balance_heuristic`]. Where one of these
    densities is unknown, it is the log-density of every completion of that prompt under its own proposal, which is valid as
    well; one beside the other would not be.

    Args:
        prompt, proposal (`torch.LongTensor` of shape `(N,)`), proposal_logps (`torch.Tensor` of shape `(N, S)`):
            As for [`balance_heuristic`], with NaN for unknown densities.
        own (`torch.Tensor` of shape `(N,)`): log-densities under the proposals that drew the rows.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    together = balance_heuristic(prompt, proposal, proposal_logps)
    is_known = torch.bincount(prompt, together.isnan().double()) == 0
    return torch.where(is_known[prompt], together, own)


def normalize_by_prompt(
    rewards: torch.Tensor, log_weights: torch.Tensor, prompt: torch.Tensor, num_prompts: int, beta: float = 1.0
) -> torch.Tensor:
    r"""
    The normalization P of [Mixing Preference Optimization](https://huggingface.co/papers/2502.18699), by prompt:

    $$ P(r)_{jk} = r_{jk} - \beta \log \sum_{i \in x} \rho_i \exp(r_{ik} / \beta) $$

    Args:
        rewards (`torch.Tensor` of shape `(N, K)`): \\(r_{jk}\\).
        log_weights (`torch.Tensor` of shape `(N,)`): \\(\log \rho_j\\), importance weights of the reference with sum 1
            over each prompt; see [`log_shares`].
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row.
        num_prompts (`int`): number of prompts; each has at least one row.
        beta (`float`, *optional*, defaults to 1.0): KL coefficient β; 1 for rewards that are divided by it already.

    Returns:
        `torch.Tensor` of shape `(N, K)`.
    """
    values = segment_logsumexp(log_weights.unsqueeze(-1) + rewards / beta, prompt, num_prompts)
    return rewards - beta * values[prompt]


def log_product(logps: torch.Tensor, weights: torch.Tensor, excluded: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Logarithms of weighted products, \\(\sum_k \lambda_k \log \pi_k\\), differentiable in the weights. A weight of 0 removes
    its factor entirely, also one of 0; a factor of 0 with another weight gives -inf.

    Args:
        logps (`torch.Tensor` of shape `(..., K)`): the logarithms, finite or -inf.
        weights (`torch.Tensor` of shape `(K,)` or `(B, K)`): one vector of weights, or several.
        excluded (`torch.BoolTensor` of shape `(..., K)`, *optional*):
            Where they are -inf; `None` for nowhere.

    Returns:
        `torch.Tensor` of shape `(...)` or `(..., B)`.
    """
    columns = weights if weights.ndim == 1 else weights.mT
    if excluded is None:
        return logps @ columns
    product = logps.masked_fill(excluded, 0) @ columns
    return product.masked_fill((excluded.to(columns) @ (columns != 0).to(columns)) > 0, -torch.inf)


# ---- sums by prompt ----


def sums_by_prompt(prompt: torch.Tensor, values: torch.Tensor, num_prompts: int) -> torch.Tensor:
    """Sums of values of shape `(N, B)` over the rows of each prompt, shape `(num_prompts, B)`."""
    return values.new_zeros(num_prompts, values.shape[-1]).index_add_(0, prompt, values)


def log_shares(prompt: torch.Tensor, log_ratios: torch.Tensor) -> torch.Tensor:
    """
    Log importance weights of shape `(N,)` with sum 1 over each prompt, from log-ratios that are known up to a constant
    of each prompt.

    Raises:
        `ValueError`: a log-ratio is NaN or positive infinity, or all those of a prompt are -inf.
    """
    sums = segment_logsumexp(log_ratios.unsqueeze(-1), prompt, int(prompt.max()) + 1)
    bad = ~sums.isfinite().squeeze(-1)
    if bad.any():
        of_prompt = log_ratios[prompt == int(bad.nonzero()[0])].tolist()
        raise ValueError(
            f"The completions of prompt {int(bad.nonzero()[0])} have no importance weights: the log-probability under the "
            f"reference less that under the proposal is {of_prompt[:3]}{'...' if len(of_prompt) > 3 else ''}. The proposal "
            "must give each completion that it drew a probability above 0, and the reference at least one completion of "
            "each prompt. Correct the log-probabilities, draw more completions, or leave the prompt out."
        )
    return log_ratios - sums.squeeze(-1)[prompt]


def effective_sample_fractions(prompt: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """
    Effective sample size of every prompt, as a fraction of its completions, shape `(P,)`.

    Args:
        prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row.
        shares (`torch.Tensor` of shape `(N,)`): importance weights with sum 1 over each prompt.
    """
    counts = torch.bincount(prompt)
    return 1 / (sums_by_prompt(prompt, shares.unsqueeze(-1) ** 2, len(counts)).squeeze(-1) * counts)


def segment_logsumexp(values: torch.Tensor, segment: torch.Tensor, num_segments: int) -> torch.Tensor:
    """
    Log-sum-exp over the rows of each segment.

    Args:
        values (`torch.Tensor` of shape `(N, B)`): the exponents.
        segment (`torch.LongTensor` of shape `(N,)`): index of the segment of every row.
        num_segments (`int`): number of segments; each has at least one row.

    Returns:
        `torch.Tensor` of shape `(num_segments, B)`.
    """
    index = segment.unsqueeze(-1).expand_as(values)
    largest = values.new_full((num_segments, values.shape[-1]), -torch.inf).scatter_reduce(0, index, values, "amax")
    largest = largest.clamp(min=torch.finfo(values.dtype).min)  # -inf less -inf would be NaN
    return sums_by_prompt(segment, (values - largest[segment]).exp_(), num_segments).log() + largest
