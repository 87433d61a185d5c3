"""Log-linear pooling of next-token distributions, checked against the definition written out."""

import math
import weakref

import pytest
import torch
from helpers import CLOSE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpo_hf.mixture import pooling
from mpo_hf.mixture.pooling import log_linear_pool, log_normalizer


def random_logits(count=3, rows=4, length=5, vocab=7, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(rows, length, vocab, generator=generator).to(dtype) for _ in range(count)]


def test_pool_is_the_weighted_sum_of_log_probabilities():
    logits, weights = random_logits(), torch.tensor([0.2, 0.5, 0.3])
    expected = sum(w * x.double().log_softmax(-1) for w, x in zip(weights.double(), logits))
    torch.testing.assert_close(log_linear_pool(logits, weights), expected.float(), **CLOSE)


def test_pool_is_not_renormalized_and_its_normalizer_is_the_lost_mass():
    logits, weights = random_logits(), torch.tensor([0.2, 0.5, 0.3])
    products = torch.stack([x.softmax(-1) ** w for w, x in zip(weights, logits)]).prod(0)
    pooled = log_linear_pool(logits, weights)
    torch.testing.assert_close(log_normalizer(pooled), products.sum(-1).log(), **CLOSE)
    torch.testing.assert_close(pooled.softmax(-1), products / products.sum(-1, keepdim=True), **CLOSE)
    assert (log_normalizer(pooled) < -0.05).all()


def test_normalizer_is_zero_where_all_components_agree():
    (logits,) = random_logits(count=1)
    pooled = log_linear_pool([logits, logits + 3.0], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(log_normalizer(pooled), torch.zeros(4, 5), **CLOSE)
    torch.testing.assert_close(pooled, logits.log_softmax(-1), **CLOSE)


def test_weights_may_be_numbers():
    logits, weights = random_logits(), [0.2, 0.5, 0.3]
    torch.testing.assert_close(
        log_linear_pool(logits, weights), log_linear_pool(logits, torch.tensor(weights)), **CLOSE
    )


def test_weights_by_row_pool_every_row_with_its_own():
    logits = random_logits()
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
    pooled = log_linear_pool(logits, weights)
    for row, own in enumerate(weights):
        alone = log_linear_pool([x[row : row + 1] for x in logits], own)
        torch.testing.assert_close(pooled[row : row + 1], alone, **CLOSE)


def test_logits_of_any_rank_are_pooled_over_their_last_dimension():
    logits, weights = random_logits(), torch.tensor([0.2, 0.5, 0.3])
    pooled = log_linear_pool(logits, weights)
    torch.testing.assert_close(log_linear_pool([x[:, -1] for x in logits], weights), pooled[:, -1], **CLOSE)
    torch.testing.assert_close(log_linear_pool([x[0, -1] for x in logits], weights), pooled[0, -1], **CLOSE)


def test_impossible_token_stays_impossible_unless_its_component_has_no_weight():
    sure, open_minded = torch.tensor([[0.0, -torch.inf, 0.0]]), torch.tensor([[0.1, 0.2, 0.3]])
    pooled = log_linear_pool([sure, open_minded], torch.tensor([0.5, 0.5]))
    assert pooled[0, 1] == -torch.inf and pooled[0, [0, 2]].isfinite().all()
    assert log_normalizer(pooled).isfinite().all()
    for weights in (torch.tensor([0.0, 1.0]), [0.0, 1.0]):
        without = log_linear_pool([sure, open_minded], weights)
        torch.testing.assert_close(without, open_minded.log_softmax(-1), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_pooled_in_float32(dtype):
    logits, weights = random_logits(dtype=dtype), torch.tensor([0.2, 0.5, 0.3])
    pooled = log_linear_pool(logits, weights)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, log_linear_pool([x.float() for x in logits], weights), **CLOSE)


def test_float64_logits_keep_their_precision():
    logits, weights = random_logits(dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    pooled = log_linear_pool(logits, weights)
    expected = sum(w * x.log_softmax(-1) for w, x in zip(weights, logits))
    assert pooled.dtype == torch.float64
    torch.testing.assert_close(pooled, expected, rtol=1e-14, atol=1e-14)


def test_negative_weights_subtract_a_component():
    expert, amateur = random_logits(count=2)
    pooled = log_linear_pool([expert, amateur], torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(pooled, 2 * expert.log_softmax(-1) - amateur.log_softmax(-1), **CLOSE)


def by_loop(logits, weights, plausibility=0.0):
    """The pool of single rows by Python numbers: any component with a weight can rule a token out."""
    rows = []
    for distributions in zip(*(x.double().softmax(-1).tolist() for x in logits)):
        least = plausibility * max(distributions[0])
        row = []
        for v, probabilities in enumerate(zip(*distributions)):
            used = [(w, p) for w, p in zip(weights, probabilities) if w != 0]
            out = any(p == 0 for _, p in used) or distributions[0][v] < least
            row.append(-math.inf if out else sum(w * math.log(p) for w, p in used))
        rows.append(row)
    return torch.tensor(rows)


RULED_OUT = [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)]


@pytest.mark.parametrize("weights", [[1.0, 0.7, -0.7], [1.5, -0.5, 0.0], [-1.0, -1.0, 3.0], [0.2, 0.5, 0.3]])
@pytest.mark.parametrize("form", ["numbers", "tensor", "by row", "differentiated", "compiling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_what_a_component_of_any_sign_rules_out_is_out(weights, form, dtype, monkeypatch):
    logits = [x[:, 0].clone() for x in random_logits(rows=6, dtype=dtype)]
    for row, components in enumerate(RULED_OUT):  # token 2, by other components in each row
        for k in components:
            logits[k][row, 2] = -torch.inf
    expected = by_loop(logits, weights)
    assert expected.isneginf().any() and not expected.isneginf().all(-1).any()
    given = weights if form in ("numbers", "differentiated") else torch.tensor(weights)
    if form == "by row":
        given = given.expand(6, -1)
    if form == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if form == "differentiated":
        logits = [x.requires_grad_() for x in logits]
    pooled = log_linear_pool(logits, given)
    torch.testing.assert_close(pooled.detach(), expected.float(), **CLOSE)
    assert log_normalizer(pooled).isfinite().all()


@pytest.mark.parametrize("form", ["numbers", "tensor", "differentiated", "compiling"])
def test_a_component_that_rules_out_everything_leaves_nothing(form, monkeypatch):
    logits = [x[:, 0].clone() for x in random_logits(count=2)]
    expected = by_loop(logits, [0.4, 0.6]).float()
    logits[1][2], expected[2] = -torch.inf, -torch.inf
    logits[0][3, 4], expected[3] = torch.nan, torch.nan  # no number is no ruling
    if form == "differentiated":
        logits = [x.requires_grad_() for x in logits]
    if form == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    pooled = log_linear_pool(logits, [0.4, 0.6] if form == "numbers" else torch.tensor([0.4, 0.6]))
    torch.testing.assert_close(pooled.detach(), expected, equal_nan=True, **CLOSE)


def test_gradients_are_finite_where_tokens_are_ruled_out():
    logits = [x[:, 0] for x in random_logits(count=2, dtype=torch.float64)]
    logits[1][:, 2] = -torch.inf
    kept = [x.requires_grad_() for x in logits]
    weights = torch.tensor([1.5, -0.5], dtype=torch.float64, requires_grad=True)
    log_normalizer(log_linear_pool(kept, weights)).sum().backward()
    # the same from the tokens that are left; they keep their probabilities, so that ruled-out ones of the first count too
    left = [x.detach()[:, [0, 1, 3, 4, 5, 6]] for x in logits]
    own = torch.tensor([1.5, -0.5], dtype=torch.float64, requires_grad=True)
    lost = logits[0].detach().logsumexp(-1) - left[0].logsumexp(-1)
    (log_normalizer(log_linear_pool(left, own)) - own[0] * lost).sum().backward()
    torch.testing.assert_close(weights.grad, own.grad)
    assert all(x.grad.isfinite().all() for x in kept)


@pytest.mark.parametrize("weights", [[1.5, -0.5], torch.tensor([1.5, -0.5])], ids=["numbers", "tensor"])
def test_plausibility_rules_tokens_out_and_leaves_the_sum_of_the_others(weights):
    logits = [x[:, 0] for x in random_logits(count=2)]
    expected = by_loop(logits, [1.5, -0.5], plausibility=0.3)
    assert expected.isneginf().any(-1).all()
    pooled = log_linear_pool(logits, weights, plausibility=0.3)
    torch.testing.assert_close(pooled, expected.float(), **CLOSE)
    torch.testing.assert_close(log_normalizer(pooled), expected.exp().sum(-1).log().float(), **CLOSE)


@pytest.mark.parametrize("plausibility", [0.0, 0.1])
def test_a_component_is_let_go_before_the_next_is_asked_for(plausibility):
    before = []

    def components():
        for seed in range(3):
            (logits,) = random_logits(count=1, seed=seed)
            assert all(tensor() is None for tensor in before)
            before.append(weakref.ref(logits))
            yield logits
            del logits

    assert log_linear_pool(components(), torch.tensor([0.2, 0.5, 0.3]), plausibility).isfinite().any()
    assert len(before) == 3


class Storages(TorchDispatchMode):
    """Sizes in bytes of all storages that are made inside of it."""

    def __init__(self, *known):
        super().__init__()
        self.sizes = {tensor.untyped_storage().data_ptr(): 0 for tensor in known}
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes.setdefault(storage.data_ptr(), storage.nbytes())
                self.kept.append(storage)  # so that no other is put into its place
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], torch.full((4, 3), 1 / 3)], ids=["numbers", "by row"])
def test_nothing_but_the_result_is_of_the_size_of_the_logits(dtype, weights, monkeypatch):
    logits = random_logits(dtype=dtype)
    monkeypatch.setitem(pooling.CHUNK_NUMEL, "cpu", 2 * 7)
    with torch.no_grad(), Storages(*logits) as made:
        pooled = log_linear_pool(logits, weights)
        log_normalizer(pooled)
    sizes = sorted(made.sizes.values(), reverse=True)
    assert sizes[0] == pooled.numel() * 4
    assert sizes[1] <= 4 * 5 * 4  # log Z; parts are smaller


BY_ROW = torch.tensor([[0.2, 0.8, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize("at_a_time", [1, 2 * 7, 3 * 5 * 7, 10**6])
@pytest.mark.parametrize(
    "rank, weights", [(1, [0.2, 0.0, 0.8]), (2, torch.tensor([0.4, 0.6, 0.0])), (3, [0.2, 0.5, 0.3]), (3, BY_ROW)]
)
def test_parts_add_up_to_what_is_differentiated(at_a_time, rank, weights, monkeypatch):
    monkeypatch.setitem(pooling.CHUNK_NUMEL, "cpu", at_a_time)
    logits = [x[(0,) * (3 - rank)] for x in random_logits()]
    logits[0][..., 2] = -torch.inf
    if rank > 1:  # rows need not lie side by side in memory
        logits[2] = logits[2].mT.contiguous().mT
    expected = log_linear_pool([x.clone().requires_grad_() for x in logits], weights)
    assert expected.requires_grad
    found = log_linear_pool(logits, weights)
    assert torch.equal(found, expected)
    torch.testing.assert_close(log_normalizer(found), log_normalizer(expected), **CLOSE)


def test_gradients_reach_weights_and_logits():
    logits = [x.requires_grad_() for x in random_logits(count=2, dtype=torch.float64, rows=1, length=1)]
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, *x: log_normalizer(log_linear_pool(x, w)), (weights, *logits))


def test_gradient_of_the_normalizer_is_the_expected_log_probability():
    # ∂ log Z/∂λ_k = E_{v~π_λ}[log π_k(v)]
    logits = random_logits(count=3, dtype=torch.float64)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
    pooled = log_linear_pool(logits, weights)
    (gradient,) = torch.autograd.grad(log_normalizer(pooled).sum(), weights)
    mixture = pooled.detach().softmax(-1)
    expected = torch.stack([(mixture * x.log_softmax(-1)).sum() for x in logits])
    torch.testing.assert_close(gradient, expected)
