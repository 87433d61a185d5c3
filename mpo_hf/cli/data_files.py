"""Prompts and completions in files, folders and datasets on the Hub."""

import bz2
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from .parser import UsageError


# By the end of a name: the builder of 🤗 Datasets.
FILE_TYPES = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}
OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED = (*OPENERS, ".zst")

Prompt = str | list[dict[str, Any]]


def file_type(name: str) -> str | None:
    """What a file holds according to its name, compressed or not; `None` for a name of anything else."""
    path = Path(name.lower())
    return FILE_TYPES.get(Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix)


def check_data(option: str, name: str) -> None:
    """
    Refuses files that are not there or that nobody can read, before anything else is opened.

    Args:
        option (`str`): the option that names the data.
        name (`str`): file, folder or repo id.

    Raises:
        `ValueError`: for a file of another kind, or an empty one.
        `OSError`: for a file or folder that is not there.
    """
    if os.path.isdir(name):
        if not os.listdir(name):
            raise ValueError(f"The folder {name!r} of {option} is empty.")
        return
    if not os.path.exists(name):
        if file_type(name):
            raise OSError(f"There is no file {name!r}, which {option} names.")
        if os.path.isabs(name) or name.startswith(("./", "../", "~")):
            raise OSError(f"There is no file or folder {name!r}, which {option} names.")
        return  # on the Hub
    if file_type(name) is None:
        kinds = ", ".join(FILE_TYPES)
        raise ValueError(
            f"{option} {name}: prompts are read from files that end in {kinds}, or {' '.join(COMPRESSED)} behind it."
        )
    if os.path.getsize(name) == 0:
        raise ValueError(f"The file {name!r} of {option} is empty.")
    if Path(name).suffix not in COMPRESSED and file_type(name) in ("json", "csv", "text"):
        try:
            with open(name, encoding="utf-8") as file:
                for _ in file:
                    pass
        except UnicodeDecodeError as err:  # otherwise found when a row is used
            raise ValueError(f"The file {name!r} of {option} is not text in UTF-8: {err}") from err


def load_table(
    name: str, config: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """
    The rows of a file, a folder or a dataset on the Hub.

    Args:
        name (`str`): file, folder or repo id.
        config (`str`, *optional*): configuration of a dataset that has several.
        split (`str`, *optional*, defaults to `"train"`): the split of a dataset that has some.
        streaming (`bool`, *optional*, defaults to `False`): whether to read rows when they are needed.

    Raises:
        `ValueError`: for a file that is not what its name says.
    """
    kind = None if os.path.isdir(name) else file_type(name)
    try:
        if kind is not None:
            options = {"sep": "\t"} if ".tsv" in name.lower() else {}
            table = load_dataset(kind, data_files=name, split="train", streaming=streaming, **options)
            return table.rename_column("text", "prompt") if kind == "text" else table
        if os.path.isfile(os.path.join(name, "state.json")):  # by `save_to_disk`
            table = load_from_disk(name)
            return table.to_iterable_dataset() if streaming else table
        return load_dataset(name, config, split=split, streaming=streaming)
    except (DatasetsError, ValueError, StopIteration) as err:
        cause: BaseException = err
        while isinstance(cause, DatasetsError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"{name!r} cannot be read: {str(cause) or 'it has no rows'}") from err


def with_prompts(table: Any, name: str, column: str | None) -> Any:
    """
    A table whose column `prompt` is the one that a user names.

    Args:
        table (`Dataset` or `IterableDataset`): the table.
        name (`str`): where it comes from, for errors.
        column (`str`, *optional*): the column of prompts. Defaults to `prompt`.

    Raises:
        `UsageError`: when there is no such column.
    """
    names = table.column_names or list(next(iter(table), {}))
    if (column or "prompt") not in names:
        way_out = "--prompt_column must be one of these." if column else "Name the one of prompts by --prompt_column."
        raise UsageError(f"{name!r} has no column {column or 'prompt'!r}, it has {names}. {way_out}")
    if column in (None, "prompt"):
        return table
    return table.rename_columns({"prompt": "prompt_0", column: "prompt"} if "prompt" in names else {column: "prompt"})


# ---- prompts to complete ----


def read_prompts_file(path: str, column: str | None) -> list[Prompt]:
    """
    The prompts in a file: its lines, or, if its name says that it is a table, a column of it.

    Args:
        path (`str`): the file.
        column (`str`, *optional*): the column of prompts. Defaults to `prompt`, or else `messages`.

    Raises:
        `ValueError`: for a file that is not what its name says, and for rows without a prompt.
        `OSError`: for a file that cannot be read.
    """
    if os.path.isdir(path):
        raise OSError(f"--prompts_file {path} is a folder.")
    kind = file_type(path)
    if kind in ("parquet", "arrow", "csv"):
        check_data("--prompts_file", path)
        return prompts_of(list(load_table(path)), path, column)
    opener = OPENERS.get(Path(path).suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (UnicodeDecodeError, EOFError, lzma.LZMAError, gzip.BadGzipFile) as err:
        raise ValueError(f"{path!r} is not text in UTF-8: {err}") from err
    if kind == "json":
        return prompts_of(_json_rows(text, path), path, column)
    if column is not None:
        raise UsageError(f"--prompt_column {column}: {path!r} holds one prompt a line, and no columns.")
    return lines_of(text)


def read_prompts_stream(file: io.TextIOBase, column: str | None) -> list[Prompt]:
    """The prompts in lines of text, or of JSON if every line is an object, as for [`read_prompts_file`]."""
    text, name = file.read(), "standard input"
    lines = lines_of(text)
    if column is not None or (lines and all(_is_object(line) for line in lines)):
        return prompts_of(_json_rows(text, name), name, column)
    return lines


def lines_of(text: str) -> list[str]:
    """The lines that are not blank."""
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _json_rows(text: str, name: str) -> list[Any]:
    """Rows of JSON, one a line, or all in one list."""
    try:
        whole = json.loads(text)
        return whole if isinstance(whole, list) else [whole]
    except ValueError:
        pass
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as err:
                raise ValueError(f"Line {number} of {name!r} is not JSON: {err}.") from err
    return rows


def prompts_of(rows: Sequence[Any], name: str, column: str | None) -> list[Prompt]:
    """
    The prompts in rows of a table. Of `messages`, the answer at the end is not part of the prompt.

    Args:
        rows (`Sequence`): the rows.
        name (`str`): where they come from, for errors.
        column (`str`, *optional*): the column of prompts. Defaults to `prompt`, or else `messages`.
    """
    prompts = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, dict):
            raise ValueError(f"Row {number} of {name!r} must be an object with a prompt, got {row!r}.")
        key = column or ("prompt" if "prompt" in row else "messages")
        if key not in row:
            raise UsageError(
                f"Row {number} of {name!r} has no {column or 'prompt'!r}, it has {sorted(row)}. Name the column of prompts by "
                "--prompt_column."
            )
        prompts.append(_checked(row[key], f"{key!r} in row {number} of {name!r}"))
    return prompts


def _checked(prompt: Any, where: str) -> Prompt:
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    is_conversation = (
        isinstance(prompt, list)
        and prompt
        and all(
            isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
            for message in prompt
        )
    )
    if not is_conversation:
        raise ValueError(f"{where} must be a text, or a list of messages with `role` and `content`, got {prompt!r}.")
    while prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    if not prompt:
        raise ValueError(f"{where} holds nothing but answers.")
    return prompt
