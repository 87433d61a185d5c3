"""Arguments of [`MPOTrainer`]."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..estimation.reward_scales import SCALES


WELFARES = ("max_min", "weighted_sum", "nash", "alpha_fair", "cvar")
# in nats: what is left to gain is then a hundredth of β at most
DEFAULT_TOLERANCE = 0.01


@dataclass
class MPOConfig(TrainingArguments):
    r"""
    Configuration of [`MPOTrainer`]: the options of
    [Mixing Preference Optimization](https://huggingface.co/papers/2502.18699) on top of
    [`~transformers.TrainingArguments`].

    Args:
        objective (`str`, *optional*, defaults to `"reward"`):
            `"reward"`: the dual objective of MPO, from what the reward functions measure, on their own scale. It takes every
            policy to be optimal for its reward. `"achieved"`: what the mixture of these very policies reaches, less β
            times its divergence from the reference. The same where they are optimal, and better where they are not; needs
            `estimator="mis"`. `"implicit"`: the log-ratios of the policies to each other, without any reward function;
            there the most aggressively trained policy pulls weight towards itself.
        beta (`float`, *optional*, defaults to 0.1):
            KL coefficient β, in the units of the rewards. Smaller values trust the rewards more and the reference less;
            very small ones leave few effective samples. Unused by the implicit objective.
        proposal (`str`, *optional*):
            The policy that completions are drawn from. `"reference"`: the reference policy, as in the paper's
            Algorithm 2. `"mixture"`: the current mixture, reweighted exactly. Defaults to `"reference"` for the reward
            objective and to `"mixture"` for the others, where samples of the reference collapse.
        welfare (`str`, *optional*, defaults to `"max_min"`):
            What is made as large as it can be, of the gains of the objectives, less β times the divergence from the
            reference. `"max_min"`: the worst-off objective, as in the paper. `"weighted_sum"`: as in MORLHF and
            multi-objective decoding; the weights are `welfare_weights` then, and a fit measures what they reach. `"nash"`:
            the product of the gains over the reference. `"alpha_fair"`: α-fairness, between all of these. `"cvar"`: the
            worst-off share of the objectives. Other than the max-min need `estimator="mis"`.
        welfare_weights (`list[float]`, *optional*):
            How much every objective (without a constraint) counts in the welfare, with sum 1; not for the max-min.
            Defaults to equal weights.
        fairness_alpha (`float`, *optional*, defaults to 2.0):
            α of `welfare="alpha_fair"`: near 0 a weighted sum, 1 Nash's welfare, towards infinity the max-min.
        cvar_level (`float`, *optional*, defaults to 0.5):
            The share of the objectives that `welfare="cvar"` looks at, in (0, 1].
        constraints (`dict[str, float]`, *optional*):
            Objectives that only have to reach an expected reward, such as `{"harmless": 0.9}`; the welfare is that of the
            others then. In the unit of `normalize_rewards="z_score"` or `"win_rate"`, where that is chosen.
        constraint_price (`float`, *optional*, defaults to 10.0):
            The most that the weight of a constrained objective may be. Where it is reached, the constraint cannot be met.
        estimator (`str`, *optional*, defaults to `"mis"`):
            `"mis"`: multiple importance sampling. All completions so far are kept under `output_dir/_rollouts`, every
            step moves to the minimum of the dual objective on all of them, and
            [`MPOTrainer.certificate`] says how far it may be from the true one. `"bsmd"`: batch stochastic mirror
            descent, the paper's Algorithm 2, where every step looks at completions of its own: needs several times the
            completions, and does not know how far it has come.
        tolerance (`float`, *optional*):
            With `estimator="mis"`, end the fit as soon as the upper confidence bound of the duality gap, in nats, is
            below this, and no earlier than after 10 prompts. Defaults to 0.01. 0 for `max_steps` steps in any case, as with a
            weighted sum, or when all completions are given.
        confidence (`float`, *optional*, defaults to 0.95):
            Level of that bound.
        num_resamples (`int`, *optional*, defaults to 200):
            Bootstrap replicates that it is computed from.
        refresh_below (`float`, *optional*, defaults to 0.5):
            With `estimator="mis"` and the mixture as proposal, the effective sample size (a fraction) below which
            completions are from then on drawn from the mixture at the weights of that moment. Until then they come from
            the weights that the fit starts from.
        num_generations (`int`, *optional*, defaults to 16):
            Completions a prompt, m. At least 2; the bias of the estimates falls as 1/m.
        per_device_train_batch_size (`int`, *optional*, defaults to 32):
            Completions a device and step (not prompts, as in TRL's `GRPOConfig`): a multiple of `num_generations`.
        per_device_eval_batch_size (`int`, *optional*, defaults to 32):
            The same for evaluation.
        max_steps (`int`, *optional*, defaults to 100):
            Steps T. -1 for `num_train_epochs` passes over the prompts.
        learning_rate (`float`, *optional*):
            Step size η of the mirror descent. Defaults to c/√T, with c = `step_scale`.
        step_scale (`float`, *optional*, defaults to 2.0):
            The constant c of the default step size η = c/√T.
        average_iterates (`bool`, *optional*, defaults to `True`):
            Whether the result is the average of all iterates, as in the paper, rather than the last one.
        normalize_rewards (`str` or `bool`, *optional*):
            What rewards of different objectives are compared on; see [`~mpo_hf.estimation.reward_scales.RewardScale`]. `"optimal"` or
            `True`: the paper's P(r) = r - β log E_ref exp(r/β), relative to what a policy of its own could reach. `"none"`
            or `False`: as they are. `"regret"`, `"reference"`, `"z_score"` and `"win_rate"` need `estimator="mis"`. Defaults
            to `"optimal"`, or for `welfare="nash"` and `"alpha_fair"`, which count gains over the reference, to
            `"reference"`.
        normalization_prompts (`int`, *optional*, defaults to 16):
            With the mixture as proposal, how many prompts to estimate each policy's value from, once, before the first
            step; see [`MPOTrainer.reward_offsets`].
        temperature (`float`, *optional*, defaults to 1.0):
            Sampling temperature. Its effect on the estimates is corrected for.
        max_completion_length (`int`, *optional*, defaults to 256):
            Longest completion, in tokens.
        logps_batch_size (`int`, *optional*, defaults to 8):
            Completions a forward pass when log-probabilities are computed.
        score_policies (`float` or `bool`, *optional*, defaults to 1.0):
            With `estimator="mis"`, the share of the prompts whose completions are scored under every policy although the
            estimate does not need it, as with completions of the reference. The weights and the bound of the duality gap do
            not depend on it. `mixture_rewards` and `shortfall` in the certificate are of these prompts alone: with a share of
            0.25 their standard errors are about twice as large, and with fewer than two such prompts there are none. Whether a
            prompt is among them depends on its content only, as if by a draw: of a few prompts it may be none. A later fit
            scores what it needs. 0 (`False`) for no prompt: a fit then takes about as long as generating its completions.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments for the chat template of conversational prompts.
        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Whether to shuffle the prompts.
        model_init_kwargs (`dict`, *optional*):
            Arguments for [`MixturePolicyModel.from_policies`] or `from_pretrained` when the trainer opens the model.
        min_effective_sample_size (`float`, *optional*, defaults to 0.1):
            Fraction of the samples below which the effective sample size is warned about.
        hub_pin_revisions (`bool`, *optional*, defaults to `True`):
            Whether what is pushed to the Hub pins policies to the commits that they were loaded from.
        hub_upload_adapters (`bool`, *optional*, defaults to `False`):
            Whether adapters that live in folders are pushed to the Hub with the mixture. Without, they are an error.
        hub_with_code (`bool`, *optional*, defaults to `False`):
            Whether the mixture is saved and pushed with the code of its class, so that it opens where mpo_hf is not
            installed; see [`MixturePolicyModel.save_pretrained`].
        kwargs:
            See [`~transformers.TrainingArguments`]. Defaults that differ: a constant learning rate, logging at every
            step, a checkpoint at every step (a few kB: no policy weights; the last 2 are kept), no gradient clipping.

    Raises:
        `ValueError`: for values that make no sense, each with what to do instead.

    Example:

    ```python
    >>> from mpo_hf import MPOConfig

    >>> args = MPOConfig(output_dir="mix", num_generations=16, max_completion_length=64, max_steps=64)
    >>> args.step_size(64)
    0.25
    ```
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["constraints"]

    objective: str = field(default="reward", metadata={"help": "'reward', 'achieved' or 'implicit'."})
    beta: float = field(default=0.1, metadata={"help": "KL coefficient, in the units of the rewards."})
    proposal: str | None = field(
        default=None,
        metadata={
            "help": "Whom to draw completions from: 'reference' or 'mixture'. Default: what suits the objective."
        },
    )
    welfare: str = field(
        default="max_min",
        metadata={"help": "What to maximise: 'max_min', 'weighted_sum', 'nash', 'alpha_fair' or 'cvar'."},
    )
    welfare_weights: list[float] | None = field(
        default=None, metadata={"help": "How much each objective counts in the welfare, with sum 1."}
    )
    fairness_alpha: float = field(default=2.0, metadata={"help": "Alpha of alpha-fairness."})
    cvar_level: float = field(default=0.5, metadata={"help": "Share of the objectives that CVaR looks at."})
    constraints: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Least expected reward of some objectives, such as '{\"harmless\": 0.9}'."}
    )
    constraint_price: float = field(default=10.0, metadata={"help": "The most that a constraint may weigh."})
    estimator: str = field(
        default="mis",
        metadata={
            "help": "'mis' (all completions so far, with a certificate) or 'bsmd' (the paper's mirror descent)."
        },
    )
    tolerance: float | None = field(
        default=None,
        metadata={
            "help": "With 'mis': end when the bound of the duality gap, in nats, is below this. Default 0.01; 0 for never."
        },
    )
    confidence: float = field(default=0.95, metadata={"help": "Level of the bound of the duality gap."})
    num_resamples: int = field(default=200, metadata={"help": "Bootstrap replicates behind the bound."})
    refresh_below: float = field(
        default=0.5, metadata={"help": "With 'mis': effective sample size below which the proposal is renewed."}
    )
    num_generations: int = field(default=16, metadata={"help": "Completions a prompt, m >= 2."})
    step_scale: float = field(default=2.0, metadata={"help": "Constant c of the default step size c/sqrt(T)."})
    average_iterates: bool = field(default=True, metadata={"help": "Return the average of all iterates."})
    normalize_rewards: str | None = field(
        default=None,
        metadata={
            "help": "What rewards are compared on: 'optimal' (relative to what a policy of their own could reach), 'regret', "
            "'reference', 'z_score', 'win_rate' or 'none'. Default: what suits the welfare."
        },
    )
    normalization_prompts: int = field(
        default=16, metadata={"help": "Prompts to estimate each policy's value from, with the mixture as proposal."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    max_completion_length: int = field(default=256, metadata={"help": "Longest completion, in tokens."})
    logps_batch_size: int = field(default=8, metadata={"help": "Completions a forward pass when scoring."})
    score_policies: float = field(
        default=1.0,
        metadata={
            "help": "With 'mis': share of the prompts, 0 to 1, whose completions are scored under every policy also where the "
            "estimate does not need it."
        },
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Further arguments for the chat template."}
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the prompts."})
    model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Arguments for opening the model, where the trainer does."}
    )
    min_effective_sample_size: float = field(
        default=0.1, metadata={"help": "Fraction of the samples below which a warning is given."}
    )
    hub_pin_revisions: bool = field(default=True, metadata={"help": "Push policies pinned to commits."})
    hub_upload_adapters: bool = field(default=False, metadata={"help": "Push adapters in folders with the mixture."})
    hub_with_code: bool = field(default=False, metadata={"help": "Save and push the code of the mixture with it."})

    # Defaults of TrainingArguments that do not suit a fit of K numbers
    learning_rate: float | None = field(default=None, metadata={"help": "Step size. Default: step_scale/sqrt(T)."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the step size."})
    max_steps: int = field(default=100, metadata={"help": "Steps T; -1 for num_train_epochs."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Completions a device and step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Completions a device in evaluation."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    save_steps: float = field(default=1, metadata={"help": "Write a checkpoint every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Must be 0: clipping would change the mirror step."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Rewards may need every column."})

    def __post_init__(self):
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False  # batches hold text, which cannot be sent between devices
        _check_choice("objective", self.objective, ("reward", "achieved", "implicit"))
        if self.proposal is None:
            self.proposal = "reference" if self.objective == "reward" else "mixture"
        _check_choice("proposal", self.proposal, ("reference", "mixture"))
        _check_choice("estimator", self.estimator, ("bsmd", "mis"))
        self._check_welfare()
        if self.tolerance is None:
            self.tolerance = DEFAULT_TOLERANCE if self.estimator == "mis" else 0.0
        if self.tolerance and self.estimator != "mis":
            raise ValueError(
                f'`tolerance={self.tolerance}` needs `estimator="mis"`: mirror descent does not know how far it has come.'
            )
        if not self.tolerance >= 0:
            raise ValueError(f"`tolerance` must be at least 0, got {self.tolerance}.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"`confidence` must be between 0 and 1, got {self.confidence}.")
        if not isinstance(self.score_policies, int | float) or not 0 <= self.score_policies <= 1:
            raise ValueError(
                f"`score_policies` must be a share of the prompts, from 0 (none) to 1 (all), got {self.score_policies!r}."
            )
        self.score_policies = float(self.score_policies)
        for name in ("beta", "temperature", "step_scale"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)}.")
        for name in ("max_completion_length", "logps_batch_size", "normalization_prompts", "num_resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_generations < 2:
            raise ValueError(
                f"`num_generations` must be at least 2, got {self.num_generations}: with one completion a prompt its "
                "importance weight is 1 whatever the weights, the gradient loses its curvature, and the fit runs to a "
                "vertex. The bias falls as 1/m; 16 or more is a good choice."
            )
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) % self.num_generations:
                raise ValueError(
                    f"`{name}` counts completions and must be a multiple of `num_generations`, got {getattr(self, name)} "
                    f"with num_generations={self.num_generations}."
                )
        if self.max_grad_norm:
            raise ValueError(
                f"`max_grad_norm` must be 0, got {self.max_grad_norm}: a clipped gradient is no mirror descent step."
            )

    def _check_welfare(self) -> None:
        _check_choice("welfare", self.welfare, WELFARES)
        gains_over_reference = self.welfare in ("nash", "alpha_fair")
        named = {None: "reference" if gains_over_reference else "optimal"}
        named |= {True: "optimal", False: "none", "true": "optimal", "false": "none"}  # YAML, and the command line
        scale = self.normalize_rewards
        scale = named.get(scale.lower() if isinstance(scale, str) else scale, scale)
        _check_choice("normalize_rewards", scale, SCALES)
        self.normalize_rewards = scale
        if isinstance(self.constraints, str) or not all(
            isinstance(value, int | float) and math.isfinite(value) for value in (self.constraints or {}).values()
        ):
            raise ValueError(
                f"`constraints` must give names of objectives numbers to reach, got {self.constraints!r}."
            )
        if self.welfare_weights is not None and self.welfare == "max_min":
            raise ValueError("`welfare_weights` have no place in a max-min. Choose another `welfare`, such as 'cvar'.")
        if gains_over_reference and scale in ("optimal", "regret"):
            raise ValueError(
                f"`welfare={self.welfare!r}` needs gains above 0, and with `normalize_rewards={scale!r}` nothing is. Use "
                "'reference', 'z_score' or 'win_rate'."
            )
        if gains_over_reference and self.constraints:
            raise ValueError(f"`constraints` go with max_min, weighted_sum or cvar, not with {self.welfare}.")
        beyond = self.welfare != "max_min" or self.constraints
        if self.objective == "achieved" and (self.estimator == "bsmd" or gains_over_reference):
            raise ValueError(
                '`objective="achieved"` needs `estimator="mis"`, and a max-min, a weighted sum or CVaR; got '
                f"estimator={self.estimator!r} and welfare={self.welfare!r}."
            )
        if self.objective == "implicit" and (gains_over_reference or self.constraints):
            raise ValueError(
                f"`welfare={self.welfare!r}` with `constraints={self.constraints}` needs rewards on a scale of their own, which "
                "the implicit objective does not have."
            )
        if self.estimator == "bsmd" and (beyond or scale not in ("optimal", "none")):
            raise ValueError(
                f"`welfare={self.welfare!r}`, `constraints={self.constraints}`, `normalize_rewards={scale!r}` need "
                '`estimator="mis"`; mirror descent is for the max-min.'
            )

    def step_size(self, num_steps: int) -> float:
        """The step size η for a fit of `num_steps` steps."""
        return self.learning_rate if self.learning_rate is not None else self.step_scale / math.sqrt(num_steps)

    @property
    def train_prompts_per_device(self) -> int:
        """Prompts a device and step."""
        return self.per_device_train_batch_size // self.num_generations

    @property
    def eval_prompts_per_device(self) -> int:
        """Prompts a device and evaluation step."""
        return self.per_device_eval_batch_size // self.num_generations


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")
