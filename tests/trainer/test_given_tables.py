"""Tables of users: what cannot be what its column stands for is refused by column and row, before anything runs."""

import math

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from fits import count_b, count_c, make_args, make_trainer
from helpers import close
from toy import PROMPTS, VOCAB_SIZE, toy_tokenizer

from mpo_hf import MPOTrainer
from mpo_hf.trainer.tables import batches_of, check_numbers, check_prompts, check_rollouts


GOOD = {
    "prompt": PROMPTS,
    "completion": ["a b", "b", "c d e", "f"],
    "prompt_ids": [[1], [2, 3], [4], [5]],
    "completion_ids": [[0, 1], [1], [2, 3, 4], [5]],
    "rewards": [[1.0, 2.0], [0.5, -1.0], [3.0, 0.0], [0.0, 0.0]],
    "policy_logps": [[-1.0, -2.0], [-math.inf, -1.0], None, [0.0, 1e-6]],
    "reference_logps": [-1.0, -math.inf, None, -3.0],
    "proposal_logps": [-1.0, None, -2.0, -3.0],
    "proposal": [[0.5, 0.5], None, [], [0.2, 0.8]],
    "normalizers": [[1.0], None, [math.nan], [0.0]],
    "prompt_key": ["a", None, "c#1", "d"],
}
CHAT = [{"role": "user", "content": "a"}]
BAD = {
    "rewards": [
        math.nan,
        [1.0],
        [1.0, 2.0, 3.0],
        [1.0, math.nan],
        [math.inf, 1.0],
        [1.0, None],
        ["1", "2"],
        [True, False],
        [],
    ],
    "completion_ids": [None, [], [-1], [None], [1.0], [1.5], [True], ["1"], [[1]], "1"],
    "prompt_ids": [None, [], [-3], [1.0]],
    "policy_logps": [[-1.0], [-1.0, 5.0], [-1.0, math.nan], [-1.0, None], ["-1", "-2"], -1.0],
    "reference_logps": [5.0, math.nan, math.inf, "-1", True, [-1.0]],
    "proposal_logps": [5.0, math.nan, -math.inf, "-1", True, [-1.0]],
    "proposal": [[0.5, math.nan], [None, 1.0], "mixture", 0.5],
    "normalizers": ["x", [True]],
    "prompt_key": [1],
    "prompt": [None, 1, ["a", "b"], [], [{"from": "human", "value": "a"}], [{"role": "user"}]],
    "completion": [None, 1, ["a"], [*CHAT, *CHAT], CHAT],
}
CASES = [(column, value) for column, values in BAD.items() for value in values]


def table(**columns) -> Dataset:
    return Dataset.from_dict(GOOD | columns)


def with_bad_row(column: str, value) -> tuple[Dataset, int]:
    """The table with a value in row 2, or in all rows where a column cannot hold it beside good ones."""
    rows = list(GOOD[column])
    rows[2] = value
    try:
        # among numbers, a column takes truth values for numbers
        fits = pa.array(rows).type == pa.array(GOOD[column]).type and "True" not in str(value)
    except pa.ArrowException:
        fits = False
    return table(**{column: rows if fits else [value] * 4}), 2 if fits else 0


def check(rollouts, **kwargs) -> None:
    check_rollouts(rollouts, **{"num_objectives": 2, "needs_rewards": True, "has_rewards": False, **kwargs})


def test_a_good_table_is_accepted():
    check(table())
    check(table().remove_columns("completion_ids"))
    check(table(proposal=[[]] * 4, policy_logps=[None] * 4, reference_logps=[-1, -2, -3, 0]))


@pytest.mark.parametrize("column, value", CASES, ids=lambda value: str(value)[:30])
def test_a_bad_entry_is_refused_by_column_and_row(column, value):
    rollouts, row = with_bad_row(column, value)
    if column == "completion":  # which is not read beside ids
        rollouts = rollouts.remove_columns("completion_ids")
    with pytest.raises(
        ValueError, match=rf"Row {row} of (the |`)rollouts`? has .*'{column}'.* (Correct|Give|Move|Remove)"
    ):
        check(rollouts)


@pytest.mark.parametrize("row", [0, 9_999, 10_000, 24_321])
def test_rows_are_counted_over_all_batches_and_as_a_dataset_orders_them(row):
    numbers = [-1.0] * 25_000
    numbers[row] = 1.0
    rows = Dataset.from_dict({"prompt": ["a"] * 25_000, "proposal_logps": numbers, "completion": ["b"] * 25_000})
    with pytest.raises(ValueError, match=f"Row {row} of the rollouts has 1.0"):
        check(rows, needs_rewards=False)
    order = [row, *(i for i in range(100) if i != row)]
    with pytest.raises(ValueError, match="Row 0 of the rollouts has 1.0"):
        check(rows.select(order), needs_rewards=False)
    texts = ["a"] * 25_000
    texts[row] = None
    with pytest.raises(ValueError, match=f"Row {row} of `train_dataset` has None in the column 'prompt'"):
        check_prompts("train_dataset", Dataset.from_dict({"prompt": texts}))


def test_rewards_that_are_needed_must_be_known():
    rows = list(GOOD["rewards"])
    rows[1] = None
    with pytest.raises(
        ValueError, match="rewards of `rollouts` are not all known: row 1 has none. Pass `reward_funcs`"
    ):
        check(table(rewards=rows))
    with pytest.raises(ValueError, match="rewards of `rollouts` are not all known: there is no column"):
        check(table().remove_columns("rewards"))
    check(table(rewards=rows), needs_rewards=False)
    # those that reward functions replace may be anything
    check(table(rewards=["none"] * 4), has_rewards=True)


def test_what_a_mixture_drew_needs_its_log_probability():
    proposals = [None, None, None, [0.5, 0.5]]
    for rows in (
        table(proposal=proposals, proposal_logps=[None] * 4),
        table(proposal=proposals).remove_columns("proposal_logps"),
    ):
        with pytest.raises(
            ValueError, match=r"Row 3 of the rollouts has the `proposal` \[0.5, 0.5\].* but no `proposal_logps`"
        ):
            check(rows)


def test_tokens_and_lengths_are_checked_against_the_policies():
    numbers = {"num_objectives": 2, "vocab_size": VOCAB_SIZE, "context": 4}
    check_numbers(batches_of(table()), **numbers)
    with pytest.raises(ValueError, match="Row 1 .*'completion_ids'.* policies have 6 tokens, and 6 is none of them"):
        check_numbers(batches_of(table(completion_ids=[[1], [0, 6], [2], [7]])), **numbers)
    with pytest.raises(
        ValueError, match="Row 2 .*'prompt_ids'.* policies have 6 tokens, and 4611686018427387904 is none"
    ):
        check_numbers(batches_of(table(prompt_ids=[[1], [0], [2**62], [7]])), **numbers)
    with pytest.raises(
        ValueError, match="Row 2 of the rollouts has 4 tokens in its prompt and completion.* context of 3"
    ):
        check_numbers(batches_of(table()), context=3)


def test_other_objects_than_tables_are_refused_with_the_way_to_make_one():
    whole = DatasetDict(train=table())
    for given in (whole, [{"prompt": "a"}], {"prompt": ["a"]}):
        with pytest.raises(ValueError, match="`train_dataset` must be a Dataset .* Choose a split .*from_list"):
            check_prompts("train_dataset", given)
        with pytest.raises(ValueError, match="`rollouts` must be a Dataset or the folder .* Choose a split"):
            check(given)
    with pytest.raises(ValueError, match="`rollouts` is empty"):
        check(table().select([]))
    with pytest.raises(ValueError, match="Rollouts need the columns 'prompt' and 'completion'"):
        check(Dataset.from_dict({"prompt": PROMPTS}))
    with pytest.raises(ValueError, match="column 'completions', a name .* Rename it"):
        check_prompts("train_dataset", Dataset.from_dict({"prompt": PROMPTS, "completions": PROMPTS}))


# ---- in a trainer ----


def rollouts_trainer(mixture, folder, rows, **kwargs):
    return MPOTrainer(
        model=mixture,
        args=make_args(folder, estimator="mis", num_resamples=5),
        processing_class=toy_tokenizer(),
        rollouts=rows,
        **kwargs,
    )


def test_a_trainer_checks_given_rows_when_it_is_made(mixture, tmp_path):
    good = {"prompt": PROMPTS, "rewards": GOOD["rewards"]}
    with pytest.raises(ValueError, match=r"Row 2 .* \[1.0, 2.0, 3.0\] .*'rewards'.* must be 2 of them"):
        rows = Dataset.from_dict(good | {"completion": ["a"] * 4, "rewards": [[1.0, 2.0]] * 2 + [[1.0, 2.0, 3.0]] * 2})
        rollouts_trainer(mixture, tmp_path, rows)
    with pytest.raises(ValueError, match="Row 1 .* and 6 is none of them"):
        rollouts_trainer(mixture, tmp_path, Dataset.from_dict(good | {"completion_ids": [[1], [6], [2], [1]]}))
    with pytest.raises(ValueError, match="Row 3 of `rollouts` has 2 tokens in its prompt and 3000 in its completion"):
        rollouts_trainer(mixture, tmp_path, Dataset.from_dict(good | {"completion": ["a", "b", "c", "a " * 3000]}))
    with pytest.raises(ValueError, match="Row 1 of `rollouts` has the prompt '', which has no tokens"):
        rollouts_trainer(
            mixture, tmp_path, Dataset.from_dict(good | {"prompt": ["a", "", "b", "c"], "completion": ["a"] * 4})
        )


def test_a_store_is_checked_like_a_table(mixture, tmp_path):
    make_trainer(mixture, tmp_path / "run", estimator="mis", num_resamples=5, max_steps=1).train()
    (shard,) = (tmp_path / "run" / "_rollouts").glob("rollouts-*.parquet")
    rows = pa.parquet.read_table(shard)
    changed = rows["proposal_logps"].to_pylist()
    changed[5] = 2.5
    rows = rows.set_column(rows.column_names.index("proposal_logps"), "proposal_logps", pa.array(changed))
    pa.parquet.write_table(rows, shard)
    (shard.parent / "shards.json").unlink()  # stores of earlier versions have no digests
    with pytest.raises(ValueError, match="Row 5 of the rollouts has 2.5 in the column 'proposal_logps'"):
        rollouts_trainer(mixture, tmp_path / "again", tmp_path / "run" / "_rollouts")


def test_prompts_and_rewards_are_checked_when_a_trainer_is_made(mixture, tmp_path):
    def needs_answer(completions, answer, **kwargs):
        return [0.0] * len(completions)

    good, bad = Dataset.from_dict({"prompt": PROMPTS}), Dataset.from_dict({"prompt": ["a", None]})
    with pytest.raises(ValueError, match="Row 1 of `train_dataset` has None in the column 'prompt'"):
        make_trainer(mixture, tmp_path, dataset=bad)
    with pytest.raises(ValueError, match="Row 1 of `eval_dataset hard` has None in the column 'prompt'"):
        make_trainer(mixture, tmp_path, eval_dataset={"hard": bad})
    with pytest.raises(
        ValueError, match="Row 0 of `train_dataset` has the prompt .*'user'.* which the tokenizer cannot take"
    ):
        make_trainer(mixture, tmp_path, dataset=Dataset.from_dict({"prompt": [CHAT]}))
    with pytest.raises(ValueError, match="'needs_answer' cannot be called .*missing a required argument: 'answer'"):
        make_trainer(mixture, tmp_path, rewards=[needs_answer, count_b], dataset=good)


@pytest.mark.parametrize("second", [None, CHAT, ["a"]], ids=str)
def test_prompts_of_a_stream_are_checked_when_they_are_read(mixture, tmp_path, second):
    rows = [{"prompt": "a"}, {"prompt": second}]
    trainer = make_trainer(mixture, tmp_path, dataset=IterableDataset.from_generator(lambda: iter(rows)))
    with pytest.raises(ValueError, match="A row of the dataset has .* in the column 'prompt', which is"):
        trainer.train()


def test_columns_with_names_of_the_store_reach_rewards_as_in_trl(mixture, tmp_path):
    seen = []

    def spy(completions, id, step, **kwargs):
        seen.append((id, step))
        return [0.0] * len(completions)

    data = Dataset.from_dict({"prompt": PROMPTS, "id": [7, 8, 9, 10], "step": list("wxyz")})
    make_trainer(mixture, tmp_path, rewards=[spy, count_b], dataset=data, shuffle_dataset=False, max_steps=1).train()
    assert seen == [([7] * 4 + [8] * 4, ["w"] * 4 + ["x"] * 4)]


@pytest.mark.parametrize("estimator", ["mis", "bsmd"])
def test_metrics_of_reward_functions_are_logged_as_means(mixture, tmp_path, caplog, estimator):
    lengths = []

    def reward(completions, log_metric, log_extra, **kwargs):
        for completion in completions[:2]:
            lengths.append(len(completion))
            log_metric("length", lengths[-1])
        log_extra("text", completions)
        return count_c(completions)

    data = Dataset.from_dict({"prompt": PROMPTS[:2]})
    trainer = make_trainer(
        mixture, tmp_path, rewards=[reward, count_b], estimator=estimator, max_steps=2, eval_dataset=data
    )
    trainer.train()
    steps = [entry["length"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps == close([sum(lengths[:2]) / 2, sum(lengths[2:4]) / 2])
    assert trainer.evaluate()["eval_length"] == close(sum(lengths[4:]) / 2)
    assert caplog.text.count("`log_extra` of the column 'text' has no effect") <= 1
