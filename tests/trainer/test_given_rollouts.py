"""Fits to given completions: what they are taken to be drawn from, and what is said of it."""

import math

import pytest
import torch
from datasets import Dataset
from fits import count_b, count_c, make_args, make_trainer
from helpers import CLOSE, close
from toy import toy_tokenizer

from mpo_hf import MixturePolicyModel, MPOTrainer
from mpo_hf.cli.fit import summarize
from mpo_hf.trainer.fit_card import ORIGINS
from mpo_hf.trainer.fit_logging import MIN_EFFECTIVE_COMPLETIONS


TEXTS = ["c c b", "b a c", "a a a", "e f c"]


@pytest.fixture
def refit(toy_folder, tmp_path):
    """A trainer that fits to given rows, or to the folder of a store."""

    def make(rollouts, name="again", reference=True, **kwargs):
        where = {"reference": toy_folder / "ref"} if reference else {}
        mixture = MixturePolicyModel.from_policies([toy_folder / "a", toy_folder / "b"], labels=["a", "b"], **where)
        options = {"estimator": "mis", "num_resamples": 20, "per_device_train_batch_size": 4, **kwargs}
        return MPOTrainer(
            model=mixture,
            reward_funcs=[count_c, count_b] if options.get("objective") != "implicit" else None,
            args=make_args(tmp_path / name, **options),
            processing_class=toy_tokenizer(),
            rollouts=table(rollouts) if isinstance(rollouts, list) else rollouts,
        )

    return make


def table(rows) -> Dataset:
    """Rows as a dataset, with `None` for what a row does not have."""
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_list([{name: row.get(name) for name in names} for row in rows])


def rows_of(*columns) -> list[dict]:
    """The texts as completions of one prompt after another, each with further columns."""
    return [
        {"prompt": prompt, "completion_ids": toy_tokenizer()(text)["input_ids"], **more}
        for prompt, more in zip(("a b", "b c"), columns)
        for text in TEXTS
    ]


def logps_at(policy, row, temperature=1.0) -> float:
    """The log-probability of a completion that is drawn token by token at some temperature."""
    prompt, ids = toy_tokenizer()(row["prompt"])["input_ids"], row["completion_ids"]
    with torch.no_grad():
        logits = policy(torch.tensor([prompt + ids])).logits[0].double() / temperature
    logps = logits.log_softmax(-1)
    return sum(logps[len(prompt) + t - 1, token].item() for t, token in enumerate(ids))


# ---- completions without `proposal_logps` ----


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_missing_number_is_completed_in_its_own_row_alone(refit, temperature):
    rows = rows_of({}, {})
    given = {1: -3.25, 2: -0.5, 6: -7.0}
    for i, row in enumerate(rows):
        row |= {"proposal_logps": given.get(i), "proposal": [0.25, 0.75] if i in given else None}
    trainer = refit(rows, temperature=temperature)
    trainer.train()
    columns, proposals = trainer.rollout_fit.columns, list(trainer.rollout_fit.columns.proposals)
    reference = trainer.reference_policy
    for i, row in enumerate(rows):
        expected = given[i] if i in given else logps_at(reference, row, temperature)
        assert columns["proposal_logps"][i] == close(expected)
        assert columns["reference_logps"][i] == close(logps_at(reference, row))
        assert proposals[columns["proposal"][i]] == ((0.25, 0.75) if i in given else ())


def test_completions_of_the_reference_at_a_temperature_are_weighted_for_it(refit):
    """Weights of a fit at another temperature differ from those of one that takes the same completions for plain ones."""
    rows = rows_of({}, {})
    warm, plain = refit(rows, "warm", temperature=0.5), refit(rows, "plain")
    told = [row | {"proposal_logps": logps_at(warm.reference_policy, row, 0.5)} for row in rows]
    told = refit(told, "told")
    for trainer in (warm, plain, told):
        trainer.train()
    torch.testing.assert_close(warm.weights, told.weights, **CLOSE)
    assert not torch.allclose(warm.weights, plain.weights, atol=1e-3)
    assert warm.rollout_fit.store.info["temperature"] == 0.5


def test_the_temperature_of_a_store_is_its_own(refit, mixture, tmp_path):
    first = make_trainer(
        mixture,
        tmp_path / "run",
        estimator="mis",
        num_resamples=20,
        temperature=0.7,
        proposal="mixture",
        refresh_below=1.0,
    )
    first.train()
    folder = tmp_path / "run" / "_rollouts"
    again, same = refit(folder, "again"), refit(folder, "same", temperature=0.7)
    for trainer in (again, same):
        trainer.train()
        torch.testing.assert_close(trainer.weights, first.weights, atol=1e-9, rtol=0)
        assert trainer.rollout_fit.store.info["temperature"] == 0.7
    with pytest.raises(ValueError, match=r"`temperature=1.3` has no effect .* at temperature 0.7"):
        refit(folder, "other", temperature=1.3)


def test_rows_that_contradict_themselves_are_refused(refit):
    rows = rows_of({"proposal": [0.5, 0.5], "proposal_logps": -2.0}, {"proposal": [0.5, 0.5], "proposal_logps": None})
    with pytest.raises(ValueError, match=r"`proposal` \[0.5, 0.5\].*but no `proposal_logps`"):
        refit(rows).train()
    with pytest.raises(ValueError, match="4 of 4 completions have no `proposal_logps`.*`ref_model`"):
        refit(rows_of({}, {}), "orphans", reference=False, objective="implicit").train()


def test_completions_of_unknown_policies_are_weighted_by_their_own_numbers(refit):
    """Nothing is known of them under another proposal, though the reference drew other completions of the prompt."""
    rows = rows_of({"proposal_logps": -4.0}, {"proposal_logps": -4.0})
    for row in rows[:2]:
        row["proposal_logps"] = None
    trainer = refit(rows)
    trainer.train()
    columns = trainer.rollout_fit.columns
    assert set(columns.proposals) == {(), None}
    assert columns.log_densities(8, True).tolist() == columns["proposal_logps"].tolist()
    assert columns["proposal_logps"][2:].tolist() == [-4.0] * 6
    # and a fit to what this one has kept takes them for the same
    kept = trainer.rollout_fit.store
    assert kept.read(("proposal",))["proposal"] == [[]] * 2 + [None] * 6
    later = refit(kept.folder, "later")
    later.train()
    assert later.rollout_fit.columns == columns and later.origin == "given"


# ---- what is said of their origin ----


MIXED, DRAWN = [0.25, 0.75], -3.0
ROWS = {
    "reference": ({}, {"proposal": [], "proposal_logps": DRAWN}),
    "mixture": ({"proposal": MIXED, "proposal_logps": DRAWN}, {"proposal": [0.5, 0.5], "proposal_logps": DRAWN}),
    "both": ({}, {"proposal": MIXED, "proposal_logps": DRAWN}),
    "given": ({"proposal": MIXED, "proposal_logps": DRAWN}, {"proposal_logps": DRAWN}),
}
SAID = {
    "reference": "mean reward of the reference's samples",
    "mixture": "mean reward of the mixture's samples",
    "both": "mean reward of all samples",
    "given": "mean reward of the given completions",
}


@pytest.mark.parametrize("proposal", ["reference", "mixture"])
@pytest.mark.parametrize("origin", ROWS)
def test_the_origin_of_completions_is_read_from_the_data(refit, tmp_path, origin, proposal):
    trainer = refit(rows_of(*ROWS[origin]), proposal=proposal)
    trainer.train()
    trainer.save_model()
    assert trainer.origin == origin
    assert SAID[origin] in summarize(trainer)
    card = " ".join((tmp_path / "again" / "README.md").read_text().split())
    assert f"completions that were drawn before it, {ORIGINS[origin]}, and" in card
    assert "| the completions, steps 1 to 2 |" in card and "drew its completions" not in card


@pytest.mark.parametrize("estimator", ["mis", "bsmd"])
@pytest.mark.parametrize("proposal", ["reference", "mixture"])
def test_the_origin_of_completions_of_a_fit_is_its_proposal(mixture, tmp_path, estimator, proposal):
    trainer = make_trainer(mixture, tmp_path, estimator=estimator, proposal=proposal, max_steps=2)
    assert trainer.origin == proposal
    trainer.train()
    assert trainer.origin == proposal and SAID[proposal] in summarize(trainer)


# ---- how many completions count ----


def effective_counts(trainer) -> list[float]:
    """For every prompt, one over the sum of squared shares of its completions in the estimate."""
    columns, weights = trainer.rollout_fit.columns, trainer.weights.detach()
    rewards, beta = torch.from_numpy(columns["rewards"]), trainer.args.beta
    ratios = torch.from_numpy(columns["reference_logps"] - columns.log_densities(len(columns), True))
    exponents = ratios + rewards @ weights / beta  # offsets of a prompt cancel
    found = []
    for prompt in range(len(columns.prompts)):
        shares = exponents[torch.from_numpy(columns["prompt"]) == prompt].softmax(-1)
        found.append(1 / shares.square().sum().item())
    return found


def test_effective_completions_are_counted_by_prompt(refit, caplog):
    """Two prompts with different numbers of completions: the fraction alone does not tell how many count."""
    rows = rows_of({}, {})[:6]
    trainer = refit(rows, beta=5.0)
    trainer.train()
    counts = effective_counts(trainer)
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["effective_completions"] == close(sum(counts) / 2)
    assert last["effective_sample_size"] == close((counts[0] / 4 + counts[1] / 2) / 2)
    (warning,) = [r.getMessage() for r in caplog.records if "completions of each prompt count" in r.getMessage()]
    assert "biased" in warning and "Give more completions of each prompt, or raise `beta`" in warning
    assert "collapsed" not in caplog.text


def test_a_collapse_is_told_with_where_the_completions_come_from(refit, caplog):
    refit(rows_of({}, {}), beta=0.01, proposal="mixture", min_effective_sample_size=0.9).train()
    (warning,) = [r.getMessage() for r in caplog.records if "effective sample size has collapsed" in r.getMessage()]
    assert 'come from the reference policy: draw from the mixture itself, with `proposal="mixture"`' in warning
    assert "without `rollouts`" in warning and f"{1.0:.1f}" in warning


@pytest.mark.parametrize("objective, estimator", [("reward", "bsmd"), ("achieved", "mis"), ("implicit", "mis")])
def test_effective_completions_of_every_estimator_fit_the_fraction(mixture, tmp_path, caplog, objective, estimator):
    """Where all prompts have as many completions, the number is the fraction of that."""
    options = {"num_generations": 16, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 64}
    options |= {"objective": objective, "estimator": estimator, "max_steps": 1, "proposal": "mixture"}
    trainer = make_trainer(mixture, tmp_path, **options)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["effective_completions"] == close(16 * entry["effective_sample_size"])
    assert (
        MIN_EFFECTIVE_COMPLETIONS < entry["effective_completions"] <= 16
        and "completions of each prompt count" not in caplog.text
    )
    metrics = trainer.evaluate(trainer.train_dataset)
    assert metrics["eval_effective_completions"] == close(16 * metrics["eval_effective_sample_size"])
    assert math.isfinite(metrics["eval_loss"])
