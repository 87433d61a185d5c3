import itertools

import pytest
import torch
from helpers import BOS, CLOSE, EOS, PAD, SIZES, VOCAB, close, load_lora, save_lora, save_tiny, tiny
from toy import LENGTH, PROMPTS, VOCAB_SIZE, enumerate_completions, sequence_logps, toy_policy, toy_tokenizer
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, Lfm2Config, Lfm2ForCausalLM

from mpo_hf import MixturePolicyModel
from mpo_hf.mixture import pooling
from mpo_hf.rollouts import (
    completion_logps,
    mixture_logps,
    pad_completions,
    pad_ids,
    sample_completions,
    tokenize_prompts,
)
from mpo_hf.rollouts.sampling import draw_tokens
from mpo_hf.rollouts.scoring import token_logps


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
    torch.testing.assert_close(logps, completion_logps(views, completions, batch_size=1000), **CLOSE)
    for row in range(10):
        prompt, completion = completions.prompt_ids[row].tolist(), completions.completion_ids[row]
        expected = [sequence_logps(policy, prompt, completion[None])[0].item() for policy in policies]
        assert logps[row].tolist() == close(expected)
        assert completions.pooled_logps[row].item() == close(0.3 * expected[0] + 0.7 * expected[1])
        if row % 5 == 0:
            table = token_level_mixture(policies, [0.3, 0.7], prompt, temperature)
        assert completions.proposal_logps[row].item() == close(table[tuple(completion.tolist())])


@pytest.mark.parametrize("size", [1, 2, 7, 16, 50])
def test_a_number_draws_the_token_that_it_falls_on_in_the_cumulative_distribution(size, monkeypatch):
    generator = torch.Generator().manual_seed(size)
    masses = torch.randint(0, 4, (size,), generator=generator) / 4  # many are 0, and no sum of them is rounded
    masses[-1 if size < 3 else size // 2] = 0.75
    numbers = torch.cat([torch.linspace(0, 1, 401, dtype=torch.float64)[:-1], torch.tensor([1 - 2.0**-53])])
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: numbers[:, None])
    drawn = draw_tokens(masses.log().expand(len(numbers), -1)).squeeze(-1)
    ends = (masses / masses.sum()).double().cumsum(0)
    for number, token in zip(numbers.tolist(), drawn.tolist()):
        assert masses[token] > 0
        assert ends[token] - masses[token] / masses.sum() - 1e-6 <= number <= ends[token] + 1e-6


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
        assert logps[row, 0].item() == close(expected.item())
        assert completions.proposal_logps[row].item() == close(expected.item())


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


# ---- scoring, against one forward pass of each completion without padding ----

SOME_PROMPTS = [[BOS, 7, 11, 3, 22, 8, 14], [BOS, 30], [BOS, 6, 6, 19, 27]]
SOME_COMPLETIONS = [
    [[4, 9, EOS], [21, 21, 5, 17, 28, 3], [EOS]],
    [[13, EOS], [5, 8, 9, 10, 11, 12, EOS], [30, 30, 4]],
    [[24, 3, 7, EOS], [6], [9, 9, 9, 9, EOS]],
]


def some_completions(prompts=SOME_PROMPTS, answers=SOME_COMPLETIONS, order=slice(None)):
    pairs = [(prompt, answer) for prompt, own in zip(prompts, answers) for answer in own]
    pairs = pairs[order]
    return pad_completions([p for p, _ in pairs], [a for _, a in pairs], PAD, "cpu"), pairs


def alone(models, pairs, weights=None, temperature=1.0):
    """Log-probabilities under Transformers' own models, a row and a model at a time; pooled if there are weights."""
    found = []
    with torch.no_grad():
        for prompt, answer in pairs:
            ids, targets = torch.tensor([prompt + answer]), torch.tensor(answer)[:, None]
            steps = [m(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in models]
            if weights is not None:
                steps = [(sum(w * s for w, s in zip(weights, steps)) / temperature).log_softmax(-1)]
            found.append([step.gather(-1, targets).sum().item() for step in steps])
    return torch.tensor(found, dtype=torch.float64)


class WithoutLastIds(torch.nn.Module):
    """A model over fewer token ids than it has."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        output = self.model(ids)
        output.logits = output.logits[..., :VOCAB]
        return output


def count_tokens(mixture, monkeypatch):
    """The shapes of the inputs that the embeddings of a mixture's first model are given from now on."""
    shapes, embeddings = [], mixture.get_input_embeddings()
    plain = embeddings.forward
    monkeypatch.setattr(embeddings, "forward", lambda ids: (shapes.append(tuple(ids.shape)), plain(ids))[1])
    return shapes


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters over a base and the base itself as policies that share it, and each as PEFT runs it alone."""
    folder = tmp_path_factory.mktemp("adapters")
    base = save_tiny(folder / "base", "llama", 20)
    loras = [save_lora(folder / f"adapter_{i}", base, 30 + i, r=2 + i) for i in range(2)]
    mixture = MixturePolicyModel.from_policies(loras)
    views = [mixture.policy(0), mixture.policy(1), mixture.reference_policy]
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    return views, [*(load_lora(lora, base) for lora in loras), plain], mixture


def lfm2(seed):
    """A model with states that are no keys and values, so that completions cannot go on from their prompt's."""
    torch.manual_seed(seed)
    layers = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
    return Lfm2ForCausalLM(Lfm2Config(**{**SIZES, "num_hidden_layers": 2}, **layers)).eval()


def gemma3n(seed):
    """A model of which some layers have no keys and values of their own, and no place in a cache."""
    torch.manual_seed(seed)
    config = Gemma3nTextConfig(
        **{**SIZES, "num_hidden_layers": 4, "intermediate_size": [32] * 4},
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        sliding_window=4,
        head_dim=8,
        vocab_size_per_layer_input=SIZES["vocab_size"],
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    return AutoModelForCausalLM.from_config(config).eval()


OTHERS = {"lfm2": lfm2, "gemma3n": gemma3n}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma3", *OTHERS])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_scores_are_those_of_each_completion_alone(architecture, batch_size):
    """Windows are shorter than the prompts; completions of one prompt are not adjacent."""
    models = [OTHERS[architecture](k) if architecture in OTHERS else tiny(architecture, k) for k in range(2)]
    mixture = MixturePolicyModel.from_policies(models, [0.3, 0.7])
    completions, pairs = some_completions(order=slice(None, None, -2))
    expected = alone(models, pairs)
    views = [mixture.policy(0), mixture.policy(1)]
    torch.testing.assert_close(completion_logps(views, completions, batch_size), expected, **CLOSE)
    found, pooled = mixture_logps(views, completions, [(0.3, 0.7), (1.0, 0.0)], 0.8, batch_size)
    torch.testing.assert_close(found, expected, **CLOSE)
    for column, weights in zip(pooled.T, [(0.3, 0.7), (1.0, 0.0)]):
        torch.testing.assert_close(column, alone(models, pairs, weights, 0.8)[:, 0], **CLOSE)


def test_adapters_are_scored_side_by_side(adapters, monkeypatch):
    views, models, mixture = adapters
    passes = count_tokens(mixture, monkeypatch)
    completions, pairs = some_completions()
    found = completion_logps(views, completions, batch_size=4)
    # three rows of 6 tokens before the last one of a prompt; then the 9 completions, in batches of 4, 4 and 1; three times
    # the rows as there are three policies. What comes first is the trial run of a stack
    assert passes[1:] == [(9, 6), (12, 7), (12, 3), (3, 1)]
    torch.testing.assert_close(found, alone(models, pairs), **CLOSE)


def test_a_mixture_among_the_policies_is_scored_as_one(adapters):
    views, models, mixture = adapters
    completions, pairs = some_completions()
    found = completion_logps([views[2], mixture, views[0]], completions)
    expected = torch.cat(
        [alone(models[2:], pairs), alone(models[:2], pairs, [0.5, 0.5]), alone(models[:1], pairs)], -1
    )
    torch.testing.assert_close(found, expected, **CLOSE)


def test_prompts_of_one_token_and_empty_completions_are_scored(adapters):
    views, models, _ = adapters
    completions, pairs = some_completions([[BOS]], [[[5, 7], [9]]])
    torch.testing.assert_close(completion_logps(views, completions), alone(models, pairs), **CLOSE)
    completions = pad_completions([[BOS, 7]], [[]], PAD, "cpu")
    assert completion_logps(views, completions).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma3"])
def test_a_prompt_of_one_token_beside_longer_ones(architecture):
    """Of what is read before the last token of a prompt, it has nothing but padding."""
    models = [tiny(architecture, seed) for seed in range(2)]
    mixture = MixturePolicyModel.from_policies(models, [0.3, 0.7])
    prompts = [[BOS], *SOME_PROMPTS]
    completions, pairs = some_completions(prompts, [[[5, 7], [9]], *SOME_COMPLETIONS])
    found = completion_logps([mixture.policy(0), mixture.policy(1)], completions)
    torch.testing.assert_close(found, alone(models, pairs), **CLOSE)
    drawn = sample_completions(mixture, prompts, 2, 5, PAD)
    pairs = [(prompts[row // 2], ids) for row, ids in enumerate(drawn.id_lists())]
    torch.testing.assert_close(drawn.policy_logps, alone(models, pairs), **CLOSE)


def test_padding_may_be_an_id_beyond_the_vocabulary():
    _, pairs = some_completions()
    completions = pad_completions([p for p, _ in pairs], [a for _, a in pairs], VOCAB + 5, "cpu")
    mixture = MixturePolicyModel.from_policies(
        [tiny("llama", 1), tiny("llama", 2, vocab_size=VOCAB + 8)], vocab_size=VOCAB
    )
    found = completion_logps([mixture.policy(0), mixture.policy(1)], completions)
    torch.testing.assert_close(found, alone([WithoutLastIds(model) for model in mixture.backbones], pairs), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_log_probabilities_some_positions_at_a_time(dtype, monkeypatch):
    logits = [3 * torch.randn(2, 5, VOCAB, generator=torch.Generator().manual_seed(k)).to(dtype) for k in range(2)]
    logits[0][..., 3] = -torch.inf
    ids = torch.arange(10).view(2, 5) % 3
    monkeypatch.setitem(pooling.CHUNK_NUMEL, "cpu", 3 * VOCAB + 1)
    steps = [component.double().log_softmax(-1) for component in logits]
    pooled = ((0.4 * steps[0] + 0.6 * steps[1]) / 0.7).log_softmax(-1)
    for found, step in (
        (token_logps(logits[1:], ids), steps[1]),
        (token_logps(logits, ids, [0.4, 0.6], 0.7), pooled),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), step.gather(-1, ids[..., None])[..., 0], **CLOSE)


# ---- sampling: prompts are read once, and every component's log-probabilities are known ----


@pytest.mark.parametrize("architecture", ["llama", "mistral", "lfm2"])
def test_samples_are_those_of_plain_generation(architecture, monkeypatch):
    models = [lfm2(seed) if architecture == "lfm2" else tiny(architecture, seed) for seed in range(2)]
    mixture = MixturePolicyModel.from_policies(models, [0.3, 0.7])
    padded, mask = pad_ids(SOME_PROMPTS, PAD, left=True)
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, num_samples: draw_tokens(probabilities.log()))
    torch.manual_seed(0)
    expected = mixture.generate(
        padded,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=6,
        num_return_sequences=4,
        pad_token_id=PAD,
    )
    passes = count_tokens(mixture, monkeypatch)
    torch.manual_seed(0)
    completions = sample_completions(mixture, SOME_PROMPTS, 4, 6, pad_token_id=PAD, eos_token_id=EOS)
    assert torch.equal(completions.completion_ids, expected[:, 7:])
    assert passes[0] == ((12, 7) if architecture == "lfm2" else (3, 6))


def test_sampling_tells_the_log_probabilities_of_every_component(adapters):
    views, models, mixture = adapters
    torch.manual_seed(0)
    completions = sample_completions(mixture, SOME_PROMPTS, 4, 6, PAD, eos_token_id=[EOS, 5, 9], temperature=0.7)
    assert completions.completion_mask.sum(-1).min() < 6
    pairs = [(SOME_PROMPTS[row // 4], ids) for row, ids in enumerate(completions.id_lists())]
    torch.testing.assert_close(completions.policy_logps, alone(models[:2], pairs), **CLOSE)
    assert mixture.component_hook is None
    some = sample_completions(mixture, SOME_PROMPTS, 4, 6, PAD, mixture_weights=torch.tensor([1.0, 0.0]))
    assert some.policy_logps is None  # the second did not run


def test_weights_by_prompt_are_those_of_all_its_completions(adapters):
    views, models, mixture = adapters
    weights = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    completions = sample_completions(mixture, SOME_PROMPTS, 2, 4, PAD, mixture_weights=weights)
    for row, ids in enumerate(completions.id_lists()):
        expected = alone(models[:2], [(SOME_PROMPTS[row // 2], ids)], weights[row // 2].tolist())
        assert completions.proposal_logps[row].item() == close(expected.item())
