"""One owner of an output folder at a time, for as long as its process lives."""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging


if sys.platform != "win32":
    import fcntl


logger = logging.get_logger(__name__)

# Trainer does not push files that begin with an underscore.
LOCK = "_owner.lock"
_held: set[int] = set()

if hasattr(os, "register_at_fork"):
    # a child that outlives a killed owner must not hold its folder
    os.register_at_fork(after_in_child=lambda: [os.close(file) for file in _held])


@contextmanager
def locked(folder: str | os.PathLike, shared: bool = False) -> Iterator[None]:
    """
    A context that no other run may enter for the same folder, in this process or in others. The lock is one of the operating
    system, which ends with the process, however that ends: the file that stays says nothing.

    Args:
        folder (`str` or `os.PathLike`): the folder.
        shared (`bool`, *optional*, defaults to `False`): whether others may enter as well, with `shared=True`: they only read.

    Raises:
        `ValueError`: when another run is in it.
    """
    path = Path(folder) / LOCK
    if sys.platform == "win32" or (shared and not path.is_file()):
        yield
        return
    file = os.open(path, os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(file)
    try:
        _lock(file, folder, shared)
        yield
    finally:
        _held.discard(file)
        os.close(file)


def _lock(file: int, folder: str | os.PathLike, shared: bool) -> None:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            logger.warning(
                f"The file system of {str(folder)!r} has no locks ({error}). See to it that only one run writes there at a time."
            )
            return
        owner = str(os.pread(file, 1000, 0), errors="replace").strip()
        raise ValueError(
            f"Another run is at work in {str(folder)!r}: {owner or 'a process that only reads'}. Wait for its end, or choose "
            "another folder."
        ) from None
    if not shared:
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
