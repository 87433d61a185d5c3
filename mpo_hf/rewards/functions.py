"""Reward functions: what all rewards have in common, and Python functions as rewards."""

import asyncio
import functools
import inspect
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .loading import Text
from .values import user_code, validate_rewards


# Functions that a trainer passes to reward functions, as TRL's trainers do.
LOGGERS = ("log_extra", "log_metric")


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

    def check(self, prompts: Sequence[Text], columns: Iterable[str]) -> None:  # noqa: B027 (some have nothing to check)
        """
        Raises a `ValueError` if completions of these prompts cannot be scored, before there are any.

        Args:
            prompts (`Sequence`): some prompts.
            columns (`Iterable[str]`): names of the further columns that there will be.
        """

    def to(self, device: torch.device | str) -> "RewardFunction":
        """Moves the model, unless there is none or a device map has placed it."""
        if self.model is not None and getattr(self.model, "hf_device_map", None) is None:
            self.model.to(device)
        return self


class CallableReward(RewardFunction):
    """
    A function with the signature of TRL's reward functions: `prompts`, `completions` and all columns (`completion_ids`,
    `trainer_state`, `log_metric`, `log_extra`, those of the dataset) are passed as keyword arguments, and it returns one
    number per completion, as a list, array or tensor. It may be async, even under a running event loop as in a notebook: all
    async functions of a process share one loop in the background, so that a client can keep its connections open between
    calls.

    Raises:
        `RewardError`: the function raised.
        `ValueError`: see [`validate_rewards`].
    """

    def __init__(self, function: Callable, name: str | None = None):
        self.function = function
        self.name = name or _callable_name(function)
        try:
            # of the function that is called, not of one that it wraps
            self._signature = inspect.signature(function, follow_wrapped=False)
        except (TypeError, ValueError):  # some functions written in C tell nothing of their arguments
            self._signature = None

    def __call__(self, prompts: list[Text], completions: list[Text], **columns) -> torch.Tensor:
        if self._signature is not None:  # outside of a trainer, nothing is logged
            columns = {name: _ignore for name in LOGGERS if name in self._signature.parameters} | columns
        with user_code(self.name):
            rewards = self.function(prompts=prompts, completions=completions, **columns)
            if inspect.isawaitable(rewards):
                rewards = asyncio.run_coroutine_threadsafe(_await(rewards), _event_loop(os.getpid())).result()
            if isinstance(rewards, Iterator):  # it is code of the user that runs now
                rewards = list(rewards)
        return validate_rewards(self.name, rewards, completions)

    def check(self, prompts: Sequence[Text], columns: Iterable[str]) -> None:
        names = ["prompts", "completions", *columns]
        try:
            if self._signature is not None:
                self._signature.bind(**dict.fromkeys(names))
        except TypeError as error:
            raise ValueError(
                f"The reward function {self.name!r} cannot be called with the keyword arguments {names}: {error}. Let it "
                "accept `**kwargs`, and add columns that it needs to the dataset."
            ) from error


def _ignore(name: str, value: Any) -> None:
    pass


async def _await(awaitable: Any) -> Any:
    return await awaitable


@functools.cache
def _event_loop(pid: int) -> asyncio.AbstractEventLoop:
    # one per process, since threads do not survive a fork
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="mpo_hf-async-rewards", daemon=True).start()
    return loop


def _callable_name(function: Callable) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
