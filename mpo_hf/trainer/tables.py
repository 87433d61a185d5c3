"""Checks of the tables that users give: prompts, and completions with their numbers, by column and row."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from ..rewards.values import shorten
from ..rollouts.store import check_columns


# Rows that are checked at a time.
BATCH = 1000
# Rounding may leave the log-probability of a completion that is certain this far above 0.
ROUNDING = 1e-3
# What entries of a column must be, in messages, and what tells those that are.
NUMBERS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "prompt_ids": ("token ids, which are whole numbers of 0 or more", lambda ids: ids >= 0),
    "completion_ids": ("token ids, which are whole numbers of 0 or more", lambda ids: ids >= 0),
    "rewards": ("finite numbers", np.isfinite),
    "policy_logps": ("log-probabilities, which are numbers of at most 0", lambda logps: logps <= ROUNDING),
    "reference_logps": ("log-probabilities, which are numbers of at most 0", lambda logps: logps <= ROUNDING),
    "proposal_logps": (
        "log-probabilities of what was drawn, which are finite numbers of at most 0",
        lambda logps: np.isfinite(logps) & (logps <= ROUNDING),
    ),
    "proposal": ("mixture weights, which are finite numbers", np.isfinite),
    # unknown ones are NaN
    "normalizers": ("numbers", lambda values: np.ones(len(values), bool)),
}
SCALARS = ("proposal_logps", "reference_logps")
IDS = ("prompt_ids", "completion_ids")
# Names that reward functions are called with, whatever the columns of the prompts are.
RESERVED = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")


def check_prompts(name: str, dataset: Dataset | IterableDataset) -> None:
    """
    Checks prompts, before models are loaded. Those of a stream are checked when they are read.

    Args:
        name (`str`): the argument that they are passed as, for messages.
        dataset (`Dataset` or `IterableDataset`): the prompts.

    Raises:
        `ValueError`: for anything but texts or conversations, with the row.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"`{name}` must be a Dataset or an IterableDataset, got a {type(dataset).__name__}. Choose a split of a "
            "DatasetDict, or use `Dataset.from_list` or `Dataset.from_pandas`."
        )
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    columns = columns_of_rows(dataset)
    if "prompt" not in columns:
        raise ValueError(f"`{name}` needs a column 'prompt', it has {columns}.")
    if taken := [column for column in columns if column in RESERVED]:
        raise ValueError(
            f"`{name}` has the column {taken[0]!r}, a name under which reward functions get something else. Rename it, for "
            f"instance to 'my_{taken[0]}'."
        )
    if isinstance(dataset, Dataset):
        _check_texts(f"`{name}`", "prompt", dataset)


def columns_of_rows(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns of the rows of a dataset, which a transform may have changed, and which a stream may not tell."""
    if isinstance(dataset, Dataset):
        return list(dataset[0]) if _is_transformed(dataset) else dataset.column_names
    return dataset.column_names or list(next(iter(dataset)))


def _is_transformed(dataset: Dataset) -> bool:
    return dataset.format["type"] == "custom"


def _check_texts(table: str, column: str, dataset: Dataset) -> None:
    first = None
    for start, texts in texts_of(dataset, column):
        check_text_list(texts, lambda row, start=start: f"Row {start + row} of {table}", column, first)
        first = texts[0] if first is None else first


def texts_of(dataset: Dataset, column: str) -> Iterator[tuple[int, list]]:
    """The entries of a column, some at a time, and the row of the first of them."""
    rows = dataset if _is_transformed(dataset) else dataset.select_columns([column]).with_format(None)
    for start in range(0, len(rows), BATCH):
        yield start, rows[start : start + BATCH][column]


def check_text_list(texts: Sequence[Any], place: Callable[[int], str], column: str, first: Any = None) -> None:
    """
    Checks some texts or conversations.

    Args:
        texts (`Sequence`): the texts.
        place (`Callable[[int], str]`): the name of a row, for messages.
        column (`str`): the name of their column, for messages.
        first (*optional*): a text that all must be of the same kind as. Defaults to the first of them.
    """
    kind = type(first if first is not None else texts[0])
    for row, text in enumerate(texts):
        fault = _fault(text)
        if fault is None and type(text) is not kind:
            fault = (
                "a text, while others are conversations"
                if isinstance(text, str)
                else "a conversation, while others are texts"
            )
        if fault is not None:
            raise ValueError(
                f"{place(row)} has {shorten(text)} in the column {column!r}, which is {fault}. Give a text in every row, or "
                "in every row a list of messages, dictionaries with 'role' and 'content'."
            )


def _fault(text: Any) -> str | None:
    """What is wrong with a text or a conversation."""
    if isinstance(text, str):
        return None
    if not isinstance(text, list):
        return "no text"
    if not text:
        return "a conversation without messages"
    for message in text:
        if not isinstance(message, Mapping):
            return "a list, but not of messages"
        if not isinstance(message.get("role"), str):
            return "a message without a role"
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            return "a message without content"
    return None


# ---- completions and their numbers ----


def check_rollouts(rollouts: Any, num_objectives: int | None, needs_rewards: bool, has_rewards: bool) -> None:
    """
    Checks a table of completions, before models are loaded. The folder of a store is checked when it is opened.

    Args:
        rollouts (`Dataset`, `str` or `os.PathLike`): the table, or the folder.
        num_objectives (`int`, *optional*): how many objectives there are, if that is known.
        needs_rewards (`bool`): whether the fit needs rewards.
        has_rewards (`bool`): whether there are reward functions, whose rewards replace those of the table.

    Raises:
        `ValueError`: for the first entry that cannot be what its column stands for, with the column and the row.
    """
    if isinstance(rollouts, str | os.PathLike):
        return
    if not isinstance(rollouts, Dataset):
        raise ValueError(
            f"`rollouts` must be a Dataset or the folder of a store, got a {type(rollouts).__name__}. Choose a split of a "
            "DatasetDict, or use `Dataset.from_list` or `Dataset.from_pandas`."
        )
    if len(rollouts) == 0:
        raise ValueError("`rollouts` is empty.")
    check_columns(rollouts.column_names)
    missing = needs_rewards and not has_rewards
    if missing and "rewards" not in rollouts.column_names:
        raise ValueError(
            "The rewards of `rollouts` are not all known: there is no column 'rewards'. Pass `reward_funcs`."
        )
    required = ("rewards",) if missing else ()
    check_numbers(batches_of(rollouts), num_objectives, skipped=("rewards",) if has_rewards else (), required=required)
    _check_texts("`rollouts`", "prompt", rollouts)
    if "completion_ids" not in rollouts.column_names:
        _check_texts("`rollouts`", "completion", rollouts)
        _check_answers(rollouts)


def batches_of(dataset: Dataset) -> Iterator[pa.Table]:
    """The columns with numbers of a dataset, some rows at a time."""
    names = [name for name in (*NUMBERS, "prompt_key") if name in dataset.column_names]
    if names:
        yield from dataset.select_columns(names).with_format("arrow").iter(10 * BATCH)


def _check_answers(rollouts: Dataset) -> None:
    for start, texts in texts_of(rollouts, "completion"):
        for row, text in enumerate(texts, start):
            if isinstance(text, str):
                continue
            if len(text) != 1 or text[0]["role"] != "assistant" or not isinstance(text[0]["content"], str):
                raise ValueError(
                    f"Row {row} of `rollouts` has {shorten(text)} in the column 'completion', which must be a text or a "
                    "single message of the assistant with a text. Move earlier messages to the prompt."
                )


def check_numbers(
    batches: Iterable[pa.Table],
    num_objectives: int | None = None,
    vocab_size: int | None = None,
    context: int | None = None,
    skipped: Sequence[str] = (),
    required: Sequence[str] = (),
) -> None:
    """
    Checks the numbers of a table of completions.

    Args:
        batches (`Iterable[pa.Table]`): its columns, some rows at a time.
        num_objectives (`int`, *optional*): how many numbers `rewards` and `policy_logps` must hold, if that is known.
        vocab_size (`int`, *optional*): the size of the vocabulary of the policies.
        context (`int`, *optional*): how many tokens they take.
        skipped (`Sequence[str]`): columns that will not be read.
        required (`Sequence[str]`): columns that must be known in every row.

    Raises:
        `ValueError`: for the first entry that cannot be what its column stands for, with the column and the row.
    """
    start = 0
    for batch in batches:
        for column in batch.column_names:
            if column in NUMBERS and column not in skipped:
                size = num_objectives if column in ("rewards", "policy_logps") else None
                checker = _Column(column, batch[column].combine_chunks(), start)
                checker.check(size, column in required or column in IDS, vocab_size if column in IDS else None)
        _check_keys(batch, start)
        _check_drawn(batch, start)
        if context is not None and set(IDS) <= set(batch.column_names):
            lengths = sum(pc.list_value_length(batch[column]).to_numpy() for column in IDS)
            if (lengths > context).any():
                row = int(np.argmax(lengths > context))
                raise ValueError(
                    f"Row {start + row} of the rollouts has {lengths[row]} tokens in its prompt and completion, which do not "
                    f"fit into the context of {context} tokens. Leave such rows out."
                )
        start += len(batch)


class _Column:
    """A column of some rows of a table, whose entries are numbers or lists of numbers."""

    def __init__(self, name: str, array: pa.Array, start: int):
        self.name, self.array, self.start = name, array, start
        self.must_be, self.is_good = NUMBERS[name]

    def check(self, size: int | None, required: bool, vocab_size: int | None) -> None:
        if required and self.array.null_count:
            row = int(np.argmax(pc.is_null(self.array).to_numpy(zero_copy_only=False)))
            if self.name == "rewards":
                raise ValueError(
                    f"The rewards of `rollouts` are not all known: row {self.start + row} has none. Pass `reward_funcs`."
                )
            self._refuse(row)
        if pa.types.is_null(self.array.type):
            return
        rows, values = self._values()
        if size is not None or self.name in IDS:
            self._check_lengths(size)
        bad = np.ones(len(values), bool)
        if _is_number(values.type, whole=self.name in IDS):
            # what is null inside of a list is NaN, which nothing may be
            numbers = pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
            bad = ~self.is_good(numbers)
            if vocab_size is not None and not bad.any() and (beyond := numbers >= vocab_size).any():
                place = int(np.argmax(beyond))
                self._refuse(
                    rows[place], f"The policies have {vocab_size} tokens, and {int(numbers[place])} is none of them."
                )
        if bad.any():
            self._refuse(rows[int(np.argmax(bad))])

    def _values(self) -> tuple[np.ndarray, pa.Array]:
        """The numbers of all rows, and the row of each."""
        rows = np.arange(len(self.array))
        if self.name in SCALARS:
            known = self.array.is_valid()
            return rows[known.to_numpy(zero_copy_only=False)], self.array.filter(known)
        if not _is_list(self.array.type):
            self._refuse(int(np.argmax(self.array.is_valid().to_numpy(zero_copy_only=False))))
        lengths = pc.fill_null(pc.list_value_length(self.array), 0).to_numpy(zero_copy_only=False)
        return np.repeat(rows, lengths), self.array.flatten()

    def _check_lengths(self, size: int | None) -> None:
        lengths = pc.fill_null(pc.list_value_length(self.array), size if size is not None else 1)
        lengths = lengths.to_numpy(zero_copy_only=False)
        wrong = lengths != size if size is not None else lengths == 0
        if wrong.any():
            count = f"{size} of them, one an objective" if size is not None else "one or more of them"
            self._refuse(int(np.argmax(wrong)), f"There must be {count}.")

    def _refuse(self, row: int, advice: str = "") -> None:
        value = self.array[int(row)].as_py()
        unknown = "" if self.name in IDS else " Leave it null where it is not known."
        if self.name == "rewards":
            unknown = " Or pass `reward_funcs` to compute all rewards anew."
        raise ValueError(
            f"Row {self.start + int(row)} of the rollouts has {shorten(value)} in the column {self.name!r}, which must hold "
            f"{self.must_be}.{' ' + advice if advice else ''}{unknown} Correct the table, or leave the row out."
        )


def _is_list(of_type: pa.DataType) -> bool:
    return pa.types.is_list(of_type) or pa.types.is_large_list(of_type) or pa.types.is_fixed_size_list(of_type)


def _is_number(of_type: pa.DataType, whole: bool) -> bool:
    return pa.types.is_integer(of_type) or (not whole and pa.types.is_floating(of_type))


def _check_keys(batch: pa.Table, start: int) -> None:
    if "prompt_key" not in batch.column_names:
        return
    keys = batch["prompt_key"]
    if not (pa.types.is_string(keys.type) or pa.types.is_large_string(keys.type) or pa.types.is_null(keys.type)):
        raise ValueError(
            f"Row {start} of the rollouts has {shorten(keys[0].as_py())} in the column 'prompt_key', which must hold texts. "
            "Remove the column to have equal prompts count as one."
        )


def _check_drawn(batch: pa.Table, start: int) -> None:
    """Checks that what a mixture drew comes with its log-probability."""
    if "proposal" not in batch.column_names or not _is_list(batch["proposal"].type):
        return
    drawn = pc.fill_null(pc.greater(pc.list_value_length(batch["proposal"]), 0), False)
    if "proposal_logps" in batch.column_names:
        drawn = pc.and_(drawn, pc.is_null(batch["proposal_logps"]))
    drawn = drawn.to_numpy()
    if drawn.any():
        row = int(np.argmax(drawn))
        raise ValueError(
            f"Row {start + row} of the rollouts has the `proposal` {batch['proposal'][row].as_py()}, weights of a mixture, "
            "but no `proposal_logps`. Add its log-probability under it, or leave out `proposal` if the reference drew it."
        )
