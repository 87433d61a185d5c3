"""
Adapters of one model take turns: the one that runs is a state of the model, which all mixtures and views of it share, and
with them all threads.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .compat import AdapterSwitch, without_peft
from .stacked_rows import StackingError, with_children


# Not attributes of the modules: a lock can neither be copied nor pickled.
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


def lock_of(module: nn.Module) -> Any:
    """The reentrant lock of a module. Holds for the module itself: a copy has its own."""
    with _LOCKS_GUARD:
        lock = _LOCKS.get(module)
        if lock is None:
            lock = _LOCKS[module] = threading.RLock()
        return lock


@contextmanager
def held(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Holds the locks of those modules that have adapters, in one order for all threads."""
    bases = {
        id(base): base for module in modules if hasattr(module, "get_base_model") for base in [without_peft(module)]
    }
    with ExitStack() as stack:
        for _, base in sorted(bases.items()):
            stack.enter_context(lock_of(base))
        yield


def call_with_adapter(function: Callable, inputs: dict[str, Any], model: nn.Module, adapter: str | None) -> Any:
    """
    Calls a model, or a part of it, while one of its adapters is active, and leaves the model as it was, also after an error.
    Other threads wait until then.

    Args:
        function (`Callable`): the model, or a part of it.
        inputs (`dict`): its arguments.
        model (`nn.Module`): the model. One that is not a `PeftModel` has nothing to switch, and needs no turns.
        adapter (`str`, *optional*): name of the adapter; `None` for the base alone.
    """
    if not hasattr(model, "get_base_model"):
        return function(**inputs)
    if torch.compiler.is_compiling():  # compiled code can hold no lock: who calls it does
        switch = AdapterSwitch(model)
        switch.activate(adapter)
        output = function(**inputs)
        switch.undo()
        return output
    with lock_of(without_peft(model)):
        switch = AdapterSwitch(model)
        try:
            switch.activate(adapter)
            return function(**inputs)
        finally:
            switch.undo()


def with_own_switch(model: nn.Module) -> nn.Module:
    """
    A copy of a `PeftModel` that shares all with it but which adapter is active. The model itself where that is impossible, as
    with offloaded weights.
    """
    memo: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) not in memo:
            children = {name: child and copied(child) for name, child in module._modules.items()}
            is_changed = any(child is not module._modules[name] for name, child in children.items())
            is_switched = "_active_adapter" in module.__dict__
            memo[id(module)] = with_children(module, children) if is_changed or is_switched else module
        return memo[id(module)]

    try:
        return copied(model)
    except StackingError:
        return model
