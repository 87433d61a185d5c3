"""`MixtureLogitsProcessor`: the same tokens as the model class, and as loops that keep nothing between steps."""

from functools import partial

import pytest
import torch
from helpers import CLOSE, EOS, SIZES, VOCAB, tiny
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from mpo_hf import MixturePolicyModel
from mpo_hf.decoding.logits_process import MixtureLogitsProcessor


# not 0: beam search fills up rows with the end token then
PAD = 3
WEIGHTS = {1: [0.45, 0.55], 2: [0.4, 0.35, 0.25]}

make_llama, make_gpt2, make_qwen2 = (partial(tiny, name) for name in ("llama", "gpt2", "qwen2"))


@pytest.fixture(scope="module")
def policy():
    return make_llama(0)


@pytest.fixture(scope="module")
def gpt2():
    return make_gpt2(1)


@pytest.fixture(scope="module")
def qwen2():
    return make_qwen2(2)


@pytest.fixture(scope="module")
def assistant():
    return make_llama(3, num_hidden_layers=1)


def prompts(rows=3, length=5, seed=0, lengths=None):
    """Random prompts, left-padded where `lengths` says how long each really is."""
    generator = torch.Generator().manual_seed(seed)
    lengths = lengths or [length] * rows
    ids = torch.randint(4, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def generate(model, inputs, processor=None, **kwargs):
    kwargs = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS, **kwargs}
    if processor is not None:
        kwargs["logits_processor"] = [processor]
    torch.manual_seed(0)
    return model.generate(**inputs, **kwargs).tolist()


def assert_same_as_model_class(policy, others, inputs, processor=None, **kwargs):
    weights = WEIGHTS[len(others)]
    if processor is None:
        processor = MixtureLogitsProcessor(others, weights)
    expected = generate(MixturePolicyModel.from_policies([policy, *others], weights), inputs, **kwargs)
    assert generate(policy, inputs, processor, **kwargs) == expected
    return expected


@torch.no_grad()
def mixed_logps(models, weights, tokens):
    """Log-probabilities of the mixture after one unpadded text, from nothing but stock forward passes."""
    ids = torch.tensor([tokens])
    logps = sum(w * model(ids, use_cache=False).logits[0, -1].log_softmax(-1) for w, model in zip(weights, models))
    return logps.log_softmax(-1)


class Recompute(LogitsProcessor):
    """The mixture with no state at all: row by row, padding taken off, no cache, no mask, no batch."""

    def __init__(self, others, weights):
        self.others, self.weights = others, weights

    def __call__(self, input_ids, scores):
        pooled = self.weights[0] * scores.log_softmax(-1)
        for row, ids in enumerate(input_ids.tolist()):
            start = next(i for i, token in enumerate(ids) if token != PAD)
            for other, weight in zip(self.others, self.weights[1:]):
                pooled[row] += weight * mixed_logps([other], [1.0], ids[start:])
        return pooled.log_softmax(-1)


def beam_search(models, weights, prompt, num_beams, max_new_tokens, early_stopping, length_penalty):
    """Beam search by hand over plain lists; returns finished texts, best first."""
    running, finished = [(0.0, prompt)], []
    for step in range(1, max_new_tokens + 1):
        candidates = []
        for score, tokens in running:
            logps = mixed_logps(models, weights, tokens).tolist()
            candidates += [(score + logp, [*tokens, token]) for token, logp in enumerate(logps)]
        candidates = sorted(candidates, reverse=True)[: 2 * num_beams]
        ended = [tokens[-1] == EOS or step == max_new_tokens for _, tokens in candidates]
        done = [c for c, end in zip(candidates[:num_beams], ended) if end]
        finished = sorted(finished + [(s / step**length_penalty, t) for s, t in done], reverse=True)[:num_beams]
        running = [c for c, end in zip(candidates, ended) if not end][:num_beams]
        full = len(finished) == num_beams
        if not running or (full and (early_stopping or running[0][0] / step**length_penalty <= finished[-1][0])):
            break
    return [tokens for _, tokens in finished]


def unpadded(rows):
    """Rows as they were before the end of a batch was filled up."""
    return [[t for t in row if t != PAD] for row in rows]


MODES = {
    "greedy": {},
    "greedy, rows end early": {"eos_token_id": list(range(4, 12))},
    "no cache of its own": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "top-k and top-p": {"do_sample": True, "top_k": 7, "top_p": 0.9},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "3 beams": {"num_beams": 3},
    "4 beams, all returned": {"num_beams": 4, "num_return_sequences": 4},
    "beams, early stopping": {"num_beams": 3, "early_stopping": True},
    "beams, never stopping early": {"num_beams": 3, "early_stopping": "never"},
    "beams, long ones": {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 2},
    "beams, short ones": {"num_beams": 4, "length_penalty": -1.0, "early_stopping": True},
    "beams, sampled": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
}
SOME_MODES = ["greedy", "several sequences", "4 beams, all returned"]


@pytest.mark.parametrize("mode", MODES)
def test_same_tokens_as_the_model_class(policy, gpt2, mode):
    assert_same_as_model_class(policy, [gpt2], prompts(), **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_same_tokens_as_recomputing_everything(policy, gpt2, mode):
    others, kwargs = [gpt2], {"use_cache": False, **MODES[mode]}
    expected = generate(policy, prompts(), Recompute(others, WEIGHTS[1]), **kwargs)
    assert generate(policy, prompts(), MixtureLogitsProcessor(others, WEIGHTS[1]), **MODES[mode]) == expected


@pytest.mark.parametrize("mode", SOME_MODES)
def test_three_policies(policy, gpt2, qwen2, mode):
    inputs = prompts(rows=2)
    mixed = assert_same_as_model_class(policy, [gpt2, qwen2], inputs, **MODES[mode])
    # the test could not fail if one policy had all the say
    assert all(generate(model, inputs, **MODES[mode]) != mixed for model in (policy, gpt2, qwen2))


def test_greedy_and_sampling_by_hand(policy, gpt2, qwen2):
    models, inputs = [policy, gpt2, qwen2], prompts(rows=1)
    processor = MixtureLogitsProcessor(models[1:], WEIGHTS[2])
    for do_sample in (False, True):
        tokens = inputs["input_ids"][0].tolist()
        torch.manual_seed(0)
        while len(tokens) < 14 and tokens[-1] != EOS:
            logps = mixed_logps(models, WEIGHTS[2], tokens)
            tokens.append(int(torch.multinomial(logps.exp(), 1) if do_sample else logps.argmax()))
        assert generate(policy, inputs, processor, do_sample=do_sample) == [tokens]


@pytest.mark.parametrize("early_stopping", [True, False])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_beams_by_hand(policy, gpt2, early_stopping, length_penalty):
    search = {"num_beams": 3, "early_stopping": early_stopping, "length_penalty": length_penalty, "max_new_tokens": 6}
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1])
    for seed in range(3):
        inputs = prompts(rows=1, seed=seed)
        expected = beam_search([policy, gpt2], WEIGHTS[1], inputs["input_ids"][0].tolist(), **search)
        assert unpadded(generate(policy, inputs, processor, num_return_sequences=3, **search)) == expected


# ---- padding ----


def padded():
    return prompts(lengths=[6, 3, 4], seed=5)


@pytest.mark.parametrize("mode", ["greedy", "several sequences", "3 beams", "4 beams, all returned", "beams, sampled"])
@pytest.mark.parametrize("how", ["attention_mask", "pad_token_id"])
def test_left_padding(policy, gpt2, mode, how):
    inputs, others = padded(), [gpt2]
    known = {"attention_mask": inputs["attention_mask"], "pad_token_id": PAD}[how]
    processor = MixtureLogitsProcessor(others, WEIGHTS[1], **{how: known})
    mixed = assert_same_as_model_class(policy, others, inputs, processor, **MODES[mode])
    assert mixed == generate(policy, inputs, Recompute(others, WEIGHTS[1]), **MODES[mode])


def test_rows_of_a_padded_batch_are_those_of_single_prompts(policy, gpt2):
    inputs = padded()
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1], attention_mask=inputs["attention_mask"])
    batch = unpadded(generate(policy, inputs, processor))
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"])):
        single = {"input_ids": ids[mask == 1][None], "attention_mask": mask[mask == 1][None]}
        assert unpadded(generate(policy, single, MixtureLogitsProcessor([gpt2], WEIGHTS[1]))) == [batch[row]]


def test_no_mask_means_that_every_token_counts(policy, gpt2):
    inputs = padded()
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    assert_same_as_model_class(policy, [gpt2], inputs)


def test_a_mask_tells_padding_from_a_prompt_that_begins_with_the_same_token(policy, gpt2):
    inputs = padded()
    inputs["attention_mask"][1] = 1
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1], attention_mask=inputs["attention_mask"], pad_token_id=PAD)
    assert_same_as_model_class(policy, [gpt2], inputs, processor, num_beams=3)


def test_rows_alike_but_for_their_masks_are_kept_apart(policy, gpt2):
    ids = torch.tensor([[PAD, 5, 6, 7], [PAD, 5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1], attention_mask=inputs["attention_mask"].tolist())
    assert_same_as_model_class(policy, [gpt2], inputs, processor, num_beams=3, num_return_sequences=3)


def test_a_mask_serves_any_number_of_calls_on_its_prompts_and_their_continuations(policy, gpt2):
    inputs = padded()
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1], attention_mask=inputs["attention_mask"])
    for kwargs in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        assert_same_as_model_class(policy, [gpt2], inputs, processor, **kwargs)
    longer = {k: torch.cat([v, torch.ones_like(v[:, :2])], -1) for k, v in inputs.items()}
    assert_same_as_model_class(policy, [gpt2], longer, processor)


def test_a_mask_is_not_used_for_other_prompts(policy, gpt2):
    inputs, others = padded(), [prompts(lengths=[3, 6, 4], seed=6), prompts(lengths=[2, 5], seed=7), prompts(rows=1)]
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1], attention_mask=inputs["attention_mask"])
    generate(policy, inputs, processor)
    for other in others:
        with pytest.raises(ValueError, match="Set `processor.attention_mask` anew"):
            generate(policy, other, processor)
        processor.reset()
        with pytest.raises(ValueError, match="Set `processor.attention_mask` anew"):
            generate(policy, other, processor)
    for other in others:
        processor.attention_mask = other["attention_mask"]
        assert torch.equal(processor.attention_mask, other["attention_mask"])
        assert_same_as_model_class(policy, [gpt2], other, processor, num_beams=3)
    processor.attention_mask = None
    assert_same_as_model_class(policy, [gpt2], prompts(), processor)


@pytest.mark.parametrize("shape", [(2, 6), (3, 7), (6, 6), (0, 6)])
def test_a_mask_that_does_not_fit_the_prompts(policy, gpt2, shape):
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1], attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match="does not belong to these prompts"):
        generate(policy, padded(), processor)


def test_a_mask_of_one_row_for_two_prompts(policy, gpt2):
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1], attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="does not belong to these prompts"):
        generate(policy, prompts(rows=2), processor)


# ---- one processor, several calls ----


CALLS = [
    prompts(seed=1),
    prompts(seed=2),  # other prompts of the same shape
    prompts(seed=2),  # the same again
    prompts(rows=1, length=9, seed=3),
    prompts(rows=5, length=2, seed=4),
    padded(),
    {k: v[:, -4:] for k, v in prompts(lengths=[6, 3, 4, 3], seed=5).items()},
    {k: v[:1, :3] for k, v in prompts(seed=1).items()},  # the beginning of the first
]


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_nothing_is_left_of_earlier_calls(policy, gpt2, qwen2, kwargs):
    others = [gpt2, qwen2]
    processor = MixtureLogitsProcessor(others, WEIGHTS[2], pad_token_id=PAD)
    for inputs in CALLS:
        assert_same_as_model_class(policy, others, inputs, processor, **kwargs)


def test_calls_of_different_kinds_and_models(policy, gpt2, qwen2, assistant):
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1])
    inputs = prompts(rows=1)
    for model, kwargs in [
        (policy, {"num_beams": 4}),
        (qwen2, {}),
        (policy, {"assistant_model": assistant}),
        (policy, {"num_return_sequences": 4, "do_sample": True}),
        (qwen2, {"num_beams": 3, "num_return_sequences": 3}),
        (policy, {"max_new_tokens": 2}),
        (policy, {"max_new_tokens": 12}),
    ]:
        assert_same_as_model_class(model, [gpt2], inputs, processor, **kwargs)


def test_every_call_computes_alike(policy, gpt2):
    """No rounding error of an earlier call may tip the balance in a later one."""
    processor, prompt = MixtureLogitsProcessor([gpt2], WEIGHTS[1]), prompts(rows=2)
    settings = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    similar = {k: v.clone() for k, v in prompt.items()}
    similar["input_ids"][:, -1] = 4
    with Fed(gpt2) as shapes:
        first, again, _, later = (
            policy.generate(**inputs, logits_processor=[processor], **settings).scores
            for inputs in (prompt, prompt, similar, prompt)
        )
    assert shapes.count((2, 5)) == 4
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, later))


# ---- drafts ----


REPEATING = {
    "input_ids": torch.tensor([[5, 9, 7, 11, 5, 9, 7, 11, 5, 9]]),
    "attention_mask": torch.ones(1, 10, dtype=torch.long),
}


@pytest.mark.parametrize("do_sample", [False, True])
def test_prompt_lookup(policy, gpt2, qwen2, do_sample):
    lookup = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 16}
    mixed = assert_same_as_model_class(policy, [gpt2, qwen2], REPEATING, do_sample=do_sample, **lookup)
    if not do_sample:
        assert mixed == generate(policy, REPEATING, Recompute([gpt2, qwen2], WEIGHTS[2]), max_new_tokens=16)


@pytest.mark.parametrize("inputs", [prompts(rows=1), padded()], ids=["plain", "padded"])
def test_assisted_decoding(policy, gpt2, qwen2, assistant, inputs):
    others, inputs = [gpt2, qwen2], {k: v[1:2] if len(v) > 1 else v for k, v in inputs.items()}
    processor = MixtureLogitsProcessor(others, WEIGHTS[2], attention_mask=inputs["attention_mask"])
    expected = generate(policy, inputs, Recompute(others, WEIGHTS[2]), max_new_tokens=16)
    for helper in (assistant, policy, gpt2):
        mixed = assert_same_as_model_class(
            policy, others, inputs, processor, assistant_model=helper, max_new_tokens=16
        )
        assert mixed == expected


def test_assisted_sampling_draws_from_the_mixture(policy, gpt2, assistant):
    inputs = prompts(rows=1)
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1])
    expected = mixed_logps([policy, gpt2], WEIGHTS[1], inputs["input_ids"][0].tolist()).exp()
    drawn = torch.zeros(VOCAB)
    torch.manual_seed(0)
    kwargs = {"do_sample": True, "max_new_tokens": 2, "min_new_tokens": 2, "pad_token_id": PAD, "top_k": 0}
    for _ in range(150):
        output = policy.generate(**inputs, logits_processor=[processor], assistant_model=assistant, **kwargs)
        drawn[output[0, 5]] += 1 / 150
    expected[EOS] = 0
    assert (drawn - expected / expected.sum()).abs().sum() / 2 < 0.2


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_sliding_windows(policy, architecture, kwargs):
    others, kwargs = [tiny(architecture, 4)], {"max_new_tokens": 14, **kwargs}
    mixed = generate(policy, REPEATING, MixtureLogitsProcessor(others, WEIGHTS[1]), **kwargs)
    assert mixed == generate(policy, REPEATING, Recompute(others, WEIGHTS[1]), **kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_layers_that_cannot_go_back(policy, kwargs):
    sizes = {**SIZES, "layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}
    torch.manual_seed(4)
    lfm2 = Lfm2ForCausalLM(Lfm2Config(**sizes)).eval()
    processor = MixtureLogitsProcessor([lfm2], WEIGHTS[1])
    kwargs = {"max_new_tokens": 14, **kwargs}
    mixed = generate(policy, REPEATING, processor, **kwargs)
    assert mixed == generate(policy, REPEATING, Recompute([lfm2], WEIGHTS[1]), **kwargs)


# ---- what is fed ----


class Fed:
    """Counts the tokens that a model is really run over."""

    def __init__(self, model):
        self.shapes = []
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def __enter__(self):
        return self.shapes

    def __exit__(self, *_):
        self.handle.remove()


def test_steps_feed_one_token(policy, gpt2):
    for kwargs, rows in (({}, 3), ({"num_beams": 3}, 9)):
        with Fed(gpt2) as shapes:
            generate(policy, prompts(), MixtureLogitsProcessor([gpt2], WEIGHTS[1]), min_new_tokens=4, **kwargs)
        assert shapes[0] == (rows, 5) and set(shapes[1:]) == {(rows, 1)} and len(shapes) >= 4


def test_rolling_back_feeds_one_token(policy, gpt2, assistant):
    with Fed(gpt2) as shapes:
        processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1])
        generate(policy, prompts(rows=1), processor, assistant_model=assistant, min_new_tokens=9)
    # the prompt for the first draft, and once more for what is made of it
    assert shapes.count((1, 5)) <= 2 and set(shapes) == {(1, 5), (1, 1)}


def test_without_cache_everything_is_fed(policy, gpt2):
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1], use_cache=False)
    with Fed(gpt2) as shapes:
        mixed = generate(policy, prompts(), processor, min_new_tokens=4)
    assert shapes == [(3, 5 + i) for i in range(len(shapes))]
    assert mixed == generate(policy, prompts(), MixtureLogitsProcessor([gpt2], WEIGHTS[1]), min_new_tokens=4)


@pytest.mark.parametrize("mode", SOME_MODES)
def test_without_cache_the_tokens_are_the_same(policy, gpt2, mode):
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1], use_cache=False, pad_token_id=PAD)
    assert_same_as_model_class(policy, [gpt2], padded(), processor, **MODES[mode])


def random_step(rng, ids):
    """Rows that may come next: longer, shorter, permuted, duplicated, dropped, changed in one place, or all new."""

    def pick(n, size):
        return torch.randint(n, size, generator=rng)

    kind = pick(7, (1,)).item()
    if kind == 0:
        return pick(VOCAB - 4, (1 + pick(4, (1,)).item(), 3 + pick(4, (1,)).item())) + 4
    if kind == 1:
        return ids[:, : max(1, ids.shape[1] - 1 - pick(3, (1,)).item())]
    if kind in (2, 3):
        ids = ids[pick(len(ids), (1 + pick(5, (1,)).item(),))]
    if kind == 6:
        ids[pick(len(ids), (1,)), -1 - pick(min(4, ids.shape[1]), (1,))] = 4 + pick(VOCAB - 4, (1,))
    new = pick(VOCAB - 4, (len(ids), 1 + (kind > 3) * pick(3, (1,)).item())) + 4
    return torch.cat([ids, new], -1)[:, :40]


def test_whatever_comes_next_the_cache_follows(policy, gpt2, qwen2):
    rng = torch.Generator().manual_seed(0)
    settings = {"others": [gpt2, qwen2], "weights": WEIGHTS[2]}
    cached, plain = MixtureLogitsProcessor(**settings), MixtureLogitsProcessor(**settings, use_cache=False)
    ids = prompts()["input_ids"]
    with Fed(qwen2) as shapes:
        for _ in range(150):
            scores = torch.randn(len(ids), VOCAB, generator=rng)
            torch.testing.assert_close(cached(ids, scores), plain(ids, scores), **CLOSE)
            ids = random_step(rng, ids)
    cached_fed, plain_fed = (sum(length for _, length in shapes[i::2]) for i in (0, 1))
    assert cached_fed < plain_fed / 2


def test_token_ids_that_are_changed_in_place(gpt2):
    cached, plain = (MixtureLogitsProcessor([gpt2], WEIGHTS[1], use_cache=use_cache) for use_cache in (True, False))
    ids, scores = prompts(length=8)["input_ids"], torch.zeros(3, VOCAB)
    cached(ids[:, :5], scores)
    cached(ids[:, :6], scores)
    ids[:, 5] = 4
    torch.testing.assert_close(cached(ids[:, :7], scores), plain(ids[:, :7], scores), **CLOSE)
    cached.attention_mask = torch.ones(3, 5)
    cached(ids[:, :5], scores)
    ids[:, 0] = 4
    with pytest.raises(ValueError, match="does not belong to these prompts"):
        cached(ids[:, :6], scores)


def test_an_interrupted_step_leaves_no_trace(policy, gpt2, qwen2):
    processor = MixtureLogitsProcessor([gpt2, qwen2], WEIGHTS[2])
    inputs = prompts()
    calls = []

    def interrupt(*_):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = qwen2.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(policy, inputs, processor)
    handle.remove()
    longer = {k: torch.cat([v, torch.ones_like(v[:, :4])], -1) for k, v in inputs.items()}
    assert_same_as_model_class(policy, [gpt2, qwen2], longer, processor)


def test_reset_frees_the_cache_and_forgets_old_weights(policy):
    other, inputs = make_gpt2(1), prompts()
    processor = MixtureLogitsProcessor([other], WEIGHTS[1])
    output = torch.tensor(generate(policy, inputs, processor, min_new_tokens=9))
    other.load_state_dict(make_gpt2(7).state_dict())
    processor.reset()
    assert processor._held.cache is None and processor._held.seen is None
    scores = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = MixtureLogitsProcessor([other], WEIGHTS[1])(output, scores)
    assert torch.equal(processor(output, scores), expected)


# ---- weights, scores, vocabularies ----


def test_uniform_weights_by_default(gpt2, qwen2):
    processor = MixtureLogitsProcessor([gpt2, qwen2])
    torch.testing.assert_close(processor.mixture_weights, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_the_calling_model_may_have_no_weight(policy, gpt2):
    inputs = prompts()
    processor = MixtureLogitsProcessor([gpt2], torch.tensor([0.0, 1.0]))
    for kwargs in ({}, {"num_beams": 3}, {"do_sample": True}):
        assert generate(policy, inputs, processor, **kwargs) == generate(gpt2, inputs, **kwargs)


def test_others_without_weight_do_not_run(policy, gpt2, qwen2):
    with Fed(gpt2) as shapes, Fed(qwen2) as other_shapes:
        processor = MixtureLogitsProcessor([gpt2, qwen2], [1, 0, 0])
        for kwargs in ({}, {"num_beams": 3}, {"do_sample": True}):
            assert generate(policy, prompts(), processor, **kwargs) == generate(policy, prompts(), **kwargs)
        assert not shapes and not other_shapes
        generate(policy, prompts(), MixtureLogitsProcessor([gpt2, qwen2], [0.5, 0.5, 0]))
        assert shapes and not other_shapes


@pytest.mark.parametrize("weights", [[2.0, -1.0], [-0.5, 1.5], [0.0, 1.7], [1.5, 0.0], [0.3, 0.3]])
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}])
def test_off_the_simplex(policy, gpt2, weights, kwargs):
    processor = MixtureLogitsProcessor([gpt2], weights, allow_off_simplex=True)
    model = MixturePolicyModel.from_policies([policy, gpt2], weights, allow_off_simplex=True)
    assert generate(policy, prompts(), processor, **kwargs) == generate(model, prompts(), **kwargs)


def test_scores_are_normalized_log_probabilities(gpt2):
    ids, scores = prompts()["input_ids"], torch.randn(3, VOCAB) * 5
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1])
    logps = processor(ids, scores)
    torch.testing.assert_close(logps.logsumexp(-1), torch.zeros(3), **CLOSE)
    torch.testing.assert_close(processor(ids, scores.log_softmax(-1)), logps, **CLOSE)
    torch.testing.assert_close(processor(ids, scores.double()), logps.double(), **CLOSE)
    assert processor(ids, scores.bfloat16()).dtype == torch.float32
    assert not logps.requires_grad


@pytest.mark.parametrize("weights", [[0.4, 0.6], [0.0, 1.0], [-1.0, 2.0], [1.0, 0.0]])
def test_what_is_ruled_out_stays_ruled_out(policy, gpt2, weights):
    processor = MixtureLogitsProcessor([gpt2], weights, allow_off_simplex=True)
    banned = list(range(5, VOCAB, 2))
    rows = generate(policy, prompts(), processor, suppress_tokens=banned, min_new_tokens=6)
    assert not {token for row in rows for token in row[5:]} & set(banned)
    assert all(EOS not in row[5:11] for row in rows)


def test_minimum_length_and_bad_words_act_as_on_the_model_class(policy, gpt2):
    kwargs = {"min_new_tokens": 8, "bad_words_ids": [[5], [7, 8], [11]]}
    assert_same_as_model_class(policy, [gpt2], prompts(), **kwargs)
    assert_same_as_model_class(policy, [gpt2], prompts(), do_sample=True, **kwargs)


def test_penalties_act_on_the_mixture_behind_the_processor_only(policy, gpt2):
    model = MixturePolicyModel.from_policies([policy, gpt2], WEIGHTS[1])
    mix, beams = MixtureLogitsProcessor([gpt2], WEIGHTS[1]), {"num_beams": 3, "max_new_tokens": 12}
    behind = LogitsProcessorList([mix, RepetitionPenaltyLogitsProcessor(3.0)])
    expected = generate(model, prompts(), repetition_penalty=3.0, **beams)
    assert generate(policy, prompts(), logits_processor=behind, **beams) == expected
    assert generate(policy, prompts(), mix, repetition_penalty=3.0, **beams) != expected


@pytest.mark.parametrize("sizes", [(VOCAB, VOCAB + 4), (VOCAB + 4, VOCAB), (VOCAB + 2, VOCAB + 4)])
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3, "num_return_sequences": 3}])
def test_common_vocabulary(sizes, kwargs):
    policy, other = make_llama(0, vocab_size=sizes[0]), make_gpt2(1, vocab_size=sizes[1])
    processor = MixtureLogitsProcessor([other], WEIGHTS[1], vocab_size=VOCAB)
    model = MixturePolicyModel.from_policies([policy, other], WEIGHTS[1], vocab_size=VOCAB)
    assert generate(policy, prompts(), processor, **kwargs) == generate(model, prompts(), **kwargs)
    scores = processor(prompts()["input_ids"], torch.zeros(3, sizes[0]))
    assert scores.shape == (3, sizes[0]) and torch.isneginf(scores[:, VOCAB:]).all()
    assert torch.isfinite(scores[:, :VOCAB]).all()


@pytest.mark.parametrize("size", [VOCAB - 4, VOCAB + 4])
def test_vocabularies_of_different_sizes_need_a_word(gpt2, size):
    with pytest.raises(ValueError, match=f"scores {size} token ids, the other policies have {VOCAB}"):
        MixtureLogitsProcessor([gpt2], WEIGHTS[1])(prompts()["input_ids"], torch.zeros(3, size))


def test_scores_below_the_common_vocabulary(gpt2):
    with pytest.raises(ValueError, match="scores 19 token ids"):
        MixtureLogitsProcessor([gpt2], WEIGHTS[1], vocab_size=20)(prompts()["input_ids"], torch.zeros(3, 19))


@pytest.mark.parametrize("ready", [False, True])
def test_others_have_fewer_ids_than_claimed(gpt2, ready):
    others = MixturePolicyModel.from_policies([gpt2]) if ready else [gpt2]
    with pytest.raises(ValueError, match=f"vocab_size={VOCAB + 1}"):
        MixtureLogitsProcessor(others, WEIGHTS[1], vocab_size=VOCAB + 1)


def test_prompts_with_ids_that_others_do_not_know():
    policy, other = make_llama(0, vocab_size=VOCAB + 4), make_gpt2(1)
    inputs = padded()
    inputs["input_ids"][inputs["attention_mask"] == 0] = VOCAB + 1
    mask = inputs["attention_mask"]
    for known in ({"attention_mask": mask}, {"pad_token_id": VOCAB + 1}):
        processor = MixtureLogitsProcessor([other], WEIGHTS[1], vocab_size=VOCAB, **known)
        model = MixturePolicyModel.from_policies([policy, other], WEIGHTS[1], vocab_size=VOCAB)
        assert generate(policy, inputs, processor) == generate(model, inputs)
    with pytest.raises(ValueError, match=f"token id {VOCAB + 1} is not among the {VOCAB}"):
        generate(policy, inputs, MixtureLogitsProcessor([other], WEIGHTS[1], vocab_size=VOCAB))


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_that_have_ended_are_filled_with_an_id_that_others_do_not_know(use_cache):
    policy, other, pad = make_llama(0, vocab_size=VOCAB + 4), make_gpt2(1), VOCAB + 1
    inputs = prompts(rows=6, seed=4)
    settings = {"vocab_size": VOCAB, "use_cache": use_cache}
    processor = MixtureLogitsProcessor([other], WEIGHTS[1], **settings, pad_token_id=pad)
    kwargs = {"pad_token_id": pad, "eos_token_id": list(range(4, 8))}
    batch = generate(policy, inputs, processor, **kwargs)
    assert 1 < sum(pad in row for row in batch) < 6
    for row, text in enumerate(batch):
        single = {k: v[row : row + 1] for k, v in inputs.items()}
        assert generate(policy, single, processor, **kwargs) == [[token for token in text if token != pad]]
    with pytest.raises(ValueError, match="fills up rows that have ended, pass it as `pad_token_id`"):
        generate(policy, inputs, MixtureLogitsProcessor([other], WEIGHTS[1], **settings), **kwargs)
    inputs["input_ids"][:, 2] = pad
    with pytest.raises(ValueError, match=f"token id {pad} is not among"):
        generate(policy, inputs, processor, **kwargs)


def test_other_dtypes(policy):
    half = make_gpt2(1).to(torch.bfloat16)
    model = MixturePolicyModel.from_policies([policy, half], WEIGHTS[1])
    assert generate(policy, prompts(), MixtureLogitsProcessor([half], WEIGHTS[1])) == generate(model, prompts())
    scores = MixtureLogitsProcessor([half], WEIGHTS[1])(prompts()["input_ids"], torch.zeros(3, VOCAB))
    assert scores.dtype == torch.float32


# ---- what others may be ----


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}])
def test_mixtures_as_components(policy, gpt2, qwen2, kwargs):
    inner = MixturePolicyModel.from_policies([gpt2, qwen2], [0.6, 0.4])
    flat = MixturePolicyModel.from_policies([policy, gpt2, qwen2], [0.3, 0.42, 0.28])
    expected = generate(flat, prompts(), **kwargs)
    for others in (inner, [inner]):
        assert generate(policy, prompts(), MixtureLogitsProcessor(others, [0.3, 0.7]), **kwargs) == expected
    both = MixtureLogitsProcessor([inner, gpt2], [0.3, 0.5, 0.2])
    flat = MixturePolicyModel.from_policies([policy, gpt2, qwen2], [0.3, 0.5, 0.2])
    assert generate(policy, prompts(), both, **kwargs) == generate(flat, prompts(), **kwargs)


def test_the_calling_model_may_be_a_mixture(policy, gpt2, qwen2):
    inner = MixturePolicyModel.from_policies([policy, gpt2], [0.5, 0.5])
    flat = MixturePolicyModel.from_policies([policy, gpt2, qwen2], [0.3, 0.3, 0.4])
    processor = MixtureLogitsProcessor([qwen2], [0.6, 0.4])
    assert generate(inner, prompts(), processor, num_beams=3) == generate(flat, prompts(), num_beams=3)


def test_a_ready_mixture_keeps_its_common_vocabulary_and_its_weights(policy):
    wide = make_gpt2(1, vocab_size=VOCAB + 4)
    inner = MixturePolicyModel.from_policies([wide, make_qwen2(2)], [0.6, 0.4], vocab_size=VOCAB)
    processor = MixtureLogitsProcessor(inner, [0.3, 0.7])
    inner.mixture_weights = [0.1, 0.9]
    flat = MixturePolicyModel.from_policies([policy, wide, make_qwen2(2)], [0.3, 0.07, 0.63], vocab_size=VOCAB)
    assert generate(policy, prompts(), processor) == generate(flat, prompts())


def test_a_ready_mixture_with_more_ids_than_are_common(policy):
    wide = make_gpt2(1, vocab_size=VOCAB + 4)
    processor = MixtureLogitsProcessor(MixturePolicyModel.from_policies([wide]), WEIGHTS[1], vocab_size=VOCAB)
    model = MixturePolicyModel.from_policies([policy, wide], WEIGHTS[1], vocab_size=VOCAB)
    assert generate(policy, prompts(), processor) == generate(model, prompts())


@pytest.mark.parametrize("ready", [False, True])
def test_others_run_without_dropout(policy, gpt2, ready):
    expected = generate(policy, prompts(), MixtureLogitsProcessor([gpt2], WEIGHTS[1]))
    other = make_gpt2(1)
    others = MixturePolicyModel.from_policies([other]).train() if ready else [other.train()]
    assert generate(policy, prompts(), MixtureLogitsProcessor(others, WEIGHTS[1])) == expected


def test_folders_and_dictionaries(policy, gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path)
    expected = generate(policy, prompts(), MixtureLogitsProcessor([gpt2], WEIGHTS[1]))
    for others in (tmp_path, str(tmp_path), [str(tmp_path)], {"name_or_path": str(tmp_path)}):
        processor = MixtureLogitsProcessor(others, WEIGHTS[1], vocab_size=VOCAB, dtype=torch.float32)
        assert generate(policy, prompts(), processor) == expected


def test_the_calling_model_may_be_another_adapter_of_the_same_model():
    peft = pytest.importorskip("peft")
    config = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}

    def adapted(*seeds):
        model = make_llama(0)
        for seed in seeds:
            torch.manual_seed(seed)
            lora = peft.LoraConfig(**config, task_type="CAUSAL_LM")
            if isinstance(model, peft.PeftModel):
                model.add_adapter(f"a{seed}", lora)
            else:
                model = peft.get_peft_model(model, lora, f"a{seed}")
        return model.eval()

    apart = MixturePolicyModel.from_policies([adapted(1), adapted(2)], WEIGHTS[1])
    both = adapted(1, 2)
    both.set_adapter("a2")
    processor = MixtureLogitsProcessor([both], WEIGHTS[1])
    both.set_adapter("a1")
    assert generate(both, prompts(), processor) == generate(apart, prompts())
    assert both.active_adapter == "a1"
    assert all(p.requires_grad == ("a1" in name) for name, p in both.named_parameters())
    base = MixturePolicyModel.from_policies([make_llama(0), adapted(2)], WEIGHTS[1])
    with both.disable_adapter():
        assert generate(both, prompts(), processor) == generate(base, prompts())
    assert generate(both, prompts(), processor) == generate(apart, prompts())


# ---- errors ----


@pytest.mark.parametrize(
    "weights, message",
    [
        ([0.5, 0.4, 0.1], "Expected 2 mixture weights"),
        ([1.0], "Expected 2 mixture weights"),
        ([0.5, 0.6], "sum to 1"),
        ([1.5, -0.5], ">= 0"),
        ([float("nan"), 1.0], "finite"),
        (["much", "little"], "must be numbers"),
        ([[0.5, 0.5]], "one weight a policy"),
    ],
)
def test_bad_weights_are_refused_before_anything_is_loaded(weights, message):
    with pytest.raises(ValueError, match=message):
        MixtureLogitsProcessor(["no/such-model"], weights)


def test_bad_others(gpt2):
    with pytest.raises(ValueError, match="at least one policy"):
        MixtureLogitsProcessor([], [1.0])
    with pytest.raises(OSError, match="cannot be opened"):
        MixtureLogitsProcessor({"name_or_path": "./no-such-folder"}, WEIGHTS[1])
    with pytest.raises(ValueError, match="PreTrainedModel"):
        MixtureLogitsProcessor([torch.nn.Linear(2, 2)], WEIGHTS[1])
    with pytest.raises(ValueError, match="token ids where the others have"):
        MixtureLogitsProcessor([gpt2, make_llama(0, vocab_size=VOCAB + 4)], WEIGHTS[2])


def test_bad_masks(gpt2):
    with pytest.raises(ValueError, match=r"\(batch_size, prompt_length\), got \(5,\)"):
        MixtureLogitsProcessor(["no/such-model"], WEIGHTS[1], attention_mask=torch.ones(5))
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1])
    with pytest.raises(ValueError, match="batch_size, prompt_length"):
        processor.attention_mask = torch.ones(1, 1, 5, 5)


def test_a_row_of_padding_only(policy, gpt2):
    processor = MixtureLogitsProcessor([gpt2], WEIGHTS[1], pad_token_id=PAD)
    ids = torch.tensor([[PAD, PAD], [PAD, 4]])
    with pytest.raises(ValueError, match="nothing but the padding token 3"):
        processor(ids, torch.zeros(2, VOCAB))


def test_prompts_without_ids(policy, gpt2):
    embeddings = policy.get_input_embeddings()(prompts()["input_ids"])
    with pytest.raises(ValueError, match="need `input_ids`"):
        generate(policy, {"inputs_embeds": embeddings}, MixtureLogitsProcessor([gpt2], WEIGHTS[1]))
