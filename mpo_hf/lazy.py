"""Names of a package that are imported when they are first asked for: fitting needs TRL, which takes seconds, mixing does not."""

import importlib
import sys
from collections.abc import Callable, Mapping


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """
    `__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package (`str`): `__name__` of the package.
        homes (`Mapping[str, str]`): for each name, the module below the package that has it.

    Returns:
        `tuple[Callable, Callable]`: the two functions.
    """

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
