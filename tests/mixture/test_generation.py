"""`generate()` token for token against loops that compute every step anew, one prompt beside the other."""

import pytest
import torch
from helpers import (
    BOS,
    CLOSE,
    PAD,
    PROMPTS,
    VOCAB,
    beam_search,
    completions_of,
    greedy,
    left_pad,
    multinomial,
    pooled_logps,
    tiny,
)
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

from mpo_hf import MixturePolicyModel
from mpo_hf.mixture.compat import CACHE_NAME


STEPS = 8
# Enough tokens that end a completion for rows to end at different times.
ENDS = [2, 3, 8, 12, 17, 29]


def generate(model, prompts=PROMPTS, steps=STEPS, **kwargs):
    """Completions that a mixture generates for a left-padded batch."""
    inputs = left_pad(prompts)
    settings = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": PAD}
    return completions_of(model.generate(**inputs, **{**settings, **kwargs}), inputs)


def expected_greedy(case, **kwargs):
    return greedy(case.components, case.weights, PROMPTS, STEPS, ends=ENDS, **kwargs)


# ---- greedy, over every way to keep keys and values ----

WAYS = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 3},
}


def test_greedy_search_takes_the_most_likely_tokens(case):
    expected = greedy(case.components, case.weights, PROMPTS, STEPS, ends=())
    assert generate(case.model, eos_token_id=[]) == expected


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_rows_end_at_their_own_time(case, way):
    assert generate(case.model, **way) == expected_greedy(case)
    assert generate(case.model, min_new_tokens=3, **way) == expected_greedy(case, min_new_tokens=3)


def test_rows_of_these_tests_do_end_at_different_times(cases):
    lengths = set()
    for kind in ("llama+gpt2", "mistral+gemma3", "base+two adapters"):
        for row in expected_greedy(cases(kind), min_new_tokens=3):
            lengths.add(next((i for i, token in enumerate(row) if token in ENDS), STEPS))
    assert len(lengths) >= 3


def test_one_prompt_needs_no_mask(case):
    for prompt in PROMPTS:
        output = case.model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=[])
        expected = greedy(case.components, case.weights, [prompt], 4, ends=())
        assert output[:, len(prompt) :].tolist() == expected


def test_growing_cache_of_the_users_own_is_filled(case):
    cache = DynamicCache()
    assert generate(case.model, cache=cache) == expected_greedy(case)
    assert cache.get_seq_length() > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_a_loop_by_hand_prepares_inputs_from_ids_mask_and_cache(case, kind):
    room = max(map(len, PROMPTS)) + STEPS
    config = case.model.config
    cache = DynamicCache(config=config) if kind == "growing" else StaticCache(config=config, max_cache_len=room)
    inputs = left_pad(PROMPTS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for step in range(STEPS):
        prepared = case.model.prepare_inputs_for_generation(
            ids if step == 0 else ids[:, -1:], attention_mask=mask, cache=cache, is_first_iteration=step == 0
        )
        token = case.model(**prepared).logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], dim=1), torch.cat([mask, torch.ones_like(token)], dim=1)
    assert completions_of(ids, inputs) == greedy(case.components, case.weights, PROMPTS, STEPS, ends=())


# ---- sampling ----


@pytest.mark.parametrize("use_cache", [True, False])
def test_sampling_draws_from_the_mixture(case, use_cache):
    expected = multinomial(case.components, case.weights, PROMPTS, STEPS, seed=11, ends=ENDS)
    torch.manual_seed(11)
    assert generate(case.model, do_sample=True, top_k=0, use_cache=use_cache) == expected


def test_logits_and_scores_are_those_of_the_sampled_path(case):
    torch.manual_seed(12)
    inputs = left_pad(PROMPTS)
    output = case.model.generate(
        **inputs,
        max_new_tokens=5,
        do_sample=True,
        top_k=0,
        temperature=0.7,
        eos_token_id=[],
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    completions = completions_of(output.sequences, inputs)
    for step in range(5):
        prefixes = [prompt + completion[:step] for prompt, completion in zip(PROMPTS, completions)]
        expected = pooled_logps(case.components, case.weights, prefixes).float()
        # not renormalised: their logsumexp is log Z
        torch.testing.assert_close(output.logits[step], expected, **CLOSE)
        torch.testing.assert_close(output.scores[step], expected / 0.7, **CLOSE)


def test_sampled_sequences_of_one_prompt_differ_and_each_follows_the_mixture(case):
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    expected = multinomial(case.components, case.weights, prompts, STEPS, seed=13, ends=())
    torch.manual_seed(13)
    settings = {"do_sample": True, "top_k": 0, "eos_token_id": [], "num_return_sequences": 3}
    assert generate(case.model, **settings) == expected
    assert len({tuple(row) for row in expected}) == 9


# ---- beams ----


def check_beams(model, components, weights, prompts, steps=6, **settings):
    inputs = left_pad(prompts)
    output = model.generate(
        **inputs,
        max_new_tokens=steps,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        eos_token_id=ENDS,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    settings.pop("use_cache", None)
    settings.pop("cache_implementation", None)
    settings.pop("mixture_weights", None)
    weights = torch.as_tensor(weights).expand(len(prompts), -1)
    expected = [
        beam
        for prompt, own in zip(prompts, weights)
        for beam in beam_search(components, own, prompt, steps, 3, ends=ENDS, **settings)
    ]
    for row, (_, tokens) in zip(completions_of(output.sequences, inputs), expected, strict=True):
        assert row[: len(tokens)] == tokens
    scores = torch.tensor([score for score, _ in expected])
    torch.testing.assert_close(output.sequences_scores, scores, **CLOSE)


BEAMS = {
    "default": {},
    "long is better": {"length_penalty": 2.0},
    "short is better": {"length_penalty": -1.0},
    "stop early": {"early_stopping": True},
    "never stop": {"early_stopping": "never", "length_penalty": 0.5},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("settings", BEAMS.values(), ids=BEAMS.keys())
def test_beam_search_finds_the_same_beams_with_the_same_scores(case, settings):
    check_beams(case.model, case.components, case.weights, PROMPTS, **settings)


def test_sampled_beams_do_not_depend_on_the_cache(case):
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(14)
        settings = {"num_beams": 3, "do_sample": True, "top_k": 0, "num_return_sequences": 2, "use_cache": use_cache}
        outputs.append(generate(case.model, **settings))
    assert outputs[0] == outputs[1]


# ---- weights by row ----


@pytest.fixture
def row_weights(case):
    """Weights of every prompt's own, one of them on the first component alone."""
    weights = torch.rand(3, len(case.components), generator=torch.Generator().manual_seed(3)).softmax(-1)
    weights[1] = torch.eye(len(case.components))[0]
    return weights


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_row_is_decoded_with_its_own_weights(case, row_weights, way):
    expected = greedy(case.components, row_weights, PROMPTS, 5, ends=())
    assert generate(case.model, steps=5, eos_token_id=[], mixture_weights=row_weights, **way) == expected


def test_weights_by_row_may_be_a_list(case, row_weights):
    expected = greedy(case.components, row_weights, PROMPTS, 3, ends=())
    assert generate(case.model, steps=3, eos_token_id=[], mixture_weights=row_weights.tolist()) == expected


def test_one_set_of_weights_is_not_taken_for_a_row_each(case):
    # as many prompts as components: (K,) must not be expanded like a batch
    count = len(case.components)
    weights = torch.arange(1, count + 1) / (count * (count + 1) / 2)
    prompts = PROMPTS[:count]
    expected = multinomial(case.components, weights, [p for p in prompts for _ in range(2)], 4, seed=15, ends=())
    torch.manual_seed(15)
    settings = {"do_sample": True, "top_k": 0, "eos_token_id": [], "num_return_sequences": 2}
    assert generate(case.model, prompts, steps=4, mixture_weights=weights, **settings) == expected


def test_weights_follow_their_row_into_several_sequences(case, row_weights):
    prompts, weights = [p for p in PROMPTS for _ in range(2)], row_weights.repeat_interleave(2, 0)
    expected = multinomial(case.components, weights, prompts, STEPS, seed=16, ends=ENDS)
    torch.manual_seed(16)
    settings = {"do_sample": True, "top_k": 0, "num_return_sequences": 2}
    assert generate(case.model, mixture_weights=row_weights, **settings) == expected


def test_weights_follow_their_row_into_beams(case, row_weights):
    check_beams(case.model, case.components, row_weights, PROMPTS, mixture_weights=row_weights)


# ---- around the loop ----


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens: list[int] = []
        self.ended = False

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamer_sees_every_token_once(case):
    streamer = Collector()
    completion = generate(case.model, PROMPTS[:1], eos_token_id=[], streamer=streamer)[0]
    assert streamer.tokens == PROMPTS[0] + completion and streamer.ended


class Favor(LogitsProcessor):
    """Raises the scores of odd tokens."""

    def __call__(self, input_ids, scores):
        return scores + 2.0 * (torch.arange(scores.shape[-1]) % 2)


def test_logits_processors_see_the_mixture(case):
    favor = {"process": lambda scores: Favor()(None, scores)}
    expected = greedy(case.components, case.weights, PROMPTS, STEPS, ends=(), **favor)
    assert generate(case.model, eos_token_id=[], logits_processor=LogitsProcessorList([Favor()])) == expected
    assert expected != greedy(case.components, case.weights, PROMPTS, STEPS, ends=())


def test_generation_continues_from_a_returned_cache(case):
    inputs = left_pad(PROMPTS)
    settings = {"do_sample": False, "eos_token_id": [], "return_dict_in_generate": True}
    first = case.model.generate(**inputs, max_new_tokens=3, **settings)
    more = torch.tensor([[5, 9], [21, 4], [13, 13]])
    ids = torch.cat([first.sequences, more], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
    seen = first[CACHE_NAME].get_seq_length()
    second = case.model.generate(ids, attention_mask=mask, cache=first[CACHE_NAME], max_new_tokens=4, **settings)
    prompts = [p + row + new for p, row, new in zip(PROMPTS, completions_of(first.sequences, inputs), more.tolist())]
    assert seen == inputs["input_ids"].shape[1] + 2  # the last token of the first call has not been read yet
    assert second.sequences[:, ids.shape[1] :].tolist() == greedy(case.components, case.weights, prompts, 4, ends=())


@pytest.mark.parametrize("do_sample", [False, True])
def test_assistant_does_not_change_what_the_mixture_writes(case, do_sample):
    # a component is right often enough to have tokens accepted, and wrong often enough to have some thrown away
    assistant = case.components[0]
    for prompt in PROMPTS[:2]:
        torch.manual_seed(17)
        settings = {"do_sample": do_sample, "top_k": 1 if do_sample else 50, "eos_token_id": []}
        output = generate(case.model, [prompt], assistant_model=assistant, **settings)
        assert output == greedy(case.components, case.weights, [prompt], STEPS, ends=())


def test_mixture_assists_another_model(case):
    target = tiny("llama", 40)
    for prompt in PROMPTS[:2]:
        output = generate(target, [prompt], assistant_model=case.model, eos_token_id=[])
        assert output == greedy([target], [1.0], [prompt], STEPS, ends=())


def test_mixture_assists_another_mixture(cases):
    target, assistant = cases("llama+gpt2"), cases("mistral+gemma3")
    for prompt in PROMPTS:
        output = generate(target.model, [prompt], assistant_model=assistant.model, eos_token_id=[])
        assert output == greedy(target.components, target.weights, [prompt], STEPS, ends=())


def test_weights_of_a_call_stay_with_the_target_of_assisted_decoding(case):
    weights = torch.eye(len(case.components))[-1]
    output = generate(
        case.model, PROMPTS[:1], assistant_model=tiny("llama", 40), mixture_weights=weights, eos_token_id=[]
    )
    assert output == greedy(case.components, weights, PROMPTS[:1], STEPS, ends=())


def test_prompt_lookup_does_not_change_what_the_mixture_writes(case):
    prompt = [BOS, 7, 11, 3, 7, 11, 3, 7, 11]
    output = generate(case.model, [prompt], prompt_lookup_num_tokens=3, eos_token_id=[])
    assert output == greedy(case.components, case.weights, [prompt], STEPS, ends=())


def test_guidance_contrasts_the_mixture_with_itself(cases):
    case, scale = cases("llama+gpt2"), 1.5
    prompt, completion = PROMPTS[0], []
    for _ in range(5):
        given = pooled_logps(case.components, case.weights, [prompt + completion]).log_softmax(-1)
        without = pooled_logps(case.components, case.weights, [prompt[-1:] + completion]).log_softmax(-1)
        completion.append((scale * (given - without) + without).argmax().item())
    assert generate(case.model, [prompt], steps=5, guidance_scale=scale, eos_token_id=[]) == [completion]


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_that_end_early_are_padded_with_an_id_beyond_the_common_vocabulary(use_cache):
    policies = [tiny("llama", 1), tiny("gpt2", 2, vocab_size=VOCAB + 1)]
    model = MixturePolicyModel.from_policies(policies, vocab_size=VOCAB)
    inputs = left_pad(PROMPTS, pad=VOCAB)
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": ENDS, "use_cache": use_cache}
    output = completions_of(model.generate(**inputs, pad_token_id=VOCAB, **settings), inputs)
    usual = generate(model, use_cache=use_cache)
    padded = [[VOCAB if any(t in ENDS for t in row[:i]) else token for i, token in enumerate(row)] for row in usual]
    assert output == padded and any(VOCAB in row for row in output)
    with pytest.raises(ValueError, match=f"token id {VOCAB} is not among"):
        model.generate(
            torch.tensor([[BOS, VOCAB, 4]]), attention_mask=torch.ones(1, 3), pad_token_id=VOCAB, **settings
        )


def test_embeddings_in_place_of_tokens_are_refused(cases):
    model = cases("llama+gpt2").model
    with pytest.raises((ValueError, TypeError), match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 16), max_new_tokens=2)
