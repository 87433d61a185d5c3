import math

import pytest
import torch

from mpo_hf.estimation.optim import MirrorDescent, entropic_mirror_step


def simplex(*values):
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_step_is_the_exponentiated_gradient_update():
    weights, grad, lr = simplex(0.2, 0.3, 0.5), [1.0, -2.0, 0.5], 0.7
    optimizer = MirrorDescent([weights], lr=lr)
    weights.grad = torch.tensor(grad, dtype=torch.float64)
    optimizer.step()
    unnormalized = [w * math.exp(-lr * g) for w, g in zip([0.2, 0.3, 0.5], grad)]
    expected = [u / sum(unnormalized) for u in unnormalized]
    torch.testing.assert_close(weights.detach(), torch.tensor(expected, dtype=torch.float64))


def test_step_solves_its_proximal_problem():
    point, grad = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5]).double()

    def value(w):
        return 0.7 * (grad * w).sum() + (w * (w / point).log()).sum()

    best = entropic_mirror_step(point.log(), grad, 0.7).exp()
    torch.manual_seed(0)
    others = torch.distributions.Dirichlet(torch.ones(3).double()).sample((500,))
    assert all(value(best) <= value(other) for other in others)


def test_average_is_the_mean_of_all_iterates():
    weights = simplex(0.5, 0.5)
    optimizer = MirrorDescent([weights], lr=0.3)
    assert torch.equal(optimizer.average(weights), weights.detach())
    iterates = []
    for g in (1.0, -0.4, 2.0):
        weights.grad = torch.tensor([g, 0.0], dtype=torch.float64)
        optimizer.step()
        iterates.append(weights.detach().clone())
    torch.testing.assert_close(optimizer.average(weights), torch.stack(iterates).mean(0))


def test_state_dict_carries_the_weights_themselves():
    def steps(weights, optimizer, grads):
        for g in grads:
            weights.grad = torch.tensor([g, 0.0, 0.1], dtype=torch.float64)
            optimizer.step()

    whole = simplex(0.2, 0.3, 0.5)
    whole_optimizer = MirrorDescent([whole], lr=0.5)
    steps(whole, whole_optimizer, [1.0, -1.5, 0.3, 2.0])

    first = simplex(0.2, 0.3, 0.5)
    first_optimizer = MirrorDescent([first], lr=0.5)
    steps(first, first_optimizer, [1.0, -1.5])
    second = simplex(1 / 3, 1 / 3, 1 / 3)
    second_optimizer = MirrorDescent([second], lr=0.5)
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    assert torch.equal(second, first)
    steps(second, second_optimizer, [0.3, 2.0])
    assert torch.equal(second, whole)
    assert torch.equal(second_optimizer.average(second), whole_optimizer.average(whole))


def test_a_weight_that_underflows_comes_back():
    weights = simplex(0.5, 0.5)
    optimizer = MirrorDescent([weights], lr=1.0)
    for grad in (900.0, -1800.0):
        weights.grad = torch.tensor([grad, 0.0], dtype=torch.float64)
        optimizer.step()
    assert weights[0] == 1.0


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.5, 0.6), (-0.1, 1.1), (float("nan"), 1.0)])
def test_points_outside_the_simplex_are_refused(values):
    with pytest.raises(ValueError, match="inside the simplex"):
        MirrorDescent([simplex(*values)])


def test_negative_step_size_is_refused():
    with pytest.raises(ValueError, match="step size"):
        MirrorDescent([simplex(0.5, 0.5)], lr=-1.0)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    weights = simplex(0.5, 0.5)
    optimizer = MirrorDescent([weights], lr=1.0)
    weights.grad = torch.tensor([float("nan"), 0.0], dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="nan"):
        optimizer.step()
    assert weights.tolist() == [0.5, 0.5]
