"""Where the numbers of an evaluation go: what `evaluate` returns, callbacks, and the choice of the best checkpoint."""

import pytest
import torch
from datasets import Dataset
from fits import make_trainer
from toy import LENGTH, PROMPTS
from transformers import EarlyStoppingCallback, TrainerCallback


EVALUATED = Dataset.from_dict({"prompt": PROMPTS[:2]})
OTHERS = Dataset.from_dict({"prompt": PROMPTS[2:]})


class Seen(TrainerCallback):
    """The rewards that each evaluation passes to callbacks."""

    def __init__(self):
        self.rewards = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.rewards.append({name: value for name, value in metrics.items() if "rewards/" in name})


def rewards_of(trainer, monkeypatch) -> dict[str, float]:
    """Means of the rewards that the trainer measures from now on, by objective; a dictionary that fills up."""
    found = {"a": [], "b": []}
    score = type(trainer).score_rewards

    def record(self, inputs, completions, objectives=None):
        rewards = score(self, inputs, completions, objectives)
        for name, values in zip(found, rewards.unbind(-1)):
            found[name] += values.tolist()
        return rewards

    monkeypatch.setattr(type(trainer), "score_rewards", record)
    return found


@pytest.mark.parametrize("estimator", ["mis", "bsmd"])
def test_evaluate_returns_what_it_measures_of_the_completions(mixture, tmp_path, monkeypatch, estimator):
    seen = Seen()
    trainer = make_trainer(mixture, tmp_path, eval_dataset=EVALUATED, callbacks=[seen], estimator=estimator)
    found = rewards_of(trainer, monkeypatch)
    metrics = trainer.evaluate()
    means = {f"eval_rewards/{name}": sum(values) / len(values) for name, values in found.items()}
    assert all(len(values) == 2 * 4 for values in found.values())
    assert {name: metrics[name] for name in means} == pytest.approx(means)
    assert seen.rewards == [pytest.approx(means)]
    assert metrics["eval_completions/mean_length"] == LENGTH
    (logged,) = trainer.state.log_history
    assert {name: logged[name] for name in means} == pytest.approx(means)


def test_every_prefix_has_its_own_numbers(mixture, tmp_path):
    """Several datasets, a prefix of the caller, and `predict`; nothing is left for the log of the fit."""
    first = make_trainer(mixture, tmp_path, eval_dataset=EVALUATED, seed=1)
    expected = first.evaluate()
    trainer = make_trainer(mixture, tmp_path, eval_dataset={"near": EVALUATED, "far": OTHERS}, seed=1)
    metrics = trainer.evaluate()
    assert metrics["eval_near_rewards/a"] == expected["eval_rewards/a"]
    assert {"eval_far_rewards/a", "eval_far_rewards/b", "eval_near_rewards/b"} <= set(metrics)
    assert "eval_rewards/a" not in metrics
    assert {"test_rewards/a", "test_loss"} <= set(trainer.evaluate(EVALUATED, metric_key_prefix="test"))
    output = trainer.predict(EVALUATED)
    assert {"test_rewards/a", "test_loss"} <= set(output.metrics) and output.predictions is None
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 6 and all(not name.startswith(("eval", "test")) for entry in steps for name in entry)


def test_an_entry_of_the_caller_takes_nothing_from_that_of_the_step(mixture, tmp_path):
    class Talkative(TrainerCallback):
        trainer = None

        def on_step_end(self, args, state, control, **kwargs):
            self.trainer.log({"mine": 1.0})

    talkative = Talkative()
    trainer = make_trainer(mixture, tmp_path, callbacks=[talkative], max_steps=2)
    talkative.trainer = trainer
    output = trainer.train()
    entries = trainer.state.log_history
    assert [set(entry) - {"step", "epoch"} for entry in entries if "mine" in entry] == [{"mine"}] * 2
    assert all("rewards/a" in entry for entry in entries if "loss" in entry)
    assert output.metrics["weights/a"] == trainer.model.config.mixture_weights[0]


@pytest.mark.parametrize("estimator", ["mis", "bsmd"])
def test_rewards_choose_the_best_checkpoint(mixture, tmp_path, estimator):
    seen = Seen()
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_rewards/a"}
    trainer = make_trainer(
        mixture,
        tmp_path,
        eval_dataset=EVALUATED,
        callbacks=[seen, EarlyStoppingCallback(early_stopping_patience=100)],
        estimator=estimator,
        load_best_model_at_end=True,
        proposal="mixture",
        tolerance=0,
        **options,
    )
    trainer.train()
    values = [rewards["eval_rewards/a"] for rewards in seen.rewards]
    assert len(values) == 6 and len(set(values)) > 1
    assert trainer.state.best_metric == max(values)
    assert trainer.state.best_global_step == 1 + values.index(max(values))


class PrefersStep(TrainerCallback):
    """Gives every evaluation a number that is the largest at one step."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_preference"] = -abs(state.global_step - self.step)


@pytest.mark.parametrize("estimator, welfare", [("mis", "max_min"), ("mis", "nash"), ("bsmd", "max_min")])
def test_everything_speaks_of_the_weights_of_the_best_step(mixture, tmp_path, estimator, welfare):
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_preference"}
    options |= {"load_best_model_at_end": True, "greater_is_better": True, "tolerance": 0, "welfare": welfare}
    trainer = make_trainer(
        mixture, tmp_path, eval_dataset=EVALUATED, callbacks=[PrefersStep(3)], estimator=estimator, beta=2.0, **options
    )
    trainer.train()
    trainer.save_model()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    best, last = ([steps[i][f"weights/{name}"] for name in "ab"] for i in (2, -1))
    assert best != last
    assert trainer.weights.tolist() == trainer.fitted_weights().tolist() == best
    assert trainer.model.config.mixture_weights[:2] == best
    card = (tmp_path / "README.md").read_text()
    assert all(f"{weight:.4f}" in card for weight in best)
    assert "The weights are those of step 3, the best one by `eval_preference`." in card
    if estimator == "mis":
        certificate, table = trainer.certificate, trainer.rollout_fit.estimator.table
        assert len(table.prompt) == 6 * 8  # all completions, those of later steps too
        assert certificate.weights.tolist() == best
        by_prompt, _ = table.by_prompt(torch.tensor([best], dtype=torch.float64))
        assert certificate.dual_objective == pytest.approx(by_prompt.mean().item())
        assert certificate.duality_gap > 0
        assert trainer.rollout_fit.effective_sample_fraction == pytest.approx(
            table.effective_sample_fractions(trainer.weights.detach()).mean().item()
        )
