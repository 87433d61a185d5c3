"""Rewards as given on the command line and in YAML files."""

import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from ..rewards import RewardModelSpec
from ..rewards.ensembles import RewardEnsemble


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
    try:
        module = _import_file(source) if source.endswith(".py") else _import_module(source)
    except (ImportError, SyntaxError) as err:
        raise ValueError(f"The reward {given!r} cannot be imported: {type(err).__name__}: {err}") from err
    function = module
    for part in name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise ValueError(f"The reward {given!r}: {source!r} has no function {name!r}.")
    return function


@functools.cache
def _import_file(path: str):
    if not os.path.isfile(path):
        raise OSError(f"There is no file {path!r} to take a reward function from.")
    folder, filename = os.path.split(os.path.abspath(path))
    if folder not in sys.path:
        sys.path.append(folder)  # it may import modules beside it
    # a name that is unique among modules
    name = f"{filename.removesuffix('.py')}_{zlib.crc32(folder.encode()):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _import_module(name: str):
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)
