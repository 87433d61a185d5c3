"""One component of a mixture: where its model and its adapter are stored."""

import os
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from .config_schema import is_model_dtype, is_text, shown
from .hub_files import Location, leads_out


# The fields that are paths inside of a folder or repository, or parts of such paths.
_INSIDE = ("revision", "subfolder", "variant", "gguf_file", "adapter_revision", "adapter_subfolder")


@dataclass
class MixtureComponent:
    """
    Where one policy of a mixture is stored.

    Args:
        name_or_path (`str`, *optional*):
            Repo id or folder of a causal language model; with an `adapter`, of the adapter's base. In a saved config, a
            path that starts with `./` or `../`, or that exists in the folder of the config, is relative to that
            folder. `None` for a model that was given in memory.
        revision (`str`, *optional*):
            Branch, tag or commit of `name_or_path`.
        subfolder (`str`, *optional*):
            Folder inside `name_or_path`.
        variant (`str`, *optional*):
            Variant of the weight files, such as `"fp16"`.
        dtype (`str`, *optional*):
            dtype to load this component in, such as `"bfloat16"`.
        gguf_file (`str`, *optional*):
            GGUF file inside `name_or_path` to load the model from.
        adapter (`str`, *optional*):
            Repo id or folder of a PEFT adapter over `name_or_path`.
        adapter_revision (`str`, *optional*):
            Branch, tag or commit of `adapter`; independent of `revision`.
        adapter_subfolder (`str`, *optional*):
            Folder inside `adapter`.
        label (`str`, *optional*):
            Name of the objective that this policy is aligned to.
    """

    name_or_path: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    dtype: str | None = None
    gguf_file: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    adapter_subfolder: str | None = None
    label: str | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            elif isinstance(value, torch.dtype):
                value = str(value).removeprefix("torch.")
            if value is not None and not is_text(value):
                raise ValueError(f"`{field.name}` of a component must be a non-empty string, got {shown(value)}.")
            if value is not None and field.name in _INSIDE and leads_out(value):
                raise ValueError(
                    f"`{field.name}` of a component must lead to something inside of its folder or repo, got {shown(value)}. "
                    "Another folder is named by `name_or_path` or `adapter`."
                )
            setattr(self, field.name, value)
        if self.dtype is not None and self.dtype != "auto" and not is_model_dtype(self.dtype):
            raise ValueError(
                f"`dtype` of a component must name a torch dtype of weights, such as 'bfloat16', got {shown(self.dtype)}."
            )
        if self.adapter is None and (self.adapter_revision or self.adapter_subfolder):
            raise ValueError("`adapter_revision` and `adapter_subfolder` need an `adapter`.")

    @classmethod
    def from_dict(cls, spec: "dict[str, Any] | MixtureComponent") -> "MixtureComponent":
        """Builds a component from a dictionary. Unknown keys are an error."""
        if isinstance(spec, cls):
            return replace(spec)
        if is_dataclass(spec) and type(spec).__name__ == cls.__name__:
            spec = asdict(spec)  # an instance of another copy of this class, which came with the code of a mixture
        known = [field.name for field in fields(cls)]
        if not isinstance(spec, dict) or (unknown := sorted(set(map(str, spec)) - set(known))):
            what = f"the unknown keys {shown(unknown)}" if isinstance(spec, dict) else shown(spec)
            raise ValueError(f"A component is described by a dictionary with the keys {known}, got {what}.")
        return cls(**spec)

    def to_dict(self) -> dict[str, str]:
        """The component as a dictionary, without the fields that are not set."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def checkpoint(self) -> tuple[str | None, ...]:
        """
        The fields that determine which weights are loaded, adapters aside: components that agree in them share a
        model.
        """
        return (self.name_or_path, self.revision, self.subfolder, self.variant, self.dtype, self.gguf_file)

    @property
    def location(self) -> Location | None:
        """Where the model is stored, or the base of an adapter; `None` for a model that was given in memory."""
        if self.name_or_path is None:
            return None
        return Location(self.name_or_path, self.revision, self.subfolder, self.gguf_file)

    @property
    def adapter_location(self) -> Location | None:
        """Where the adapter is stored; `None` without one."""
        if self.adapter is None:
            return None
        return Location(self.adapter, self.adapter_revision, self.adapter_subfolder)

    @property
    def source(self) -> str:
        """The adapter or model of the component, for messages."""
        return self.adapter or self.name_or_path or "a model in memory"
