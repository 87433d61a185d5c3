"""The estimators, fed with every completion at once and its exact probability: then they must be exact."""

import math

import pytest
import torch
from helpers import close
from toy import enumerate_completions, toy_policy

from mpo_hf.estimation.objectives import (
    dual_objective,
    effective_sample_size,
    implicit_dual_objective,
    on_policy_objective,
)
from mpo_hf.rewards import normalize_rewards


@pytest.fixture(scope="module")
def enumeration():
    reference = toy_policy(100, 0.5)
    return enumerate_completions([toy_policy(k, 0.3, reference) for k in (1, 2, 3)], reference)


@pytest.fixture
def weights():
    return torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)


def exact_gradient(enumeration, weights):
    """∂F/∂λ_k = E_{y~π_λ} [a_k], by summing over all completions."""
    advantages = enumeration.policies - enumeration.reference.unsqueeze(-1)
    mixture = torch.softmax(enumeration.policies @ weights.detach(), dim=-1)
    return torch.einsum("py,pyk->k", mixture, advantages) / len(advantages)


def test_dual_objective_is_exact_on_an_enumeration(enumeration, weights):
    advantages = enumeration.policies - enumeration.reference.unsqueeze(-1)
    # a uniform proposal over all completions: the ratio to it is the reference itself, up to a constant
    value, log_weights = dual_objective(weights, advantages, enumeration.reference)
    assert value.item() == pytest.approx(enumeration.dual(weights.detach()))
    value.backward()
    torch.testing.assert_close(weights.grad, exact_gradient(enumeration, weights))
    mixture = torch.softmax(enumeration.policies @ weights.detach(), dim=-1)
    torch.testing.assert_close(torch.softmax(log_weights.detach(), -1), mixture)


def test_implicit_dual_objective_is_exact_on_an_enumeration(enumeration, weights):
    count = enumeration.policies.shape[1]
    uniform = torch.full_like(enumeration.reference, -math.log(count))
    value, _ = implicit_dual_objective(weights, enumeration.policies, uniform)
    assert value.item() == pytest.approx(enumeration.dual(weights.detach()))
    value.backward()
    # the reference shifts all entries alike, which a step on the simplex does not see
    expected = exact_gradient(enumeration, weights)
    torch.testing.assert_close(weights.grad - weights.grad.mean(), expected - expected.mean())


def test_on_policy_objective_is_exact_for_optimal_policies(enumeration, weights):
    count = enumeration.policies.shape[1]
    uniform = torch.full_like(enumeration.reference, -math.log(count))
    advantages = enumeration.policies - enumeration.reference.unsqueeze(-1)
    value, _ = on_policy_objective(
        weights, advantages, enumeration.policies @ weights.detach(), uniform, enumeration.reference
    )
    assert value.item() == pytest.approx(enumeration.dual(weights.detach()))
    value.backward()
    torch.testing.assert_close(weights.grad, exact_gradient(enumeration, weights))


def test_on_policy_objective_is_below_the_dual_for_other_policies(enumeration, weights):
    count = enumeration.policies.shape[1]
    uniform = torch.full_like(enumeration.reference, -math.log(count))
    rewards = (enumeration.policies - enumeration.reference.unsqueeze(-1)).roll(1, dims=1)
    value, _ = on_policy_objective(
        weights, rewards, enumeration.policies @ weights.detach(), uniform, enumeration.reference
    )
    assert value.item() < enumeration.dual(weights.detach(), rewards)


def test_dual_is_zero_at_every_vertex_and_negative_inside(enumeration):
    assert [enumeration.dual(w) for w in torch.eye(3)] == close([0, 0, 0])
    assert enumeration.dual([1 / 3] * 3) < -0.01


def test_normalized_rewards_make_the_dual_zero_at_every_vertex():
    torch.manual_seed(0)
    rewards = torch.randn(4, 16, 3).double()
    normalized = normalize_rewards(rewards, beta=0.3) / 0.3
    for vertex in torch.eye(3).double():
        assert dual_objective(vertex, normalized)[0].item() == pytest.approx(0, abs=1e-9)


def test_effective_sample_size_counts_equal_weights():
    assert effective_sample_size(torch.zeros(10)).item() == pytest.approx(10)
    log_weights = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf])
    assert effective_sample_size(log_weights + 7).item() == pytest.approx(2)
    weights = torch.tensor([[1.0, 2.0, 3.0]])
    assert effective_sample_size(weights.log()).item() == pytest.approx(36 / 14)
