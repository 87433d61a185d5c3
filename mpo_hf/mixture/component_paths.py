"""Where the components of a saved mixture lie: relative to its config, and for a mixture from the Hub nowhere else on this machine."""

import os
import re
from dataclasses import replace

from .config_schema import shown
from .hub_files import is_repo, leads_out
from .mixture_component import MixtureComponent


# A folder of the Hub's cache holds what somebody uploaded, like the repository itself.
_SNAPSHOT = re.compile(r".*[/\\]models--[^/\\]+[/\\]snapshots[/\\][^/\\]+")


def resolve_relative(
    component: MixtureComponent, folder: str, revision: str | None = None, subfolder: str | None = None
) -> MixtureComponent:
    """
    Resolves paths that a saved config holds relative to itself.

    Args:
        component (`MixtureComponent`): the component as written in the config.
        folder (`str`): the folder, or the repo id, that the config was read from.
        revision (`str`, *optional*): the revision of that repo.
        subfolder (`str`, *optional*): the folder inside `folder` that the config was read from.

    Raises:
        `ValueError`: for a component of a mixture from the Hub that is neither in a repository nor in a folder inside of
            the mixture's own.
        `OSError`: for a folder that does not exist, or lies outside of the mixture's repository.
    """
    snapshot = _SNAPSHOT.match(os.path.abspath(folder)) if os.path.isdir(folder) else None
    for name, prefix in (("name_or_path", ""), ("adapter", "adapter_")):
        path = getattr(component, name)
        if path is None:
            continue
        explicit = path.startswith(("./", "../")) or path in (".", "..")
        if not os.path.isdir(folder) or snapshot:
            _check_from_hub(name, path, explicit, folder)
        if os.path.isdir(folder):
            inside = _inside_folder(path, explicit, os.path.join(folder, subfolder or ""))
            if snapshot and inside and not _lies_in(inside, snapshot[0]):
                raise _outside(folder, path)
            changes = {name: inside} if inside else {}
        elif explicit:
            inside = os.path.join(subfolder or "", path, getattr(component, prefix + "subfolder") or "")
            inside = os.path.normpath(inside)
            if leads_out(inside):
                raise _outside(folder, path)
            changes = {
                name: folder,
                prefix + "revision": revision,
                prefix + "subfolder": inside.removeprefix(".") or None,
            }
        else:
            changes = {}
        component = replace(component, **changes)
    return component


def _check_from_hub(name: str, path: str, explicit: bool, folder: str) -> None:
    if not explicit and not is_repo(path):
        raise ValueError(
            f"`{name}` {shown(path)} of a component of {folder!r} is a folder of this machine, or no name of a repository. A "
            "mixture from the Hub opens repositories, and folders inside of its own (`./...`), only. If you mean that folder, "
            "mix the policies yourself by `MixturePolicyModel.from_policies`; if you do not, work in a directory without it."
        )


def _inside_folder(path: str, explicit: bool, folder: str) -> str | None:
    """The folder that a path means which is written relative to a folder; `None` for other paths."""
    inside = os.path.normpath(os.path.join(folder, path))
    if os.path.isabs(path):
        return None
    if os.path.isdir(inside):
        return os.path.abspath(inside)
    if explicit:
        raise OSError(f"The mixture in {folder!r} refers to the folder {path!r} beside it, which does not exist.")
    return None


def _lies_in(path: str, folder: str) -> bool:
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path == folder or path.startswith(os.path.join(folder, ""))


def _outside(folder: str, path: str) -> OSError:
    return OSError(f"The mixture in {folder!r} refers to {path!r}, which lies outside its repository.")
