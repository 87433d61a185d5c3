"""What completions and checkpoints belong to, and whether that is what a fit has now."""

from collections.abc import Callable
from typing import Any


PLACE = ("name_or_path", "revision", "subfolder", "gguf_file", "adapter", "adapter_revision", "adapter_subfolder")


def place(component: dict[str, Any]) -> dict[str, Any]:
    """The place that a component was loaded from."""
    return {name: component[name] for name in PLACE if component.get(name) is not None}


def contents_differ(before: Any, now: Any) -> bool | None:
    """Whether two models, rewards or tokenizers have different content; `None` if that of one of them is not known."""
    known = [part.get("content") for part in (before, now) if isinstance(part, dict)]
    if len(known) < 2 or None in known or before.get("python") != now.get("python"):
        return None
    return known[0] != known[1]


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """
    The first of some named parts that is not the same, in a sentence; `None` if all are. Parts with a content are compared by
    it, wherever they lie, and those without by their place or name. Parts that either does not have are not compared.

    Args:
        before (`dict`): the parts that are recorded.
        now (`dict`): those of the fit.
    """
    for name in sorted(before.keys() & now.keys()):
        if not _same(before[name], now[name]):
            return f"{name!r} was {shown(before[name])} there and is {shown(now[name])} here"
    return None


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_same, before, now))
    if not (isinstance(before, dict) and isinstance(now, dict) and {"content", "name_or_path"} & {*before, *now}):
        return before == now
    differ = contents_differ(before, now)
    if differ is not None:
        return not differ
    describe: Callable = place if "name" not in now else lambda part: part.get("name")
    return describe(before) == describe(now)


def shown(part: Any) -> str:
    """A part, as messages show it."""
    if isinstance(part, list):
        return f"[{', '.join(map(shown, part))}]"
    if not isinstance(part, dict) or not {"content", "name_or_path"} & part.keys():
        return repr(part)
    where = part["name"] if "name" in part else place(part) or "a model in memory"
    return f"{where!r}" + (f" (content {part['content'][:8]})" if part.get("content") else "")
