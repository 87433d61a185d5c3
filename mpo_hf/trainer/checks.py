"""Checks of what a trainer is given, before anything is sampled."""

import os
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..mixture.hub import check_pushable
from ..mixture.modeling_mixture import MixturePolicyModel
from ..rollouts.store import RolloutStore
from .mpo_config import MPOConfig
from .tables import check_prompts, check_rollouts
from .unused_options import warn_of_unused_options


logger = logging.get_logger(__name__)


# Options of a generation config that change the distribution of the next token, and the values at which they do not.
NEUTRAL_DECODING: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "guidance_scale": None,
}


def check_arguments(
    args: MPOConfig,
    model: Any,
    reward_funcs: Sequence[Any],
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None,
    rollouts: str | os.PathLike | Dataset | None,
) -> None:
    """
    Checks the arguments of a trainer before models are loaded.

    Args:
        args ([`MPOConfig`]): the options.
        model: the mixture, or the list of policies.
        reward_funcs (`Sequence`): the reward functions, none for an empty list.
        train_dataset, eval_dataset: the prompts.
        rollouts (`str`, `os.PathLike` or `Dataset`, *optional*): completions that are given instead of prompts.

    Raises:
        `ValueError`: for arguments that do not fit together.
    """
    if not isinstance(args, MPOConfig):
        raise ValueError(f"`args` must be an MPOConfig, got {type(args).__name__}.")
    has_rollouts = rollouts is not None
    if has_rollouts and (train_dataset is not None or args.estimator != "mis"):
        raise ValueError('`rollouts` takes the place of `train_dataset`, and needs `estimator="mis"`.')
    if has_rollouts:
        count = len(model) if isinstance(model, list | tuple) else None
        check_rollouts(rollouts, count, args.objective != "implicit", bool(reward_funcs))
    elif train_dataset is None:
        raise ValueError("`train_dataset` is needed: prompts, in TRL's prompt-only format.")
    else:
        check_prompts("train_dataset", train_dataset)
    for name, dataset in eval_dataset.items() if isinstance(eval_dataset, dict) else [("", eval_dataset)]:
        if dataset is not None:
            check_prompts(f"eval_dataset {name}".strip(), dataset)
    if not reward_funcs and args.objective != "implicit" and not has_rollouts:
        raise ValueError(
            f"`objective={args.objective!r}` needs `reward_funcs`, one an objective. Only the objective 'implicit' works "
            "without."
        )
    if isinstance(model, list | tuple):
        _check_reward_count(reward_funcs, len(model))
    if args.model_init_kwargs and isinstance(model, PreTrainedModel):
        logger.warning("`model_init_kwargs` has no effect: the model is loaded already.")
    warn_of_unused_options(args, has_rollouts, evaluates=eval_dataset is not None)


def check_mixture(
    args: MPOConfig,
    model: MixturePolicyModel,
    reference: MixturePolicyModel | None,
    reward_funcs: Sequence[Any],
    has_rollouts: bool = False,
) -> None:
    """
    Checks that the weights of a mixture can be fitted.

    Args:
        args ([`MPOConfig`]): the options.
        model ([`MixturePolicyModel`]): the mixture.
        reference ([`MixturePolicyModel`], *optional*): the reference policy.
        reward_funcs (`Sequence`): the reward functions, none for an empty list.
        has_rollouts (`bool`, *optional*, defaults to `False`): whether completions are given, so that none are drawn.

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
    if args.proposal == "mixture" and args.score_policies < 1 and not has_rollouts and min(config.mixture_weights) > 0:
        raise ValueError(
            f"`score_policies={args.score_policies}` has no effect: drawing from the mixture computes the log-probabilities "
            'under every policy. Leave it out, or use `proposal="reference"`.'
        )
    _check_reward_count(reward_funcs, len(config.labels))
    if args.push_to_hub:  # now rather than after the fit
        check_pushable(config, args.hub_upload_adapters)


def set_decoding(args: MPOConfig, generation_config: GenerationConfig, given: RolloutStore | None) -> None:
    """
    Sets the temperature of a fit that leaves it open, and refuses to fit for decoding that does more to the distribution.

    Args:
        args ([`MPOConfig`]): the options.
        generation_config ([`~transformers.GenerationConfig`]): that of the mixture.
        given ([`~mpo_hf.rollouts.store.RolloutStore`], *optional*): the store that given completions come from.

    Raises:
        `ValueError`: the generation config changes the distribution by more than a temperature.
    """
    is_decoded = args.objective == "achieved" and args.mixing == "token"
    if args.temperature is None:
        own = getattr(generation_config, "temperature", None) if is_decoded else None
        own = given.info.get("temperature") if given is not None and is_decoded else own
        args.temperature = float(own) if own else 1.0
    for name, neutral in NEUTRAL_DECODING.items() if is_decoded else ():
        value = getattr(generation_config, name, None)
        if value in (None, neutral) or getattr(args, name, None) is not None:
            continue
        way_out = (
            f"pass `{name}={neutral}`" if hasattr(args, name) else f"set `model.generation_config.{name} = {neutral}`"
        )
        raise ValueError(
            f"The generation config of the mixture has {name}={value}, and weights are fitted for sampling that only a "
            f"temperature changes, as the log-probabilities under other weights would not be known. Either {way_out} to fit for "
            'sampling without it, and decode so, or fit the weights of the theorem with `objective="reward"`.'
        )


def drawn_temperature(args: MPOConfig, given: RolloutStore | None) -> float:
    """
    The temperature that the completions of a fit are drawn at, or that given ones were drawn at.

    Args:
        args ([`MPOConfig`]): the options.
        given ([`~mpo_hf.rollouts.store.RolloutStore`], *optional*): the store that given completions come from.

    Raises:
        `ValueError`: for a `temperature` that is not that of the store.
    """
    if given is None:
        return args.temperature
    drawn = given.info.get("temperature", 1.0)
    if args.mixing == "sequence" and args.temperature not in (1.0, drawn):
        raise ValueError(
            f"`temperature={args.temperature}` has no effect on the completions in {str(given.folder)!r}: they were drawn "
            f"at temperature {drawn}. Leave it out."
        )
    return drawn


def use_dtype_of_policies(accelerator: Accelerator) -> None:
    """
    Turns off the mixed precision of `bf16=True`, `fp16=True` or a launcher. It would apply to the mixture while it draws, and not
    to its policies while they score: log-probabilities of one completion would not fit together.
    """
    if accelerator.mixed_precision == "no":
        return
    accelerator.native_amp, accelerator.scaler = False, None
    logger.warning(
        f"Mixed precision ({accelerator.mixed_precision}) has no effect: policies run in the dtype that they are loaded in. For "
        'another one, use `model_init_kwargs={"dtype": "bfloat16"}`, or `--dtype bfloat16` on the command line.'
    )


def _check_reward_count(reward_funcs: Sequence[Any], num_policies: int) -> None:
    if reward_funcs and len(reward_funcs) != num_policies:
        raise ValueError(
            f"Got {len(reward_funcs)} `reward_funcs` for {num_policies} policies; MPO needs one for each."
        )
