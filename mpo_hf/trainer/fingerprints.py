"""
What a fit belongs to, by content: models by their weights, reward functions by their code, tokenizers, prompts.

A path that has moved is the same if its content is. What has no fingerprint (`None`) is not compared.
"""

import contextlib
import dataclasses
import dis
import functools
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence, Sized
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..mixture.modeling_mixture import MixturePolicyModel
from ..rewards import RewardModelSpec


# How many rows of a dataset are looked at, from the first to the last.
MAX_ROWS = 1000
# How many numbers of a tensor are looked at one by one; a sum covers the others.
MAX_NUMBERS = 64
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A text that tells tokenizers of one vocabulary apart.
PROBE = "The 2 quick brown foxes jumped over\n\tthe lazy dog's café; naïve — 日本 e.g. 3.14 a b c d e f"
ATOMS = (bool, int, float, complex, str, bytes, os.PathLike, torch.dtype)
# Fields of a reward model's description that say where it lies, and how it runs.
PLACE = (
    "model adapter revision adapter_revision subfolder adapter_subfolder gguf_file processing_class label batch_size "
    "model_kwargs"
).split()


def digest(value: Any) -> str:
    """A short digest of what JSON can hold; of other objects, of how they are printed, without their address."""
    text = json.dumps(value, sort_keys=True, default=lambda other: re.sub(r" at 0x\w+", "", str(other)))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# ---- models ----


def policy_fingerprint(policy: MixturePolicyModel, known: dict[int, list] | None = None) -> str | None:
    """
    A fingerprint of a policy that is a model of its own; see [`MixturePolicyModel.policy`]. Adapters of other policies over
    the same base do not count.

    Args:
        policy ([`MixturePolicyModel`]): the policy.
        known (`dict`, *optional*): see [`model_fingerprint`].
    """
    backbone, adapter = policy.backbones[0], policy.policies[0].adapter
    return model_fingerprint(backbone, adapter, set(getattr(backbone, "peft_config", ())) - {adapter}, known)


@torch.no_grad()
def model_fingerprint(
    model: nn.Module,
    adapter: str | None = None,
    others: Collection[str] = (),
    known: dict[int, list] | None = None,
) -> str | None:
    """
    A fingerprint of the weights of a model; `None` where some are offloaded.

    Args:
        model (`torch.nn.Module`): the model.
        adapter (`str`, *optional*): the adapter that belongs to it.
        others (`Collection[str]`, *optional*): adapters that do not.
        known (`dict`, *optional*): what was found out about tensors, by their `id`, for models that share some.
    """
    known = {} if known is None else known
    found, saved = [], model.state_dict().keys()
    buffers = ((name, tensor) for name, tensor in model.named_buffers() if name in saved)
    for name, tensor in (*model.named_parameters(), *buffers):
        parts = name.removeprefix("base_model.model.").replace(".base_layer.", ".").split(".")
        if set(others).intersection(parts):
            continue
        if tensor.is_meta:
            return None
        parts = ["adapter" if part == adapter else part for part in parts]
        if id(tensor) not in known:
            known[id(tensor)] = _numbers(tensor)
        found.append([".".join(parts), list(tensor.shape), str(tensor.dtype), *known[id(tensor)]])
    scalings = (getattr(module, "scaling", None) for module in model.modules())
    return digest([sorted(found), [s[adapter] for s in scalings if isinstance(s, dict) and adapter in s]])


def _numbers(tensor: torch.Tensor) -> list:
    """The sum of all bit patterns, which does not depend on the device, and some of them in their order."""
    if hasattr(tensor, "__tensor_flatten__"):  # several tensors that appear as one, such as a quantized one
        return [_numbers(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    bits = tensor.detach().cpu().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    return [bits.sum(dtype=torch.int64).item(), bits[:: max(1, len(bits) // MAX_NUMBERS)].tolist()]


# ---- tokenizers and prompts ----


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of a tokenizer: its vocabulary, its chat template, and how it splits a text."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    probe = tokenizer(PROBE)["input_ids"]
    return digest([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, special, probe])


def rows_fingerprint(dataset: Any) -> str | None:
    """A fingerprint of a dataset: its length, and its rows, or some of them if they are many; `None` for a stream."""
    if not isinstance(dataset, Sized):
        return None
    indices = np.linspace(0, len(dataset) - 1, min(len(dataset), MAX_ROWS)).round().astype(int)
    return digest([len(dataset), [dataset[i] for i in indices.tolist()]])


# ---- rewards ----


def reward_fingerprint(reward: Any) -> str:
    """
    A fingerprint of a reward: the code of a function, the weights of a model, and the values that either is made with. Values
    that its own code changes, as counters, do not count, nor do dictionaries and lists of other than functions and models, which
    may be caches.
    """
    return digest(_described(reward, ()))


def _described(value: Any, within: tuple[int, ...]) -> Any:
    """What a value is, for JSON. `within` are the values that it is a part of."""
    if value is None or isinstance(value, ATOMS):
        return repr(value)
    if id(value) in within:
        return None
    within = (*within, id(value))
    if isinstance(value, nn.Module):
        return model_fingerprint(value)
    if isinstance(value, PreTrainedTokenizerBase):
        return tokenizer_fingerprint(value)
    if isinstance(value, CodeType):
        parts = (value.co_code, value.co_names, value.co_varnames, value.co_consts)
    elif isinstance(value, tuple) or (isinstance(value, list) and value and all(map(callable, value))):
        parts = value
    elif isinstance(value, frozenset):
        parts = tuple(sorted(value, key=repr))
    elif isinstance(value, functools.partial):
        parts = (value.func, value.args, tuple(sorted(value.keywords.items())))
    elif isinstance(value, MethodType):
        parts = (value.__func__, value.__self__)
    elif isinstance(value, FunctionType):
        parts = (
            value.__code__,
            value.__defaults__,
            tuple(sorted((value.__kwdefaults__ or {}).items())),
            *_used(value),
        )
    elif isinstance(value, RewardModelSpec):
        parts = tuple((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.name not in PLACE)
        parts = tuple((name, tuple(sorted(v.items())) if isinstance(v, dict) else v) for name, v in parts)
    elif callable(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
        parts = _made_of(value)
    else:
        return getattr(value, "__qualname__", type(value).__qualname__)
    return [type(value).__qualname__, *(_described(part, within) for part in parts)]


def _used(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Values that a function takes from around it: those of its module, and those that it was defined among."""
    changed = _stored(function.__code__, ("STORE_DEREF", "STORE_GLOBAL"))
    for name in sorted({name for code in _nested(function.__code__) for name in code.co_names}):
        value = function.__globals__.get(name)
        same_module = getattr(value, "__module__", None) == function.__module__
        if name not in changed and (isinstance(value, ATOMS + (tuple, frozenset)) or same_module):
            yield name, value
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # not set yet
            if name not in changed:
                yield name, cell.cell_contents


def _made_of(instance: Any) -> list:
    """The code of the class of an object, unless it is one of this package, and the attributes that it was made with."""
    package = type(instance).__module__.split(".")[0]
    classes = [cls for cls in type(instance).__mro__ if cls.__module__.split(".")[0] == package]
    functions = {name: f for cls in reversed(classes) for name, f in vars(cls).items() if isinstance(f, FunctionType)}
    changed: set[str] = set()
    for name, function in functions.items():
        if name not in ("__init__", "__post_init__"):
            changed |= _stored(function.__code__, ("STORE_ATTR",))
    own = [] if package == __name__.split(".")[0] else sorted(functions.items())
    return [*own, *((name, v) for name, v in sorted(vars(instance).items()) if name not in changed | {"name"})]


def _stored(code: CodeType, operations: Sequence[str]) -> set[str]:
    """Names that some code stores values under."""
    return {step.argval for part in _nested(code) for step in dis.get_instructions(part) if step.opname in operations}


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Some code, with that of the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
