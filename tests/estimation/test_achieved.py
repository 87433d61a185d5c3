"""The primal objective of mixtures of policies that are not optimal for their rewards, against enumerations."""

import pytest
import torch
from fits import make_trainer
from optima import UNIFORM, exact_optima, population
from scipy.optimize import minimize
from toy import PROMPTS, TabularPolicy, reward_functions

from mpo_hf import MixturePolicyModel, MPOConfig
from mpo_hf.estimation import (
    Constrained,
    CVaR,
    MaxMin,
    MixtureTable,
    WeightedSum,
    certify_primal,
    maximize_primal,
    minimize_dual,
    primal_objective,
    reward_table,
)


BETA = 0.2
STARTS = [UNIFORM, *(0.7 * torch.eye(3, dtype=torch.float64) + 0.1)]


class World:
    """All completions of all prompts; policies are optimal for their rewards up to noise in their log-probabilities."""

    def __init__(self, seed: int, noise: float):
        enumeration, rewards = population(seed, BETA)
        self.reference, self.rewards = enumeration.reference, rewards
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(rewards.shape, generator=generator, dtype=torch.float64)
        self.policies = (enumeration.policies + noise * drawn).log_softmax(1)
        # every completion once: a uniform proposal
        self.prompt = torch.arange(rewards.shape[0]).repeat_interleave(rewards.shape[1])
        density = torch.full((len(self.prompt),), 1 / rewards.shape[1], dtype=torch.float64).log()
        reference, advantages = self.reference.flatten(), (rewards / BETA).flatten(0, 1)
        self.dual = reward_table(self.prompt, advantages, reference, density, normalize=False)
        ratios = self.policies.flatten(0, 1) - density.unsqueeze(-1)
        self.table = MixtureTable(self.prompt, advantages, ratios, reference - density)

    def reached(self, weights) -> tuple[torch.Tensor, float]:
        """Gains and divergence of a mixture, by sums over all completions."""
        mixture = (self.policies @ torch.as_tensor(weights, dtype=torch.float64)).log_softmax(1)
        gains = torch.einsum("py,pyk->k", mixture.exp(), self.rewards / BETA) / len(mixture)
        return gains, (mixture.exp() * (mixture - self.reference)).sum(-1).mean().item()


def test_welfare_is_that_of_sums_over_all_completions():
    world = World(0, 0.7)
    for weights in ([0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.7, 0.9, -0.6]):
        gains, divergence = world.reached(weights)
        found, of_prompts = world.table.measure(torch.tensor(weights, dtype=torch.float64))
        torch.testing.assert_close(found.mean(0), gains)
        assert of_prompts.mean().item() == pytest.approx(divergence)
        value = primal_objective(world.table, torch.tensor(weights, dtype=torch.float64), MaxMin())
        assert value.item() == pytest.approx(gains.min().item() - divergence)


@pytest.mark.parametrize(
    "welfare",
    [MaxMin(), WeightedSum([0.2, 0.2, 0.6]), CVaR(0.5, UNIFORM), Constrained(MaxMin(), [1], 10.0)],
    ids=lambda welfare: type(welfare).__name__,
)
@pytest.mark.parametrize("seed", range(2))
def test_maximum_is_that_of_another_solver(welfare, seed):
    world = World(seed, 0.7)
    weights, value = maximize_primal(world.table, welfare, STARTS)
    assert value.item() == pytest.approx(primal_objective(world.table, weights, welfare).item(), abs=1e-12)

    def negative(logits):
        gains, divergence = world.reached(torch.tensor(logits).softmax(-1))
        return divergence - welfare.value(gains).item()

    options = {"maxiter": 600, "xatol": 1e-7, "fatol": 1e-10}
    others = [minimize(negative, start.log().numpy(), method="Nelder-Mead", options=options) for start in STARTS]
    assert value.item() >= -min(other.fun for other in others) - 5e-5


def test_optimal_policies_leave_nothing_to_gain():
    world = World(0, 0.0)
    (dual,), (bound,) = minimize_dual(world.dual)
    weights, value = maximize_primal(world.table, MaxMin(), STARTS)
    assert value.item() == pytest.approx(bound.item(), abs=5e-5)
    torch.testing.assert_close(weights, dual, atol=5e-3, rtol=0)
    certificate = certify_primal(world.dual, world.table, weights, MaxMin(), num_resamples=5)
    assert 0 <= certificate.duality_gap < 5e-5 and certificate.of_mixture


def test_certificate_bounds_what_any_policy_could_gain():
    world = World(1, 0.7)
    weights, value = maximize_primal(world.table, MaxMin(), STARTS)
    _, (bound,) = minimize_dual(world.dual)
    rewards = world.rewards.flatten(0, 1)
    certificate = certify_primal(world.dual, world.table, weights, MaxMin(), rewards, num_resamples=30)
    assert certificate.duality_gap == pytest.approx(bound.item() - value.item(), abs=1e-9)
    assert certificate.duality_gap_bound > certificate.duality_gap > 0.01
    torch.testing.assert_close(certificate.mixture_rewards, world.reached(weights)[0] * BETA)
    assert (certificate.standard_errors > 0).all() and certificate.weights is weights


@pytest.mark.integration
@pytest.mark.parametrize("proposal", ["mixture", pytest.param("reference", marks=pytest.mark.slow)])
def test_fit_finds_the_best_mixture_of_policies_that_are_not_optimal(tmp_path, proposal):
    enumeration, rewards = exact_optima(2, BETA)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(enumeration.policies.shape, generator=generator, dtype=torch.float64)
    spread = torch.tensor([2.0, 0.5, 0.5], dtype=torch.float64)  # the first policy is far from its optimum
    policies = (enumeration.policies + spread * noise).log_softmax(1)
    mixture = MixturePolicyModel.from_policies(
        [TabularPolicy(logps) for logps in policies.unbind(-1)], reference=TabularPolicy(enumeration.reference)
    )
    trainer = make_trainer(
        mixture,
        tmp_path,
        reward_functions(rewards, enumeration.completions),
        estimator="mis",
        objective="achieved",
        mixing="sequence",
        proposal=proposal,
        normalize_rewards=False,
        beta=BETA,
        num_generations=128,
        per_device_train_batch_size=512,
        per_device_eval_batch_size=512,
        logps_batch_size=1024,
        max_steps=8,
        num_resamples=10,
    )
    trainer.train()
    prompt = torch.arange(len(PROMPTS)).repeat_interleave(rewards.shape[1])
    density = torch.full((len(prompt),), 1 / rewards.shape[1], dtype=torch.float64).log()
    ratios = policies.flatten(0, 1) - density.unsqueeze(-1)
    reference = enumeration.reference.flatten() - density
    exact = MixtureTable(prompt, (rewards / BETA).flatten(0, 1), ratios, reference)
    _, best = maximize_primal(exact, MaxMin(), STARTS)
    start = primal_objective(exact, UNIFORM, MaxMin())
    found = primal_objective(exact, trainer.weights.detach(), MaxMin())
    assert best - start > 0.05
    assert best - found < 0.1 * (best - start)
    assert trainer.certificate.of_mixture
    logged = trainer.state.log_history[-2]
    assert logged["welfare"] == pytest.approx(found.item(), abs=0.3) and "dual_objective" not in logged
    trainer.evaluate(trainer.train_dataset)
    evaluated = trainer.state.log_history[-1]
    assert evaluated["eval_welfare"] == pytest.approx(-evaluated["eval_loss"], abs=1e-4)
    assert evaluated["eval_welfare"] == pytest.approx(found.item(), abs=1.5)


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({"estimator": "bsmd"}, '`objective="achieved"` needs `estimator="mis"`'),
        ({"welfare": "nash", "mixing": "sequence"}, "needs a max-min, a weighted sum or CVaR; got welfare='nash'"),
        ({"mixing": "sequence", "free_sum": True}, '`free_sum=True` needs `mixing="token"`'),
        ({"mixing": "words"}, "`mixing` must be one of"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, options, needs):
    with pytest.raises(ValueError, match=needs):
        MPOConfig(output_dir=str(tmp_path), objective="achieved", **options)


@pytest.mark.parametrize("options", [{"mixing": "token"}, {"free_sum": True}])
def test_options_of_it_are_refused_for_the_theorem(tmp_path, options):
    with pytest.raises(ValueError, match='needs `objective="achieved"`'):
        MPOConfig(output_dir=str(tmp_path), objective="reward", **options)
