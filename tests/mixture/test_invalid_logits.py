"""Tokens that components rule out, texts that no token may follow, and logits that are no numbers."""

import pytest
import torch
from helpers import BOS, EOS, PAD, component_logps, tiny
from toy import LENGTH, PROMPTS, VOCAB_SIZE, TabularPolicy, toy_tokenizer

from mpo_hf import MixtureLogitsProcessor, MixturePolicyModel, sequence_level_beam_search, sequential_monte_carlo


IDS = torch.tensor([[BOS, 5, 9, 3]])
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": [], "pad_token_id": PAD}
SAMPLE = {"do_sample": True, "top_k": 0}


def masked(seed, ids, value=-torch.inf):
    """A model whose logits of some ids are replaced."""
    model = tiny("llama", seed)

    def hook(model, args, output):
        output.logits[..., list(ids)] = value

    model.register_forward_hook(hook)
    return model


def written(model, **kwargs) -> list[int]:
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), **{**GREEDY, **kwargs})[0].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"mixture_weights": [[1, 1, -1]]},
    ],
    ids=["greedy", "no cache", "static", "by row"],
)
def test_what_any_component_rules_out_is_never_written(options):
    # 20 and above by all, 10 and above by the one with a negative weight alone
    models = [masked(1, range(20, 32)), masked(2, range(20, 32)), masked(3, range(10, 32))]
    text = IDS[0].tolist()
    for _ in range(GREEDY["max_new_tokens"]):
        logps = [component_logps(model, [text])[0] for model in models]
        sums = {v: sum(w * own[v].item() for w, own in zip([1, 1, -1], logps)) for v in range(10)}
        text.append(max(sums, key=sums.get))
    assert written(MixturePolicyModel.from_proxy_tuning(*models), **options) == text
    processor = MixtureLogitsProcessor(models[1:], weights=[1, 1, -1], allow_off_simplex=True)
    options = {name: value for name, value in options.items() if name != "mixture_weights"}
    assert written(models[0], logits_processor=[processor], **options) == text


@pytest.mark.parametrize(
    "options",
    [
        {},
        SAMPLE,
        {"num_beams": 3, "eos_token_id": EOS},
        {"num_beams": 3, "eos_token_id": EOS, "custom_generate": sequence_level_beam_search},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=["greedy", "sampling", "beams", "sequence-level beams", "no cache", "static"],
)
def test_a_text_that_nothing_may_follow_is_refused(options):
    policies = [masked(1, range(16)), masked(2, range(16, 32))]
    with pytest.raises(ValueError, match="rule out every token between them .* after 4 tokens of row 0"):
        written(MixturePolicyModel.from_policies(policies), **options)
    if "custom_generate" not in options:
        with pytest.raises(ValueError, match="rule out every token between them"):
            written(policies[0], logits_processor=[MixtureLogitsProcessor(policies[1])], **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2, "eos_token_id": EOS}, {**SAMPLE, "custom_generate": sequential_monte_carlo}],
    ids=["greedy", "beams", "particles"],
)
def test_logits_that_are_no_numbers_are_refused_with_their_component(value, options):
    policies = [tiny("gpt2", 1), masked(2, [3], value)]
    model = MixturePolicyModel.from_policies(policies, labels=["kind", "broken"])
    with pytest.raises(ValueError, match=r"\['broken'\] return logits of NaN"):
        written(model, **options)
    assert written(model, mixture_weights=[1.0, 0.0]) == written(policies[0])
    if not options:
        with pytest.raises(ValueError, match=r"\['broken'\] return"):
            written(policies[0], logits_processor=[MixtureLogitsProcessor(model)])
        with pytest.raises(ValueError, match=r"\['calling model'\] return"):
            written(policies[1], logits_processor=[MixtureLogitsProcessor(policies[0])])


@pytest.fixture(scope="module")
def parting():
    """
    Two policies over all completions that agree on none after the likeliest first token, 0, and their product by
    completion. After another prompt 1 is the likeliest.
    """
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(2, len(PROMPTS), *[VOCAB_SIZE] * LENGTH, generator=generator, dtype=torch.float64)
    tables[:, 0, 0] += 4
    tables[:, 1:, 1] += 4
    tables[0, :, 0, :3] = tables[1, :, 0, 3:] = -torch.inf
    tables = tables.flatten(2).log_softmax(-1)
    return MixturePolicyModel.from_policies([TabularPolicy(table) for table in tables]), tables.mean(0)


def generate(model, rows, **kwargs):
    ids = torch.tensor(toy_tokenizer()(PROMPTS)["input_ids"])[rows]
    return model.generate(ids, **{"max_new_tokens": LENGTH, "pad_token_id": 2, "do_sample": False, **kwargs})[:, 2:]


def test_beams_and_particles_leave_a_text_that_nothing_may_follow(parting):
    model, products = parting
    place_values = torch.tensor([VOCAB_SIZE**2, VOCAB_SIZE, 1])
    with pytest.raises(ValueError, match="after 3 tokens of row 0"):
        generate(model, [0])
    beams = {"num_beams": 30, "length_penalty": 0.0}
    best = generate(model, [0], custom_generate=sequence_level_beam_search, **beams)
    assert (best @ place_values).item() == products[0].argmax()
    # token by token, the first tokens are compared before anything is known of those that follow
    assert generate(model, [0], **beams)[0, 0] != 0
    torch.manual_seed(0)
    drawn = generate(
        model, [0], **SAMPLE, custom_generate=sequential_monte_carlo, num_particles=64, num_return_sequences=9
    )
    assert (drawn[:, 0] != 0).all()


def test_what_follows_the_end_of_a_row_does_not_matter(parting):
    rows = generate(parting[0], [0, 1], eos_token_id=0)
    assert rows[0].tolist() == [0, 2, 2]
    assert torch.equal(rows[1:], generate(parting[0], [1], eos_token_id=0))
