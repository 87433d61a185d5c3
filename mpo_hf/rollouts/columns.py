"""
The numbers of all completions of a fit, in columns.

With three policies, a row takes about a hundred bytes. A step touches the rows that it adds and those of its own prompts.
Passes over all rows run in NumPy, and only once the number of rows has grown by `GROWTH`.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch

from ..estimation.tables import known_densities


# A pass over all rows is repeated once their number has grown by this fraction.
GROWTH = 1 / 64
# How many log-probabilities of completions under proposals `RolloutColumns.log_densities` holds at a time.
_CHUNK = 1_000_000

# Mixture weights; () is the reference policy.
Proposal = tuple[float, ...]


class Column:
    """
    An array that grows at its end, by doubling.

    Args:
        dtype (`type`): the dtype of its entries.
        shape (`tuple[int, ...]`, *optional*, defaults to `()`):
            The shape of an entry. Entries of shape `(0,)` are unknown values, and become NaN beside entries of another shape.
    """

    def __init__(self, dtype: type, shape: tuple[int, ...] = ()):
        self._buffer: np.ndarray = np.empty((0, *shape), dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> np.ndarray:
        """All entries, as a view. Entries never change once they are there."""
        return self._buffer[: self._size]

    def extend(self, values: np.ndarray) -> None:
        """Adds entries."""
        shape = max(values.shape[1:], self._buffer.shape[1:])
        size = self._size + len(values)
        if size > len(self._buffer) or shape != self._buffer.shape[1:]:
            buffer = np.empty((max(size, 2 * self._size), *shape), self._buffer.dtype)
            _fill(buffer[: self._size], self.values)
            self._buffer = buffer
        _fill(self._buffer[self._size : size], values)
        self._size = size


def _fill(buffer: np.ndarray, values: np.ndarray) -> None:
    buffer[...] = np.nan if values.shape[1:] == (0,) else values


class RolloutColumns:
    """
    The numbers of N completions that an estimate is made from: the rows of a [`~mpo_hf.rollouts.store.RolloutStore`] without
    their texts, and its densities. `columns[name]` is a column, with NaN for unknown values:

    - `id`; `prompt` and `proposal`: indices into `prompts` and `proposals`.
    - `proposal_logps`, `reference_logps`; `policy_logps` and `rewards` of shape `(N, K)`, and `normalizers` of shape `(N, E)`,
      or `(N, 0)` if none is known.

    Attributes:
        prompts (`dict[str, int]`): the key of every prompt, and its index, in the order of their first completions.
        proposals (`dict[Proposal | None, int]`):
            The mixture weights of every proposal, and its index; `None` stands for proposals that are not known.
    """

    COLUMNS = (
        "id",
        "prompt_key",
        "proposal",
        "proposal_logps",
        "reference_logps",
        "policy_logps",
        "rewards",
        "normalizers",
    )
    DENSITIES = ("id", "proposal", "logps")

    def __init__(self) -> None:
        self.prompts: dict[str, int] = {}
        self.proposals: dict[Proposal | None, int] = {}
        self._columns = {
            "id": Column(np.int64),
            "prompt": Column(np.int32),
            "proposal": Column(np.int32),
            "proposal_logps": Column(np.float64),
            "reference_logps": Column(np.float64),
            "policy_logps": Column(np.float64, (0,)),
            "rewards": Column(np.float64, (0,)),
            "normalizers": Column(np.float64, (0,)),
        }
        # log-probabilities of completions under proposals that did not draw them; of two for the same pair, the later one counts
        self._densities = {"id": Column(np.int64), "proposal": Column(np.int32), "logps": Column(np.float64)}
        self._ids_ascend = True
        # rows sorted by prompt, and the place where the rows of each prompt begin
        self._by_prompt: tuple[np.ndarray, np.ndarray] = (np.empty(0, np.int64), np.zeros(1, np.int64))
        # a proposal, a flag for each row whether a density under it is known, and how many densities have been read
        self._known: tuple[int, Column, int] = (-1, Column(bool), 0)

    def __len__(self) -> int:
        return len(self._columns["id"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name].values

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RolloutColumns):
            return NotImplemented
        pairs = zip(
            [*self._columns.values(), *self._densities.values()],
            [*other._columns.values(), *other._densities.values()],
        )
        return (self.prompts, self.proposals) == (other.prompts, other.proposals) and all(
            np.array_equal(mine.values, others.values, equal_nan=True) for mine, others in pairs
        )

    # ---- adding rows ----

    def extend(self, rows: pa.Table) -> None:
        """
        Adds rows, each of them once: with several processes, the last batch is filled up with rows that came before.

        Args:
            rows (`pyarrow.Table`): columns `COLUMNS` of the store.
        """
        ids = rows["id"].to_numpy()
        _, first = np.unique(ids, return_index=True)
        first.sort()
        new = first[self._rows_of_ids(ids[first]) < 0]
        if len(new) < len(ids):
            ids, rows = ids[new], rows.take(new)
        if len(new) == 0:
            return
        self._ids_ascend &= bool((np.diff(ids) > 0).all() and (len(self) == 0 or self["id"][-1] < ids[0]))
        keys = rows["prompt_key"].combine_chunks().dictionary_encode()
        prompts = [self.prompts.setdefault(key, len(self.prompts)) for key in keys.dictionary.to_pylist()]
        values = {
            "id": ids,
            "prompt": np.array(prompts)[keys.indices.to_numpy()],
            "proposal": self._index(rows["proposal"]),
            "proposal_logps": _floats(rows["proposal_logps"]),
            "reference_logps": _floats(rows["reference_logps"]),
            "policy_logps": _vectors(rows["policy_logps"]),
            "rewards": _vectors(rows["rewards"]),
            "normalizers": _vectors(rows["normalizers"])
            if "normalizers" in rows.column_names
            else np.empty((len(ids), 0)),
        }
        for name, column in self._columns.items():
            column.extend(values[name])

    def extend_densities(self, rows: pa.Table) -> None:
        """
        Adds densities.

        Args:
            rows (`pyarrow.Table`): columns `DENSITIES` of the store. Their completions may come later.
        """
        if rows.num_rows == 0:
            return
        self._densities["id"].extend(rows["id"].to_numpy())
        self._densities["proposal"].extend(self._index(rows["proposal"]))
        self._densities["logps"].extend(_floats(rows["logps"]))

    def _index(self, proposals: pa.ChunkedArray) -> np.ndarray:
        found = (None if weights is None else tuple(weights) for weights in proposals.to_pylist())
        return np.array([self.proposals.setdefault(weights, len(self.proposals)) for weights in found], np.int32)

    # ---- queries of a step ----

    def proposals_of(self, keys: Sequence[str]) -> list[Proposal]:
        """The known proposals that drew completions of some prompts, in the order of their weights."""
        drew = set(self["proposal"][self._rows_of_prompts(keys)].tolist())
        return sorted(weights for weights, index in self.proposals.items() if index in drew and weights is not None)

    @property
    def origin(self) -> str:
        """
        What drew the completions: `"reference"`, `"mixture"` or `"both"`; `"given"` if that is not known of some of them.
        """
        known = list(self.proposals)
        drew = [known[index] for index in np.unique(self["proposal"])]
        if None in drew:
            return "given"
        if all(drew):
            return "mixture"
        return "both" if any(drew) else "reference"

    def unknown_under(self, proposal: Proposal, keys: Sequence[str]) -> list[int]:
        """Ids of those completions of some prompts whose log-probability under a proposal is unknown, in the order of rows."""
        rows = self._rows_of_prompts(keys)
        index = self.proposals.get(proposal, -1)
        missing = (self["proposal"][rows] != index) & ~self._known_under(index)[rows]
        return self["id"][rows[missing]].tolist()

    def _rows_of_prompts(self, keys: Sequence[str]) -> np.ndarray:
        """All rows of some prompts, in order."""
        prompt, wanted = self["prompt"], sorted({self.prompts[key] for key in keys if key in self.prompts})
        order, begin = self._by_prompt
        if len(prompt) > max(1000, len(order) * (1 + GROWTH)):
            order, begin = np.argsort(prompt, kind="stable"), np.append(0, np.cumsum(np.bincount(prompt)))
            self._by_prompt = order, begin
        sorted_in = [order[begin[i] : begin[i + 1]] for i in wanted if i + 1 < len(begin)]
        recent = len(order) + np.flatnonzero(np.isin(prompt[len(order) :], wanted))
        return np.sort(np.concatenate([*sorted_in, recent]))

    def _known_under(self, proposal: int) -> np.ndarray:
        """A flag for every row: whether its density under a proposal that did not draw it is known."""
        last, known, seen = self._known
        if proposal != last:
            known, seen = Column(bool), 0
        known.extend(np.zeros(len(self) - len(known), bool))
        ids = self._densities["id"].values[seen:][self._densities["proposal"].values[seen:] == proposal]
        rows = self._rows_of_ids(ids)
        known.values[rows[rows >= 0]] = True
        self._known = (proposal, known, len(self._densities["id"]))
        return known.values

    def _rows_of_ids(self, ids: np.ndarray) -> np.ndarray:
        """The row of every id; -1 for ids that are not there."""
        own = self["id"]
        if len(own) == 0:
            return np.full(len(ids), -1)
        # ids ascend, except in a store that was put together from several
        order = None if self._ids_ascend else np.argsort(own, kind="stable")
        rows = np.searchsorted(own, ids, sorter=order).clip(max=len(own) - 1)
        rows = rows if order is None else order[rows]
        return np.where(own[rows] == ids, rows, -1)

    # ---- densities of all rows ----

    def log_densities(self, rows: int, all_under_reference: bool) -> np.ndarray:
        """
        The log-density of each of the first `rows` completions under all proposals of its prompt together, as far as these are
        known; see [`~mpo_hf.estimation.tables.known_densities`].

        Args:
            rows (`int`): how many rows.
            all_under_reference (`bool`): whether `reference_logps` are log-probabilities under the proposal `()`.
        """
        own, prompt = self["proposal_logps"][:rows], self["prompt"][:rows].astype(np.int64)
        proposals, first = np.unique(self["proposal"][:rows], return_index=True)
        if len(proposals) == 1:
            return own
        # one column a proposal, in the order of their first completions
        column = np.full(len(self.proposals), -1)
        column[proposals[np.argsort(first)]] = np.arange(len(proposals))
        drew = column[self["proposal"][:rows]]
        reference = column[self.proposals[()]] if all_under_reference and () in self.proposals else -1
        densities = np.empty(rows)
        for block, row, proposal, known in self._blocks(prompt, column):
            logps = np.full((len(block), len(proposals)), np.nan)
            logps[np.arange(len(block)), drew[block]] = own[block]
            if reference >= 0:
                logps[:, reference] = self["reference_logps"][block]
            logps[row, proposal] = known
            of = prompt[block] - prompt[block[0]]
            densities[block] = known_densities(*map(torch.from_numpy, (of, drew[block], logps, own[block]))).numpy()
        return densities

    def _blocks(
        self, prompt: np.ndarray, column: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """
        Blocks of the rows whose prompts are given, each with all rows of some prompts; for the densities that belong to a
        block, their rows in it, their columns and their log-densities.
        """
        order, ends = np.argsort(prompt, kind="stable"), np.cumsum(np.bincount(prompt))
        place_of = np.full(len(self) + 1, -1)  # the last entry is for ids that are not there
        place_of[order] = np.arange(len(order))
        place = place_of[self._rows_of_ids(self._densities["id"].values)]
        columns = column[self._densities["proposal"].values]
        used = np.flatnonzero((place >= 0) & (columns >= 0))
        used = used[np.argsort(place[used], kind="stable")]
        place, columns, logps = place[used], columns[used], self._densities["logps"].values[used]
        start, size = 0, _CHUNK // (column.max() + 1)
        while start < len(order):
            whole = np.searchsorted(ends, [start, start + size], side="right") - [0, 1]
            stop = ends[whole.max()]
            part = slice(*np.searchsorted(place, [start, stop]))
            yield order[start:stop], place[part] - start, columns[part], logps[part]
            start = stop


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64()).to_numpy()


def _vectors(column: pa.ChunkedArray) -> np.ndarray:
    """Lists of K numbers as an array of shape `(N, K)`, or `(N, 0)` where no list is known."""
    lists = column.combine_chunks()
    known = lists.is_valid().to_numpy(zero_copy_only=False)
    if not known.any():
        return np.empty((len(lists), 0))
    numbers = lists.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False).reshape(known.sum(), -1)
    if known.all():
        return numbers
    values = np.full((len(lists), numbers.shape[1]), np.nan)
    values[known] = numbers
    return values
