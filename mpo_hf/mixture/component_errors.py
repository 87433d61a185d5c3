"""Errors of other libraries, told with the name of the part of a mixture that they are about."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .config_schema import blame, reason_of
from .hub_files import explain_hub_error


@contextmanager
def errors_named(failure: str, revision: str | None = None) -> Iterator[None]:
    """
    A context in which whatever goes wrong is an error that begins with a sentence of ours.

    Files are read by several libraries, and each has exceptions of its own for broken ones.

    Args:
        failure (`str`): what failed, such as `"The component 'org/a' cannot be loaded."`.
        revision (`str`, *optional*): the revision that was asked for, to explain why it may not be found.

    Raises:
        `OSError`: for files that cannot be found or read.
        `ValueError`: for files with contents that do not fit. A lack of memory or of a package stays as it is.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as err:
        if torch.get_default_device().type == "meta":  # nothing can be loaded there, as Transformers says
            raise
        unreadable = isinstance(err, OSError) or type(err).__name__ == "SafetensorError"
        reason = reason_of(err) if isinstance(err, OSError | ValueError) else f"{type(err).__name__}: {reason_of(err)}"
        raise (OSError if unreadable else ValueError)(f"{failure} {explain_hub_error(err, revision)}{reason}") from err


def build_from_config(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A component with random weights. The error says which field of its config it cannot be built from."""
    try:
        return AutoModelForCausalLM.from_config(config)
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as err:
        field = blame(config.to_diff_dict(), _build_without_weights)
        raise ValueError(f"{name} cannot be built. {field}{reason_of(err)}") from err


def _build_without_weights(fields: dict[str, Any]) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
