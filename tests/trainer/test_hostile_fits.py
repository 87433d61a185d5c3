"""Whole fits of policies that exclude completions, of rewards that nothing improves, and of prompts that are repeated."""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from fits import Interrupt, count_b, count_c, make_args, make_trainer
from optima import exact_optima
from toy import PROMPTS, Enumeration, TabularPolicy, reward_functions, toy_tokenizer

from mpo_hf import MixturePolicyModel, MPOTrainer
from mpo_hf.estimation import objectives
from mpo_hf.rewards import normalize_rewards


pytestmark = pytest.mark.integration
BETA = 0.2
LABELS = ["a", "b"]


def no_difference(completions, **kwargs):
    return [0.5] * len(completions)


# ---- policies that exclude completions ----


class World:
    """Policies of which the second never ends a completion with the first token."""

    def __init__(self):
        self.enumeration, self.rewards = exact_optima(2, BETA)
        self.enumeration.policies[:, ::6, 1] = -math.inf
        self.enumeration.policies = self.enumeration.policies.log_softmax(1)

    def trainer(self, tmp_path, **kwargs) -> MPOTrainer:
        model = MixturePolicyModel.from_policies(
            [TabularPolicy(logps) for logps in self.enumeration.policies.unbind(-1)],
            reference=TabularPolicy(self.enumeration.reference),
            labels=["kind", "safe", "short"],
        )
        rewards = reward_functions(self.rewards, self.enumeration.completions)
        options = {"beta": BETA, "num_generations": 128, "per_device_train_batch_size": 512, "logps_batch_size": 1024}
        options |= {"per_device_eval_batch_size": 512, "num_resamples": 10, "tolerance": 0.0, **kwargs}
        if kwargs.get("estimator") == "bsmd":
            del options["num_resamples"]
        if kwargs.get("objective") == "achieved":
            options.setdefault("mixing", "sequence")
        if kwargs["objective"] == "implicit":
            rewards = None
        return make_trainer(model, tmp_path, rewards, **options)

    def gap(self, objective: str, weights: torch.Tensor, proposal: str) -> float:
        """How far weights are from the exact optimum over all completions, by sums over these."""
        everything = self.enumeration
        shared = everything.policies[0].isfinite().all(-1)  # by all policies
        within = Enumeration(everything.policies[:, shared], everything.reference[:, shared], everything.completions)
        if objective == "achieved":
            # completions of the mixture of all policies tell nothing of mixtures without the second
            points = [w for w in grid(20) if w[1] > 0 or proposal == "reference"]
            return max(map(self.reached, points)) - self.reached(weights.tolist())
        if objective == "implicit":
            return within.dual(weights) - within.minimum()[1]
        advantages = self.rewards / BETA
        values = torch.logsumexp(everything.reference.unsqueeze(-1) + advantages, dim=1, keepdim=True)
        return everything.dual(weights, advantages - values) - everything.minimum(advantages - values)[1]

    def reached(self, weights) -> float:
        """The smallest expected reward of a mixture over β, relative to the best of each, less its divergence."""
        used = [k for k in range(3) if weights[k] > 0]
        powers = self.enumeration.policies[..., used] @ torch.tensor(weights, dtype=torch.float64)[used]
        mixture, reference = powers.log_softmax(1), self.enumeration.reference
        best = torch.logsumexp(reference.unsqueeze(-1) + self.rewards / BETA, dim=1).mean(0)
        gains = torch.einsum("py,pyk->k", mixture.exp(), self.rewards / BETA) / len(mixture) - best
        divergence = (mixture.exp() * (mixture - reference).nan_to_num(neginf=0)).sum(-1).mean()
        return (gains.min() - divergence).item()


def grid(count: int) -> list[tuple[float, ...]]:
    """Points of the simplex, with its faces and corners."""
    steps = itertools.product(range(count + 1), repeat=2)
    return [(a / count, b / count, 1 - (a + b) / count) for a, b in steps if a + b <= count]


@pytest.mark.parametrize(
    "objective, proposal, estimator",
    [
        *itertools.product(["reward", "implicit", "achieved"], ["reference", "mixture"], ["mis"]),
        *itertools.product(["reward", "implicit"], ["reference", "mixture"], ["bsmd"]),
    ],
)
def test_a_policy_that_excludes_completions_is_fitted(tmp_path, objective, proposal, estimator):
    world = World()
    tolerance = {"tolerance": None} if estimator == "bsmd" else {}
    steps = 3 if estimator == "mis" else 40
    trainer = world.trainer(
        tmp_path, objective=objective, proposal=proposal, estimator=estimator, max_steps=steps, **tolerance
    )
    trainer.train()
    weights = trainer.fitted_weights()
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    gap, start = (world.gap(objective, point, proposal) for point in (weights, uniform))
    assert weights.isfinite().all() and weights.min() >= 0 and weights.sum().item() == pytest.approx(1)
    if (objective, proposal, estimator) == ("reward", "mixture", "bsmd"):  # whose objective is another one
        assert (weights - uniform).abs().max() > 0.01 and gap < 0.05
    else:
        assert -1e-3 <= gap <= 0.4 * start
    if estimator == "mis":
        # a bound that says how good they are does not say more
        bound = trainer.certificate.duality_gap_bound
        assert not bound < 0.2 * gap


# ---- objectives that nothing improves ----


@pytest.mark.parametrize("options", [{"welfare": "nash"}, {"welfare": "alpha_fair", "normalize_rewards": "win_rate"}])
def test_a_fit_without_a_policy_that_improves_all_ends_in_an_error(mixture, tmp_path, caplog, options):
    options |= {"proposal": "reference", "tolerance": 100.0, "num_resamples": 10}
    trainer = make_trainer(mixture, tmp_path, (count_c, no_difference), estimator="mis", max_steps=3, **options)
    with pytest.raises(ValueError, match="No policy .* has 'b' with a positive gain, .* Leave it out"):
        trainer.train()
    assert trainer.state.global_step == 2  # not before the end, as more completions might have told them apart
    assert trainer.weights.tolist() == [0.5, 0.5] and trainer.certificate is None and not trainer.has_converged()
    assert sum("weights stay as they are" in record.message for record in caplog.records) == 1


def test_a_fit_goes_on_when_completions_of_later_prompts_improve_an_objective(mixture, tmp_path, caplog):
    """Of the first two prompts, no completion has the second reward."""

    def later(prompts, completions, **kwargs):
        return [float(p in PROMPTS[2:] and "b" in c) for p, c in zip(prompts, completions)]

    trainer = make_trainer(
        mixture,
        tmp_path,
        (count_c, later),
        estimator="mis",
        welfare="nash",
        proposal="reference",
        num_generations=16,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        max_steps=2,
        shuffle_dataset=False,
        beta=2.0,
    )
    trainer.train()
    assert any("'b' with a positive gain" in record.message for record in caplog.records)
    weights = trainer.weights.detach()
    assert trainer.certificate is not None and weights.prod() >= 0.25 - 1e-9 and weights[1] > weights[0]


@pytest.mark.parametrize(
    "estimator, objective, scale",
    [
        *itertools.product(["mis"], ["reward", "achieved"], ["optimal", "reference", "win_rate", "none"]),
        *itertools.product(["bsmd"], ["reward"], ["optimal", "none"]),
    ],
)
def test_an_objective_that_nothing_improves_is_warned_about(mixture, tmp_path, caplog, estimator, objective, scale):
    for rewards, told in (((count_c, count_b), 0), ((count_c, no_difference), 1)):
        caplog.clear()
        options = {"objective": objective, "normalize_rewards": scale}
        if estimator == "mis":
            options["num_resamples"] = 10
        if objective == "achieved":
            options["mixing"] = "sequence"
        make_trainer(mixture, tmp_path / str(told), rewards, estimator=estimator, max_steps=2, **options).train()
        assert sum("rewards of 'b' are the same" in record.message for record in caplog.records) == told


# ---- repeated prompts ----


REPEATED = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]


def keys_and_weights(trainer) -> tuple[list[str], list[float]]:
    columns = trainer.rollout_fit.columns
    keys = list(columns.prompts)
    return [keys[i] for i in columns["prompt"]], trainer.weights.tolist()


@pytest.mark.parametrize("proposal", ["reference", "mixture"])
def test_a_prompt_weighs_as_often_as_it_stands_in_the_dataset(mixture, toy_folder, tmp_path, proposal):
    """In every epoch the same: two epochs of four rows have four prompts, with the completions of two visits each."""
    options = {"estimator": "mis", "proposal": proposal, "tolerance": 0.0, "num_resamples": 10, "max_steps": 4}
    trainer = make_trainer(mixture, tmp_path / "run", dataset=Dataset.from_dict({"prompt": REPEATED}), **options)
    trainer.train()
    keys, weights = keys_and_weights(trainer)
    contents = [key.partition("#")[0] for key in keys]
    assert [keys.count(key) for key in dict.fromkeys(keys)] == [8] * 4
    assert sorted(contents.count(content) for content in set(contents)) == [8, 24]
    assert trainer.rollout_fit.estimator.table.num_prompts == 4 and trainer.rollout_fit.num_prompts == 2
    # a fit to the same completions weighs them in the same way, from the folder and from a table, which does not hold what
    # each completion scores under the proposals of the others
    table = Dataset.from_parquet(str(tmp_path / "run/_rollouts/rollouts-*"))
    for store, tolerance in ((tmp_path / "run" / "_rollouts", 1e-6), (table, 0.02)):
        again = MPOTrainer(
            model=MixturePolicyModel.from_policies(
                [toy_folder / label for label in LABELS], reference=toy_folder / "ref", labels=LABELS
            ),
            args=make_args(tmp_path / f"again-{type(store).__name__}", **options),
            processing_class=toy_tokenizer(),
            rollouts=store,
        )
        again.train()
        assert keys_and_weights(again)[0] == keys
        assert keys_and_weights(again)[1] == pytest.approx(weights, abs=tolerance)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_repeated_prompts_have_the_objective_of_mirror_descent(mixture, tmp_path, beta):
    """On the completions of one epoch: the mean over its four visits, three of them of one prompt."""
    dataset = Dataset.from_dict({"prompt": REPEATED})
    options = {"estimator": "mis", "proposal": "reference", "tolerance": 0.0, "num_resamples": 10, "max_steps": 2}
    trainer = make_trainer(mixture, tmp_path, dataset=dataset, beta=beta, **options)
    trainer.train()
    rewards = torch.from_numpy(trainer.rollout_fit.columns["rewards"]).view(4, 4, 2)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    expected, _ = objectives.dual_objective(weights, normalize_rewards(rewards, beta) / beta)
    assert trainer.rollout_fit.loss(weights).item() == pytest.approx(expected.item(), abs=1e-6)


def test_resuming_within_an_epoch_knows_what_has_been_visited(toy_folder, tmp_path):
    def train(name, *callbacks, resume=None):
        model = MixturePolicyModel.from_policies(
            [toy_folder / label for label in LABELS], reference=toy_folder / "ref", labels=LABELS
        )
        trainer = make_trainer(
            model,
            tmp_path / name,
            dataset=Dataset.from_dict({"prompt": REPEATED * 2}),
            callbacks=list(callbacks),
            estimator="mis",
            tolerance=0.0,
            num_resamples=10,
            max_steps=8,  # two epochs of four steps
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = keys_and_weights(train("whole"))
    for step in (2, 4, 6):
        name = f"until-{step}"
        with pytest.raises(KeyboardInterrupt):
            train(name, Interrupt(step))
        assert keys_and_weights(train(name, resume=True)) == whole
    assert max(whole[0].count(key) for key in whole[0]) == 8


# ---- numbers that are none ----


@pytest.mark.parametrize("bad", [[1.0, math.nan], [math.inf, 1.0], [1.0, None], [1.0], [1.0, "high"], [1.0, 2.0, 3.0]])
def test_given_rewards_that_are_no_numbers_are_refused_with_their_row(mixture, tmp_path, bad):
    rows = {"prompt": PROMPTS, "completion": ["a b c"] * 4, "rewards": [[1.0, 2.0]] * 4}
    given = [dict(zip(rows, values)) for values in zip(*rows.values())]
    if all(isinstance(value, float) for value in bad) or None in bad:
        given[2]["rewards"] = bad
        position = 2
    else:  # a column of one type
        given = [{**row, "rewards": bad} for row in given]
        position = 0
    if "high" in bad:
        given = [{**row, "rewards": ["1.0", "high"]} for row in given]
    with pytest.raises(
        ValueError, match=rf"Row {position} of the rollouts has .* in the column 'rewards'.* pass `reward_funcs`"
    ):
        MPOTrainer(
            model=mixture,
            args=make_args(tmp_path, estimator="mis"),
            processing_class=toy_tokenizer(),
            rollouts=Dataset.from_list(given),
        )


@pytest.mark.parametrize("estimator", ["mis", "bsmd"])
def test_a_policy_that_gives_nan_is_named(mixture, tmp_path, monkeypatch, estimator):
    trainer = make_trainer(mixture, tmp_path, None, objective="implicit", estimator=estimator, max_steps=2)
    original = trainer.policy_logps

    def broken(completions):
        logps = original(completions).clone()
        logps[1, 1] = math.nan
        return logps

    monkeypatch.setattr(trainer, "policy_logps", broken)
    if trainer.rollout_fit is not None:
        object.__setattr__(trainer.rollout_fit.context, "policy_logps", broken)
    with pytest.raises(ValueError, match="policy of 'b' gives NaN"):
        trainer.train()
