"""The optimization problem of a fit: the welfare of the objectives, the scale of their rewards, and the mixture."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.utils import logging

from ..estimation import (
    AlphaFair,
    Constrained,
    CVaR,
    DecodedTable,
    DualTable,
    InfeasibleError,
    LogNormalizer,
    MaxMin,
    MixtureTable,
    RewardScale,
    WeightedSum,
    Welfare,
    implicit_table,
    reference_moments,
    reward_table,
)
from ..estimation.decoded_weights import WeightSpace
from ..estimation.reward_scales import distinguishes
from ..estimation.tables import LARGEST_ADVANTAGE
from ..mixture.modeling_mixture import MixturePolicyModel
from .decoded_estimator import DecodedEstimator
from .estimators import DualEstimator, Estimator, PrimalEstimator
from .mpo_config import MPOConfig


logger = logging.get_logger(__name__)

# A weight this close to the price of its constraint, relative to it, is at the price.
PRICE_TOLERANCE = 1e-6
# A larger weight, off the simplex, makes more of a policy's errors than of what it has learned.
LARGE_WEIGHT = 100.0
# A difference of so many standard errors is taken for real.
SEPARATED = 2.0
# Fewer prompts give no information on the variation between prompts.
MIN_PROMPTS_OF_MIXTURE = 2


@dataclass(frozen=True)
class DecodedRows:
    r"""
    What the law of decoded mixtures depends on, of N completions.

    Args:
        proposal (`torch.LongTensor` of shape `(N,)`): index of the proposal that drew every row.
        proposals (`list[tuple[float, ...]]`): the mixture weights of each; `()` is the reference, `None` one not known.
        own_logps (`torch.Tensor` of shape `(N,)`): \\(\log q(y_j)\\) under it.
        normalizers (`torch.Tensor` of shape `(N, E)`): see [`~mpo_hf.estimation.LogNormalizer`]; NaN where unknown.
        current (`Sequence[float]`): weights of the proposal that new completions are drawn with; empty for the reference.
    """

    proposal: torch.Tensor
    proposals: list[tuple[float, ...] | None]
    own_logps: torch.Tensor
    normalizers: torch.Tensor
    current: Sequence[float]


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
        self.args, self.objectives, self.num_objectives = args, list(objectives), len(objectives)
        self.thresholds = {objectives.index(name): tau for name, tau in (args.constraints or {}).items()}
        self.welfare = self._make_welfare()
        self._scale = RewardScale(
            args.normalize_rewards,
            args.beta,
            self.thresholds,
            from_reference=isinstance(self.welfare, AlphaFair),
            objective_names=self.objectives,
        )
        self._flat: list[str] = []
        self._own_gains: torch.Tensor | None = None
        self._own_errors: torch.Tensor | None = None
        self._distinguished: set[str] = set()
        self._has_warned: set[str] = set()

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
        if not self.has_reference_component:
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

    @property
    def has_reference_component(self) -> bool:
        """Whether the reference is the last component of the mixture."""
        return self.leaves_simplex or self.args.free_sum

    @property
    def is_decoded(self) -> bool:
        """Whether the fit is about the mixture as it is decoded, token by token."""
        return self.args.objective == "achieved" and self.args.mixing == "token"

    @property
    def num_components(self) -> int:
        """How many components the mixture has."""
        return self.num_objectives + self.has_reference_component

    def mixture_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of the components, shape `(M,)`, from those of the objectives, shape `(K,)`."""
        return torch.cat([weights, 1 - weights.sum(-1, keepdim=True)]) if self.has_reference_component else weights

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
        decoded: DecodedRows | None = None,
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
                Whether the scale of the rewards is set by these completions, rather than by the last ones that did.
            decoded ([`DecodedRows`], *optional*): required where the fit is about decoded mixtures.

        Returns:
            [`Estimator`]

        Raises:
            `ValueError`: required numbers are missing or not finite, or an objective cannot be compared with the others.
        """
        if not proposal_logps.isfinite().all():
            row = int((~proposal_logps.isfinite()).nonzero()[0])
            raise ValueError(
                f"The log-probability of a completion under the proposals that drew it is {proposal_logps[row].item()} in row "
                f"{row}. It must be a finite number: correct `proposal_logps`, or leave the completion out."
            )
        if self.args.objective == "implicit":
            logps = _known("policy_logps", policy_logps)[:, : self.num_objectives]
            self._check_columns("log-probability of a completion under the policy", logps, or_minus_infinity=True)
            table = implicit_table(prompt, logps, proposal_logps, self.objectives)
            return DualEstimator(table.closed(self.welfare.can_have_weight(self.num_objectives)), None, self.welfare)
        reference_logps, rewards = _known("reference_logps", reference_logps), _known("rewards", rewards)
        self._check_columns("reward of a completion", rewards)
        completions = None
        if decoded is not None:
            completions = self._decoded_table(prompt, policy_logps, reference_logps, rewards, decoded)
            proposal_logps = completions.log_densities(decoded.proposals)
        log_ratios = reference_logps - proposal_logps
        if sets_scale:
            found = distinguishes(rewards, prompt, log_ratios).tolist()
            self._flat = [name for name, varies in zip(self.objectives, found) if not varies]
        if sets_scale and self.args.normalize_rewards == "z_score":
            self._scale.moments = reference_moments(rewards, prompt, log_ratios, self.objectives)
        if completions is not None and (sets_scale or self._scale.reference_means is None):
            self._set_baselines(completions)
        gains = self._scale(rewards, prompt, log_ratios) / self.args.beta
        table = reward_table(prompt, gains, reference_logps, proposal_logps, False, self.objectives)
        if completions is not None:
            space = WeightSpace(self.num_components, self.args.free_sum)
            if decoded.current:
                space.proposal = torch.tensor(decoded.current, dtype=torch.float64)
            completions.gains = gains
            return DecodedEstimator(table, None, self.welfare, completions, space, rewards, self.objectives)
        mixture = None
        if policy_logps is not None:
            mixture = self._mixture_table(table, policy_logps, reference_logps, proposal_logps)
        kind = PrimalEstimator if self.args.objective == "achieved" else DualEstimator
        return kind(table, mixture, self.welfare)

    def _decoded_table(
        self,
        prompt: torch.Tensor,
        policy_logps: torch.Tensor,
        reference_logps: torch.Tensor,
        rewards: torch.Tensor,
        decoded: DecodedRows,
    ) -> DecodedTable:
        """The completions for decoded mixtures, with rewards in place of gains."""
        if self.has_reference_component and policy_logps.shape[-1] == self.num_objectives:
            policy_logps = torch.cat([policy_logps, reference_logps.unsqueeze(-1)], dim=-1)
        return DecodedTable(
            prompt,
            decoded.proposal,
            rewards,
            policy_logps,
            reference_logps,
            decoded.own_logps,
            LogNormalizer.unpack(decoded.normalizers, self.num_components),
            self.args.temperature,
            decoded.proposal == (decoded.proposals.index(()) if () in decoded.proposals else -1),
            torch.tensor(decoded.current, dtype=torch.float64) if decoded.current else None,
        )

    def _set_baselines(self, completions: DecodedTable) -> None:
        """Expected rewards under the reference, and of each policy on its own objective, for scales relative to these."""
        scale = self.args.normalize_rewards
        if scale in ("reference", "gain") or isinstance(self.welfare, AlphaFair):
            of_reference = completions.contributions(completions.reference_log_ratios(), completions.gains)
            self._scale.reference_means = of_reference.mean(0)
        if scale == "gain":
            own = torch.eye(self.num_components, dtype=torch.float64)
            by_prompt = [completions.measure(own[k])[0][:, k] for k in range(self.num_objectives)]
            gains = torch.stack(by_prompt, dim=-1) - of_reference
            self._own_gains, self._own_errors = gains.mean(0), gains.std(0) / len(gains) ** 0.5
            # a gain that is lost in its noise, or a loss, is no unit
            unit = torch.maximum(self._own_gains, self._own_errors)
            self._scale.policy_means = self._scale.reference_means + unit

    def _check_columns(self, what: str, values: torch.Tensor, or_minus_infinity: bool = False) -> None:
        """Checks that the numbers of all objectives are finite, or -inf, and that their squares do not overflow."""
        bad = ~((values.abs() < LARGEST_ADVANTAGE) | ((values == -torch.inf) & or_minus_infinity))
        if bad.any():
            row, k = bad.nonzero()[0].tolist()
            raise ValueError(
                f"The {what} of {self.objectives[k]!r} is {values[row, k].item()} in row {row}. It must be a finite "
                f"number below {LARGEST_ADVANTAGE:.0e}: correct it, leave the completion out, or check the dtype of the model, as "
                "float16 overflows."
            )

    def exclude_from_flat(self, rewards: torch.Tensor, num_generations: int) -> None:
        """Notes which objectives distinguish completions of the reference, `num_generations` of each prompt, of all steps so far."""
        prompt = torch.arange(len(rewards)) // num_generations
        found = distinguishes(rewards, prompt, rewards.new_zeros(len(rewards))).tolist()
        self._distinguished |= {name for name, varies in zip(self.objectives, found) if varies}
        self._flat = [name for name in self.objectives if name not in self._distinguished]

    def warn_of_flat_objectives(self) -> None:
        """Warns of objectives that do not distinguish the completions of the last estimate, once for each."""
        for name in self._flat:
            self._warn_once(
                name,
                f"The rewards of {name!r} are the same for all completions of each prompt, so that no policy improves it. "
                "Unless its gains are above those of all others, it counts as worst off and takes all weight, whatever its "
                "policy is like. Check the reward function. Leave this objective out, or give it a constraint.",
            )

    def check_feasible(self) -> None:
        """
        Refuses a welfare that requires gains for all objectives where some cannot have any. Estimates of their gains are noise
        around 0.

        Raises:
            `InfeasibleError`: with the names of these objectives.
        """
        if self.args.welfare in ("nash", "alpha_fair") and self._flat:
            names = " and ".join(self._flat)
            raise InfeasibleError(
                f"The rewards of {names} are the same for all completions of each prompt, so that no mixture has positive gains "
                f"for all objectives, which Nash's welfare and α-fairness require. Leave {names} out, or choose another welfare, "
                "such as a max-min.",
                [self.objectives.index(name) for name in self._flat],
            )

    def warn_of_exclusions(self, policy_logps: torch.Tensor) -> None:
        """
        Warns of policies that rule out completions of others, once for each.

        Args:
            policy_logps (`torch.Tensor` of shape `(N, M)`): log-probabilities of the completions under the policies.
        """
        excludes = policy_logps.isneginf().any(0).tolist()
        for name in itertools.compress(self.objectives, excludes):
            self._warn_once(
                f"exclusions of {name}",
                f"The policy of {name!r} gives the probability 0 to completions that others write. Any weight of it rules these "
                "out, so that the fit compares mixtures that all give it some, and does not know what those without it would "
                "reach. Fit the other policies without it, and compare the welfare at the end of both fits.",
            )

    def warn_of_own_gains(self) -> None:
        """Warns of objectives whose own policy does not clearly gain, where gains are in units of what it does."""
        if self._own_gains is None:
            return
        assert self._own_errors is not None
        for name, gain, error in zip(self.objectives, self._own_gains.tolist(), self._own_errors.tolist()):
            if gain < SEPARATED * error:
                self._warn_once(
                    f"gain of {name}",
                    f"The policy of {name!r} gains {gain:.3g} ± {error:.2g} over the reference on its own objective, which is no "
                    "unit to measure other gains in. Draw completions of more prompts, use another `normalize_rewards` than "
                    '"gain", or leave this objective out.',
                )

    def warn_of_weights(self, weights: torch.Tensor) -> None:
        """
        Warns of constraints whose weights are at their limit, and of weights that are too large to be applied, once for each.

        Args:
            weights (`torch.Tensor` of shape `(K,)`): fitted weights of the objectives.
        """
        for name, weight in zip(self.objectives, weights.tolist()):
            if weight > LARGE_WEIGHT and name not in (self.args.constraints or {}):
                self._warn_once(
                    f"weight of {name}",
                    f"The weight of {name!r} is {weight:.3g}, as its gain is small beside those of others. The mixture has its "
                    "policy to this power, with all deviations from the optimum. Rescale the reward to the others' scale, or "
                    "leave this objective out.",
                )
        for k, threshold in self.thresholds.items():
            if (
                weights[k] >= (1 - PRICE_TOLERANCE) * self.args.constraint_price
                and not self.args.objective == "achieved"
            ):
                self._warn_once(
                    f"price of {k}",
                    f"The constraint of {self.objectives[k]!r}, an expected reward of at least {threshold}, is not met: its "
                    f"weight is at the limit, `constraint_price={self.args.constraint_price}`. Lower the threshold to what "
                    "`certificate.rewards` shows to be within reach, lower `beta`, or raise `constraint_price`.",
                )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._has_warned:
            self._has_warned.add(key)
            logger.warning(message)

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


def _known(name: str, values: torch.Tensor | None) -> torch.Tensor:
    if values is None:
        raise ValueError(
            f"The estimate requires `{name}` of all completions, and some are missing or NaN. Leave these completions out, or "
            "leave out the column to have it computed."
        )
    return values
