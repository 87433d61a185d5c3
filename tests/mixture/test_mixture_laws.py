"""Laws that every mixture obeys, whatever its components are. Written once, checked on every kind."""

import itertools

import pytest
import torch
from helpers import ADAPTER_KINDS, CLOSE, MEMORY_KINDS, PROMPTS, VOCAB, left_pad, pooled_logps, tiny
from transformers import DynamicCache, StaticCache

from mpo_hf import MixturePolicyModel
from mpo_hf.mixture.compat import CACHE_NAME
from mpo_hf.mixture.pooling import log_normalizer


@torch.no_grad()
def all_logits(components, ids, weights):
    """Pooled log-probabilities of every position of one unpadded batch, from the components themselves."""
    logps = [component(input_ids=ids, use_cache=False).logits.double().log_softmax(-1) for component in components]
    return sum(weight * logp for weight, logp in zip(weights, logps)).float()


@pytest.fixture
def ids():
    return torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_logits_are_the_weighted_sum_of_log_probabilities(case, ids):
    logits = case.model(ids).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, all_logits(case.components, ids, case.weights), **CLOSE)


@torch.no_grad()
def test_weight_one_on_a_component_is_that_component(case, ids):
    for k, component in enumerate(case.components):
        weights = [float(i == k) for i in range(len(case.components))]
        alone = component(input_ids=ids).logits.log_softmax(-1)
        torch.testing.assert_close(case.model(ids, mixture_weights=weights).logits, alone, **CLOSE)
        torch.testing.assert_close(case.model.policy(k)(ids).logits, alone, **CLOSE)


@torch.no_grad()
def test_components_disagree_so_that_mixing_matters(case, ids):
    # the laws above would hold for copies of one model as well
    logps = [component(input_ids=ids).logits.log_softmax(-1) for component in case.components]
    for one, other in itertools.combinations(logps, 2):
        assert (one.argmax(-1) != other.argmax(-1)).float().mean() > 0.1
        assert (one - other).abs().mean() > 0.2


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma3"])
def test_identical_components_give_the_component(architecture, ids):
    model = tiny(architecture, 1)
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.6, 0.4], [1.0, 0.0, 0.0]])
    mixture = MixturePolicyModel.from_policies([model, tiny(architecture, 1), model])
    expected = model(ids).logits.log_softmax(-1)
    torch.testing.assert_close(mixture(ids).logits, expected, **CLOSE)
    torch.testing.assert_close(mixture(ids, mixture_weights=weights).logits, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_order_of_components_does_not_matter_in_memory(kind, cases, ids):
    case = cases(kind)
    backwards = MixturePolicyModel.from_policies(case.components[::-1], case.weights[::-1])
    torch.testing.assert_close(backwards(ids).logits, case.model(ids).logits, **CLOSE)
    torch.testing.assert_close(
        backwards.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None),
        case.model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None),
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_order_of_components_does_not_matter_on_file(kind, cases, ids):
    case = cases(kind)
    backwards = MixturePolicyModel.from_policies(case.model.config.components[::-1], case.weights[::-1])
    torch.testing.assert_close(backwards(ids).logits, case.model(ids).logits, **CLOSE)


@torch.no_grad()
def test_token_level_mixture_times_its_normalisers_is_the_product_of_policies(case):
    # π_tok(y)·W(y) = Π_k π_k(y)^λ_k for every y, so the sums over all y agree: exp F(λ) of one prompt
    prompt = PROMPTS[2]
    completions = torch.tensor(list(itertools.product(range(VOCAB), repeat=2)))
    ids = torch.cat([torch.tensor(prompt).expand(len(completions), -1), completions], 1)

    def of_tokens(logps):
        return logps[:, len(prompt) - 1 : -1].gather(-1, completions.unsqueeze(-1)).squeeze(-1).sum(-1)

    pooled = case.model(ids).logits.double()
    tokens = of_tokens(pooled.log_softmax(-1))
    log_w = log_normalizer(pooled)[:, len(prompt) - 1 : -1].sum(-1)
    policies = [of_tokens(c(input_ids=ids).logits.double().log_softmax(-1)) for c in case.components]
    product = sum(weight * policy for weight, policy in zip(case.weights, policies))
    torch.testing.assert_close(tokens + log_w, product, **CLOSE)
    torch.testing.assert_close(tokens.logsumexp(0), torch.zeros((), dtype=torch.float64), **CLOSE)
    dual = product.logsumexp(0)
    torch.testing.assert_close((tokens.exp() * log_w.exp()).sum(), dual.exp(), **CLOSE)
    assert dual < -0.01  # F < 0 inside the simplex, where policies differ


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[9], [4, 5], [1] * 9, [6, 1, 2]], ids=str)
def test_cached_equals_uncached(case, chunks, ids):
    expected = all_logits(case.components, ids, case.weights)
    cache, logits = None, []
    for chunk in ids.split(chunks, dim=1):
        output = case.model(chunk, cache=cache, use_cache=True)
        cache = output[CACHE_NAME]
        logits.append(output.logits)
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(torch.cat(logits, 1), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("make", ["dynamic", "growing", "static"])
def test_every_stock_cache_gives_the_same_logits(case, make, ids):
    config = case.model.config
    cache = {
        "dynamic": lambda: DynamicCache(config=config),
        "growing": DynamicCache,
        "static": lambda: StaticCache(config=config, max_cache_len=12),
    }[make]()
    mask = torch.ones(3, 5, dtype=torch.long)
    logits = [case.model(ids[:, :5], attention_mask=mask, cache=cache).logits]
    for t in range(5, 9):
        mask = torch.ones(3, t + 1, dtype=torch.long)
        logits.append(case.model(ids[:, t : t + 1], attention_mask=mask, cache=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), all_logits(case.components, ids, case.weights), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_batched_equals_one_by_one(case, use_cache):
    expected = pooled_logps(case.components, case.weights, PROMPTS).float()
    batch = case.model(**left_pad(PROMPTS), use_cache=use_cache).logits[:, -1]
    torch.testing.assert_close(batch, expected, **CLOSE)
    alone = [case.model(torch.tensor([prompt]), use_cache=use_cache).logits[:, -1] for prompt in PROMPTS]
    torch.testing.assert_close(batch, torch.cat(alone), **CLOSE)


@torch.no_grad()
def test_left_padded_rows_continue_from_a_cache_as_if_alone(case):
    tokens = [[4, 9, 17], [28, 2, 2], [13, 5, 21]]
    inputs, cache = left_pad(PROMPTS), None
    mask, new = inputs["attention_mask"], inputs["input_ids"]
    for step in range(4):
        output = case.model(new, attention_mask=mask, cache=cache, use_cache=True)
        prefixes = [prompt + row[:step] for prompt, row in zip(PROMPTS, tokens)]
        expected = pooled_logps(case.components, case.weights, prefixes).float()
        torch.testing.assert_close(output.logits[:, -1], expected, **CLOSE)
        cache = output[CACHE_NAME]
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        new = torch.tensor([row[step : step + 1] for row in tokens]) if step < 3 else None


@torch.no_grad()
def test_right_padding_does_not_reach_the_tokens_before_it(case, ids):
    mask = torch.ones_like(ids)
    mask[0, 6:], mask[1, 3:] = 0, 0
    logits = case.model(ids, attention_mask=mask).logits
    expected = all_logits(case.components, ids, case.weights)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **CLOSE)


@torch.no_grad()
def test_cache_can_be_reordered_selected_and_repeated(case, ids):
    prompt, last = ids[:, :6], ids[:, 6:7]
    expected = all_logits(case.components, ids[:, :7], case.weights)[:, -1]

    def filled():
        return case.model(prompt, use_cache=True)[CACHE_NAME]

    order = torch.tensor([2, 0, 1])
    order = torch.tensor([2, 0, 1])
    changes = [
        ("reorder_cache", order, order),
        ("batch_select_indices", order[:2], order[:2]),
        ("batch_repeat_interleave", 2, torch.tensor([0, 0, 1, 1, 2, 2])),
    ]
    for change, argument, rows in changes:
        cache = filled()
        getattr(cache, change)(argument)
        logits = case.model(last[rows], cache=cache).logits[:, -1]
        torch.testing.assert_close(logits, expected[rows], **CLOSE)


@torch.no_grad()
def test_static_cache_can_be_reset_and_used_again(case, ids):
    cache = StaticCache(config=case.model.config, max_cache_len=12)
    first = case.model(ids, cache=cache).logits
    cache.reset()
    again = case.model(ids, cache=cache).logits
    torch.testing.assert_close(again, first, **CLOSE)


@torch.no_grad()
def test_growing_cache_can_be_cropped(case, ids):
    cache = case.model(ids, cache=DynamicCache())[CACHE_NAME]
    cache.crop(-3)
    assert cache.get_seq_length() == 6
    logits = case.model(ids[:, 6:], cache=cache).logits
    torch.testing.assert_close(logits, all_logits(case.components, ids, case.weights)[:, 6:], **CLOSE)
