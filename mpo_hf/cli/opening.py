"""Opening a mixture and its tokenizer, as several commands do."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..mixture.modeling_mixture import MixturePolicyModel


@dataclass
class ModelArguments:
    """Which mixture to open, and how."""

    model: str = field(metadata={"help": "The mixture: a folder or a repo id.", "metavar": "MIX"})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the mixture's repo."})
    weights: list[float] | None = field(
        default=None, metadata={"help": "Mixture weights, one a component, instead of those of the mixture."}
    )
    allow_off_simplex: bool = field(
        default=False, metadata={"help": "Accept negative weights, and other sums than 1."}
    )
    dtype: str = field(default="auto", metadata={"help": "Type of the weights in memory, such as bfloat16."})
    device: str | None = field(
        default=None, metadata={"help": "Where to run, such as cuda:1. Default: what is there."}
    )
    device_map: str | None = field(
        default=None, metadata={"help": "'auto' spreads a large mixture over all devices (Accelerate)."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that comes with the components."}
    )


MODEL_SECTION = [
    "model",
    "weights",
    "allow_off_simplex",
    "revision",
    "dtype",
    "device",
    "device_map",
    "trust_remote_code",
]


def open_mixture(args: ModelArguments) -> MixturePolicyModel:
    """
    Opens a mixture and puts it where it runs.

    Args:
        args ([`ModelArguments`]): which one, and how.
    """
    kwargs: dict[str, Any] = {"dtype": args.dtype}
    for name in ("revision", "device_map"):
        if getattr(args, name) is not None:
            kwargs[name] = getattr(args, name)
    if args.trust_remote_code:
        kwargs["component_kwargs"] = {"trust_remote_code": True}
    if args.allow_off_simplex:
        kwargs["allow_off_simplex"] = True
    if args.weights is not None:
        kwargs["mixture_weights"] = args.weights
    with named_in_errors(args.model):
        model = MixturePolicyModel.from_pretrained(args.model, **kwargs)
    if args.device_map is None:
        model.to(args.device or _default_device())
    return model.eval()


@contextmanager
def named_in_errors(source: str) -> Iterator[None]:
    """Says which mixture could not be opened: not every error of the Hub's client does."""
    try:
        yield
    except OSError as err:
        raise OSError(f"The mixture {source!r} cannot be opened. {err}") from err


def open_tokenizer(model: MixturePolicyModel, source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """
    The tokenizer saved with a mixture, or that of the first component that has one.

    Args:
        model ([`MixturePolicyModel`]): the mixture.
        source (`str`): where it was opened from.
        revision (`str`, *optional*): the revision of that repo.
    """
    places = [(source, {"revision": revision})]
    places += [
        (c.name_or_path, {"revision": c.revision, "subfolder": c.subfolder, "gguf_file": c.gguf_file})
        for c in model.config.components
        if c.name_or_path is not None
    ]
    for place, location in places:
        try:
            return AutoTokenizer.from_pretrained(place, **{k: v for k, v in location.items() if v is not None})
        except (OSError, ValueError):
            continue
    raise ValueError(f"Neither {source!r} nor one of its components comes with a tokenizer. Save one in that folder.")


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
