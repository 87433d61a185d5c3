"""Arguments of [`MPOTrainer`]."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..estimation.reward_scales import SCALES
from .unused_options import refuse_unused_options


WELFARES = ("max_min", "weighted_sum", "nash", "alpha_fair", "cvar")
# In nats: the welfare is then at most a hundredth of β below that of the best weights.
DEFAULT_TOLERANCE = 0.01
# Completions per device and step, before this is rounded up to a multiple of `num_generations`.
DEFAULT_BATCH_SIZE = 32


@dataclass
class MPOConfig(TrainingArguments):
    r"""
    Configuration of [`MPOTrainer`]: the options of
    [Mixing Preference Optimization](https://huggingface.co/papers/2502.18699) on top of
    [`~transformers.TrainingArguments`].

    Args:
        objective (`str`, *optional*):
            What the weights are best for. `"achieved"`: what the mixture of these policies reaches as it is decoded, the
            welfare of its rewards less β times its divergence from the reference; it needs `estimator="mis"`. `"reward"`: the
            paper's theorem, the dual objective with these rewards, which is right for policies that are optimal for them.
            `"implicit"`: its other half, with the log-ratios of the policies to each other instead of reward functions; the
            most aggressively trained policy then gains weight. Defaults to `"achieved"`, and to `"reward"` for
            `estimator="bsmd"`.
        mixing (`str`, *optional*):
            The mixture that `objective="achieved"` speaks of. `"token"`: as `generate()` mixes, token by token, at the
            `temperature` of the fit. `"sequence"`: whole completions, \\(\prod_k \pi_k(y)^{\lambda_k}\\), as in the theorem and as
            [sequence-level decoding](../how-to/sequence_level) draws them. Defaults to `"token"`; the other objectives are about
            `"sequence"` always.
        free_sum (`bool`, *optional*, defaults to `False`):
            Whether the sum of the weights is free, with `objective="achieved"`: the reference becomes a further component of
            the mixture and takes the rest, which may be negative. Better for policies that were trained too much, or too little.
        beta (`float`, *optional*, defaults to 0.1):
            KL coefficient β, in the units of the rewards. Smaller values allow the mixture to move further from the reference;
            very small ones leave few effective samples. Unused by the implicit objective.
        proposal (`str`, *optional*):
            The policy that completions are drawn from. `"reference"`: the reference policy, as in the paper's
            Algorithm 2. `"mixture"`: the current mixture, with exact importance weights. Defaults to `"reference"` for the
            reward objective and to `"mixture"` for the others, whose importance weights collapse with the reference. For what
            is decoded, a few completions come from each policy and from the reference, to compare with.
        welfare (`str`, *optional*, defaults to `"max_min"`):
            The function of the objectives' gains that is maximized, less β times the divergence from the reference.
            `"max_min"`: the gain of the worst-off objective, as in the paper. `"weighted_sum"`: as in MORLHF and multi-objective
            decoding. The weights of the mixture are then `welfare_weights`, and a fit measures the rewards that they reach.
            `"nash"`: the product of the gains over the reference. `"alpha_fair"`: α-fairness, with all of these as special
            or limiting cases. `"cvar"`: the mean of the worst-off share of the objectives. Every welfare function other than
            `"max_min"` requires `estimator="mis"`.
        welfare_weights (`list[float]`, *optional*):
            The weight of every objective without a constraint in the welfare, with sum 1. Not for `"max_min"`. Defaults to
            equal weights.
        fairness_alpha (`float`, *optional*, defaults to 2.0):
            α of `welfare="alpha_fair"`: a weighted sum for α near 0, Nash welfare for 1, the max-min as α grows.
        cvar_level (`float`, *optional*, defaults to 0.5):
            The share of the objectives that `welfare="cvar"` looks at, in (0, 1].
        constraints (`dict[str, float]`, *optional*):
            Objectives with a minimum expected reward, such as `{"harmless": 0.9}`. The welfare is then that of the other
            objectives. With `normalize_rewards="z_score"` or `"win_rate"`, in units of these.
        constraint_price (`float`, *optional*, defaults to 10.0):
            The maximum weight of a constrained objective. If it is reached, the constraint cannot be met.
        estimator (`str`, *optional*, defaults to `"mis"`):
            `"mis"`: multiple importance sampling. All completions are kept under `output_dir/_rollouts`, every step moves to
            the minimum of the dual objective on all of them, and [`MPOTrainer.certificate`] bounds the distance to the true
            minimum. `"bsmd"`: batch stochastic mirror descent, the paper's Algorithm 2, where every step uses its own
            completions only. It needs several times as many completions, and has no certificate.
        tolerance (`float`, *optional*):
            With `estimator="mis"`, the fit ends when the upper confidence bound of the duality gap, in nats, is below this,
            though not before 10 prompts. Defaults to 0.01. With 0, a fit always takes `max_steps` steps, as it does for a
            weighted sum and for given completions.
        confidence (`float`, *optional*, defaults to 0.95):
            Level of that bound.
        num_resamples (`int`, *optional*, defaults to 200):
            Number of bootstrap replicates for the bound.
        refresh_below (`float`, *optional*, defaults to 0.5):
            With `estimator="mis"` and the mixture as proposal, the effective sample size, as a fraction, below which the
            proposal is renewed: completions are then drawn from the mixture at its current weights. The first proposal is the
            mixture at its initial weights.
        num_generations (`int`, *optional*, defaults to 16):
            Completions per prompt, m, at least 2. The bias of the estimates falls as 1/m.
        per_device_train_batch_size (`int`, *optional*):
            Completions (not prompts, as in TRL's `GRPOConfig`) per device and step, a multiple of `num_generations`, as a
            device draws all completions of a prompt. Defaults to 32, rounded up to such a multiple.
        per_device_eval_batch_size (`int`, *optional*):
            The same for evaluation.
        max_steps (`int`, *optional*, defaults to 100):
            Steps T. -1 for `num_train_epochs` passes over the prompts.
        learning_rate (`float`, *optional*):
            Step size η of the mirror descent, `estimator="bsmd"`. Defaults to c/√T, with c = `step_scale`.
        step_scale (`float`, *optional*, defaults to 2.0):
            The constant c of the default step size η = c/√T of `estimator="bsmd"`.
        average_iterates (`bool`, *optional*, defaults to `True`):
            Whether the result of `estimator="bsmd"` is the average of all iterates, as in the paper, rather than the last one.
        normalize_rewards (`str` or `bool`, *optional*):
            The scale on which rewards of different objectives are compared; see
            [`~mpo_hf.estimation.reward_scales.RewardScale`]. `"optimal"` or `True`: the paper's
            P(r) = r - β log E_ref exp(r/β), relative to the value of the best policy for that objective alone. `"none"` or
            `False`: rewards as they are. `"regret"`, `"reference"`, `"z_score"` and `"win_rate"` need `estimator="mis"`, and
            `"gain"`, in units of what each objective's own policy gains, a fit to what is decoded.
            Defaults to `"reference"` for `welfare="nash"` and `"alpha_fair"`, which are functions of gains over the reference,
            and to `"optimal"` otherwise.
        normalization_prompts (`int`, *optional*, defaults to 16):
            With the mixture as proposal, the number of prompts from which each policy's value is estimated, once, before the
            first step; see [`MPOTrainer.reward_offsets`].
        temperature (`float`, *optional*):
            Sampling temperature. For what is decoded token by token, the temperature that the weights are meant for; it
            defaults to that of the mixture's generation config. Otherwise the importance weights correct for its effect, and it
            defaults to 1. For given completions of the reference policy without `proposal_logps`, the temperature that they were
            drawn at.
        top_k (`int`, *optional*), top_p (`float`, *optional*):
            What is decoded token by token is fitted without truncation only, as truncated tokens have a log-probability of minus
            infinity. A generation config of the mixture that truncates is refused, unless `top_k=0` and `top_p=1.0` say that
            the weights are meant for sampling without it.
        max_completion_length (`int`, *optional*, defaults to 256):
            Maximum length of a completion, in tokens.
        logps_batch_size (`int`, *optional*, defaults to 8):
            Completions per forward pass when log-probabilities are computed.
        score_policies (`float` or `bool`, *optional*, defaults to 1.0):
            With `estimator="mis"`, the share of the prompts whose completions are scored under every policy even if the
            estimate does not need it, as with the reference as proposal. The weights and the bound of the duality gap do not
            depend on it. `mixture_rewards` and `mixture_duality_gap` of the certificate are estimated from these prompts
            alone: with a share of 0.25, their standard errors are about twice as large, and with fewer than two such prompts
            there are none. The content of a prompt decides whether it is among them, as if by a random draw, so that of a few
            prompts there may be none. A later fit scores the completions that it needs. With 0 (`False`), no completions are
            scored, and a fit takes about as long as generating them.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments for the chat template of conversational prompts.
        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Whether to shuffle the prompts.
        model_init_kwargs (`dict`, *optional*):
            Arguments for [`MixturePolicyModel.from_policies`] or `from_pretrained` if the trainer loads the model.
        min_effective_sample_size (`float`, *optional*, defaults to 0.1):
            The effective sample size, as a fraction, below which a warning is given. There is one below 4 completions of a
            prompt too.
        hub_pin_revisions (`bool`, *optional*, defaults to `True`):
            Whether the config on the Hub pins policies to the commits that they were loaded from.
        hub_upload_adapters (`bool`, *optional*, defaults to `False`):
            Whether adapters in folders are pushed to the Hub with the mixture. If not, they are an error.
        hub_with_code (`bool`, *optional*, defaults to `False`):
            Whether the mixture is saved and pushed with the code of its class, so that it loads where mpo_hf is not
            installed; see [`MixturePolicyModel.save_pretrained`].
        kwargs:
            See [`~transformers.TrainingArguments`]. Defaults that differ: a constant learning rate, logging at every
            step, a checkpoint at every step (a few kB: no policy weights; the last 2 are kept), no gradient clipping.

    Raises:
        `ValueError`:
            for invalid values, and for options that have no effect beside the others, with a remedy for each.

    Example:

    ```python
    >>> from mpo_hf import MPOConfig

    >>> args = MPOConfig(output_dir="mix", num_generations=16, max_completion_length=64, max_steps=64)
    >>> args.step_size(64)
    0.25
    ```
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["constraints"]

    objective: str | None = field(
        default=None,
        metadata={
            "help": "What the weights are best for: 'achieved' (what this mixture reaches as it is decoded), 'reward' (the "
            "paper's theorem, for policies that are optimal for their rewards) or 'implicit' (the same, without rewards). Default "
            "'achieved'; with --estimator bsmd, 'reward'."
        },
    )
    mixing: str | None = field(
        default=None,
        metadata={
            "help": "With 'achieved': 'token', as generate() mixes, or 'sequence', the product of whole completions. Default "
            "'token'."
        },
    )
    free_sum: bool = field(
        default=False,
        metadata={"help": "With 'achieved': leave the sum of the weights free; the reference takes the rest."},
    )
    beta: float = field(default=0.1, metadata={"help": "KL coefficient, in the units of the rewards."})
    proposal: str | None = field(
        default=None,
        metadata={
            "help": "The policy that completions are drawn from: 'reference' or 'mixture'. The default depends on the objective."
        },
    )
    welfare: str = field(
        default="max_min",
        metadata={
            "help": "The welfare function to maximize: 'max_min', 'weighted_sum', 'nash', 'alpha_fair' or 'cvar'."
        },
    )
    welfare_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each objective in the welfare, with sum 1."}
    )
    fairness_alpha: float = field(default=2.0, metadata={"help": "Alpha of alpha-fairness."})
    cvar_level: float = field(
        default=0.5, metadata={"help": "Share of the objectives, from the worst-off on, that CVaR is the mean of."}
    )
    constraints: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Minimum expected reward of some objectives, such as '{\"harmless\": 0.9}'."}
    )
    constraint_price: float = field(default=10.0, metadata={"help": "Maximum weight of a constrained objective."})
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
    num_resamples: int = field(default=200, metadata={"help": "Number of bootstrap replicates for the bound."})
    refresh_below: float = field(
        default=0.5, metadata={"help": "With 'mis': effective sample size below which the proposal is renewed."}
    )
    num_generations: int = field(default=16, metadata={"help": "Completions per prompt, m >= 2."})
    step_scale: float = field(default=2.0, metadata={"help": "Constant c of the default step size c/sqrt(T)."})
    average_iterates: bool = field(default=True, metadata={"help": "Return the average of all iterates."})
    normalize_rewards: str | None = field(
        default=None,
        metadata={
            "help": "The scale on which rewards are compared: 'optimal' (relative to the best policy for each objective alone), "
            "'regret', 'reference', 'gain' (in units of what each own policy gains), 'z_score', 'win_rate' or 'none'. The "
            "default depends on the welfare."
        },
    )
    normalization_prompts: int = field(
        default=16, metadata={"help": "Prompts to estimate each policy's value from, with the mixture as proposal."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Sampling temperature. Default: that of the generation config, or 1."}
    )
    top_k: int | None = field(default=None, metadata={"help": "0 to fit for sampling without top-k."})
    top_p: float | None = field(default=None, metadata={"help": "1.0 to fit for sampling without top-p."})
    max_completion_length: int = field(default=256, metadata={"help": "Maximum length of a completion, in tokens."})
    logps_batch_size: int = field(default=8, metadata={"help": "Completions per forward pass when scoring."})
    score_policies: float = field(
        default=1.0,
        metadata={
            "help": "With 'mis': share of the prompts, 0 to 1, whose completions are scored under every policy even if the "
            "estimate does not need it."
        },
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Further arguments for the chat template."}
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the prompts."})
    model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Arguments for loading the model, if the trainer loads it."}
    )
    min_effective_sample_size: float = field(
        default=0.1, metadata={"help": "Fraction of the samples below which a warning is given."}
    )
    hub_pin_revisions: bool = field(default=True, metadata={"help": "Push policies pinned to commits."})
    hub_upload_adapters: bool = field(default=False, metadata={"help": "Push adapters in folders with the mixture."})
    hub_with_code: bool = field(default=False, metadata={"help": "Save and push the code of the mixture with it."})

    # Defaults of TrainingArguments that a fit of K numbers replaces
    learning_rate: float | None = field(default=None, metadata={"help": "Step size. Default: step_scale/sqrt(T)."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the step size."})
    max_steps: int = field(default=100, metadata={"help": "Steps T; -1 for num_train_epochs."})
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "Completions per device and step. Default 32, rounded up to a multiple of num_generations."},
    )
    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "Completions per device in evaluation. Default as for the fit."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    save_steps: float = field(default=1, metadata={"help": "Write a checkpoint every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Must be 0: clipping would change the mirror step."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Rewards may need every column."})

    def __post_init__(self):
        group = max(1, self.num_generations)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) is None:
                setattr(self, name, math.ceil(DEFAULT_BATCH_SIZE / group) * group)
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False  # batches hold text, which cannot be sent between devices
        if self.objective is None:
            self.objective = self.dependent_defaults()["objective"]
        _check_choice("objective", self.objective, ("reward", "achieved", "implicit"))
        if self.proposal is None:
            self.proposal = self.dependent_defaults()["proposal"]
        _check_choice("proposal", self.proposal, ("reference", "mixture"))
        _check_choice("estimator", self.estimator, ("bsmd", "mis"))
        self._check_decoding()
        self._check_welfare()
        if self.tolerance is None:
            self.tolerance = self.dependent_defaults()["tolerance"]
        if self.tolerance and self.estimator != "mis":
            raise ValueError(
                f'`tolerance={self.tolerance}` needs `estimator="mis"`: mirror descent does not estimate how far it is from the optimum.'
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
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"`{name}` must be a positive number, got {value}.")
        for name in ("max_completion_length", "logps_batch_size", "normalization_prompts", "num_resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_generations < 2:
            raise ValueError(
                f"`num_generations` must be at least 2, got {self.num_generations}: with one completion per prompt, its "
                "importance weight is 1 for all mixture weights, the gradient loses its curvature, and the fit runs to a "
                "vertex. The bias falls as 1/m; 16 or more is a good choice."
            )
        self.check_batch_size("per_device_train_batch_size")
        if self.eval_strategy != "no":  # otherwise when something is evaluated
            self.check_batch_size("per_device_eval_batch_size")
        if self.max_grad_norm:
            raise ValueError(
                f"`max_grad_norm` must be 0, got {self.max_grad_norm}: a clipped gradient is no mirror descent step."
            )
        refuse_unused_options(self)

    def dependent_defaults(self) -> dict[str, Any]:
        """The defaults that depend on other options."""
        weights_are_given = self.welfare == "weighted_sum" and self.objective != "achieved"
        return {
            "objective": "reward" if self.estimator == "bsmd" else "achieved",
            "proposal": "reference" if self.objective == "reward" else "mixture",
            "tolerance": DEFAULT_TOLERANCE if self.estimator == "mis" and not weights_are_given else 0.0,
        }

    def _check_decoding(self) -> None:
        is_achieved = self.objective == "achieved"
        if self.mixing is None:
            self.mixing = "token" if is_achieved else "sequence"
        _check_choice("mixing", self.mixing, ("token", "sequence"))
        if not is_achieved and (self.mixing == "token" or self.free_sum):
            name, value = ("mixing", self.mixing) if self.mixing == "token" else ("free_sum", self.free_sum)
            raise ValueError(
                f'`{name}={value!r}` needs `objective="achieved"`: objective={self.objective!r} is about whole completions, '
                "with weights that its welfare function determines."
            )
        if self.free_sum and self.mixing != "token":
            raise ValueError('`free_sum=True` needs `mixing="token"`, got mixing="sequence".')
        if self.top_k or (self.top_p is not None and self.top_p != 1):
            raise ValueError(
                f"`top_k={self.top_k}`, `top_p={self.top_p}`: weights are fitted for sampling without truncation, as the "
                "log-probability of a truncated token is minus infinity. Pass `top_k=0` and `top_p=1.0`, and decode so."
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
                f"`constraints` must be a dictionary of objectives and minimum rewards, got {self.constraints!r}."
            )
        if self.welfare_weights is not None and self.welfare == "max_min":
            raise ValueError("A max-min has no `welfare_weights`. Choose another `welfare`, such as 'cvar'.")
        if gains_over_reference and scale in ("optimal", "regret"):
            raise ValueError(
                f"`welfare={self.welfare!r}` needs gains above 0, and with `normalize_rewards={scale!r}` no gain is. Use "
                "'reference', 'z_score' or 'win_rate'."
            )
        is_decoded = self.objective == "achieved" and self.mixing == "token"
        if scale == "gain" and not is_decoded:
            raise ValueError(
                '`normalize_rewards="gain"` needs `objective="achieved"` with `mixing="token"`, which measures what each policy '
                f"gains; got objective={self.objective!r}, mixing={self.mixing!r}."
            )
        if gains_over_reference and self.constraints:
            raise ValueError(
                f"`constraints` can be combined with max_min, weighted_sum or cvar, not with {self.welfare}."
            )
        beyond = self.welfare != "max_min" or self.constraints
        if self.objective == "achieved" and self.estimator == "bsmd":
            raise ValueError(
                '`objective="achieved"` needs `estimator="mis"`. Mirror descent, `estimator="bsmd"`, takes `objective="reward"` '
                'or "implicit".'
            )
        if self.objective == "achieved" and self.mixing == "sequence" and gains_over_reference:
            raise ValueError(
                f'`mixing="sequence"` with `objective="achieved"` needs a max-min, a weighted sum or CVaR; got '
                f"welfare={self.welfare!r}."
            )
        if self.objective == "implicit" and (gains_over_reference or self.constraints):
            raise ValueError(
                f"`welfare={self.welfare!r}` with `constraints={self.constraints}` needs rewards on their own scale, which the "
                "implicit objective does not have."
            )
        if self.estimator == "bsmd" and (beyond or scale not in ("optimal", "none")):
            raise ValueError(
                f"`welfare={self.welfare!r}`, `constraints={self.constraints}`, `normalize_rewards={scale!r}` need "
                '`estimator="mis"`; mirror descent maximizes the max-min only.'
            )

    def check_batch_size(self, name: str) -> None:
        """Raises an error unless the batch size `name` is a multiple of `num_generations`."""
        size = getattr(self, name)
        if size < 1 or size % self.num_generations:
            raise ValueError(
                f"`{name}` counts completions and must be a multiple of `num_generations`, as a device draws all completions "
                f"of a prompt; got {size} with num_generations={self.num_generations}. Leave it out for a size that fits."
            )

    def step_size(self, num_steps: int) -> float:
        """The step size η for a fit of `num_steps` steps."""
        return self.learning_rate if self.learning_rate is not None else self.step_scale / math.sqrt(num_steps)

    @property
    def train_prompts_per_device(self) -> int:
        """Prompts per device and step."""
        return self.per_device_train_batch_size // self.num_generations

    @property
    def eval_prompts_per_device(self) -> int:
        """Prompts per device and evaluation step."""
        return self.per_device_eval_batch_size // self.num_generations


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")
