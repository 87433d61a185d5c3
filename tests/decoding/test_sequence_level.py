"""Decoding from the sequence-level mixture, against policies whose every completion can be enumerated."""

import itertools

import pytest
import torch
from helpers import CLOSE, PAD, close, left_pad, pooled_logps, tiny
from toy import LENGTH, PROMPTS, VOCAB_SIZE, TabularPolicy, toy_tokenizer
from transformers import DynamicCache, StoppingCriteria, TopKLogitsWarper

from mpo_hf import MixturePolicyModel, sequence_level_beam_search, sequential_monte_carlo
from mpo_hf.mixture.compat import CACHE_NAME


WEIGHTS = [0.5, 0.3, 0.2]
COMPLETIONS = torch.tensor(list(itertools.product(range(VOCAB_SIZE), repeat=LENGTH)))
PLACE_VALUES = VOCAB_SIZE ** torch.arange(LENGTH - 1, -1, -1)  # of tokens, in the index of a completion
PROMPT_IDS = torch.tensor(toy_tokenizer()(PROMPTS)["input_ids"])
END = 5
# for the tiny models: prompts of different lengths, and enough tokens that end a completion for rows to end early
LONG_AND_SHORT = [[1, 7, 11, 3, 22, 8, 14], [1, 30]]
ENDS = [2, 3, 8, 12, 17, 29]


@pytest.fixture(scope="module")
def mixture():
    """Three policies that agree on little."""
    generator = torch.Generator().manual_seed(0)
    tables = 5 * torch.randn(3, len(PROMPTS), len(COMPLETIONS), generator=generator, dtype=torch.float64)
    return MixturePolicyModel.from_policies([TabularPolicy(t.log_softmax(-1)) for t in tables], WEIGHTS)


def generate(model, input_ids=None, **kwargs):
    settings = {"custom_generate": sequential_monte_carlo, "do_sample": True, "top_k": 0, "max_new_tokens": LENGTH}
    settings |= {"input_ids": input_ids, "return_dict_in_generate": True, "pad_token_id": PAD}
    return model.generate(**{**settings, **kwargs})


@torch.no_grad()
def enumerate_mixture(model, prompt, end=None, weights=WEIGHTS, temperature=1.0, banned=()):
    """log Π_k π_k(y)^λ_k of all completions, not normalized, and their token-level log-probabilities."""
    ids = torch.cat([prompt.expand(len(COMPLETIONS), -1), COMPLETIONS], dim=1)
    logits = [model.policy(k)(ids).logits[:, len(prompt) - 1 : -1].double() for k in range(len(weights))]
    steps = sum(weight * policy.log_softmax(-1) for weight, policy in zip(weights, logits)) / temperature
    steps[..., list(banned)] = -torch.inf
    padding = after_end(COMPLETIONS, end)
    exists = ~(padding & (COMPLETIONS != PAD)).any(-1)
    logps = [s.gather(-1, COMPLETIONS[..., None]).squeeze(-1) for s in (steps, steps.log_softmax(-1))]
    return [logp.masked_fill(padding, 0).sum(-1).masked_fill(~exists, -torch.inf) for logp in logps]


def after_end(completions, end):
    ends = (completions == (-1 if end is None else end)).long()
    return ends.cumsum(-1) - ends > 0


def places(completions, end=None):
    """Which of all completions they are."""
    return (completions.masked_fill(after_end(completions, end), PAD) * PLACE_VALUES[: completions.shape[-1]]).sum(-1)


def shares(completions, weights=None):
    """How often each completion occurs."""
    counts = torch.bincount(places(completions), weights, minlength=len(COMPLETIONS)).double()
    return counts / counts.sum()


def total_variation(p, q):
    return (p - q).abs().sum().item() / 2


# ---- the distribution ----


@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("ess_threshold", [0, 0.7, 1])
def test_particles_follow_the_sequence_level_mixture_of_each_prompt(mixture, ess_threshold, end):
    torch.manual_seed(0)
    n, prompts = 80000, PROMPT_IDS[:2]
    output = generate(mixture, prompts, num_particles=n, ess_threshold=ess_threshold, eos_token_id=end)
    assert torch.equal(output.particles[..., :2], prompts[:, None].expand(-1, n, -1))
    for row, prompt in enumerate(prompts):
        exact, token_level = (logps.softmax(0) for logps in enumerate_mixture(mixture, prompt, end))
        assert total_variation(exact, token_level) > 0.4
        weighted = shares(output.particles[row, :, 2:], output.log_weights[row].softmax(-1))
        assert total_variation(weighted, exact) < 0.02


@pytest.mark.parametrize("ess_threshold", [0, 0.7])
def test_returned_completions_come_closer_with_more_particles(mixture, ess_threshold):
    torch.manual_seed(0)
    exact, token_level = (logps.softmax(0) for logps in enumerate_mixture(mixture, PROMPT_IDS[0], END))
    prompts = PROMPT_IDS[:1].expand(4000, -1)
    distances = []
    for n in (1, 8, 64):
        output = generate(mixture, prompts, num_particles=n, ess_threshold=ess_threshold, eos_token_id=END)
        distances.append(total_variation(shares(output.sequences[:, 2:]), exact))
    # one particle is the token-level mixture, and no number of such completions comes closer
    assert distances[0] == pytest.approx(total_variation(exact, token_level), abs=0.02)
    assert distances[1] < distances[0] / 2
    assert distances[2] < 0.04


def test_several_completions_are_drawn_from_the_particles_of_their_prompt(mixture):
    torch.manual_seed(0)
    n = 80000
    output = generate(mixture, PROMPT_IDS[:2], num_particles=n, num_return_sequences=n, eos_token_id=END)
    for row, drawn in enumerate(output.sequences.view(2, n, -1)[..., 2:]):
        assert total_variation(shares(drawn), enumerate_mixture(mixture, PROMPT_IDS[row], END)[0].softmax(0)) < 0.02


@pytest.mark.parametrize("ess_threshold", [0, 0.7, 1])
def test_the_estimate_of_the_normalizer_is_unbiased(mixture, ess_threshold):
    torch.manual_seed(0)
    prompts = PROMPT_IDS.repeat_interleave(4000, 0)
    output = generate(mixture, prompts, num_particles=4, ess_threshold=ess_threshold, eos_token_id=END)
    estimates = output.log_normalizer.exp().view(len(PROMPT_IDS), -1)
    for prompt, estimate in zip(PROMPT_IDS, estimates):
        exact = enumerate_mixture(mixture, prompt, END)[0].logsumexp(0).exp()
        error = estimate.std() / len(estimate) ** 0.5
        assert error < 0.05 * exact
        assert abs(estimate.mean() - exact) < 4 * error


@pytest.mark.parametrize(
    "arguments, target",
    [
        ({"temperature": 1.5}, {"temperature": 1.5}),
        ({"proposal_temperature": 1.3}, {}),
        ({"proposal_temperature": 0.8, "temperature": 1.5}, {"temperature": 1.5}),
        ({"suppress_tokens": [1, 3]}, {"banned": [1, 3]}),
        ({"mixture_weights": [0.1, 0.2, 0.7]}, {"weights": [0.1, 0.2, 0.7]}),
    ],
    ids=str,
)
def test_arguments_change_the_target_as_documented(mixture, arguments, target):
    torch.manual_seed(0)
    prompt = PROMPT_IDS[2]
    output = generate(mixture, prompt[None], num_particles=80000, ess_threshold=0.7, eos_token_id=END, **arguments)
    exact, token_level = enumerate_mixture(mixture, prompt, END, **target)
    weighted = shares(output.particles[0, :, 2:], output.log_weights[0].softmax(-1))
    assert total_variation(weighted, exact.softmax(0)) < 0.02
    assert total_variation(token_level.softmax(0), exact.softmax(0)) > 0.1
    assert output.log_normalizer.item() == pytest.approx(exact.logsumexp(0).item(), abs=0.05)


# ---- real models ----


def check_log_weights(output, components, weights):
    """Σ_t log Z_t of every particle, computed anew for every prefix."""
    for row, (prompt, particles) in enumerate(zip(LONG_AND_SHORT, output.particles)):
        for particle, log_weight in zip(particles[:, len(LONG_AND_SHORT[0]) :].tolist(), output.log_weights[row]):
            length = next((i for i, token in enumerate(particle) if token in ENDS), len(particle) - 1) + 1
            assert set(particle[length:]) <= {PAD}
            prefixes = [prompt + particle[:t] for t in range(length)]
            expected = pooled_logps(components, weights[row], prefixes).logsumexp(-1).sum()
            assert log_weight.item() == close(expected.item())


@torch.no_grad()
def test_weights_are_those_of_the_definition(case):
    torch.manual_seed(0)
    inputs = left_pad(LONG_AND_SHORT)
    settings = {**inputs, "max_new_tokens": 6, "eos_token_id": ENDS, "num_particles": 4, "ess_threshold": 0}
    output = generate(case.model, num_return_sequences=3, **settings)
    check_log_weights(output, case.components, [case.weights] * 2)
    assert torch.equal(output.particles[..., :7], inputs["input_ids"][:, None].expand(-1, 4, -1))
    for row, sequence in enumerate(output.sequences):
        assert (output.particles[row // 3] == sequence).all(-1).any()


@torch.no_grad()
def test_weights_by_call_and_by_row(cases):
    case = cases("llama+gpt2")
    settings = {**left_pad(LONG_AND_SHORT), "max_new_tokens": 5, "eos_token_id": ENDS, "ess_threshold": 0}
    # as many weights as rows, which are no weights by row
    for given, by_row in [([0.2, 0.8], [[0.2, 0.8]] * 2), ([[0.9, 0.1], [0.3, 0.7]],) * 2]:
        output = generate(case.model, mixture_weights=given, num_return_sequences=2, **settings)
        check_log_weights(output, case.components, by_row)


@pytest.mark.parametrize("way", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}])
def test_caches_follow_their_particles(case, way):
    inputs = left_pad(LONG_AND_SHORT)
    settings = {**inputs, "max_new_tokens": 8, "eos_token_id": [], "num_particles": 5, "ess_threshold": 1}
    outputs = []
    for kwargs in ({}, way):
        torch.manual_seed(1)
        outputs.append(generate(case.model, **settings, **kwargs))
    assert torch.equal(outputs[0].particles, outputs[1].particles)
    torch.testing.assert_close(outputs[0].log_weights, outputs[1].log_weights, **CLOSE)
    # resampled before every token, so that no weight is above another
    assert (outputs[0].log_weights == outputs[0].log_weights[:, :1]).all()


def test_a_single_policy_is_sampled_as_ever():
    model = MixturePolicyModel.from_policies([tiny("llama", 3)])
    settings = {**left_pad(LONG_AND_SHORT), "max_new_tokens": 8, "eos_token_id": ENDS}
    torch.manual_seed(0)
    output = generate(model, num_particles=6, **settings)
    torch.manual_seed(0)
    plain = generate(model, num_return_sequences=6, custom_generate=None, **settings)
    assert torch.equal(output.particles.flatten(0, 1), plain.sequences)
    assert output.log_weights.abs().max() < CLOSE["atol"]
    assert output.log_normalizer.abs().max() < CLOSE["atol"]
    assert output.effective_sample_size.tolist() == pytest.approx([6, 6])


class EndsWith(StoppingCriteria):
    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], self.tokens)


def test_stopping_criteria_end_particles(cases):
    case = cases("llama+gpt2")
    settings = {**left_pad(LONG_AND_SHORT), "max_new_tokens": 6, "num_particles": 8, "ess_threshold": 0}
    torch.manual_seed(0)
    output = generate(case.model, eos_token_id=[], stopping_criteria=[EndsWith(ENDS)], **settings)
    check_log_weights(output, case.components, [case.weights] * 2)
    torch.manual_seed(0)
    assert torch.equal(output.particles, generate(case.model, eos_token_id=ENDS, **settings).particles)


def test_a_prompt_may_continue_from_a_cache(cases):
    model = cases("llama+gpt2").model
    prompt = torch.tensor(LONG_AND_SHORT[:1])
    cache = model(prompt[:, :4], cache=DynamicCache(config=model.config), use_cache=True)[CACHE_NAME]
    torch.manual_seed(0)
    output = generate(model, prompt, cache=cache, max_new_tokens=6, ess_threshold=1)
    torch.manual_seed(0)
    assert torch.equal(output.particles, generate(model, prompt, max_new_tokens=6, ess_threshold=1).particles)


# ---- what is refused ----


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"do_sample": False}, "do_sample=True"),
        ({"top_k": 50}, "TopKLogitsWarper.*`top_k=0`"),
        ({"top_p": 0.9}, "TopPLogitsWarper"),
        ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
        ({"renormalize_logits": True}, "LogitNormalization"),
        ({"logits_processor": [TopKLogitsWarper(3)]}, "TopKLogitsWarper"),
        ({"num_beams": 2}, "num_beams=2.*sequence_level_beam_search"),
        ({"output_scores": True}, "`output_scores`"),
        ({"num_particles": 0}, "`num_particles`.* got 0"),
        ({"num_particles": 2.5}, "`num_particles`.* got 2.5"),
        ({"ess_threshold": 1.5}, "`ess_threshold`.* got 1.5"),
        ({"proposal_temperature": 0}, "`proposal_temperature`.* got 0"),
        ({"cache": DynamicCache(), "num_return_sequences": 2}, f"`{CACHE_NAME}`.*num_return_sequences=2"),
        ({"suppress_tokens": list(range(VOCAB_SIZE))}, "prompt 0.*no token may follow"),
        ({"custom_generate": sequence_level_beam_search}, "`num_beams`.* got 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_change_the_distribution_is_refused(mixture, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(mixture, PROMPT_IDS[:1], **kwargs)


def test_models_that_are_no_mixture_are_refused():
    for method in (sequential_monte_carlo, sequence_level_beam_search):
        with pytest.raises(ValueError, match="LlamaForCausalLM has none"):
            generate(tiny("llama", 3), PROMPT_IDS[:1], custom_generate=method)


# ---- beams ----


def search(model, input_ids=None, **kwargs):
    settings = {"custom_generate": sequence_level_beam_search, "num_beams": 36, "do_sample": False}
    settings |= {"input_ids": input_ids, "output_scores": True}
    return generate(model, **{**settings, "length_penalty": 0.0, **kwargs})


@pytest.mark.parametrize("end", [None, END])
def test_beams_find_the_most_likely_completions(mixture, end):
    output = search(mixture, PROMPT_IDS, num_return_sequences=3, eos_token_id=end)
    stock = search(mixture, PROMPT_IDS, custom_generate=None, eos_token_id=end)
    found, scores = output.sequences.view(len(PROMPT_IDS), 3, -1)[..., 2:], output.sequences_scores.view(-1, 3)
    differ = 0
    for row, prompt in enumerate(PROMPT_IDS):
        exact, token_level = enumerate_mixture(mixture, prompt, end)
        best = exact.topk(3)
        # by their places, for beam search pads with the end token where the pad token is 0
        assert places(found[row], end).tolist() == best.indices.tolist()
        assert scores[row].tolist() == close(best.values.tolist())
        stock_place = places(stock.sequences[row, 2:], end)
        assert stock_place == token_level.argmax()
        differ += stock_place.item() != best.indices[0].item()
    assert differ > 0


@torch.no_grad()
def test_scores_of_beams_are_those_of_the_sequence_level_mixture(case):
    settings = {**left_pad(LONG_AND_SHORT), "num_beams": 3, "num_return_sequences": 2}
    output = search(case.model, max_new_tokens=6, eos_token_id=ENDS, **settings)
    for row, (sequence, score) in enumerate(zip(output.sequences[:, 7:].tolist(), output.sequences_scores)):
        length = next((i for i, token in enumerate(sequence) if token in ENDS), len(sequence) - 1) + 1
        prompt = LONG_AND_SHORT[row // 2]
        logps = pooled_logps(case.components, case.weights, [prompt + sequence[:t] for t in range(length)])
        expected = logps.gather(1, torch.tensor(sequence[:length])[:, None]).sum()
        assert score.item() == close(expected.item())
