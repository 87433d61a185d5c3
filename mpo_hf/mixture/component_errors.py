"""Errors of other libraries, told with the name of the part of a mixture that they are about."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
        unreadable = isinstance(err, OSError) or type(err).__name__ == "SafetensorError"
        reason = str(err) if isinstance(err, OSError | ValueError) else f"{type(err).__name__}: {err}"
        raise (OSError if unreadable else ValueError)(f"{failure} {explain_hub_error(err, revision)}{reason}") from err
