"""The optimization problem of a fit: the welfare of the objectives, the scale of their rewards, and the mixture."""

from collections.abc import Sequence

import torch

from ..estimation import (
    AlphaFair,
    Constrained,
    CVaR,
    DualTable,
    MaxMin,
    MixtureTable,
    RewardScale,
    WeightedSum,
    Welfare,
    implicit_table,
    reference_moments,
    reward_table,
)
from ..mixture.modeling_mixture import MixturePolicyModel
from .estimators import DualEstimator, Estimator, PrimalEstimator
from .mpo_config import MPOConfig


# Fewer prompts give no information on the variation between prompts.
MIN_PROMPTS_OF_MIXTURE = 2


class FitProblem:
    """
    The optimization problem that the options of a fit define.

    Args:
        args ([`MPOConfig`]): the options.
        objectives (`Sequence[str]`): names of the objectives.

    Raises:
        `ValueError`: the constraints or the weights do not match the objectives.
    """

    def __init__(self, args: MPOConfig, objectives: Sequence[str]):
        unknown = [name for name in args.constraints or {} if name not in objectives]
        if unknown:
            raise ValueError(f"`constraints` names {unknown}, but the objectives are {list(objectives)}.")
        self.args, self.num_objectives = args, len(objectives)
        self.thresholds = {objectives.index(name): tau for name, tau in (args.constraints or {}).items()}
        self.welfare = self._make_welfare()
        self._scale = RewardScale(
            args.normalize_rewards, args.beta, self.thresholds, isinstance(self.welfare, AlphaFair)
        )

    def _make_welfare(self) -> Welfare:
        args, free = self.args, self.num_objectives - len(self.thresholds)
        if not free:
            raise ValueError(
                f"All objectives have constraints, {args.constraints}: at least one must be left to maximize."
            )
        weights = args.welfare_weights if args.welfare_weights is not None else [1 / free] * free
        if len(weights) != free:
            raise ValueError(
                f"Got {len(weights)} `welfare_weights` for {free} objectives"
                f"{' without a constraint' if self.thresholds else ''}."
            )
        welfare = {
            "max_min": MaxMin,
            "weighted_sum": lambda: WeightedSum(weights),
            "cvar": lambda: CVaR(args.cvar_level, weights),
            "nash": lambda: AlphaFair(1.0, weights),
            "alpha_fair": lambda: AlphaFair(args.fairness_alpha, weights),
        }[args.welfare]()
        return Constrained(welfare, list(self.thresholds), args.constraint_price) if self.thresholds else welfare

    # ---- weights of objectives, and of the mixture's components ----

    def extend(self, model: MixturePolicyModel, reference: MixturePolicyModel | None) -> MixturePolicyModel:
        """
        The mixture whose weights are fitted. Where the weights of the objectives need not sum to 1, it has the
        reference as its last component, which takes the remaining weight.

        Args:
            model ([`MixturePolicyModel`]): the mixture of the policies.
            reference ([`MixturePolicyModel`], *optional*): the reference policy.
        """
        if not self.leaves_simplex:
            return model
        extended = MixturePolicyModel.from_policies(
            [model, reference],
            weights=[1.0, 0.0],
            reference=reference,
            labels=[model.config.labels[0], "reference"],
            vocab_size=model.config.vocab_size,
            allow_off_simplex=True,
        )
        extended.generation_config = model.generation_config
        extended._load_kwargs = model._load_kwargs
        return extended

    @property
    def leaves_simplex(self) -> bool:
        """Whether the sum of the weights of the objectives may differ from 1."""
        return not self.welfare.on_simplex and self.args.objective != "achieved"

    def mixture_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of the components, shape `(M,)`, from those of the objectives, shape `(K,)`."""
        return torch.cat([weights, 1 - weights.sum(-1, keepdim=True)]) if self.leaves_simplex else weights

    def objective_weights(self, mixture_weights: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """Weights of the objectives, shape `(K,)`, from those of the components, shape `(M,)`."""
        return torch.as_tensor(mixture_weights, dtype=torch.float64)[: self.num_objectives]

    # ---- estimators from completions ----

    def make_estimator(
        self,
        prompt: torch.Tensor,
        proposal_logps: torch.Tensor,
        policy_logps: torch.Tensor | None = None,
        reference_logps: torch.Tensor | None = None,
        rewards: torch.Tensor | None = None,
        sets_scale: bool = True,
    ) -> Estimator:
        r"""
        The estimator of the loss. With `policy_logps` it also estimates the primal objective of the mixture, on the
        prompts all of whose completions have them.

        Args:
            prompt (`torch.LongTensor` of shape `(N,)`): index of the prompt of every row.
            proposal_logps (`torch.Tensor` of shape `(N,)`): \\(\log q(y_j)\\) of all proposals together.
            policy_logps (`torch.Tensor` of shape `(N, K)`, *optional*):
                \\(\log \pi_k(y_j)\\). Required by objectives other than `"reward"`; with that, rows of NaN stand for
                unknown ones.
            reference_logps (`torch.Tensor` of shape `(N,)`, *optional*): required for rewards.
            rewards (`torch.Tensor` of shape `(N, K)`, *optional*): required for rewards.
            sets_scale (`bool`, *optional*, defaults to `True`):
                Whether z-scores are relative to these completions, rather than to the last ones that set the scale.

        Returns:
            [`Estimator`]
        """
        if self.args.objective == "implicit":
            table = implicit_table(prompt, policy_logps[:, : self.num_objectives], proposal_logps)
            return DualEstimator(table, None, self.welfare)
        log_ratios = reference_logps - proposal_logps
        if sets_scale and self.args.normalize_rewards == "z_score":
            self._scale.moments = reference_moments(rewards, prompt, log_ratios)
        gains = self._scale(rewards, prompt, log_ratios) / self.args.beta
        table = reward_table(prompt, gains, reference_logps, proposal_logps, normalize=False)
        mixture = None
        if policy_logps is not None:
            mixture = self._mixture_table(table, policy_logps, reference_logps, proposal_logps)
        kind = PrimalEstimator if self.args.objective == "achieved" else DualEstimator
        return kind(table, mixture, self.welfare)

    def _mixture_table(
        self, table: DualTable, policy_logps: torch.Tensor, reference_logps: torch.Tensor, proposal_logps: torch.Tensor
    ) -> MixtureTable | None:
        """The table of the prompts whose completions are all scored; `None` if these are fewer than two of several."""
        if self.leaves_simplex and policy_logps.shape[-1] == self.num_objectives:
            policy_logps = torch.cat([policy_logps, reference_logps.unsqueeze(-1)], dim=-1)
        ratios, reference_ratios = policy_logps - proposal_logps.unsqueeze(-1), reference_logps - proposal_logps
        missing = policy_logps.isnan().any(-1)
        if not missing.any():
            return MixtureTable(table.prompt, table.advantages, ratios, reference_ratios)
        if self.args.objective == "achieved":
            raise ValueError(
                '`objective="achieved"` requires log-probabilities of all completions under the policies, and those of '
                f"{int(missing.sum())} of {len(missing)} are not numbers."
            )
        is_whole = torch.ones(table.num_prompts, dtype=torch.bool)
        is_whole[table.prompt[missing]] = False
        if is_whole.sum() < MIN_PROMPTS_OF_MIXTURE:
            return None
        rows = is_whole[table.prompt].nonzero().squeeze(-1)
        prompt = is_whole.cumsum(0)[table.prompt[rows]] - 1
        return MixtureTable(prompt, table.advantages[rows], ratios[rows], reference_ratios[rows], rows)
