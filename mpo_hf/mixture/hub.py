"""Pushing a mixture to the Hub: a config that others can open, and one commit with all of its files."""

import copy
import inspect
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedModel

from .configuration_mixture import MixtureComponent, MixturePolicyConfig
from .hub_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, COMMIT_HASH, resolve_commit
from .model_card import add_tags, create_model_card, pictures_of, update_model_card


# Commits by repo id and requested revision.
Commits = dict[tuple[str, str | None], str]

# One thread saves at a time: whether Transformers saves code, and shows progress, is a state of classes and modules.
_SAVING = threading.RLock()


def loaded_commits(model: PreTrainedModel) -> Commits:
    """The commits that the components of a mixture were loaded from."""
    commits: Commits = {}
    for component, handle in zip(model.config.components, model.policies):
        backbone = model.backbones[handle.backbone]
        base = getattr(backbone.config, "_commit_hash", None)
        adapter = handle.adapter and getattr(backbone.peft_config[handle.adapter], "_commit_hash", None)
        if component.name_or_path is not None and base:
            commits[component.name_or_path, component.revision] = base
        if component.adapter is not None and adapter:
            commits[component.adapter, component.adapter_revision] = adapter
    return commits


def pin_revisions(
    config: MixturePolicyConfig, token: bool | str | None = None, known: Mapping | None = None
) -> MixturePolicyConfig:
    """
    A copy of a config in which every component on the Hub, and the reference, is pinned to a commit.

    Args:
        config ([`MixturePolicyConfig`]): the config. It stays as it is.
        token (`bool` or `str`, *optional*): token for private components.
        known (`Mapping[tuple[str, str | None], str]`, *optional*):
            Known commits by repo id and revision. Others are looked up on the Hub.

    Returns:
        [`MixturePolicyConfig`]

    Raises:
        `OSError`: for a component whose repository or revision the Hub does not find.
    """
    commits = dict(known or {})
    pinned = copy.deepcopy(config)
    pinned.components = [_pin(component, commits, token) for component in pinned.components]
    if pinned.reference is not None:
        pinned.reference = _pin(pinned.reference, commits, token)
    return pinned


def _pin(component: MixtureComponent, commits: Commits, token: bool | str | None) -> MixtureComponent:
    for name, prefix in (("name_or_path", ""), ("adapter", "adapter_")):
        path, revision = getattr(component, name), getattr(component, f"{prefix}revision")
        # files in the mixture's own repository have the revision of the mixture
        if path is None or path.startswith("./") or _is_local(path) or COMMIT_HASH.fullmatch(revision or ""):
            continue
        if (path, revision) not in commits:
            commits[path, revision] = resolve_commit(path, revision, token)
        component = replace(component, **{f"{prefix}revision": commits[path, revision]})
    return component


def _is_local(path: str | None) -> bool:
    return path is not None and not path.startswith("./") and (os.path.isabs(path) or os.path.isdir(path))


def check_pushable(config: MixturePolicyConfig, upload_adapters: bool = False) -> None:
    """
    Refuses to share a mixture that refers to folders of this machine.

    Args:
        config ([`MixturePolicyConfig`]): the config.
        upload_adapters (`bool`, *optional*, defaults to `False`):
            Whether adapters in folders are uploaded with the mixture.

    Raises:
        `ValueError`: with every component that is in a folder, and what can be done about it.
    """
    bases, adapters = [], []
    for name, component in _parts(config).items():
        if _is_local(component.name_or_path):
            bases.append(f"{name!r} ({component.name_or_path!r})")
        elif _is_local(component.adapter):
            adapters.append(f"{name!r} ({component.adapter!r})")
    if not bases and (upload_adapters or not adapters):
        return
    message = "A mixture on the Hub cannot refer to folders of this machine."
    if bases:
        message += (
            f" The models of {', '.join(bases)} are in such folders: push them to repositories of their own, and mix them by "
            "repo id."
        )
    if adapters:
        message += (
            f" The adapters of {', '.join(adapters)} are in such folders: pass `upload_adapters=True` to put them into the repository of "
            "the mixture itself, or push them to repositories of their own and mix them by repo id."
        )
    raise ValueError(message)


def _parts(config: MixturePolicyConfig) -> dict[str, MixtureComponent]:
    """Components by their labels, and the reference."""
    parts = dict(zip(config.labels, config.components))
    if config.reference is not None:
        parts["reference" if "reference" not in parts else "reference policy"] = config.reference
    return parts


def carries_code(model: PreTrainedModel) -> bool:
    """Whether a mixture was loaded with its code, or its class is registered (`register_for_auto_class`)."""
    return model.is_remote_code() or "AutoModelForCausalLM" in (getattr(model.config, "auto_map", None) or {})


@contextmanager
def code_alongside(model: PreTrainedModel, wanted: bool | None = None) -> Iterator[None]:
    """
    A context in which Transformers saves the code of a mixture's classes with it, or does not.

    Transformers does so for registered classes (`register_for_auto_class`), such as those of mixtures that were loaded
    with their code.

    Args:
        model ([`MixturePolicyModel`]): the mixture. It and its classes are restored afterwards.
        wanted (`bool`, *optional*):
            Whether to save the code. Defaults to [`carries_code`].
    """
    with _SAVING:
        config = model.config
        if wanted is None:
            wanted = carries_code(model)
        auto_map = config.__dict__.pop("auto_map", None)
        names = {type(model): "AutoModelForCausalLM", type(config): "AutoConfig"}
        before = {cls: cls._auto_class for cls in names}
        for cls, name in names.items():
            cls._auto_class = (cls._auto_class or name) if wanted else None
        if wanted and auto_map:
            config.auto_map = dict(auto_map)
        try:
            yield
        finally:
            for cls, name in before.items():
                cls._auto_class = name
            config.__dict__.pop("auto_map", None)
            if auto_map is not None:
                config.auto_map = auto_map


@contextmanager
def shared_config(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    token: bool | str | None = None,
    pin: bool = True,
    upload_adapters: bool = False,
) -> Iterator[None]:
    """
    A context in which the config of a mixture is one that others can open, to be saved into `folder` and pushed.

    Args:
        model ([`MixturePolicyModel`]): the mixture. Its config is restored afterwards.
        folder (`str` or `os.PathLike`): the folder that will be pushed. Adapters are copied there.
        token (`bool` or `str`, *optional*): token for private components.
        pin (`bool`, *optional*, defaults to `True`): whether to pin components to commits.
        upload_adapters (`bool`, *optional*, defaults to `False`):
            Whether to copy adapters that are stored in folders into `adapters/` of `folder`.
    """
    config = model.config
    check_pushable(config, upload_adapters)
    shared = copy.deepcopy(config)
    if pin:
        token = token if token is not None else model._load_kwargs.get("token")
        shared = pin_revisions(config, token, loaded_commits(model))
    if upload_adapters:
        parts = _copy_adapters(_parts(shared), folder)
        shared.components, shared.reference = parts[: len(config.components)], (parts + [None])[len(config.components)]
    before = config.components, config.reference
    config.components, config.reference = shared.components, shared.reference
    try:
        yield
    finally:
        config.components, config.reference = before


def _copy_adapters(parts: dict[str, MixtureComponent], folder: str | os.PathLike) -> list[MixtureComponent]:
    copied, names = [], set()
    for label, component in parts.items():
        if _is_local(component.adapter):
            name = re.sub(r"[^\w-]+", "-", label)
            while name in names:
                name += "-"
            names.add(name)
            _copy_adapter(component, os.path.join(folder, "adapters", name))
            component = replace(component, adapter=f"./adapters/{name}", adapter_revision=None, adapter_subfolder=None)
        copied.append(component)
    return copied


def _copy_adapter(component: MixtureComponent, target: str) -> None:
    source = os.path.join(component.adapter, component.adapter_subfolder or "")
    if not os.path.isfile(os.path.join(source, ADAPTER_WEIGHTS)):
        raise OSError(
            f"The adapter in {source!r} has no {ADAPTER_WEIGHTS}, and adapters are uploaded as safetensors only."
        )
    with open(os.path.join(source, ADAPTER_CONFIG), encoding="utf-8") as file:
        adapter_config = json.load(file)
    if os.path.realpath(source) != os.path.realpath(target):
        os.makedirs(target, exist_ok=True)
        shutil.copyfile(os.path.join(source, ADAPTER_WEIGHTS), os.path.join(target, ADAPTER_WEIGHTS))
    # it may have been trained over a copy in a local folder
    adapter_config["base_model_name_or_path"] = component.name_or_path
    with open(os.path.join(target, ADAPTER_CONFIG), "w", encoding="utf-8") as file:
        json.dump(adapter_config, file, indent=2, sort_keys=True)


class MixtureSharingMixin:
    """The part of [`MixturePolicyModel`] that pushes to the Hub."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | str | None = None,
        pin_revisions: bool = True,
        upload_adapters: bool = False,
        with_code: bool | None = None,
    ) -> CommitInfo:
        """
        Uploads the mixture to the Hub, in one commit: its config with every component pinned to the commit that it was
        loaded from, its generation config, and a model card where the repo has none. A mixture whose components were all
        given in memory is uploaded whole.

        Args:
            repo_id (`str`):
                The repo to push to; it is created where needed.
            commit_message (`str`, *optional*, defaults to `"Upload mixture"`):
                Message of the commit.
            commit_description (`str`, *optional*):
                Description of the commit.
            private (`bool`, *optional*):
                Whether to make the repo private when it is created.
            token (`bool` or `str`, *optional*):
                Token to write to the repo with. Defaults to the one stored by `hf auth login`.
            revision (`str`, *optional*):
                Branch to push to; it is created where needed.
            create_pr (`bool`, *optional*, defaults to `False`):
                Whether to open a pull request instead of committing.
            max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`):
                Largest file of weights, where there are any.
            tags (`list[str]`, *optional*):
                Further tags for the model card.
            pin_revisions (`bool`, *optional*, defaults to `True`):
                Whether to pin components to commits. Unpinned ones are loaded at the latest commit of their repos.
            upload_adapters (`bool`, *optional*, defaults to `False`):
                Whether to upload adapters that are stored in folders, into `adapters/` of the repo. Their bases must
                be on the Hub.
            with_code (`bool`, *optional*):
                Whether to upload the code of this class too; see [`~MixturePolicyModel.save_pretrained`].

        Returns:
            [`~huggingface_hub.CommitInfo`]

        Raises:
            `ValueError`: for components that are stored in folders of this machine.
            `OSError`: for components that are to be pinned and not found on the Hub.
        """
        # everything is written and checked before the repository is created
        api = HfApi()
        with (
            tempfile.TemporaryDirectory() as folder,
            shared_config(self, folder, token, pin_revisions, upload_adapters),
            code_alongside(self, with_code),
        ):
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            card = _copy_card(self.name_or_path, folder)
            repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            card = _model_card(self, card, repo_id, token)
            add_tags(card, [*(self.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])])
            card.save(os.path.join(folder, "README.md"))
            if revision is not None and not revision.startswith("refs/pr") and not create_pr:
                api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
            # one commit, however large, so that readers never see a part of the upload
            return api.create_commit(
                repo_id,
                operations=_additions(folder),
                commit_message=commit_message or "Upload mixture",
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )


# The arguments of `push_to_hub` and their defaults, without `repo_id`, for code that passes them on.
PUSH_ARGUMENTS = {
    name: parameter.default
    for name, parameter in inspect.signature(MixtureSharingMixin.push_to_hub).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}


def _copy_card(source: str, folder: str) -> ModelCard | None:
    """The card in the folder that a mixture was loaded from, if any. Its pictures are copied into `folder`."""
    path = os.path.join(source, "README.md")
    if not source or not os.path.isfile(path):
        return None
    try:
        card = ModelCard.load(path)
    except Exception as err:  # raised by the YAML parser, or by the validation of the metadata
        raise ValueError(f"The metadata of the model card {path!r} cannot be read: {err}") from err
    for picture in pictures_of(card):
        if os.path.isfile(os.path.join(source, picture)):
            os.makedirs(os.path.dirname(os.path.join(folder, picture)), exist_ok=True)
            shutil.copyfile(os.path.join(source, picture), os.path.join(folder, picture))
    return card


def _model_card(model: PreTrainedModel, card: ModelCard | None, repo_id: str, token: bool | str | None) -> ModelCard:
    """The given card, or the one in the repository, brought up to date; a new one where there is neither."""
    current = create_model_card(model.config, repo_id, with_code=carries_code(model), token=token)
    if card is None:
        try:
            card = ModelCard.load(repo_id, token=token)
        except EntryNotFoundError:
            return current
    update_model_card(card, current)
    return card


def _additions(folder: str) -> list[CommitOperationAdd]:
    paths = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
    return [CommitOperationAdd(os.path.relpath(path, folder).replace(os.sep, "/"), path) for path in sorted(paths)]
