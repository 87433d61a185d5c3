"""Fits by default: what the mixture reaches as it is decoded, against sums over all completions."""

import math

import pytest
import torch
from datasets import Dataset
from decoded_worlds import DecodedWorld
from optima import ALL_PROMPTS
from toy import LENGTH, reward_functions, toy_tokenizer

from mpo_hf import MixturePolicyModel, MPOConfig, MPOTrainer
from mpo_hf.rollouts import sample_completions


BETA = 0.2
UNIFORM = [1 / 3] * 3
SHORT = {"max_completion_length": LENGTH, "report_to": "none"}


def make_trainer(world: DecodedWorld, folder, dataset=None, weights=None, rollouts=None, **kwargs) -> MPOTrainer:
    """A fit with the default objective, proposal and estimator."""
    rewards = reward_functions(world.rewards, world.completions, ALL_PROMPTS)
    prompts = Dataset.from_dict({"prompt": ALL_PROMPTS}) if dataset is None else dataset
    return MPOTrainer(
        model=MixturePolicyModel.from_policies(world.models, weights=weights, reference=world.reference_model),
        reward_funcs=rewards,
        args=MPOConfig(
            output_dir=str(folder),
            **{
                "beta": BETA,
                "num_generations": 64,
                "per_device_train_batch_size": 768,
                "logps_batch_size": 1024,
                "max_steps": 12,
                "max_completion_length": LENGTH,
                "save_strategy": "no",
                "disable_tqdm": True,
                "report_to": "none",
                **kwargs,
            },
        ),
        train_dataset=None if rollouts is not None else prompts,
        processing_class=toy_tokenizer(),
        rollouts=rollouts,
    )


@pytest.mark.parametrize("kind", ["optimal", "undertrained", "other_beta"])
def test_default_fit_reaches_the_best_weights_of_a_grid(tmp_path, kind):
    """Within 2% of what the best weights of a grid gain over the worst of uniform weights and the reference."""
    world = DecodedWorld(seed=0, beta=BETA, kind=kind)
    trainer = make_trainer(world, tmp_path, tolerance=0.0, max_steps=18)
    trainer.train()
    best = world.best_on_grid(40)
    base = min(world.welfare(UNIFORM), BETA * (world.reached_by(world.reference)[0].min()).item())
    found = world.welfare(trainer.model.config.mixture_weights)
    assert (best - found) / (best - base) < 0.02, (found, best, base, trainer.model.config.mixture_weights)
    exact, divergence = world.reached(trainer.model.config.mixture_weights)
    certificate = trainer.certificate
    assert certificate.optimality_gap_bound >= (best - found) / BETA
    assert certificate.divergence == pytest.approx(divergence.item(), abs=4 * certificate.divergence_error)
    assert 0 < trainer.summary().expansion_error < 0.05
    fitted = trainer.comparisons["fitted"]
    assert fitted.welfare == pytest.approx(found, abs=4 * fitted.welfare_error)


def test_fit_is_about_the_temperature_of_the_generation_config(tmp_path):
    world = DecodedWorld(seed=3, beta=BETA, kind="other_beta")
    trainer = make_trainer(world, tmp_path, tolerance=0.0, temperature=0.6)
    assert trainer.args.temperature == 0.6
    trainer.train()
    found = trainer.model.config.mixture_weights
    grid = [(i / 20, j / 20, 1 - (i + j) / 20) for i in range(21) for j in range(21 - i)]
    best = max(world.welfare(point, 0.6) for point in grid)
    spread = best - min(world.welfare(point, 0.6) for point in grid)
    assert best - world.welfare(found, 0.6) < 0.02 * spread
    gains, divergence = world.reached(found, 0.6)
    assert trainer.certificate.divergence == pytest.approx(
        divergence.item(), abs=4 * trainer.certificate.divergence_error
    )


def test_temperature_is_that_of_the_generation_config(tmp_path):
    world = DecodedWorld(seed=0, beta=BETA, kind="optimal")
    model = MixturePolicyModel.from_policies(world.models, reference=world.reference_model)
    model.generation_config.temperature = 0.7
    rewards = reward_functions(world.rewards, world.completions, ALL_PROMPTS)
    arguments = {
        "reward_funcs": rewards,
        "train_dataset": Dataset.from_dict({"prompt": ALL_PROMPTS}),
        "processing_class": toy_tokenizer(),
    }
    trainer = MPOTrainer(model=model, args=MPOConfig(str(tmp_path / "a"), **SHORT), **arguments)
    assert trainer.args.temperature == 0.7
    args = MPOConfig(str(tmp_path / "b"), objective="reward", **SHORT)
    assert MPOTrainer(model=model, args=args, **arguments).args.temperature == 1.0


@pytest.mark.parametrize(
    ("option", "value", "way_out"),
    [
        ("top_p", 0.9, "pass `top_p=1.0`"),
        ("top_k", 50, "pass `top_k=0`"),
        ("min_p", 0.1, "set `model.generation_config.min_p = None`"),
        ("repetition_penalty", 1.1, "set `model.generation_config.repetition_penalty = 1.0`"),
    ],
)
def test_decoding_that_cannot_be_fitted_is_refused_with_the_way_out(tmp_path, option, value, way_out):
    world = DecodedWorld(seed=0, beta=BETA, kind="optimal")
    model = MixturePolicyModel.from_policies(world.models, reference=world.reference_model)
    setattr(model.generation_config, option, value)
    arguments = {
        "model": model,
        "reward_funcs": reward_functions(world.rewards, world.completions, ALL_PROMPTS),
        "train_dataset": Dataset.from_dict({"prompt": ALL_PROMPTS}),
        "processing_class": toy_tokenizer(),
    }
    with pytest.raises(ValueError, match=f"has {option}={value}.*{way_out}"):
        MPOTrainer(args=MPOConfig(str(tmp_path), **SHORT), **arguments)
    MPOTrainer(args=MPOConfig(str(tmp_path), **SHORT, top_k=0, top_p=1.0, objective="reward"), **arguments)
    if option in ("top_k", "top_p"):
        MPOTrainer(args=MPOConfig(str(tmp_path), **SHORT, top_k=0, top_p=1.0), **arguments)
    with pytest.raises(ValueError, match="fitted for sampling without truncation"):
        MPOConfig(str(tmp_path), top_p=0.9)


def test_free_sum_is_better_than_the_simplex_for_undertrained_policies(tmp_path):
    world = DecodedWorld(seed=1, beta=BETA, kind="undertrained")
    trainer = make_trainer(world, tmp_path, tolerance=0.0, free_sum=True, max_steps=15)
    trainer.train()
    weights = trainer.model.config.mixture_weights
    assert len(weights) == 4 and sum(weights) == pytest.approx(1) and weights[3] < -0.1
    assert world.welfare(weights) > world.best_on_grid(20)
    ids = trainer.model.generate(torch.tensor([[0, 1]]), do_sample=True, max_new_tokens=3, pad_token_id=0)
    assert ids.shape == (1, 5)


def test_completions_of_single_policies_and_of_the_reference_are_drawn_to_compare_with(tmp_path):
    world = DecodedWorld(seed=0, beta=BETA, kind="optimal")
    trainer = make_trainer(world, tmp_path, num_generations=16, per_device_train_batch_size=64, max_steps=2)
    trainer.train()
    columns = trainer.rollout_fit.columns
    counts = dict(zip(columns.proposals, torch.bincount(torch.from_numpy(columns["proposal"]).long()).tolist()))
    assert counts[tuple(UNIFORM)] == 112 and counts[()] == 8
    singles = [counts[tuple(corner)] for corner in torch.eye(3).tolist()]
    assert sum(singles) == 16 and min(singles) >= 4
    assert len(columns.prompts) == 8


def test_fit_to_completions_of_the_reference_finds_the_same_weights(tmp_path):
    """Given completions without normalizers are scored; they come from the reference, far from the mixture."""
    world = DecodedWorld(seed=0, beta=BETA, kind="other_beta")
    drawn = torch.multinomial(world.reference.exp(), 200, replacement=True, generator=torch.Generator().manual_seed(0))
    rows = [(prompt, index) for prompt, indices in enumerate(drawn.tolist()) for index in indices]
    data = Dataset.from_dict(
        {
            "prompt": [ALL_PROMPTS[prompt] for prompt, _ in rows],
            "completion_ids": [world.completions[index].tolist() for _, index in rows],
            "completion": ["" for _ in rows],
        }
    )
    trainer = make_trainer(world, tmp_path, rollouts=data, per_device_train_batch_size=1024)
    trainer.train()
    best = world.best_on_grid(40)
    spread = best - BETA * world.reached_by(world.reference)[0].min().item()
    assert best - world.welfare(trainer.model.config.mixture_weights) < 0.05 * abs(spread)


def test_gains_are_relative_to_the_reference_and_to_each_own_policy(tmp_path):
    world = DecodedWorld(seed=0, beta=BETA, kind="other_beta")
    trainer = make_trainer(world, tmp_path, normalize_rewards="gain", tolerance=0.0)
    trainer.train()
    found = trainer.comparisons
    for k, name in enumerate(trainer.objective_names):
        assert found[f"policy {name}"].gains[k].item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(found["reference"].gains, torch.zeros(3, dtype=torch.float64))


def test_infeasible_nash_names_the_objective(tmp_path):
    """The third policy is worse than the reference on an objective that all others lower, too."""
    world = DecodedWorld(seed=0, beta=BETA, kind="optimal")
    world.rewards[..., 2] = -world.rewards[..., :2].sum(-1)
    trainer = make_trainer(world, tmp_path, welfare="nash", num_generations=16, per_device_train_batch_size=576)
    trainer.model.mixture_weights = [0.45, 0.45, 0.1]
    trainer.args.max_steps = 2
    with pytest.raises(ValueError, match="reward_"):
        trainer.train()
    assert trainer.certificate is None


def test_scorer_and_sampler_agree_on_normalizers():
    world = DecodedWorld(seed=0, beta=BETA, kind="other_beta")
    model = MixturePolicyModel.from_policies(world.models, reference=world.reference_model)
    from mpo_hf.rollouts.scoring import CompletionScorer

    torch.manual_seed(0)
    weights = torch.tensor([0.5, 0.3, 0.2])
    drawn = sample_completions(model, [[0, 1], [2, 3]], 5, LENGTH, 0, None, 0.8, weights, with_normalizers=True)
    scorer = CompletionScorer([model.policy(k) for k in range(3)])
    policy_logps, packed = scorer.normalizers(drawn, weights.tolist(), 0.8)
    torch.testing.assert_close(policy_logps, drawn.policy_logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed, drawn.normalizers, atol=1e-5, rtol=1e-5)
    assert math.isclose(packed[0, 0].item(), 0.5 / 0.8, rel_tol=1e-6)
