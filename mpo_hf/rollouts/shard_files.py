"""Files of a store: their names and digests, reading with errors that name the file, writing wholly or not at all."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet


SHARD = re.compile(r"(?P<kind>rollouts|densities)-(?P<step>\d{8})-(?P<part>\d{4,})\.parquet")


def in_order(names: Iterable[str], kind: str, last_step: int | None) -> list[str]:
    """Names of shards of a kind, up to a step, in the order of steps and processes."""
    found = [m for name in names if (m := SHARD.fullmatch(name)) and m["kind"] == kind]
    places = sorted((int(m["step"]), int(m["part"]), m.string) for m in found)
    return [name for step, _, name in places if last_step is None or step <= last_step]


def digest_of(path: Path) -> str:
    """A digest of the content of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


@contextmanager
def open_shard(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """A shard, to read from. An error in between names it."""
    try:
        with pyarrow.parquet.ParquetFile(path) as shard:
            yield shard
    except FileNotFoundError as error:
        raise OSError(f"The shard {str(path)!r} is missing.") from error
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"The shard {str(path)!r} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """
    The content of a JSON file that holds an object.

    Raises:
        `OSError`: when the file is damaged, with its name.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"The file {str(path)!r} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise OSError(f"The file {str(path)!r} is damaged: it holds no object.")
    return content


def write_whole(path: Path, write: Any) -> None:
    """Writes a file under another name and moves it into place, so that no one finds a part of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
