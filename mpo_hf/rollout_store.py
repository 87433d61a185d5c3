"""Every sampled completion with everything that is known of it, in parquet shards that are written whole or not at all."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, concatenate_datasets


INFO = "rollouts.json"
SHARD = re.compile(r"(?P<kind>rollouts|densities)-(?P<step>\d{8})-(?P<part>\d{4,})\.parquet")
# what the columns of a dataset may not be called, because rollouts have columns of these names
COLUMNS = (
    "completion",
    "completion_ids",
    "id",
    "prompt_ids",
    "prompt_key",
    "proposal",
    "proposal_logps",
    "policy_logps",
    "reference_logps",
    "rewards",
    "step",
)


class RolloutStore:
    r"""
    A folder of completions. Each batch writes one shard, `rollouts-{step}-{part}.parquet`, a row a completion:

    - `prompt`, `completion` and the dataset's other columns, as rewards saw them; `prompt_ids` and `completion_ids`.
    - `step`, `id` (unique within the store), `prompt_key` (equal for completions of one prompt).
    - `proposal`: the mixture weights that it was drawn with, or an empty list for the reference policy;
      `proposal_logps`: \\(\log q(y)\\) under that proposal.
    - `policy_logps` (K numbers), `reference_logps`, `rewards` (one an objective), each `null` when not known.

    When a prompt is visited again with another proposal, `densities-{step}-{part}.parquet` adds the log-probabilities of
    its earlier completions under it: columns `id`, `proposal`, `logps`.

    The folder is a dataset: `load_dataset("parquet", data_files="_rollouts/rollouts-*.parquet")` opens it.

    Args:
        folder (`str` or `os.PathLike`): where the shards are; it is created with the first one.
        info (`dict`):
            What the completions belong to: the policies, the reference, the rewards. Kept in `rollouts.json`.

    Raises:
        `ValueError`: when the folder holds completions that belong to something else.
    """

    def __init__(self, folder: str | os.PathLike, info: dict[str, Any]):
        self.folder = Path(folder)
        self.info = json.loads(json.dumps(info))
        if (self.folder / INFO).is_file():
            self._check_info(json.loads((self.folder / INFO).read_text()))

    def _check_info(self, found: dict[str, Any]) -> None:
        different = sorted(key for key in self.info.keys() | found.keys() if self.info.get(key) != found.get(key))
        if different:
            key = different[0]
            raise ValueError(
                f"The folder {str(self.folder)!r} holds completions of another run: {key!r} was {found.get(key)!r} there "
                f"and is {self.info.get(key)!r} here. Choose another `output_dir`, or remove that folder."
            )

    def shards(self, kind: str = "rollouts") -> list[Path]:
        """The shards of a kind, in the order of steps and processes."""
        if not self.folder.is_dir():
            return []
        names = sorted(name for name in os.listdir(self.folder) if (m := SHARD.fullmatch(name)) and m["kind"] == kind)
        return [self.folder / name for name in names]

    def path(self, kind: str, step: int, part: int) -> Path:
        """Where a shard is."""
        return self.folder / f"{kind}-{step:08d}-{part:04d}.parquet"

    def write(self, kind: str, step: int, part: int, columns: dict[str, Sequence]) -> None:
        """
        Writes one shard.

        Args:
            kind (`str`): `"rollouts"` or `"densities"`.
            step (`int`): the step that it belongs to.
            part (`int`): the process, or the batch of a process, that writes it.
            columns (`dict[str, Sequence]`): its columns.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if part == 0 and not (self.folder / INFO).is_file():
            write_whole(self.folder / INFO, lambda path: path.write_text(json.dumps(self.info, indent=2) + "\n"))
        table = Dataset.from_dict(dict(columns)).data.table
        write_whole(self.path(kind, step, part), lambda path: pyarrow.parquet.write_table(table, path))

    def discard_after(self, step: int) -> None:
        """Removes what was written after a step: a run that goes on from there will draw it again."""
        for path in [*self.shards("densities"), *self.shards()]:
            if int(SHARD.fullmatch(path.name)["step"]) > step:
                path.unlink()

    def read(
        self, columns: Sequence[str], kind: str = "rollouts", paths: Sequence[Path] | None = None
    ) -> dict[str, list]:
        """
        Columns of all shards, or of those at `paths`.

        Args:
            columns (`Sequence[str]`): which columns.
            kind (`str`, *optional*, defaults to `"rollouts"`): which shards.
            paths (`Sequence[Path]`, *optional*): which of them.
        """
        found: dict[str, list] = {name: [] for name in columns}
        for path in self.shards(kind) if paths is None else paths:
            shard = pyarrow.parquet.read_table(path, columns=list(columns))
            for name in columns:
                found[name].extend(shard.column(name).to_pylist())
        return found


def write_whole(path: Path, write: Any) -> None:
    """Writes a file under another name and then moves it into place, so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def given_rollouts(
    rollouts: str | os.PathLike | Dataset, objectives: Sequence[str]
) -> tuple[Dataset, dict[str, list] | None]:
    """
    Completions that are known already, as a dataset whose columns fit the objectives at hand, and the densities of a
    store.

    Args:
        rollouts (`str`, `os.PathLike` or `Dataset`):
            The folder of a [`RolloutStore`], or a table with the columns `prompt` and `completion` or `completion_ids`;
            other columns of the store are used where they are there.
        objectives (`Sequence[str]`):
            The objectives of the fit, whose numbers are picked from those of the store.

    Raises:
        `ValueError`: for a folder that is no store, and for a table that lacks what cannot be computed.
    """
    densities = None
    if not isinstance(rollouts, Dataset):
        folder = Path(rollouts)
        if not (folder / INFO).is_file():
            raise ValueError(f"The folder {str(folder)!r} holds no rollouts: there is no {INFO} in it.")
        info = json.loads((folder / INFO).read_text())
        store = RolloutStore(folder, info)
        if not store.shards():
            raise ValueError(f"The folder {str(folder)!r} holds no completions yet.")
        tables = [Dataset(pyarrow.parquet.read_table(path)) for path in store.shards()]
        densities = store.read(("id", "proposal", "logps"), "densities")
        rollouts = concatenate_datasets(tables).map(_pick(info["objectives"], objectives), keep_in_memory=True)
    elif "id" in rollouts.column_names:
        rollouts = rollouts.remove_columns("id")
    missing = [name for name in ("prompt", "completion") if name not in rollouts.column_names]
    if missing and not (missing == ["completion"] and "completion_ids" in rollouts.column_names):
        raise ValueError(f"Rollouts need the columns 'prompt' and 'completion', these have {rollouts.column_names}.")
    if densities is None:
        rollouts = rollouts.add_column("id", list(range(len(rollouts))))
    return rollouts.remove_columns([n for n in ("step", "prompt_key") if n in rollouts.column_names]), densities


def _pick(found: Sequence[str], wanted: Sequence[str]):
    """Numbers of the wanted objectives, in their order; `None` where one of them is not known."""
    at = [found.index(name) if name in found else None for name in wanted]

    def pick(row: dict[str, Any]) -> dict[str, Any]:
        picked = {}
        for name in ("policy_logps", "rewards"):
            values = row[name]
            picked[name] = None if values is None or None in at else [values[k] for k in at]
        return picked

    return pick
