"""
Options that have no effect beside the other options of a fit.

They are refused, as whoever sets one expects something of it. Those that a file of options for several trainers may well
hold raise a warning.
"""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING

from transformers.utils import logging


if TYPE_CHECKING:
    from .mpo_config import MPOConfig

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Rule:
    """Names of options, when they have no effect, and why: with a remedy, if it is not just to leave them out."""

    names: str
    applies: Callable[["MPOConfig"], bool]
    reason: str


def _always(args: "MPOConfig") -> bool:
    return True


def _with_mis(args: "MPOConfig") -> bool:
    return args.estimator == "mis"


def _estimates_offsets(args: "MPOConfig") -> bool:
    kind = (args.estimator, args.objective, args.proposal, args.normalize_rewards)
    return kind == ("bsmd", "reward", "mixture", "optimal")


REFUSED = (
    _Rule(
        "learning_rate step_scale average_iterates",
        _with_mis,
        '`estimator="mis"` goes to the optimum of its estimate at every step, and has no step size. Leave it out, or use '
        '`estimator="bsmd"`',
    ),
    _Rule(
        "confidence num_resamples refresh_below score_policies",
        lambda args: args.estimator == "bsmd",
        '`estimator="bsmd"` uses completions for one step only, and gives no certificate. Leave it out, or use '
        '`estimator="mis"`',
    ),
    _Rule(
        "refresh_below",
        lambda args: args.proposal == "reference",
        'the reference does not change. Leave it out, or use `proposal="mixture"`',
    ),
    _Rule(
        "normalization_prompts",
        lambda args: not _estimates_offsets(args),
        'the values of policies are estimated beforehand only for `objective="reward"` with `estimator="bsmd"`, '
        '`proposal="mixture"` and `normalize_rewards="optimal"`. Leave it out',
    ),
    _Rule(
        "score_policies",
        lambda args: args.objective != "reward",
        "the objective needs the log-probabilities of all completions under every policy. Leave it out, or use "
        '`objective="reward"`',
    ),
    _Rule(
        "tolerance",
        lambda args: args.welfare == "weighted_sum" and args.objective != "achieved",
        "the weights of a weighted sum are `welfare_weights`, and the fit measures what they reach, in `max_steps` steps. "
        "Leave it out",
    ),
    _Rule(
        "fairness_alpha",
        lambda args: args.welfare != "alpha_fair",
        'it belongs to `welfare="alpha_fair"`. Choose that, or leave it out',
    ),
    _Rule(
        "cvar_level",
        lambda args: args.welfare != "cvar",
        'it belongs to `welfare="cvar"`. Choose that, or leave it out',
    ),
    _Rule(
        "constraint_price",
        lambda args: not args.constraints,
        "it is the largest weight of an objective with a constraint, and there are no `constraints`. Add some, or leave it out",
    ),
    _Rule(
        "label_smoothing_factor neftune_noise_alpha",
        _always,
        "no policy is trained. Leave it out",
    ),
)

WARNED = (
    _Rule(
        "lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio",
        _with_mis,
        '`estimator="mis"` has no step size',
    ),
    _Rule(
        "optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon",
        _always,
        "the weights of the mixture have an optimizer of their own",
    ),
    _Rule(
        "gradient_checkpointing activation_checkpointing",
        _always,
        "no policy is trained, so that nothing is kept for a backward pass; for less memory, lower `logps_batch_size`",
    ),
    _Rule("torch_compile", _always, "completions are drawn and scored without compilation"),
    _Rule(
        "auto_find_batch_size",
        _always,
        "the options set the batch sizes; for less memory, lower `per_device_train_batch_size` and `logps_batch_size`",
    ),
    _Rule(
        "dataloader_num_workers dataloader_drop_last train_sampling_strategy",
        _always,
        "prompts are read by a loader of the fit's own; see `shuffle_dataset`",
    ),
    _Rule(
        "num_train_epochs",
        lambda args: args.max_steps > 0,
        "the fit takes `max_steps` steps; for passes over the prompts, set `max_steps=-1`",
    ),
    _Rule(
        "beta", lambda args: args.objective == "implicit", "the implicit objective has no rewards to weigh it against"
    ),
    _Rule(
        "normalize_rewards",
        lambda args: args.objective == "implicit" and args.normalize_rewards != "optimal",
        "the implicit objective has no rewards",
    ),
)

# Options of drawing, which an evaluation uses too, and of the steps: a fit to given completions needs neither.
DRAWING = ("num_generations", "max_completion_length", "proposal")
STEPS = ("refresh_below", "max_steps", "num_train_epochs", "tolerance", "shuffle_dataset")


def refuse_unused_options(args: "MPOConfig") -> None:
    """
    Refuses options that are set, and have no effect.

    Args:
        args ([`MPOConfig`]): the options.

    Raises:
        `ValueError`: for the first of them, with the reason and a remedy.
    """
    for rule in REFUSED:
        if rule.applies(args) and (names := set_options(args, rule.names.split())):
            raise ValueError(f"{_no_effect(args, names)}: {rule.reason}.")


def warn_of_unused_options(args: "MPOConfig", has_rollouts: bool, evaluates: bool) -> None:
    """
    Warns of options that are set and have no effect, but that a file of options for several trainers may hold.

    Args:
        args ([`MPOConfig`]): the options.
        has_rollouts (`bool`): whether completions are given, so that none are drawn.
        evaluates (`bool`): whether there are prompts to evaluate on.
    """
    drawing = STEPS if evaluates else DRAWING + STEPS
    for rule in WARNED:
        names = [name for name in rule.names.split() if not (has_rollouts and name in drawing)]
        if rule.applies(args) and (names := set_options(args, names)):
            logger.warning(f"{_no_effect(args, names)}: {rule.reason}.")
    if has_rollouts and (names := set_options(args, drawing)):
        logger.warning(
            f"{_no_effect(args, names)} with `rollouts`, all of which are fitted in one pass; none are drawn."
        )


def set_options(args: "MPOConfig", names: Sequence[str]) -> list[str]:
    """Those of some options that differ from their defaults. What is off by default and turned off does not."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(args)
    } | args.dependent_defaults()
    pairs = ((name, getattr(args, name), defaults[name]) for name in names if name in defaults)
    return [name for name, value, default in pairs if value != default and (value or default)]


def _no_effect(args: "MPOConfig", names: Sequence[str]) -> str:
    values = {name: getattr(args, name) for name in names}
    listed = ", ".join(f"`{name}={getattr(value, 'value', value)!r}`" for name, value in values.items())
    return f"{listed} {'has' if len(names) == 1 else 'have'} no effect"
