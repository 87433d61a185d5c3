"""Checks of what a trainer is given, before anything is sampled."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from ..mixture.hub import check_pushable
from ..mixture.modeling_mixture import MixturePolicyModel
from .mpo_config import MPOConfig


def check_arguments(
    args: MPOConfig,
    model: Any,
    reward_funcs: Sequence[Any],
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None,
    has_rollouts: bool,
) -> None:
    """
    Checks the arguments of a trainer before models are loaded.

    Args:
        args ([`MPOConfig`]): the options.
        model: the mixture, or the list of policies.
        reward_funcs (`Sequence`): the reward functions, none for an empty list.
        train_dataset, eval_dataset: the prompts.
        has_rollouts (`bool`): whether completions are given instead of prompts.

    Raises:
        `ValueError`: for arguments that do not fit together.
    """
    if not isinstance(args, MPOConfig):
        raise ValueError(f"`args` must be an MPOConfig, got {type(args).__name__}.")
    if not has_rollouts:
        _check_prompts("train_dataset", train_dataset)
    elif train_dataset is not None or args.estimator != "mis":
        raise ValueError('`rollouts` takes the place of `train_dataset`, and needs `estimator="mis"`.')
    for name, dataset in eval_dataset.items() if isinstance(eval_dataset, dict) else [("", eval_dataset)]:
        _check_prompts(f"eval_dataset {name}".strip(), dataset, required=False)
    if not reward_funcs and args.objective != "implicit" and not has_rollouts:
        raise ValueError(
            f"`objective={args.objective!r}` needs `reward_funcs`, one an objective. Only the objective 'implicit' works "
            "without."
        )
    if isinstance(model, list | tuple):
        _check_reward_count(reward_funcs, len(model))


def check_mixture(
    args: MPOConfig, model: MixturePolicyModel, reference: MixturePolicyModel | None, reward_funcs: Sequence[Any]
) -> None:
    """
    Checks that the weights of a mixture can be fitted.

    Args:
        args ([`MPOConfig`]): the options.
        model ([`MixturePolicyModel`]): the mixture.
        reference ([`MixturePolicyModel`], *optional*): the reference policy.
        reward_funcs (`Sequence`): the reward functions, none for an empty list.

    Raises:
        `ValueError`: for a mixture that cannot be fitted with these options.
    """
    config = model.config
    if config.allow_off_simplex:
        raise ValueError(
            "A fit starts from weights on the simplex, but this mixture allows others (`allow_off_simplex`). Pass the "
            "list of its policies and the reference instead."
        )
    if args.estimator == "bsmd" and min(config.mixture_weights) == 0:
        raise ValueError(
            f"The fit starts from the weights of the mixture, {config.mixture_weights}, and mirror descent never changes a "
            "weight of zero. Start from uniform weights, or leave that policy out."
        )
    if config.plausibility and args.estimator == "mis":
        raise ValueError(
            "A plausibility constraint depends on more than the log-probabilities of completions. Use "
            '`estimator="bsmd"` with it.'
        )
    if reference is None and (args.objective != "implicit" or args.proposal == "reference"):
        raise ValueError(
            "This mixture has no reference policy. Pass `ref_model=`, the policy that all others were aligned from."
        )
    _check_reward_count(reward_funcs, len(config.labels))
    if args.push_to_hub:  # now rather than after the fit
        check_pushable(config, args.hub_upload_adapters)


def _check_reward_count(reward_funcs: Sequence[Any], num_policies: int) -> None:
    if reward_funcs and len(reward_funcs) != num_policies:
        raise ValueError(
            f"Got {len(reward_funcs)} `reward_funcs` for {num_policies} policies; MPO needs one for each."
        )


def _check_prompts(name: str, dataset: Dataset | IterableDataset | None, required: bool = True) -> None:
    if dataset is None:
        if required:
            raise ValueError(f"`{name}` is needed: prompts, in TRL's prompt-only format.")
        return
    if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    columns = getattr(dataset, "column_names", None) or list(next(iter(dataset)))
    if "prompt" not in columns:
        raise ValueError(f"`{name}` needs a column 'prompt', it has {columns}.")
