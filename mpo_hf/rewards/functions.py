"""Reward functions and reward models, one per objective, and the normalization P that makes their scales comparable."""

import asyncio
import dataclasses
import functools
import inspect
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trl import apply_chat_template, is_conversational

from ..estimation.tables import normalize_by_prompt
from .loading import (
    ACTIVATIONS,
    RewardModelSpec,
    Text,
    choose_logit,
    is_model,
    length_limit,
    load_model,
    load_reward_tokenizer,
    model_name,
    template_fields,
)


class RewardError(RuntimeError):
    """An exception inside a user's reward function or template; the original is its `__cause__`."""


class RewardFunction(ABC):
    """
    The reward of one objective.

    Attributes:
        name (`str`): name of the objective.
        model (`torch.nn.Module`, *optional*): the reward model, for a trainer to place and prepare.
        metrics (`Mapping[str, torch.Tensor]`): further numbers from the last call, whose means a trainer logs.
    """

    name: str
    model: nn.Module | None = None
    metrics: Mapping[str, torch.Tensor] = {}

    @abstractmethod
    def __call__(self, prompts: list[Text], completions: list[Text], **columns) -> torch.Tensor:
        """Rewards of N completions, of shape `(N,)`, float64, on CPU. `columns` are further columns, lists of N."""

    def to(self, device: torch.device | str) -> "RewardFunction":
        """Moves the model, unless there is none or a device map has placed it."""
        if self.model is not None and getattr(self.model, "hf_device_map", None) is None:
            self.model.to(device)
        return self


class CallableReward(RewardFunction):
    """
    A function with the signature of TRL's reward functions: `prompts`, `completions` and all columns (`completion_ids`,
    `trainer_state`, those of the dataset) are passed as keyword arguments, and it returns one number per completion, as a
    list, array or tensor. It may be async, even under a running event loop as in a notebook: all async functions of a process
    share one loop in the background, so that a client can keep its connections open between calls.

    Raises:
        `RewardError`: the function raised.
        `ValueError`: see [`validate_rewards`].
    """

    def __init__(self, function: Callable, name: str | None = None):
        self.function = function
        self.name = name or _callable_name(function)

    def __call__(self, prompts: list[Text], completions: list[Text], **columns) -> torch.Tensor:
        with _user_code(self.name):
            rewards = self.function(prompts=prompts, completions=completions, **columns)
            if inspect.isawaitable(rewards):
                rewards = asyncio.run_coroutine_threadsafe(_await(rewards), _event_loop(os.getpid())).result()
        return validate_rewards(self.name, rewards, completions)


class ModelReward(RewardFunction):
    """
    A sequence classifier as reward, by the conventions of TRL's GRPOTrainer: no special tokens beyond those of the chat
    template, padding on the right whatever the tokenizer's side, EOS for a missing pad token.

    Raises:
        `ValueError`: the model has several outputs and `logit` chooses none; its head is not in the checkpoint and
            would be random; there is no tokenizer; when called, an input is longer than `max_length`.
    """

    def __init__(self, spec: RewardModelSpec | str | PreTrainedModel, name: str | None = None):
        self.spec = spec if isinstance(spec, RewardModelSpec) else RewardModelSpec(spec)
        self.name = name or self.spec.label or model_name(self.spec)
        self.model, locations = load_model(self.spec)
        self.processing_class = load_reward_tokenizer(self.spec, self.name, locations)
        # read now, as a trainer may wrap the model later, which hides its config
        config = self.model.config
        self.logit = choose_logit(self.spec, self.name, config)
        self.max_length = self.spec.max_length or length_limit(config, self.processing_class)
        # the classifier reads its logits at the last token that is not this one
        config.get_text_config().pad_token_id = self.processing_class.pad_token_id

    @torch.no_grad()
    def __call__(self, prompts: list[Text], completions: list[Text], **columns) -> torch.Tensor:
        rewards = torch.empty(len(completions), dtype=torch.float64)
        if len(completions) == 0:
            return rewards
        texts = [self._text(*pair) for pair in zip(range(len(completions)), prompts, completions, strict=True)]
        inputs = self.processing_class(text=texts, add_special_tokens=self.spec.add_special_tokens, verbose=False)
        lengths = [len(ids) for ids in inputs["input_ids"]]
        self._check_lengths(lengths, completions)
        self.model.eval()
        longest_first = sorted(range(len(texts)), key=lengths.__getitem__, reverse=True)
        for start in range(0, len(texts), self.spec.batch_size):
            rows = longest_first[start : start + self.spec.batch_size]
            rewards[rows] = self._score({key: [values[row] for row in rows] for key, values in inputs.items()})
        return validate_rewards(self.name, rewards, completions)

    def _score(self, inputs: dict[str, list]) -> torch.Tensor:
        inputs = self.processing_class.pad(inputs, padding_side="right", return_tensors="pt")
        device = next(self.model.parameters()).device
        if device.type != "meta":  # an offloaded model moves its inputs itself
            inputs = inputs.to(device)
        logits = self.model(**inputs).logits
        if logits.ndim != 2:
            raise ValueError(
                f"The reward {self.name!r} needs a sequence classifier, with logits of shape (batch, labels), but those "
                f"of {type(self.model).__name__} have {tuple(logits.shape)}."
            )
        values = ACTIVATIONS[self.spec.activation](logits.cpu().double())[:, self.logit]
        return self.spec.sign * self.spec.scale * values + self.spec.offset

    def _text(self, index: int, prompt: Text, completion: Text) -> str:
        template = self.spec.template
        if isinstance(template, str):
            texts = {"prompt": prompt, "completion": completion}
            return template.format(**{key: self._content(index, texts[key]) for key in template_fields(template)})
        if template is not None:
            with _user_code(self.name):
                text = template(prompt, completion)
        elif isinstance(prompt, str) and isinstance(completion, str):
            text = prompt + completion
        elif is_conversational({"prompt": prompt}) and is_conversational({"completion": completion}):
            messages = {"messages": prompt + completion}
            text = apply_chat_template(messages, self.processing_class, **self.spec.chat_template_kwargs)["text"]
        else:
            text = None
        if not isinstance(text, str):
            raise ValueError(
                f"The reward {self.name!r} has no text for completion {index}: prompt and completion must both be plain "
                f"or both be conversations, and a callable `template` must return a str. Prompt: {_shorten(prompt)}, "
                f"completion: {_shorten(completion)}"
            )
        return text

    def _content(self, index: int, value: Text) -> str:
        content = value[0]["content"] if not isinstance(value, str) and len(value) == 1 else value
        if not isinstance(content, str):
            raise ValueError(
                f"The template of reward {self.name!r} takes a text or a single message of text, but for completion "
                f"{index} there is {_shorten(value)}. Give `template` as a callable (prompt, completion) -> str."
            )
        return content

    def _check_lengths(self, lengths: list[int], completions: list[Text]):
        limit = self.max_length or math.inf
        for index, length in enumerate(lengths):
            if not 0 < length <= limit:
                raise ValueError(
                    f"The reward {self.name!r} takes 1 to {limit} tokens, but the input of completion {index} has "
                    f"{length}, and a truncated text would get another reward. Use shorter prompts or a lower "
                    "`max_completion_length`, set `max_length` in its RewardModelSpec if the model can take more, or "
                    f"truncate the text in a callable `template`. The completion: {_shorten(completions[index])}"
                )


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


def validate_rewards(name: str, rewards: Any, completions: list[Text]) -> torch.Tensor:
    """
    Checks that there is one finite number for every completion. In TRL, a reward function may return `None` for "not
    applicable". Here it may not, as the worst-off objective could not be determined.

    Args:
        name (`str`): name of the objective, for the message.
        rewards (`Iterable`): what the reward function returned.
        completions (`list`): the completions that it was called with.

    Returns:
        `torch.Tensor` of shape `(len(completions),)`, float64, on CPU.

    Raises:
        `ValueError`: for anything else, with the name of the reward, the index and the completion.

    Example:

    ```python
    >>> from mpo_hf.rewards import validate_rewards

    >>> validate_rewards("length", [2, 3.5], ["Hi", "Hey"])
    tensor([2.0000, 3.5000], dtype=torch.float64)
    ```
    """
    shape = tuple(getattr(rewards, "shape", (None,)))  # a list has one dimension
    if isinstance(rewards, (str, bytes, Mapping)) or not isinstance(rewards, Iterable) or len(shape) != 1:
        returned = f"shape {shape}" if len(shape) > 1 else _shorten(rewards)
    else:
        values = rewards.tolist() if hasattr(rewards, "tolist") else list(rewards)
        returned = None if len(values) == len(completions) else f"{len(values)} rewards"
    if returned is not None:
        raise ValueError(
            f"The reward function {name!r} must return one number per completion, as a list, array or tensor of shape "
            f"({len(completions)},), but returned {returned}."
        )
    for index, value in enumerate(values):
        if getattr(value, "shape", None) == ():
            values[index] = value = value.item()
        values[index] = finite_number(value)
        if values[index] is None:
            raise ValueError(
                f"The reward function {name!r} returned {_shorten(value)} for completion {index}, but every objective "
                "needs a finite number for every completion. Return the reward that such a completion deserves, such as "
                f"the lowest one. The completion: {_shorten(completions[index])}"
            )
    return torch.tensor(values, dtype=torch.float64)


def finite_number(value: Any) -> float | None:
    """A reward as a `float`; `None` for what is not a finite number, or does not fit into a `float`."""
    try:
        return float(value) if isinstance(value, Real) and math.isfinite(value) else None
    except OverflowError:  # of an int or a fraction
        return None


def given_rewards(rows: Sequence[Sequence[float]], ids: Sequence[int], names: Sequence[str]) -> torch.Tensor:
    """
    Rewards from a table of completions, checked as those of functions are.

    Args:
        rows (`Sequence[Sequence[float]]`): the rewards of every completion.
        ids (`Sequence[int]`): the id of every completion, for the message.
        names (`Sequence[str]`): names of the K objectives.

    Returns:
        `torch.Tensor` of shape `(N, K)`, float64.

    Raises:
        `ValueError`: for anything but K finite numbers for every completion, with the row and the objective.
    """
    advice = "Correct the table, leave the row out, or pass `reward_funcs` to compute all rewards anew."
    values = []
    for row, at in zip(rows, ids):
        if isinstance(row, (str, Mapping)) or not isinstance(row, Iterable) or len(list(row)) != len(names):
            raise ValueError(
                f"Row {at} of the rollouts has the rewards {_shorten(row)}, but there must be one number for each of "
                f"{list(names)}. {advice}"
            )
        values.append([finite_number(value) for value in row])
        if None in values[-1]:
            k = values[-1].index(None)
            raise ValueError(
                f"Row {at} of the rollouts has the reward {_shorten(row[k])} for {names[k]!r}, but every objective needs a "
                f"finite number for every completion. {advice}"
            )
    return torch.tensor(values, dtype=torch.float64)


def normalize_rewards(rewards: torch.Tensor, beta: float, log_weights: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    The normalization P of [Mixing Preference Optimization](https://huggingface.co/papers/2502.18699), by prompt:

    $$ P(r)_{jk} = r_{jk} - \beta \log \sum_j w_j \exp(r_{jk} / \beta) $$

    which estimates \\(r_k(x, y_j) - \beta \log E_{y \sim \pi_{ref}} \exp(r_k(x, y) / \beta)\\) from the given completions.
    It is idempotent, and does not depend on constants added to the rewards of a prompt.

    Args:
        rewards (`torch.Tensor`): shape `(prompts, m, K)`, for m completions per prompt and K objectives.
        beta (`float`): KL coefficient β, above 0.
        log_weights (`torch.Tensor`, *optional*): if the completions are drawn from another proposal q than the reference,
            \\(\log \pi_{ref}(y_j) - \log q(y_j)\\) up to a constant, of shape `(prompts, m)`;
            \\(w = \mathrm{softmax}_j\\) of them. By default \\(w_j = 1/m\\).

    Returns:
        `torch.Tensor`: P(r), of the shape of `rewards`.

    Raises:
        `ValueError`: `beta` is not above 0, or a shape is wrong.

    Example:

    ```python
    >>> import torch
    >>> from mpo_hf.rewards import normalize_rewards

    >>> normalize_rewards(torch.tensor([[[1.0], [3.0]]]), beta=1.0)
    tensor([[[-1.4338],
             [ 0.5662]]])
    ```
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"`beta` must be finite and above 0, but is {beta!r}.")
    if rewards.ndim != 3 or rewards.shape[1] == 0:
        raise ValueError(f"`rewards` must have shape (prompts, m, K) with m above 0, but has {tuple(rewards.shape)}.")
    if log_weights is None:
        log_weights = rewards.new_zeros(rewards.shape[:2])
    if log_weights.shape != rewards.shape[:2]:
        shapes = f"{tuple(rewards.shape[:2])}, but has {tuple(log_weights.shape)}"
        raise ValueError(f"`log_weights` must have shape (prompts, m), here {shapes}.")
    num_prompts, num_completions = rewards.shape[:2]
    prompt = torch.arange(num_prompts, device=rewards.device).repeat_interleave(num_completions)
    flat, log_weights = rewards.flatten(0, 1), torch.log_softmax(log_weights, dim=-1).flatten()
    return normalize_by_prompt(flat, log_weights, prompt, num_prompts, beta).view_as(rewards)


# Small helpers


@contextmanager
def _user_code(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RewardError(f"The reward function {name!r} raised {type(error).__name__}: {error}") from error


async def _await(awaitable: Any) -> Any:
    return await awaitable


@functools.cache
def _event_loop(pid: int) -> asyncio.AbstractEventLoop:
    # one per process, since threads do not survive a fork
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="mpo_hf-async-rewards", daemon=True).start()
    return loop


def _shorten(value: Any, limit: int = 200) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an int of more than 4,300 digits
        text = f"a number of type {type(value).__name__} that is too large to be printed"
    return text if len(text) <= limit else text[:limit] + "..."


def _callable_name(function: Callable) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


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
        f"{_shorten(func)} is not a reward function. Give a callable, a repo id or folder, a loaded sequence classifier or "
        "a RewardModelSpec."
    )
