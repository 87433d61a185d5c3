"""Reward functions from what users give: functions, classifiers, and descriptions of them."""

import dataclasses
import os
from typing import Any

import torch

from .functions import CallableReward, RewardFunction
from .loading import RewardModelSpec, is_model
from .models import ModelReward
from .values import shorten


def make_reward_functions(
    reward_funcs: Any,
    names: list[str | None] | None = None,
    processing_classes: Any = None,
    device: torch.device | str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[RewardFunction]:
    """
    Builds one reward function per objective from the `reward_funcs` of TRL's GRPOTrainer.

    Args:
        reward_funcs (`Callable`, `str`, [`~transformers.PreTrainedModel`], [`RewardModelSpec`], or a list of them):
            one per objective. A [`RewardFunction`], such as a [`RewardEnsemble`], is used as it is.
        names (`list[str | None]`, *optional*): names of the objectives, `None` for the default. Equal names are
            numbered: `length`, `length_2`.
        processing_classes ([`~transformers.PreTrainedTokenizerBase`], `str`, or a list of them, *optional*): tokenizers
            of the models; those of callables are ignored.
        device (`torch.device` or `str`, *optional*): the device that models are moved to.
        model_kwargs (`dict`, *optional*): for `from_pretrained` of models given as a `str`.
        chat_template_kwargs (`dict`, *optional*): for models not given as a [`RewardModelSpec`].

    Raises:
        `ValueError`: lists that are empty or of different lengths, or an entry that is not a reward function.

    Example:

    ```python
    >>> from mpo_hf.rewards import make_reward_functions

    >>> def length(completions, **kwargs):
    ...     return [float(len(completion)) for completion in completions]

    >>> functions = make_reward_functions([length, length])
    >>> [function.name for function in functions]
    ['length', 'length_2']
    >>> functions[0](prompts=["Hi", "Hi"], completions=["Hello!", "Hey"])
    tensor([6., 3.], dtype=torch.float64)
    ```
    """
    funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    if not funcs:
        raise ValueError("`reward_funcs` is empty: give one reward function per objective.")
    columns = {"names": names, "processing_classes": processing_classes}
    for argument, values in columns.items():
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        columns[argument] = [None] * len(funcs) if values == [None] else values
        if len(columns[argument]) != len(funcs):
            raise ValueError(f"`{argument}` has {len(values)} entries for {len(funcs)} reward functions.")
    kwargs = {"chat_template_kwargs": chat_template_kwargs or {}}
    functions = []
    for func, name, processing_class in zip(funcs, *columns.values()):
        if isinstance(func, (str, os.PathLike)):
            func = RewardModelSpec(func, model_kwargs=model_kwargs or {}, **kwargs)
        elif is_model(func):
            func = RewardModelSpec(func, **kwargs)
        functions.append(_make_reward_function(func, name, processing_class))
    for function, name in zip(functions, _unique([function.name for function in functions])):
        function.name = name
        if device is not None:
            function.to(device)
    return functions


def _unique(names: list[str]) -> list[str]:
    unique = []
    for name in names:
        candidate, number = name, 1
        while candidate in unique or (number > 1 and candidate in names):
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return unique


def _make_reward_function(func: Any, name: str | None, processing_class: Any) -> RewardFunction:
    if isinstance(func, RewardFunction):
        func.name = name or func.name
        return func
    if isinstance(func, RewardModelSpec):
        if processing_class is not None:
            if func.processing_class is not None:
                raise ValueError("Give the tokenizer in the RewardModelSpec or in `processing_classes`, not in both.")
            func = dataclasses.replace(func, processing_class=processing_class)
        return ModelReward(func, name)
    if callable(func):
        return CallableReward(func, name)
    raise ValueError(
        f"{shorten(func)} is not a reward function. Give a callable, a repo id or folder, a loaded sequence classifier or "
        "a RewardModelSpec."
    )
