"""Fits of every welfare and scale by the trainer, against the exact optimum over all completions."""

import pytest
import torch
from fits import make_args, make_trainer, run_fit
from helpers import CLOSE
from optima import exact_optima
from transformers import AutoModelForCausalLM

from mpo_hf import MixturePolicyModel, MPOConfig
from mpo_hf.estimation import DualTable, minimize_dual
from mpo_hf.trainer.fit_problem import FitProblem


pytestmark = pytest.mark.integration
BETA = 0.2  # rewards over five nats


def exact_table(problem: FitProblem) -> DualTable:
    """The dual objective of all completions with their probabilities."""
    enumeration, rewards = exact_optima(2, BETA)
    num_prompts, num_completions, num_objectives = rewards.shape
    prompt = torch.arange(num_prompts).repeat_interleave(num_completions)
    density = torch.zeros(len(prompt), dtype=torch.float64)
    flat = rewards.reshape(-1, num_objectives)
    return problem.make_estimator(prompt, density, reference_logps=enumeration.reference.flatten(), rewards=flat).table


@pytest.mark.parametrize(
    "options",
    [
        {"welfare": "weighted_sum", "welfare_weights": [0.2, 0.3, 0.5]},
        {"welfare": "cvar", "cvar_level": 0.6, "normalize_rewards": "regret"},
        {"welfare": "nash"},
        {"welfare": "alpha_fair", "fairness_alpha": 3.0, "normalize_rewards": "win_rate"},
        {"welfare": "max_min", "normalize_rewards": "z_score", "beta": 1.5},  # in standard deviations
        {"constraints": {"reward_0": 0.55}, "normalize_rewards": False},
        {"constraints": {"reward_1": 0.7}, "normalize_rewards": "win_rate", "proposal": "mixture"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_fit_is_near_the_exact_optimum(tmp_path, options):
    options = dict(options)
    trainer = run_fit(
        tmp_path,
        "reward",
        options.pop("proposal", "reference"),
        options.pop("beta", BETA),
        num_generations=128,
        steps=12,
        estimator="mis",
        tolerance=0,
        num_resamples=10,
        **options,
    )
    problem = FitProblem(trainer.args, trainer.objective_names)
    table = exact_table(problem)
    (best,), (minimum,) = minimize_dual(table, welfare=problem.welfare)
    value, _ = table.by_prompt(torch.stack([trainer.weights.detach(), problem.welfare.start(3)]))
    gap, gap_at_start = (value.mean(0) - minimum).tolist()
    assert -1e-9 <= gap <= 0.15 * gap_at_start + 1e-3
    mixture_weights = torch.tensor(trainer.model.config.mixture_weights, dtype=torch.float64)
    assert mixture_weights.sum().item() == pytest.approx(1)
    torch.testing.assert_close(mixture_weights[:3], trainer.weights.detach())
    assert len(mixture_weights) == (3 if problem.welfare.on_simplex else 4)
    assert trainer.certificate.duality_gap == pytest.approx(0, abs=1e-6)
    # the policies are optimal for the rewards, not for their z-scores or win rates
    optimal = trainer.args.normalize_rewards not in ("z_score", "win_rate")
    assert (abs(trainer.certificate.mixture_duality_gap) < CLOSE["atol"]) == optimal


def test_what_leaves_the_simplex_is_a_mixture_with_the_reference(toy_folder, tmp_path):
    """Saved, resumed and opened like any other; the reference takes what the objectives leave."""
    policies = [toy_folder / "a", toy_folder / "b"]

    def trainer(steps):
        mixture = MixturePolicyModel.from_policies(policies, reference=toy_folder / "ref", labels=["a", "b"])
        options = {"estimator": "mis", "constraints": {"a": -1.0}, "proposal": "mixture", "num_resamples": 10}
        return make_trainer(mixture, tmp_path / "run", max_steps=steps, beta=2.0, tolerance=0, **options)

    whole = trainer(3)
    whole.train()
    weights = whole.model.config.mixture_weights
    assert whole.model.config.labels == ["a", "b", "reference"]
    assert weights[1] == pytest.approx(1) and weights[2] == pytest.approx(-weights[0])
    assert whole.state.log_history[-2]["weights/reference"] == pytest.approx(weights[2])
    again = trainer(3)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.model.config.mixture_weights == weights
    again.save_model()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        single = [AutoModelForCausalLM.from_pretrained(toy_folder / name)(ids).logits for name in ("a", "b", "ref")]
        pooled = sum(weight * logits.log_softmax(-1) for weight, logits in zip(weights, single))
        torch.testing.assert_close(opened(ids).logits, pooled, **CLOSE)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"welfare": "median"}, "must be one of"),
        ({"welfare": "nash", "normalize_rewards": "optimal"}, "needs gains above 0"),
        ({"welfare": "nash", "objective": "implicit"}, "on their own scale"),
        ({"welfare": "cvar", "estimator": "bsmd"}, 'need `estimator="mis"`'),
        ({"normalize_rewards": "z_score", "estimator": "bsmd"}, 'need `estimator="mis"`'),
        ({"welfare_weights": [0.5, 0.5]}, "A max-min has no `welfare_weights`"),
        ({"constraints": {"a": "high"}}, "must be a dictionary of objectives and minimum rewards"),
        ({"constraints": {"a": 1.0}, "welfare": "nash"}, "can be combined with max_min"),
        ({"tolerance": -1.0}, "at least 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        MPOConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"constraints": {"c": 1.0}}, r"names \['c'\], but the objectives are \['a', 'b'\]"),
        ({"constraints": {"a": 1.0, "b": 1.0}}, "at least one must be left"),
        ({"welfare": "cvar", "welfare_weights": [1.0]}, "Got 1 `welfare_weights` for 2 objectives"),
        ({"welfare": "weighted_sum", "welfare_weights": [1.0, 1.0]}, "with sum 1"),
    ],
)
def test_problems_that_do_not_fit_the_objectives_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FitProblem(make_args(tmp_path, **{"estimator": "mis", **options}), ["a", "b"])


def test_booleans_and_strings_name_the_scale(tmp_path):
    for given, scale in ((True, "optimal"), ("False", "none"), (None, "optimal"), ("regret", "regret")):
        assert MPOConfig(output_dir=str(tmp_path), normalize_rewards=given).normalize_rewards == scale
    assert MPOConfig(output_dir=str(tmp_path), welfare="nash").normalize_rewards == "reference"
    constraints = MPOConfig(output_dir=str(tmp_path), constraints='{"a": 0.5}').constraints
    assert constraints == {"a": 0.5}
