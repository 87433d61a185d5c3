"""Rewards as given on the command line and in YAML files."""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..rewards import RewardModelSpec
from ..rewards.ensembles import RewardEnsemble
from .parser import UsageError


ENSEMBLE_KEYS = ("ensemble", "aggregation", "coefficient", "label")


def parse_reward(given: str | dict[str, Any]) -> str | Callable | RewardModelSpec | RewardEnsemble:
    """
    A reward as `MPOTrainer` takes it, for one that is given on the command line or in YAML.

    Args:
        given (`str` or `dict`):
            `path/to/file.py:function` or `module:function`, which is imported; another string is the repo id or folder
            of a classifier; a dictionary holds the arguments of [`RewardModelSpec`], or, with the key `ensemble`, a list
            of rewards and the arguments of [`RewardEnsemble`], whose models are opened.

    Raises:
        `ValueError`: there is no such function, or no such argument.
        `OSError`: there is no such file.
    """
    if isinstance(given, dict):
        return _parse_ensemble(given) if "ensemble" in given else _parse_model(given)
    if not isinstance(given, str):
        raise ValueError(f"A reward is a repo id, a folder, a function or a dictionary, got {given!r}.")
    source, separator, name = given.rpartition(":")
    if given.endswith(".py"):
        raise UsageError(_functions_of(given, f"The reward {given!r} needs a function: {given}:NAME."))
    if os.path.isfile(given):
        raise UsageError(f"The reward {given!r} is a file, and neither Python code nor the folder of a classifier.")
    if not separator or os.path.isdir(given):
        return given
    return _import_function(given, source, name)


def _parse_model(given: dict[str, Any]) -> RewardModelSpec:
    _check_keys("A reward", given, [field.name for field in dataclasses.fields(RewardModelSpec)])
    if "model" not in given:
        raise ValueError(
            f"The reward {given} needs a `model`, the repo id or folder of a classifier, or an `ensemble` of rewards."
        )
    return RewardModelSpec(**given)


def _parse_ensemble(given: dict[str, Any]) -> RewardEnsemble:
    _check_keys("An ensemble of rewards", given, ENSEMBLE_KEYS)
    members = given["ensemble"]
    if not isinstance(members, list):
        raise ValueError(f"The `ensemble` of the reward {given} must be a list of rewards.")
    kwargs = {name: value for name, value in given.items() if name != "ensemble"}
    return RewardEnsemble([parse_reward(member) for member in members], **kwargs)


def _check_keys(what: str, given: dict[str, Any], known: Sequence[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{what} is described by the keys {list(known)}, got the unknown keys {unknown}.")


def _import_function(given: str, source: str, name: str) -> Callable:
    if os.path.isdir(source):
        raise UsageError(
            f"The reward {given!r}: {source!r} is a folder. Name a file or a module, and a function in it."
        )
    try:
        module = _import_file(source) if source.endswith(".py") else _import_module(source)
    except (OSError, UsageError):
        raise
    except (Exception, SystemExit) as err:  # whatever the code of a user raises
        raise ValueError(f"The reward {given!r} cannot be imported: {type(err).__name__}: {err}") from err
    function = module
    for part in name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise UsageError(_functions_of(source, f"The reward {given!r}: {source!r} has no function {name!r}."))
    return function


def _functions_of(source: str, message: str) -> str:
    """A message, with the functions that a file has, read without running it."""
    if not source.endswith(".py"):
        return message
    if not os.path.isfile(source):
        raise OSError(f"There is no file {source!r} to take a reward function from.")
    try:
        body = ast.parse(Path(source).read_bytes()).body
    except (SyntaxError, ValueError):
        return message
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return f"{message} It has {', '.join(dict.fromkeys(names)) or 'none'}."


def _check_once(path: str) -> None:
    """Refuses a file that defines a function twice: Python would take the last one without a word."""
    names = [node.name for node in ast.parse(Path(path).read_bytes(), path).body if isinstance(node, ast.FunctionDef)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"The file {path!r} defines {', '.join(twice)} more than once: rename the others.")


@functools.cache
def _import_file(path: str):
    if not os.path.isfile(path):
        raise OSError(f"There is no file {path!r} to take a reward function from.")
    _check_once(path)
    folder, filename = os.path.split(os.path.abspath(path))
    if folder not in sys.path:
        sys.path.append(folder)  # it may import modules beside it
    # a name that is unique among modules
    name = f"{filename.removesuffix('.py')}_{zlib.crc32(folder.encode()):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str):
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)
