"""What the completions and the checkpoints of a fit belong to. Those of another fit are refused, with what differs."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..mixture.configuration_mixture import MixturePolicyConfig
from ..mixture.modeling_mixture import MixturePolicyModel
from ..rewards.functions import RewardFunction
from ..rollouts.store import RolloutStore
from .fingerprints import policy_fingerprint, reward_fingerprint, rows_fingerprint, tokenizer_fingerprint
from .mpo_config import MPOConfig


# Options that a run cannot change when it resumes: what is drawn and how, and what the weights are best for.
LASTING_OPTIONS = (
    "objective mixing free_sum beta proposal welfare welfare_weights fairness_alpha cvar_level constraints constraint_price "
    "estimator normalize_rewards normalization_prompts num_generations top_k top_p chat_template_kwargs shuffle_dataset seed"
).split()


def completions_identity(
    args: MPOConfig,
    config: MixturePolicyConfig,
    objectives: Sequence[str],
    policies: Sequence[MixturePolicyModel],
    reference: MixturePolicyModel | None,
    tokenizer: PreTrainedTokenizerBase,
    rewards: Sequence[RewardFunction],
    temperature: float,
) -> dict[str, Any]:
    """
    What completions belong to, for [`~mpo_hf.rollouts.store.RolloutStore`].

    Args:
        args ([`MPOConfig`]): the options.
        config ([`MixturePolicyConfig`]): that of the mixture, with the places of its policies.
        objectives (`Sequence[str]`): the names of the objectives.
        policies (`Sequence[MixturePolicyModel]`): the policies.
        reference ([`MixturePolicyModel`], *optional*): the reference policy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer.
        rewards (`Sequence[RewardFunction]`): the rewards.
        temperature (`float`): the temperature that completions are drawn at.
    """
    weights: dict[int, list] = {}  # policies share those of their base, which are looked at once
    parts = [
        {**component.to_dict(), "content": policy_fingerprint(policy, weights)}
        for component, policy in zip(config.components, policies)
    ]
    own = None
    if reference is not None:
        own = {
            **(config.reference.to_dict() if config.reference else {}),
            "content": policy_fingerprint(reference, weights),
        }
    # other versions of Python compile functions to other code
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {
        "objectives": list(objectives),
        "policies": parts,
        "reference": own,
        "tokenizer": {"name": type(tokenizer).__name__, "content": tokenizer_fingerprint(tokenizer)},
        "rewards": [
            {"name": reward.name, "content": reward_fingerprint(reward), "python": version} for reward in rewards
        ],
        "temperature": temperature,
        "max_completion_length": args.max_completion_length,
    }


def checkpoint_identity(args: MPOConfig, completions: dict[str, Any], prompts: Any) -> dict[str, Any]:
    """
    What a checkpoint belongs to.

    Args:
        args ([`MPOConfig`]): the options.
        completions (`dict`): what its completions belong to.
        prompts: the dataset of prompts, or the store of given completions.
    """
    content = prompts.digest() if isinstance(prompts, RolloutStore) else rows_fingerprint(prompts)
    parts = {name: value for name, value in completions.items() if name != "objectives"}  # the config has those
    options = {name: getattr(args, name) for name in LASTING_OPTIONS}
    # as it is read back
    return json.loads(
        json.dumps({**options, **parts, "prompts": {"name": "prompts", "content": content}}, default=str)
    )
