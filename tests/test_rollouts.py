import itertools

import pytest
import torch
from toy import LENGTH, PROMPTS, VOCAB_SIZE, enumerate_completions, sequence_logps, toy_policy, toy_tokenizer

from mpo_hf import MixturePolicyModel
from mpo_hf.rollouts import completion_logps, sample_completions, tokenize_prompts


@pytest.fixture(scope="module")
def policies():
    reference = toy_policy(100, 0.5)
    return [toy_policy(1, 0.3, reference), toy_policy(2, 0.3, reference)]


@pytest.fixture(scope="module")
def mixture(policies):
    return MixturePolicyModel.from_policies(policies, weights=[0.3, 0.7])


def sample(policy, prompts, m, **kwargs):
    ids = tokenize_prompts(prompts, toy_tokenizer())
    return sample_completions(policy, ids, m, LENGTH, pad_token_id=0, **kwargs)


def token_level_mixture(policies, weights, prompt_ids, temperature=1.0):
    """Probability of every completion under token-level mixing, by the definition."""
    table = {}
    with torch.no_grad():
        for completion in itertools.product(range(VOCAB_SIZE), repeat=LENGTH):
            ids = torch.tensor([[*prompt_ids, *completion]])
            pooled = sum(w * p(ids).logits.double().log_softmax(-1) for p, w in zip(policies, weights)) / temperature
            steps = pooled.log_softmax(-1)[0, len(prompt_ids) - 1 : -1]
            table[completion] = steps.gather(-1, torch.tensor(completion)[:, None]).sum().item()
    return table


@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_samples_follow_the_token_level_mixture(policies, mixture, temperature):
    torch.manual_seed(0)
    n = 20000
    completions = sample(mixture, PROMPTS[:1], n, temperature=temperature)
    exact = token_level_mixture(policies, [0.3, 0.7], completions.prompt_ids[0].tolist(), temperature)
    counts = dict.fromkeys(exact, 0)
    for row in completions.id_lists():
        counts[tuple(row)] += 1
    # Pearson's statistic over completions expected at least five times; 0.999 quantile by the normal approximation
    expected = {y: n * torch.tensor(logp).exp().item() for y, logp in exact.items()}
    cells = [(counts[y], e) for y, e in expected.items() if e >= 5]
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    assert statistic < len(cells) + 3.1 * (2 * len(cells)) ** 0.5


def test_sampling_ignores_the_models_own_generation_config_and_leaves_it_alone(mixture):
    own = mixture.generation_config
    own.top_k, own.temperature, own.do_sample = 1, 0.1, True
    torch.manual_seed(0)
    assert len({tuple(row) for row in sample(mixture, PROMPTS[:1], 64).id_lists()}) > 10
    assert mixture.generation_config is own
    own.top_k, own.temperature, own.do_sample = None, None, None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_definition(policies, mixture, temperature):
    torch.manual_seed(0)
    completions = sample(mixture, PROMPTS[:2], 5, temperature=temperature)
    views = [mixture.policy(k) for k in range(2)]
    logps = completion_logps(views, completions, batch_size=3)
    torch.testing.assert_close(logps, completion_logps(views, completions, batch_size=1000))
    for row in range(10):
        prompt, completion = completions.prompt_ids[row].tolist(), completions.completion_ids[row]
        expected = [sequence_logps(policy, prompt, completion[None])[0].item() for policy in policies]
        assert logps[row].tolist() == pytest.approx(expected, abs=1e-4)
        assert completions.pooled_logps[row].item() == pytest.approx(0.3 * expected[0] + 0.7 * expected[1], abs=1e-4)
        if row % 5 == 0:
            table = token_level_mixture(policies, [0.3, 0.7], prompt, temperature)
        assert completions.proposal_logps[row].item() == pytest.approx(table[tuple(completion.tolist())], abs=1e-4)


def test_padding_and_end_tokens_do_not_count(policies):
    policy = MixturePolicyModel.from_policies(policies[:1])
    torch.manual_seed(0)
    ids = [[1, 2], [1, 2, 3, 4]]
    completions = sample_completions(policy, ids, 6, 5, pad_token_id=0, eos_token_id=[5])
    assert completions.prompt_mask[0].tolist() == [0, 0, 1, 1]
    lengths = completions.completion_mask.sum(-1)
    assert lengths.min() < 5  # some ended early, or the rest shows nothing
    for row, length in zip(completions.completion_ids.tolist(), lengths.tolist()):
        assert 5 not in row[: length - 1]
        assert length == 5 or row[length - 1] == 5
    logps = completion_logps([policy], completions)
    for row in range(12):
        expected = sequence_logps(policies[0], ids[row // 6], torch.tensor([completions.id_lists()[row]]))
        assert logps[row, 0].item() == pytest.approx(expected.item(), abs=1e-4)
        assert completions.proposal_logps[row].item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_free_weight_takes_token_level_to_sequence_level(policies):
    """DESIGN: Π_k π_k(y)^λ_k = π_tok(y) · W(y), so that Σ_y π_tok(y) W(y) is exp of the dual objective."""
    enumeration = enumerate_completions(policies, policies[0], PROMPTS[:1])
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    prompt = toy_tokenizer()(PROMPTS[:1])["input_ids"][0]
    table = token_level_mixture(policies, [0.3, 0.7], prompt)
    token_level = torch.tensor([table[tuple(y)] for y in enumeration.completions.tolist()])
    log_w = enumeration.policies[0] @ weights - token_level
    assert (log_w <= 1e-9).all()
    assert torch.logsumexp(token_level + log_w, 0).item() == pytest.approx(enumeration.dual(weights), abs=1e-5)
