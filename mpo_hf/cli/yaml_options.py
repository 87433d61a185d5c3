"""Options in a YAML file: what is written there, as the types of the options."""

import enum
import re
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import yaml


TRUE, FALSE = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")
IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}


class _Loader(yaml.SafeLoader):
    """Numbers as in YAML 1.2, so that `1e-1` is one; dates stay texts; a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if twice := {name for name in names if names.count(name) > 1}:
                raise yaml.YAMLError(f"{', '.join(sorted(twice))} stands there twice")
        return super().construct_mapping(node, deep)


_OTHER_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in _OTHER_TAGS]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def read_yaml(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The options in a file, and the same with every value as the text that stands there.

    Args:
        path (`str`): the file.

    Raises:
        `ValueError`: for a file that is not a mapping in YAML.
        `OSError`: for a file that cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        try:
            text = file.read()
            values = yaml.load(text, _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as err:
            raise ValueError(f"{path} is not a file in YAML: {err}") from err
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold options, as in `max_steps: 50`, one a line.")
    return values, yaml.load(text, yaml.BaseLoader)


def convert(value: Any, text: Any, hint: Any, takes_mappings: bool = False) -> Any:
    """
    A value of a YAML file as the type of an option.

    Args:
        value: the value.
        text: the same, as the text that stands in the file: `on`, where the value is `True`.
        hint: the type of the option.
        takes_mappings (`bool`, *optional*, defaults to `False`): whether it may be a mapping, whatever its type.

    Raises:
        `ValueError`: for a value of another type, with what it should be.
    """
    kinds = _alternatives(hint)
    lists = [kind for kind in kinds if (get_origin(kind) or kind) is list]
    scalars: dict[type, Callable[[Any, str], Any]] = {bool: _bool, int: _int, float: _float, str: _text}
    if value is None and type(None) in kinds or Any in kinds:
        return value
    if isinstance(value, Mapping) and (takes_mappings or any((get_origin(kind) or kind) is dict for kind in kinds)):
        return value
    if lists and (isinstance(value, list) or not any(kind in scalars for kind in kinds)):
        inner = (get_args(lists[0]) or (Any,))[0]
        values, texts = (value, text) if isinstance(value, list) else ([value], [text])
        return [convert(*pair, inner, takes_mappings) for pair in zip(values, texts)]
    if value is not None and not isinstance(value, list | Mapping):
        text = str(text)
        for kind, make in scalars.items():
            if kind in kinds or (kind is str and any(_is_choice(found) or found is dict for found in kinds)):
                try:
                    return make(value, text)
                except ValueError:
                    continue
    wanted = " or ".join(dict.fromkeys(_in_words(kind) for kind in kinds if kind is not type(None)))
    raise ValueError(f"must be {wanted}, got {text!r}" if value is not None else f"needs {wanted}, and has no value")


def _alternatives(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def _is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, enum.Enum))


def _in_words(kind: Any) -> str:
    if (get_origin(kind) or kind) is list:
        return "a list"
    return IN_WORDS.get(get_origin(kind) or kind, "a text")


def _bool(value: Any, text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise ValueError
    return text.lower() in TRUE


def _int(value: Any, text: str) -> int:
    if text.lstrip("+-").isdigit():
        return int(text)
    if not float(text).is_integer():
        raise ValueError
    return int(float(text))


def _float(value: Any, text: str) -> float:
    return float(value) if isinstance(value, float) else float(text)


def _text(value: Any, text: str) -> str:
    return text
