"""A folder of sampled completions with all their numbers, in parquet shards that are each written completely or not at all."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import Dataset
from transformers.utils import logging

from .identity import contents_differ, first_difference, place, shown
from .shard_files import digest_of, in_order, open_shard, read_json, write_whole


logger = logging.get_logger(__name__)

INFO = "rollouts.json"
# The shards of finished batches, with a digest of each.
INDEX = "shards.json"
# Rows in a row group, which is the least that can be read.
ROW_GROUP = 1024
# An id holds a step, the number of a part of the step, and the number of a row of the part.
STEP_BITS, PART_BITS, MAX_PART = 40, 24, 0xFFFF
# Columns of rollouts: a dataset of prompts cannot have columns of these names.
COLUMNS = (
    "completion",
    "completion_ids",
    "id",
    "normalizers",
    "prompt_ids",
    "prompt_key",
    "proposal",
    "proposal_logps",
    "policy_logps",
    "reference_logps",
    "rewards",
    "step",
)
# Types of columns that may be empty. Every shard has the same types, so that all shards together are one dataset.
_TYPES = {
    "policy_logps": pa.list_(pa.float64()),
    "proposal": pa.list_(pa.float64()),
    "reference_logps": pa.float64(),
    "rewards": pa.list_(pa.float64()),
    "normalizers": pa.list_(pa.float64()),
}


class _Rows(Dataset):
    """Rows with the types that `Dataset` infers, without a fingerprint, which would take longer than everything else."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"fingerprint": "rollouts", **kwargs})


class RolloutStore:
    r"""
    A folder of completions. Each batch writes one shard, `rollouts-{step}-{part}.parquet`, a row a completion:

    - `prompt`, `completion` and the dataset's other columns, as rewards got them; `prompt_ids` and `completion_ids`.
    - `step`, `id` (unique within the store), `prompt_key` (equal for completions of one prompt, and different for the rows of
      a dataset that repeat a prompt, which end in `#1`, `#2`, ...).
    - `proposal`: the mixture weights that it was drawn with, an empty list for the reference policy, or `null` if that is not
      known; `proposal_logps`: \\(\log q(y)\\) under that proposal.
    - `policy_logps` (K numbers), `reference_logps`, `rewards` (one an objective), `normalizers` (see
      [`~mpo_hf.estimation.LogNormalizer`]), each `null` if unknown.

    When a prompt is visited again with another proposal, `densities-{step}-{part}.parquet` adds the log-probabilities of
    its earlier completions under it: columns `id`, `proposal`, `logps`.

    `shards.json` lists the shards of all finished batches with a digest of each. What it lists is read and nothing else, so a
    shard that is missing or damaged, or comes from another run, is named. Stores of earlier versions have no such list.

    The folder is a dataset: `load_dataset("parquet", data_files="_rollouts/rollouts-*.parquet")` loads it.

    Args:
        folder (`str` or `os.PathLike`): the folder of the shards. It is created with the first one.
        info (`dict`):
            The policies, the reference and the rewards that the completions belong to, written to `rollouts.json`.

    Raises:
        `ValueError`: when the folder holds completions of other policies or rewards.
        `OSError`: when `rollouts.json` or `shards.json` is damaged.
    """

    def __init__(self, folder: str | os.PathLike, info: dict[str, Any]):
        self.folder = Path(folder)
        self.info = json.loads(json.dumps(info))
        if (self.folder / INFO).is_file():
            self._check_info(read_json(self.folder / INFO))
        self.index: dict[str, str] | None = self._read_index()

    def _read_index(self) -> dict[str, str] | None:
        return read_json(self.folder / INDEX) if (self.folder / INDEX).is_file() else None

    def _check_info(self, found: dict[str, Any]) -> None:
        difference = first_difference(found, self.info)
        if difference is not None:
            raise ValueError(
                f"The folder {str(self.folder)!r} holds completions of another run: {difference}. Choose another `output_dir`, "
                "or remove that folder."
            )

    def check_policies(self, info: dict[str, Any]) -> None:
        """
        Checks that completions were scored under the policies, the reference and with the tokenizer of a fit. Where the content
        of either is not known, those from other places may or may not be the same, which is warned of.

        Args:
            info (`dict`): the policies, the reference and the tokenizer of the fit.

        Raises:
            `ValueError`: for the first that is another.
        """
        policies = dict(zip(self.info["objectives"], self.info.get("policies", [])))
        parts = {
            f"policy of {name!r}": (policies.get(name), now) for name, now in zip(info["objectives"], info["policies"])
        }
        for name, (before, now) in {
            **parts,
            "reference": (self.info.get("reference"), info["reference"]),
            "tokenizer": (self.info.get("tokenizer"), info["tokenizer"]),
        }.items():
            differ = contents_differ(before, now)
            message = f"The completions in {str(self.folder)!r} were scored under {shown(before)}, and the {name} is {shown(now)} now."
            advice = "give them as a dataset without the columns `policy_logps` and `reference_logps`, to have them scored anew."
            if differ:
                raise ValueError(f"{message} That is another one: {advice.capitalize()}")
            if differ is None and before is not None and now is not None and place(before) != place(now):
                logger.warning(f"{message} If that is another model, {advice}")

    def shards(self, kind: str = "rollouts", last_step: int | None = None) -> list[Path]:
        """
        The shards of a kind that lie in the folder, of all steps or of those up to `last_step`, in the order of steps and
        processes.
        """
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return [self.folder / name for name in in_order(names, kind, last_step)]

    def finished(self, kind: str = "rollouts", last_step: int | None = None) -> list[Path]:
        """The shards of finished batches, as [`~RolloutStore.shards`]; some of them may be missing from the folder."""
        if self.index is None:
            return self.shards(kind, last_step)
        return [self.folder / name for name in in_order(self.index, kind, last_step)]

    def record(self, digests: dict[str, str]) -> None:
        """Adds the shards of a finished batch, of all processes, to the list on disk. For one process to call."""
        self.index = {**(self.index or {}), **digests}
        self._write_index()

    def _write_index(self) -> None:
        text = json.dumps(self.index, indent=0) + "\n"
        write_whole(self.folder / INDEX, lambda path: path.write_text(text))

    def digest(self, last_step: int | None = None) -> str:
        """A digest of all finished shards, or of those up to a step."""
        paths = [*self.finished(last_step=last_step), *self.finished("densities", last_step)]
        listed = [(path.name, (self.index or {}).get(path.name) or digest_of(path)) for path in paths]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def check(self, last_step: int | None = None) -> None:
        """
        Checks that the finished shards, or those up to a step, are there and are those that were written.

        Raises:
            `OSError`: for the first that is not, with its name.
        """
        for path in [*self.finished(last_step=last_step), *self.finished("densities", last_step)]:
            self._check_shard(path)

    def _check_shard(self, path: Path) -> None:
        expected = (self.index or {}).get(path.name)
        if expected is None:
            return
        if not path.is_file():
            raise OSError(f"The shard {path.name!r} is missing from {str(self.folder)!r}, which lists it in {INDEX}.")
        if digest_of(path) != expected:
            raise OSError(
                f"The shard {str(path)!r} is damaged, or comes from another run: its content is not what was written."
            )

    def path(self, kind: str, step: int, part: int) -> Path:
        """The path of a shard."""
        return self.folder / f"{kind}-{step:08d}-{part:04d}.parquet"

    def write(self, kind: str, step: int, part: int, columns: dict[str, Sequence]) -> dict[str, str]:
        """
        Writes one shard. It counts once it is on the list; see [`~RolloutStore.record`].

        Args:
            kind (`str`): `"rollouts"` or `"densities"`.
            step (`int`): the step that it belongs to.
            part (`int`): the number of the process, or of the batch of a process, that writes it.
            columns (`dict[str, Sequence]`): its columns.

        Returns:
            `dict[str, str]`: its name, and a digest of it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if part == 0 and not (self.folder / INFO).is_file():
            write_whole(self.folder / INFO, lambda path: path.write_text(json.dumps(self.info, indent=2) + "\n"))
        typed = {name: pa.array(columns[name], of_type) for name, of_type in _TYPES.items() if name in columns}
        table = _Rows.from_dict({**columns, **typed}).data.table
        path = self.path(kind, step, part)
        write_whole(path, lambda partial: pyarrow.parquet.write_table(table, partial, row_group_size=ROW_GROUP))
        return {path.name: digest_of(path)}

    def discard_after(self, step: int) -> None:
        """
        Removes the shards of later steps, and what a killed process has left of files. A run that resumes from this step draws
        their completions again.
        """
        kept = {*self.finished("densities", step), *self.finished(last_step=step)}
        if kept or self.index is not None:  # the list first: what it lists must be there
            self.index = {path.name: (self.index or {}).get(path.name) or digest_of(path) for path in sorted(kept)}
            self._write_index()
        partial = self.folder.glob(".*.tmp") if self.folder.is_dir() else []
        for path in [*partial, *self.shards("densities"), *self.shards()]:
            if path not in kept:
                path.unlink()

    def read_index(self) -> None:
        """Reads the list again, after another process has changed it."""
        self.index = self._read_index()

    def tables(
        self, columns: Sequence[str], kind: str = "rollouts", last_step: int | None = None
    ) -> Iterator[pyarrow.Table]:
        """
        Columns of one shard after another.

        Args:
            columns (`Sequence[str]`): which columns.
            kind (`str`, *optional*, defaults to `"rollouts"`): which shards.
            last_step (`int`, *optional*): the last step whose shards are read.
        """
        for path in self.finished(kind, last_step):
            self._check_shard(path)
            with open_shard(path) as shard:
                # stores of version 0.1 have no normalizers
                yield shard.read(columns=[n for n in columns if n in shard.schema_arrow.names], use_threads=False)

    def read(self, columns: Sequence[str], kind: str = "rollouts") -> dict[str, list]:
        """
        Columns of all shards, as lists.

        Args:
            columns (`Sequence[str]`): which columns.
            kind (`str`, *optional*, defaults to `"rollouts"`): which shards.
        """
        found: dict[str, list] = {name: [] for name in columns}
        for shard in self.tables(columns, kind):
            for name in columns:
                found[name].extend(shard.column(name).to_pylist())
        return found

    def find(self, ids: Sequence[int], columns: Sequence[str]) -> dict[str, list]:
        """
        Columns of completions that were sampled into this store. Their ids determine which shards and row groups are read.

        Args:
            ids (`Sequence[int]`): ids of completions; see [`~mpo_hf.rollouts.store.first_id`].
            columns (`Sequence[str]`): which columns.
        """
        found: dict[int, dict[str, Any]] = {}
        for first, members in itertools.groupby(sorted(ids), lambda i: i >> PART_BITS << PART_BITS):
            rows = [i - first for i in members]
            path = self.path("rollouts", first >> STEP_BITS, first >> PART_BITS & MAX_PART)
            with open_shard(path) as shard:
                ends = _row_group_ends(shard)
                groups = np.unique(np.searchsorted(ends, rows, side="right")).tolist()
                table = shard.read_row_groups(groups, columns=["id", *columns], use_threads=False)
            found |= {row["id"]: row for row in table.to_pylist()}
        return {name: [found[i][name] for i in ids] for name in columns}


def first_id(step: int, part: int) -> int:
    """The id of the first completion of a shard. The ids of the others follow it."""
    if part > MAX_PART:
        raise ValueError(
            f"A step can have at most {MAX_PART + 1} batches over all processes, and this is number {part + 1}. Lower "
            "`gradient_accumulation_steps`."
        )
    return step << STEP_BITS | part << PART_BITS


def _row_group_ends(shard: pyarrow.parquet.ParquetFile) -> np.ndarray:
    """The row after the last one of every row group."""
    metadata = shard.metadata
    return np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])


class StoredCompletions(torch.utils.data.Dataset):
    """
    The completions of a store as a dataset. Rows are read on access, and only the row group that was read last is kept in
    memory.

    Args:
        store ([`RolloutStore`]): the store.
        objectives (`Sequence[str]`): the objectives whose numbers are selected from those of the store, in this order.
    """

    def __init__(self, store: RolloutStore, objectives: Sequence[str]):
        known = store.info["objectives"]
        self._objectives = [known.index(name) if name in known else None for name in objectives]
        self._groups: list[tuple[Path, int]] = []
        sizes = []
        store.check()
        for path in store.finished():
            with open_shard(path) as shard:
                names = shard.schema_arrow.names
                sizes.append(np.diff(_row_group_ends(shard), prepend=0))
                self._groups += [(path, i) for i in range(len(sizes[-1]))]
        self.column_names = [name for name in names if name != "step"]
        self._ends = np.cumsum(np.concatenate(sizes))
        self._last: tuple[int, Dataset] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = []
        for group, members in itertools.groupby(indices, lambda i: int(np.searchsorted(self._ends, i, side="right"))):
            table, first = self._read(group), self._ends[group - 1] if group else 0
            columns = table[[int(i - first) for i in members]]
            rows += [self._pick(dict(zip(columns, values))) for values in zip(*columns.values())]
        return rows

    def _read(self, group: int) -> Dataset:
        if self._last is None or self._last[0] != group:
            path, index = self._groups[group]
            with open_shard(path) as shard:
                table = shard.read_row_group(index, columns=self.column_names, use_threads=False)
            self._last = (group, _Rows(table))
        return self._last[1]

    def _pick(self, row: dict[str, Any]) -> dict[str, Any]:
        """Selects the numbers of the objectives; `None` if one of them is unknown."""
        for name in ("policy_logps", "rewards"):
            values = row[name]
            unknown = values is None or None in self._objectives
            row[name] = None if unknown else [values[k] for k in self._objectives]
        return row


class GivenRows(Sequence):
    """
    A batch of a dataset of completions. It is not a list because Trainer and Accelerate search lists for tensors, down to every
    number, which would take longer than everything else that is done with the batch.
    """

    def __init__(self, rows: list[dict[str, Any]]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index):
        return self._rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)


def given_rollouts(
    rollouts: str | os.PathLike | Dataset, objectives: Sequence[str]
) -> tuple[StoredCompletions | Dataset, RolloutStore | None]:
    """
    Completions that were sampled before, as a dataset whose numbers are those of the objectives of a fit, and the store that
    they come from.

    Args:
        rollouts (`str`, `os.PathLike` or `Dataset`):
            The folder of a [`RolloutStore`], or a table with the columns `prompt` and `completion` or `completion_ids`. Other
            columns of a store are used if the table has them.
        objectives (`Sequence[str]`):
            The objectives of the fit. Their numbers are selected from those of the store.

    Raises:
        `ValueError`: for a folder that is not a store, and for a table without a column that cannot be computed.
    """
    if isinstance(rollouts, Dataset):
        check_columns(rollouts.column_names)
        own = [name for name in ("id", "step") if name in rollouts.column_names]
        return rollouts.remove_columns(own).add_column("id", np.arange(len(rollouts))), None
    folder = Path(rollouts)
    if not (folder / INFO).is_file():
        raise ValueError(f"The folder {str(folder)!r} holds no rollouts: there is no {INFO} in it.")
    store = RolloutStore(folder, read_json(folder / INFO))
    if not store.finished():
        raise ValueError(f"The folder {str(folder)!r} holds no completions yet.")
    stored = StoredCompletions(store, objectives)
    check_columns(stored.column_names)
    return stored, store


def check_columns(names: Sequence[str]) -> None:
    """Raises a `ValueError` unless columns of these names tell prompts and completions."""
    if "prompt" not in names or not {"completion", "completion_ids"} & set(names):
        raise ValueError(f"Rollouts need the columns 'prompt' and 'completion'; these have {list(names)}.")
