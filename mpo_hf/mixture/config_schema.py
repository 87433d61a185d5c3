"""What the config of a mixture may hold: every key, its type and its size. What is not listed here reaches no attribute."""

import difflib
import os
import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig


# The format of the configs that this version writes. It is raised when an older version would misread a newer config.
FORMAT = 1
# The deepest language models have about 130 layers. Without a bound, a number in a file decides how long opening takes.
MAX_LAYERS = 1000
MAX_COMPONENTS = 256
MAX_LABELS = 100_000

_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can hold and files cannot
_shorten = reprlib.Repr()
_shorten.maxlevel, _shorten.maxstring, _shorten.maxother, _shorten.maxlong = 4, 200, 200, 60
_shorten.maxlist = _shorten.maxtuple = _shorten.maxdict = 20


def shown(value: Any) -> str:
    """A value as it is shown in messages: large ones are shortened."""
    return _shorten.repr(value)


def is_integer(value: Any, least: int, most: float = float("inf")) -> bool:
    """Whether a value is an integer, and not `True` or `False`, within bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_text(value: Any) -> bool:
    """Whether a value is a string that can be a name of something: not empty, and of characters that exist."""
    return isinstance(value, str) and bool(value) and "\0" not in value and not _SURROGATE.search(value)


def is_model_dtype(value: Any) -> bool:
    """Whether a value is, or names, a dtype that weights can have."""
    dtype = vars(torch).get(value) if isinstance(value, str) else value
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _is_token_id(value: Any) -> bool:
    return is_integer(value, -1)  # some models of the Hub have -1 for none


def _is_mapping_to_text(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# A check, and what it asks for.
Rule = tuple[Callable[[Any], bool], str]

_FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
_TEXT: Rule = (lambda value: isinstance(value, str), "a string")
_DTYPE: Rule = (is_model_dtype, "a torch dtype of weights, such as 'bfloat16'")
_TOKEN: Rule = (_is_token_id, "a token id")
_MAPPING: Rule = (lambda value: isinstance(value, dict), "a mapping")
_BACKEND: Rule = (
    lambda value: isinstance(value, str) or _is_mapping_to_text(value),
    "a string, or a mapping from parts of the model to strings",
)

# What Transformers, and libraries that train its models, write into any config. `None` stands for what is not set.
TRANSFORMERS_FIELDS: dict[str, Rule] = {
    "transformers_version": _TEXT,
    "architectures": (
        lambda value: isinstance(value, list | tuple) and all(isinstance(name, str) for name in value),
        "a list of strings",
    ),
    "auto_map": (lambda value: isinstance(value, dict), "a mapping"),
    "custom_pipelines": _MAPPING,
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "quantization_config": (lambda value: isinstance(value, dict) or hasattr(value, "to_dict"), "a mapping"),
    "attn_implementation": _BACKEND,
    "experts_implementation": _BACKEND,
    "name_or_path": (lambda value: isinstance(value, str | os.PathLike), "a string"),
    "tokenizer_class": _TEXT,
    "bos_token_id": _TOKEN,
    "pad_token_id": _TOKEN,
    "eos_token_id": (
        lambda value: _is_token_id(value) or (isinstance(value, list) and value and all(map(_is_token_id, value))),
        "a token id, or a list of them",
    ),
    "use_cache": _FLAG,
    "tie_word_embeddings": _FLAG,
    "return_dict": _FLAG,
    "output_attentions": _FLAG,
    "output_hidden_states": _FLAG,
    "output_router_logits": _FLAG,
    "router_aux_loss_coef": (_is_number, "a number"),
    "is_causal": _FLAG,
    "is_encoder_decoder": (lambda value: value is False, "false: a mixture is a decoder"),
    "chunk_size_feed_forward": (lambda value: is_integer(value, 0), "an integer >= 0"),
    "num_labels": (lambda value: is_integer(value, 0, MAX_LABELS), f"an integer from 0 to {MAX_LABELS}"),
    "id2label": (
        lambda value: _is_mapping_to_text(value) and all(str(key).isdecimal() for key in value),
        "a mapping from numbers to strings",
    ),
    "label2id": (
        lambda value: isinstance(value, dict) and all(is_integer(index, 0) for index in value.values()),
        "a mapping from strings to numbers",
    ),
    "problem_type": (
        lambda value: value in ("regression", "single_label_classification", "multi_label_classification"),
        "a kind of classification",
    ),
}
# Where Transformers keeps these fields, and what it writes beside them.
_STORED_AS = {"_name_or_path": "name_or_path"}
_NOT_READ = {"_commit_hash"}


@cache
def _generation_fields() -> frozenset[str]:
    """Parameters of generation: Transformers reads them from a generation config only, and skips them in other configs."""
    return frozenset(GenerationConfig().to_dict()) - set(TRANSFORMERS_FIELDS)


def check_format(value: Any) -> None:
    """Refuses a config that a later version of this package wrote."""
    if not is_integer(value, 1):
        raise ValueError(f"`mixture_format` must be a positive integer, got {shown(value)}.")
    if value > FORMAT:
        raise ValueError(
            f"This config has `mixture_format` {value}, and this version of mpo_hf reads up to {FORMAT}. Upgrade it: `pip "
            "install --upgrade mpo_hf`."
        )


def check_fields(given: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """
    Checks the fields of a config which a mixture shares with all models.

    Args:
        given (`Mapping[str, Any]`): the fields by name.
        own (`Collection[str]`): the fields of mixtures alone, for the message about an unknown name.

    Returns:
        `dict`: the fields to hand to [`~transformers.PreTrainedConfig`].

    Raises:
        `ValueError`: for the first field that is not known, or has a value of another type.
    """
    checked: dict[str, Any] = {}
    for key, value in given.items():
        name = _STORED_AS.get(key, key)
        if name in _NOT_READ or name in _generation_fields():
            continue
        if name not in TRANSFORMERS_FIELDS:
            close = difflib.get_close_matches(name, [*own, *TRANSFORMERS_FIELDS], 1)
            raise ValueError(
                f"The config of a mixture has no field {shown(name)}. "
                + (f"Did you mean {close[0]!r}? " if close else "")
                + "Remove it, or upgrade mpo_hf if a later version wrote it."
            )
        is_right, wanted = TRANSFORMERS_FIELDS[name]
        if value is not None and not is_right(value):
            raise ValueError(f"`{name}` of a mixture must be {wanted}, got {shown(value)}.")
        if name == key or name not in given:
            checked[name] = value
    # tokens may be known to be missing; for all others, None is what is not set
    return {name: value for name, value in checked.items() if value is not None or name.endswith("_token_id")}


def check_part(config: Any) -> None:
    """
    Checks the config of one component before it is built: no key takes the place of what configs are made of, and no
    number makes it grow without bounds.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"it needs a `model_type`, got {shown(config)}.")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"`model_type` {shown(kind)} is not known to this version of Transformers.")
    machinery = _machinery(CONFIG_MAPPING[kind])
    if reserved := [key for key in config if key in machinery or key.startswith("__")]:
        raise ValueError(f"{shown(reserved)} cannot be set: they are parts of the class of the config, not fields.")
    check_sizes(config)


def check_sizes(config: Mapping[str, Any]) -> None:
    """Refuses numbers of layers and labels that are out of all proportion, also in the configs of parts."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(value)
        limit = MAX_LABELS if key == "num_labels" else MAX_LAYERS if _counts_layers(key) else None
        if limit is not None and isinstance(value, int | float) and abs(value) > limit:
            raise ValueError(f"`{key}` is {shown(value)}, which is more than {limit}.")


def _counts_layers(key: str) -> bool:
    return key.endswith(("layers", "_layer", "num_blocks")) and not key.startswith("per_")


@cache
def _machinery(config_class: type[PreTrainedConfig]) -> frozenset[str]:
    """Methods, constants and hidden storage of a class of configs."""
    stored = {name for name in vars(PreTrainedConfig()) if name.startswith("_")} - set(_STORED_AS)
    fields = set(config_class.__dataclass_fields__)
    names = set()
    for name in set(dir(config_class)) - fields - {"model_type"}:
        value = getattr(config_class, name)
        if callable(value) or (hasattr(PreTrainedConfig, name) and not isinstance(value, property)):
            names.add(name)
    private = {name for name in dir(PreTrainedConfig) if name.startswith("_")}
    return frozenset(names | stored | private | {"_heterogeneity_spec"})
