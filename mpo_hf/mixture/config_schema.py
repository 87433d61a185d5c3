"""What the config of a mixture may hold: every key, its type and its size. What is not listed here reaches no attribute."""

import copy
import difflib
import math
import os
import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig


# The format of the configs that this version writes. It is raised when an older version would misread a newer config.
FORMAT = 1
MODEL_TYPE = "mpo_mixture"
# Llama 3.1 405B has 126 layers. Without a bound, a number in a file decides how long opening takes.
MAX_LAYERS = 1000
MAX_COMPONENTS = 256
MAX_LABELS = 100_000
_LARGEST = {"num_hidden_layers": MAX_LAYERS, "num_labels": MAX_LABELS}
MAX_TRIED = 100  # fields that may be to blame

_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can hold and files cannot
_shorten = reprlib.Repr()
_shorten.maxlevel, _shorten.maxstring, _shorten.maxother, _shorten.maxlong = 4, 200, 200, 60
_shorten.maxlist = _shorten.maxtuple = _shorten.maxdict = 20


def shown(value: Any) -> str:
    """A value as it is shown in messages: large ones are shortened."""
    return _shorten.repr(value)


def reason_of(err: BaseException) -> str:
    """What an error of another library says, as far as a person would read."""
    text = str(err)
    return text if len(text) <= 2000 else f"{text[:2000]}..."


def is_integer(value: Any, least: int, most: float = math.inf) -> bool:
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
        lambda value: (
            isinstance(value, dict) and all(is_integer(index, 0) or isinstance(index, str) for index in value.values())
        ),
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
    if kind == MODEL_TYPE:
        raise ValueError(f"`model_type` is {MODEL_TYPE!r}. Mix the components of that mixture instead.")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"`model_type` {shown(kind)} is not known to this version of Transformers.")
    if config.get("is_encoder_decoder"):
        raise ValueError("`is_encoder_decoder` is true; only causal language models can be mixed.")
    machinery = _machinery(CONFIG_MAPPING[kind])
    if reserved := [key for key in config if key in machinery or key.startswith("__")]:
        raise ValueError(f"{shown(reserved)} cannot be set: they are parts of the class of the config, not fields.")
    check_sizes(config)


def check_language_model(config: PreTrainedConfig) -> None:
    """Refuses the config of something that is not a decoder of text, or out of all proportion."""
    decoder = config.get_text_config(decoder=True)
    for name, most in (("vocab_size", math.inf), ("num_hidden_layers", MAX_LAYERS)):
        if not is_integer(value := getattr(decoder, name, None), 1, most):
            bound = "" if most == math.inf else f" up to {most}"
            raise ValueError(f"`{name}` must be a positive integer{bound}, got {shown(value)}.")


def check_depth(config: PreTrainedConfig) -> None:
    """Refuses a model with more layers than any model has, before they are built."""
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if config.model_type != MODEL_TYPE and is_integer(layers, MAX_LAYERS + 1):
        raise ValueError(f"`num_hidden_layers` must be at most {MAX_LAYERS}, got {shown(layers)}.")


def check_sizes(config: Mapping[str, Any]) -> None:
    """Refuses the numbers that Transformers turns into lists as long as they say, here and in the configs of parts."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(value)
        elif isinstance(value, int | float) and value > _LARGEST.get(key, value):
            raise ValueError(f"`{key}` must be at most {_LARGEST[key]}, got {shown(value)}.")


def blame(config: Mapping[str, Any], build: Callable[[dict[str, Any]], Any] | None = None) -> str:
    """
    Says which field of the config of a component keeps it from being built: one without which it can be built, or with 1
    in place of a number. Each architecture checks its fields in its own way, and few say which it is about.

    Args:
        config (`Mapping[str, Any]`): the config, as it is written to files.
        build (`Callable`, *optional*): builds what is to be built from such a config. Defaults to the config itself.

    Returns:
        `str`: a sentence, or nothing where no field alone is to blame.
    """
    for key, value in list(config.items())[:MAX_TRIED]:
        others = {name: other for name, other in config.items() if name != key}
        for tried in (others, {**others, key: 1}) if _is_number(value) else (others,):
            try:
                (build or _build_config)(copy.deepcopy(tried))
            except Exception:
                continue
            return f"`{key}` is {shown(value)}. "
    return ""


def _build_config(config: dict[str, Any]) -> PreTrainedConfig:
    return AutoConfig.for_model(**config)


@cache
def _machinery(config_class: type[PreTrainedConfig]) -> frozenset[str]:
    """What a class of configs consists of beside its fields: methods, constants, and storage behind properties."""
    names = {"_heterogeneity_spec", *vars(PreTrainedConfig())} - {"_name_or_path"}
    private = {name for name in (*names, *dir(PreTrainedConfig)) if name.startswith("_")}
    constants = {name for name in dir(PreTrainedConfig) if not isinstance(getattr(PreTrainedConfig, name), property)}
    methods = {name for name in dir(config_class) if callable(getattr(config_class, name))}
    return frozenset((private | constants | methods) - {field.name for field in fields(config_class)} - {"model_type"})
