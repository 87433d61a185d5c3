"""Options that choose a mixture, and loading it with its tokenizer, for several commands."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..mixture.modeling_mixture import MixturePolicyModel
from ..mixture.tokenizer_loading import load_mixture_tokenizer
from .auto_dtype import settle_dtype
from .early_checks import check_device, check_dtype


@dataclass
class ModelArguments:
    """Which mixture to load, and how."""

    model: str = field(metadata={"help": "The mixture: a folder or a repo id.", "metavar": "MIX"})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the mixture's repo."})
    weights: list[float] | None = field(
        default=None, metadata={"help": "Mixture weights, one a component, instead of those of the mixture."}
    )
    allow_off_simplex: bool = field(
        default=False, metadata={"help": "Accept negative weights, and weights whose sum is not 1."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the weights in memory, such as bfloat16. auto: that of the checkpoints, or float32 on a CPU that is "
            "slow in it."
        },
    )
    device: str | None = field(
        default=None,
        metadata={"help": "Device to run on, such as cuda:1. Default: the accelerator if there is one, else the CPU."},
    )
    device_map: str | None = field(
        default=None, metadata={"help": "'auto' spreads a large mixture over all devices (Accelerate)."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code in the repos of the mixture's components and tokenizer."}
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


def load_mixture(args: ModelArguments) -> MixturePolicyModel:
    """
    Loads a mixture, and moves it to the device that it runs on.

    Args:
        args ([`ModelArguments`]): which mixture, and how.
    """
    check_dtype("--dtype", args.dtype)
    check_device(args.device)
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
    if args.dtype == "auto" and (sentence := settle_dtype(model)):
        print(sentence, file=sys.stderr)
    return model.eval()


@contextmanager
def named_in_errors(source: str) -> Iterator[None]:
    """Adds the name of the mixture to errors, as not every error of the Hub's client has it."""
    try:
        yield
    except OSError as err:
        raise OSError(f"The mixture {source!r} cannot be loaded. {err}") from err


def load_tokenizer_of(model: MixturePolicyModel, source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """
    The tokenizer saved with a mixture, or that of the first component that has one.

    Args:
        model ([`MixturePolicyModel`]): the mixture.
        source (`str`): folder or repo id that it was loaded from.
        revision (`str`, *optional*): the revision of that repo.
    """
    return load_mixture_tokenizer(model, source, revision, advice="Save one there, beside the config.")


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
