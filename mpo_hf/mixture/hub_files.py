"""Files on the Hub: where a model is stored, which commit it was read at, and the license that its card states."""

import os
import re
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id
from transformers.utils import cached_file


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")

# The arguments of `from_pretrained` that configs, tokenizers and adapters accept too; all others concern weights only.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "trust_remote_code")


@dataclass(frozen=True)
class Location:
    """
    Where a model or an adapter is stored.

    Args:
        name_or_path (`str`): repo id or folder.
        revision (`str`, *optional*): branch, tag or commit of the repo.
        subfolder (`str`, *optional*): folder inside `name_or_path`.
        gguf_file (`str`, *optional*): GGUF file to read instead of a config and safetensors.
    """

    name_or_path: str
    revision: str | None = None
    subfolder: str | None = None
    gguf_file: str | None = None

    @property
    def kwargs(self) -> dict[str, str]:
        """The arguments of `from_pretrained`, without those that are not set."""
        names = ("revision", "subfolder", "gguf_file")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class License:
    """
    The license of a repository, in the fields of the Hub's metadata.

    Args:
        license (`str`): identifier, such as `"apache-2.0"`; `"other"` for licenses that have none.
        license_name (`str`, *optional*): name of a license without an identifier.
        license_link (`str`, *optional*): where to find that license.
    """

    license: str
    license_name: str | None = None
    license_link: str | None = None

    def __str__(self) -> str:
        return self.license_name or self.license


def hub_kwargs(load_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The part of loading arguments that configs, tokenizers and adapters accept too."""
    return {name: load_kwargs[name] for name in HUB_KWARGS if name in load_kwargs}


def file_kwargs(load_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The part of loading arguments that the download of a single file accepts."""
    return {name: value for name, value in hub_kwargs(load_kwargs).items() if name != "trust_remote_code"}


def leads_out(path: str) -> bool:
    """Whether a path inside of a folder or repository is absolute, or leads out of it."""
    parts = re.split(r"[/\\]", path)
    return parts[0] in ("", "~") or ":" in parts[0] or ".." in parts


def is_repo(path: str) -> bool:
    """Whether a path is a repo id, and not a folder."""
    if os.path.isabs(path) or path.startswith(".") or os.path.isdir(path):
        return False
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def explain_hub_error(err: BaseException, revision: str | None = None) -> str:
    """Why a repository may not be readable, and what to do about it; empty for other errors."""
    causes: list[BaseException] = []
    while err is not None and err not in causes:
        causes.append(err)
        err = err.__cause__
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            return "The repository is gated: ask for access on its page, then log in with `hf auth login` or pass `token=...`. "
        if isinstance(cause, RepositoryNotFoundError):
            return (
                "The repository has been deleted or renamed, or it is private and there is no token that may read it: log "
                "in with `hf auth login` or pass `token=...`. "
            )
        if isinstance(cause, RevisionNotFoundError):
            return (
                f"The repository exists, but its revision {revision!r} is gone, as when its history was rewritten: refer to "
                "another one. "
            )
    return ""


def cached_commit(location: Location, filename: str, cache_dir: str | os.PathLike | None = None) -> str | None:
    """The commit at which a file was last read from a location; `None` for files in folders."""
    if os.path.isdir(location.name_or_path):
        return None
    filename = "/".join(part for part in (location.subfolder, filename) if part)
    path = try_to_load_from_cache(location.name_or_path, filename, cache_dir, location.revision)
    # .../snapshots/<commit>/<filename>
    found = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", path) if isinstance(path, str) else None
    return found and found[1]


def resolve_commit(repo_id: str, revision: str | None = None, token: bool | str | None = None) -> str:
    """The commit that a revision of a repository points to now."""
    try:
        return HfApi().model_info(repo_id, revision=revision, token=token).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, ValueError) as err:
        raise OSError(
            f"The component {repo_id!r} cannot be pinned to a commit. {explain_hub_error(err, revision)}To refer to it "
            f"without a commit all the same, pass `pin_revisions=False`. ({err})"
        ) from err


def require_safetensors(adapter: Location, load_kwargs: dict[str, Any]) -> None:
    """Refuses an adapter without safetensors, where PEFT would silently fall back to pickled weights."""
    kwargs = {**adapter.kwargs, **file_kwargs(load_kwargs), "_raise_exceptions_for_missing_entries": False}
    if cached_file(adapter.name_or_path, ADAPTER_WEIGHTS, **kwargs) is None:
        raise OSError(
            f"The adapter {adapter.name_or_path!r} has no {ADAPTER_WEIGHTS}. If you trust a pickled file from there, pass "
            "`use_safetensors=False`."
        )


def read_license(
    location: Location, token: bool | str | None = None, local_files_only: bool = False
) -> License | None:
    """
    The license that a model card states, `None` where it states none.

    Args:
        location ([`Location`]): a repo, or a folder with a `README.md`.
        token (`bool` or `str`, *optional*): token to read the repo with.
        local_files_only (`bool`, *optional*, defaults to `False`): whether to read no more than the cache of the Hub.

    Raises:
        `LocalEntryNotFoundError`: when the Hub cannot be reached and the card is not in the cache; other errors for a
            card that is missing or broken.
    """
    if is_repo(location.name_or_path):
        try:
            path = hf_hub_download(
                location.name_or_path,
                "README.md",
                revision=location.revision,
                token=token,
                local_files_only=local_files_only,
            )
            metadata = metadata_load(path) or {}
        except GatedRepoError:  # its files may not be read, its metadata may
            info = HfApi().model_info(location.name_or_path, revision=location.revision, token=token)
            metadata = info.card_data.to_dict() if info.card_data else {}
    else:
        metadata = metadata_load(os.path.join(location.name_or_path, location.subfolder or "", "README.md")) or {}
    license = metadata.get("license")
    # lists are accepted by the Hub in the cards of datasets only
    if not isinstance(license, str) or license == "unknown":
        return None
    details = (metadata.get(name) for name in ("license_name", "license_link"))
    return License(license, *(detail if isinstance(detail, str) else None for detail in details))
