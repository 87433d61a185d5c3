"""Where completions are kept: shards, what is read of them, and the columns of their numbers."""

import json
import random
import shutil
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import ROOT

from mpo_hf.estimation import balance_heuristic
from mpo_hf.rollouts.columns import RolloutColumns
from mpo_hf.rollouts.shard_files import digest_of
from mpo_hf.rollouts.store import RolloutStore, StoredCompletions, first_id, given_rollouts


sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
import rollout_store as benchmark  # noqa: E402


# ---- columns, beside lists and dictionaries that say the same ----


class Plain:
    """What `RolloutColumns` says, by looking at every row of a list."""

    def __init__(self):
        self.rows, self.densities = [], {}

    def extend(self, rows):
        for row in rows.to_pylist():
            if row["id"] not in [known["id"] for known in self.rows]:
                self.rows.append({**row, "proposal": tuple(row["proposal"])})

    def extend_densities(self, rows):
        self.densities |= {(row["id"], tuple(row["proposal"])): row["logps"] for row in rows.to_pylist()}

    def proposals_of(self, keys):
        return sorted({row["proposal"] for row in self.rows if row["prompt_key"] in keys})

    def unknown_under(self, proposal, keys):
        return [
            row["id"]
            for row in self.rows
            if row["prompt_key"] in keys
            and row["proposal"] != proposal
            and (row["id"], proposal) not in self.densities
        ]

    def log_densities(self, count, all_under_reference):
        rows = self.rows[:count]
        prompts = {key: i for i, key in enumerate(dict.fromkeys(row["prompt_key"] for row in rows))}
        proposals = {proposal: i for i, proposal in enumerate(dict.fromkeys(row["proposal"] for row in rows))}
        logps = torch.full((count, len(proposals)), torch.nan, dtype=torch.float64)
        for i, row in enumerate(rows):
            for proposal, s in proposals.items():
                known = row["proposal_logps"] if proposal == row["proposal"] else torch.nan
                known = row["reference_logps"] if all_under_reference and proposal == () else known
                logps[i, s] = self.densities.get((row["id"], proposal), known)
        prompt = torch.tensor([prompts[row["prompt_key"]] for row in rows])
        drew = torch.tensor([proposals[row["proposal"]] for row in rows])
        own = torch.tensor([row["proposal_logps"] for row in rows], dtype=torch.float64)
        if len(proposals) == 1:
            return own
        found = balance_heuristic(prompt, drew, logps)
        unknown = {prompt[i].item() for i in found.isnan().nonzero()}
        return torch.stack([own[i] if prompt[i].item() in unknown else found[i] for i in range(count)])


PROPOSALS = [[], [0.5, 0.5], [0.25, 0.75], [0.1, 0.9]]


def some_rows(chance, ids, proposals):
    return pa.table(
        {
            "id": ids,
            "prompt_key": [f"prompt {chance.randrange(9)}" for _ in ids],
            "proposal": [chance.choice(proposals) for _ in ids],
            "proposal_logps": [chance.gauss(-9, 1) for _ in ids],
            "reference_logps": [chance.gauss(-9, 1) for _ in ids],
            "policy_logps": [[chance.gauss(-9, 1), chance.gauss(-9, 1)] for _ in ids],
            "rewards": [[chance.random(), chance.random()] for _ in ids],
        }
    )


@pytest.mark.parametrize("in_order", [True, False], ids=["ids ascend", "ids in any order"])
def test_columns_say_what_a_look_at_every_row_would(in_order, monkeypatch):
    chance, numbers, plain = random.Random(0), RolloutColumns(), Plain()
    monkeypatch.setattr("mpo_hf.rollouts.columns._CHUNK", 100)
    ids = list(range(1600)) if in_order else chance.sample(range(10**6), 1600)
    given = [(i, chance.choice(PROPOSALS)) for i in chance.choices(ids, k=500)]  # of completions that come later
    steps = [ids[start : start + 40] for start in range(0, len(ids), 40)]
    for step, new in enumerate(steps):
        # a batch is filled up with earlier rows, and once with its own; proposals come one after another
        rows = some_rows(chance, [*new, *chance.choices(ids[: 40 * step + 40], k=5)], PROPOSALS[: 1 + step // 4])
        found = [(i, p) for i in chance.choices(new, k=10) for p in PROPOSALS[:3]] + (given if step == 3 else [])
        densities = pa.table(
            {
                "id": [i for i, _ in found],
                "proposal": [p for _, p in found],
                "logps": [chance.gauss(-9, 1) for _ in found],
            }
        )
        for each in (numbers, plain):
            each.extend(rows)
            each.extend_densities(densities)
        keys = [f"prompt {chance.randrange(10)}" for _ in range(3)]
        assert numbers.proposals_of(keys) == plain.proposals_of(keys)
        proposal = tuple(PROPOSALS[step // 10])
        if step != 3:
            # given densities are of completions that were not drawn here, which nobody asks this of before they come
            later = {i for i, _ in given} if step > 3 else set()
            assert [i for i in numbers.unknown_under(proposal, keys) if i not in later] == [
                i for i in plain.unknown_under(proposal, keys) if i not in later
            ]
        if step % 13 == 0:
            for count in (1, len(plain.rows) // 2, len(plain.rows)):
                for reference in (True, False):
                    result = torch.from_numpy(numbers.log_densities(count, reference))
                    assert torch.equal(result, plain.log_densities(count, reference))
    assert len(numbers) == len(ids) == len(plain.rows)
    for name in ("id", "proposal_logps", "reference_logps", "policy_logps", "rewards"):
        assert numbers[name].tolist() == [row[name] for row in plain.rows]
    assert [list(numbers.prompts)[i] for i in numbers["prompt"]] == [row["prompt_key"] for row in plain.rows]
    assert [list(numbers.proposals)[i] for i in numbers["proposal"]] == [row["proposal"] for row in plain.rows]


@pytest.mark.parametrize("scored", ["none", "some", "all"])
def test_estimates_are_right_whatever_is_known_of_other_proposals(scored):
    """
    One prompt, two completions, two proposals: every draw in its exact proportion. The estimate of an expectation under the
    reference is exact, also if some completions of the reference are not scored under the mixture.
    """
    reference, mixture = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    drawn = [
        (y, p) for p, q in (([], reference), ([0.5, 0.5], mixture)) for y in (0, 1) for _ in range(round(10 * q[y]))
    ]
    numbers, ids = RolloutColumns(), range(len(drawn))
    logps = {"reference_logps": [np.log(reference[y]) for y, _ in drawn]}
    logps["proposal_logps"] = [np.log((mixture if p else reference)[y]) for y, p in drawn]
    rows = {"id": list(ids), "prompt_key": ["x"] * 20, "proposal": [p for _, p in drawn], **logps}
    numbers.extend(pa.table({**rows, "policy_logps": pa.nulls(20), "rewards": pa.nulls(20)}))
    of_reference = [i for i in ids if not drawn[i][1]]
    known = {"none": [], "some": of_reference[::2], "all": of_reference}[scored]
    found = [np.log(mixture[drawn[i][0]]) for i in known]
    proposals = pa.array([[0.5, 0.5]] * len(known), pa.list_(pa.float64()))
    numbers.extend_densities(
        pa.table({"id": pa.array(known, pa.int64()), "proposal": proposals, "logps": pa.array(found, pa.float64())})
    )
    shares = np.exp(logps["reference_logps"] - numbers.log_densities(20, True))
    assert shares[[y == 0 for y, _ in drawn]].sum() / shares.sum() == pytest.approx(0.5)


def test_the_origin_of_completions_is_that_of_their_proposals():
    for proposals, expected in [
        ([[]], "reference"),
        ([[0.5, 0.5], [1.0, 0.0]], "mixture"),
        ([[], [0.5, 0.5]], "both"),
        ([None], "given"),
        ([None, [0.5, 0.5], []], "given"),
    ]:
        numbers, count = RolloutColumns(), len(proposals)
        # a proposal that other completions were scored under drew none
        numbers.extend_densities(pa.table({"id": [7, 7], "proposal": [[0.3, 0.7], []], "logps": [-1.0, -2.0]}))
        rows = some_rows(random.Random(0), list(range(count)), PROPOSALS).drop_columns("proposal")
        numbers.extend(rows.append_column("proposal", pa.array(proposals, pa.list_(pa.float64()))))
        assert numbers.origin == expected
        assert [list(numbers.proposals)[i] for i in numbers["proposal"]] == [
            p and tuple(p) if p != [] else () for p in proposals
        ]
        assert None not in numbers.proposals_of(list(numbers.prompts))


def test_numbers_that_are_not_known_are_nan_beside_those_that_are():
    chance, numbers = random.Random(0), RolloutColumns()
    for ids, unknown in (([0, 1], [None] * 2), ([2, 3], None), ([4, 5], [None, [1.0, 2.0]]), ([6], [None])):
        rows = some_rows(chance, ids, PROPOSALS)
        if unknown is not None:
            for name in ("rewards", "reference_logps"):
                values = unknown if name == "rewards" else [v and v[0] for v in unknown]
                rows = rows.set_column(rows.column_names.index(name), name, pa.array(values))
        numbers.extend(rows)
    assert np.isnan(numbers["rewards"]).all(1).tolist() == [True, True, False, False, True, False, True]
    assert np.isnan(numbers["reference_logps"]).tolist() == [True, True, False, False, True, False, True]
    assert numbers["rewards"][5].tolist() == [1.0, 2.0] and numbers["policy_logps"].shape == (7, 2)
    same = RolloutColumns()
    assert same != numbers
    rows = some_rows(random.Random(0), [0, 1], PROPOSALS).drop_columns("rewards").append_column("rewards", pa.nulls(2))
    same.extend(rows)
    assert same["rewards"].shape == (2, 0) and same == same


# ---- shards ----


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Seven completions a shard, in row groups of three."""
    monkeypatch.setattr("mpo_hf.rollouts.store.ROW_GROUP", 3)
    store = RolloutStore(tmp_path, {"objectives": ["a", "b"]})
    for step in (1, 2):
        for part in (0, 1):
            first = first_id(step, part)
            columns = {
                "prompt": [[{"role": "user", "content": f"prompt {i}"}] for i in range(7)],
                "completion_ids": [[step, part, i] for i in range(7)],
                "rewards": [[float(i), 10.0 * i] for i in range(7)],
                "policy_logps": [[-1.0, -2.0]] * 7,
                "id": range(first, first + 7),
                "step": [step] * 7,
                "prompt_key": ["x"] * 7,
            }
            store.write("rollouts", step, part, columns)
    return store


def test_a_store_is_a_dataset_that_is_read_as_it_is_asked_for(store):
    rows, ids = StoredCompletions(store, ["b"]), store.read(("id",))["id"]
    assert len(rows) == 28 and "step" not in rows.column_names
    for indices in ([0], list(range(28)), [27, 3, 3, 6, 7, 12]):
        found = rows.__getitems__(indices)
        assert [row["id"] for row in found] == [ids[i] for i in indices]
        assert [row["prompt"][0]["content"] for row in found] == [f"prompt {i % 7}" for i in indices]
        assert [row["rewards"] for row in found] == [[10.0 * (i % 7)] for i in indices]
        assert [row["completion_ids"] for row in found] == [[1 + i // 14, i // 7 % 2, i % 7] for i in indices]
    assert rows[5]["policy_logps"] == [-2.0]
    assert StoredCompletions(store, ["b", "c"])[5]["rewards"] is None


def test_completions_are_found_by_their_ids_in_their_shards_alone(store):
    for path in store.shards()[1:3]:
        path.write_bytes(b"no parquet")
    ids = [first_id(2, 1) + 6, first_id(1, 0) + 2, first_id(2, 1), first_id(1, 0) + 2]
    found = store.find(ids, ("completion_ids", "step"))
    assert found == {"completion_ids": [[2, 1, 6], [1, 0, 2], [2, 1, 0], [1, 0, 2]], "step": [2, 1, 2, 1]}


def listed(store):
    """The same store, with its shards on the list."""
    store.record({path.name: digest_of(path) for path in store.shards()})
    return RolloutStore(store.folder, store.info)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "missing": (lambda path, other: path.unlink(), "rollouts-00000001-0001.parquet' is missing from"),
    "cut": (lambda path, other: cut(path), "rollouts-00000001-0001.parquet' is damaged, or comes from another run"),
    "another": (
        lambda path, other: shutil.copy(other, path),
        "rollouts-00000001-0001.parquet' is damaged, or comes from",
    ),
    "info": (lambda path, other: cut(path.parent / "rollouts.json"), "rollouts.json' is damaged"),
    "list": (lambda path, other: cut(path.parent / "shards.json"), "shards.json' is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_missing_or_damaged_is_named(store, damage):
    harm, message = DAMAGE[damage]
    (store.folder / "rollouts.json").write_text(json.dumps({"objectives": ["a", "b"], "text": "x" * 200}))
    store = listed(store)
    paths = store.shards()
    harm(paths[1], paths[3])
    with pytest.raises(OSError, match=message):
        given_rollouts(store.folder, ["a", "b"])
    if damage in ("missing", "cut", "another"):
        with pytest.raises(OSError, match=message):
            store.read(("id",))
        store.check(last_step=0)  # what is asked for is whole


def test_a_shard_that_cannot_be_read_is_named_without_a_list_too(store):
    cut(store.shards()[2])
    with pytest.raises(OSError, match="rollouts-00000002-0000.parquet' cannot be read"):
        StoredCompletions(store, ["a"])
    with pytest.raises(OSError, match="rollouts-00000002-0000.parquet' cannot be read"):
        store.find([first_id(2, 0)], ("step",))
    store.shards()[2].unlink()
    with pytest.raises(OSError, match="rollouts-00000002-0000.parquet' is missing"):
        store.find([first_id(2, 0)], ("step",))


def test_only_shards_of_finished_batches_count(store):
    """Of a batch whose processes have not all written theirs, none does."""
    store.record({path.name: digest_of(path) for path in store.shards(last_step=1)})
    store = RolloutStore(store.folder, store.info)
    assert len(store.shards()) == 4 and len(store.finished()) == 2
    assert set(store.read(("step",))["step"]) == {1} and len(StoredCompletions(store, ["a"])) == 14
    before = store.digest(1)
    (store.folder / ".rollouts-00000002-0000.parquet.7.tmp").touch()
    store.discard_after(1)
    assert [path.name for path in store.folder.iterdir() if path.name.startswith(".")] == []
    assert len(store.shards()) == 2 and store.digest() == before
    (store.folder / "shards.json").unlink()
    assert RolloutStore(store.folder, store.info).digest() == before  # of the files themselves


def test_shards_are_in_the_order_of_steps_and_parts(tmp_path):
    store = RolloutStore(tmp_path, {})
    for step, part in ((2, 0), (1, 10_000), (1, 9999), (3, 1)):
        store.write("rollouts", step, part, {"id": [first_id(step, part)]})
    assert store.read(("id",))["id"] == sorted(store.read(("id",))["id"])
    assert [path.name for path in store.shards(last_step=1)] == [
        "rollouts-00000001-9999.parquet",
        "rollouts-00000001-10000.parquet",
    ]
    store.discard_after(1)
    assert len(store.shards()) == 2


def test_ids_of_one_step_do_not_run_into_those_of_the_next():
    assert first_id(1, 0xFFFF) < first_id(2, 0)
    with pytest.raises(ValueError, match="Lower `gradient_accumulation_steps`"):
        first_id(1, 0x10000)


# ---- size ----


def test_the_benchmark_writes_a_store_and_fits_it(tmp_path, capsys):
    benchmark.write_store(tmp_path, 400, 100)
    rows = RolloutStore(tmp_path, {"objectives": benchmark.LABELS}).read(
        ("proposal", "proposal_logps", "policy_logps")
    )
    assert {tuple(proposal) for proposal in rows["proposal"]} == set(map(tuple, benchmark.PROPOSALS))
    for proposal, logp, policies in zip(*rows.values()):  # the pooled log-probability, less log Z of every token
        assert logp > sum(w * policy for w, policy in zip(proposal, policies))
    benchmark.fit(tmp_path, 100, num_resamples=5)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["rows"] == 400 and sum(found["weights"]) == pytest.approx(1) and min(found["weights"]) > 0.1
    benchmark.draw([found, {**found, "rows": 4000}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_memory_of_a_fit_grows_by_little_with_the_rows():
    """Without the replicates of the certificate, which have a bound of their own."""
    small, large = (benchmark.measure(rows, batch_size=5000, num_resamples=2) for rows in (10_000, 100_000))
    assert (small["rows"], large["rows"]) == (10_000, 100_000)
    assert large["peak"] - small["peak"] < 90_000 * 1.5e-3  # MiB
