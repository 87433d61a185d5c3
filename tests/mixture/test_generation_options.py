"""Every option of `generate()`: token for token against loops without caches, or refused by its name."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    BOS,
    CLOSE,
    PAD,
    PROGRAMS,
    PROMPTS,
    VOCAB,
    beam_search,
    close,
    completions_of,
    greedy,
    left_pad,
    pooled_logps,
    tiny,
    tiny_tokenizer,
)
from transformers import (
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitNormalization,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    QuantizedCache,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StaticCache,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkDetector,
    WatermarkingConfig,
    WatermarkLogitsProcessor,
    cache_utils,
)
from transformers.cache_utils import StaticLayer
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)

from mpo_hf import MixturePolicyModel
from mpo_hf.mixture.compat import CACHE_NAME


PROMPT = [BOS, 7, 11, 3, 22, 8, 14, 7, 11]
ENDS = [2, 12, 17, 29]
STEPS = 8
SETTINGS = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": [], "pad_token_id": PAD}
# one whose layers all attend to everything, one with sliding windows, one with adapters over one base
SOME_KINDS = ["llama+gpt2", "mistral+gemma3", "base+two adapters"]


@pytest.fixture(params=SOME_KINDS)
def some_case(request, cases):
    return cases(request.param)


def generate(model, prompts, **kwargs):
    inputs = left_pad(prompts)
    output = model.generate(**inputs, **{**SETTINGS, **kwargs})
    return completions_of(output if isinstance(output, torch.Tensor) else output.sequences, inputs)


def decode_with(case, processors, do_sample=False, seed=0, ends=(), prompt=PROMPT, steps=STEPS):
    """One completion, every step anew, its scores passed through processors."""
    torch.manual_seed(seed)
    completion: list[int] = []
    while len(completion) < steps and not (completion and completion[-1] in ends):
        ids = torch.tensor([prompt + completion])
        scores = pooled_logps(case.components, case.weights, ids.tolist()).float()
        for processor in processors:
            scores = processor(ids, scores)
        token = torch.multinomial(scores.softmax(-1), 1) if do_sample else scores.argmax(-1)
        completion.append(token.item())
    return completion


# ---- what changes the scores ----

ENDING = torch.tensor(ENDS)
AT_END = len(PROMPT) + STEPS
SYNTHID = {
    "ngram_len": 3,
    "keys": [3, 14, 15, 92],
    "sampling_table_size": 64,
    "sampling_table_seed": 0,
    "context_history_size": 16,
}
# what `generate` is asked for, and what then works on the scores of the mixture
CHANGES = {
    "repetition_penalty": ({"repetition_penalty": 3.0}, lambda: [RepetitionPenaltyLogitsProcessor(3.0)]),
    "encoder_repetition_penalty": (
        {"encoder_repetition_penalty": 5.0},
        lambda: [EncoderRepetitionPenaltyLogitsProcessor(5.0, torch.tensor([PROMPT]))],
    ),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 1}, lambda: [NoRepeatNGramLogitsProcessor(1)]),
    "encoder_no_repeat_ngram_size": (
        {"encoder_no_repeat_ngram_size": 1},
        lambda: [EncoderNoRepeatNGramLogitsProcessor(1, torch.tensor([PROMPT]))],
    ),
    "bad_words_ids": (
        {"bad_words_ids": [[i] for i in range(3, 20)]},
        lambda: [NoBadWordsLogitsProcessor([[i] for i in range(3, 20)])],
    ),
    "sequence_bias": (
        {"sequence_bias": {(21,): 4.0, (21, 4): 6.0}},
        lambda: [SequenceBiasLogitsProcessor({(21,): 4.0, (21, 4): 6.0})],
    ),
    "forced_eos_token_id": ({"forced_eos_token_id": 9}, lambda: [ForcedEOSTokenLogitsProcessor(AT_END, 9)]),
    "suppress_tokens": (
        {"suppress_tokens": list(range(10, 32))},
        lambda: [SuppressTokensLogitsProcessor(list(range(10, 32)))],
    ),
    "begin_suppress_tokens": (
        {"begin_suppress_tokens": list(range(5, 32))},
        lambda: [SuppressTokensAtBeginLogitsProcessor(list(range(5, 32)), len(PROMPT))],
    ),
    "exponential_decay_length_penalty": (
        {"exponential_decay_length_penalty": (1, 3.0), "eos_token_id": ENDS},
        lambda: [ExponentialDecayLengthPenalty((1, 3.0), ENDING, len(PROMPT))],
    ),
    "prefix_allowed_tokens_fn": (
        {"prefix_allowed_tokens_fn": lambda row, ids: [4 + len(ids) % 3, 20]},
        lambda: [PrefixConstrainedLogitsProcessor(lambda row, ids: [4 + len(ids) % 3, 20], 1)],
    ),
    "watermarking_config": (
        {"watermarking_config": WatermarkingConfig(bias=4.0)},
        lambda: [WatermarkLogitsProcessor(VOCAB, "cpu", bias=4.0)],
    ),
}
WARPS = {
    "temperature": ({"temperature": 2.5}, lambda: [TemperatureLogitsWarper(2.5)]),
    "top_k": ({"top_k": 2}, lambda: [TopKLogitsWarper(2)]),
    "top_p": ({"top_p": 0.4}, lambda: [TopPLogitsWarper(0.4)]),
    "min_p": ({"min_p": 0.3}, lambda: [MinPLogitsWarper(0.3)]),
    "top_h": ({"top_h": 0.3}, lambda: [TopHLogitsWarper(0.3)]),
    "typical_p": ({"typical_p": 0.3}, lambda: [TypicalLogitsWarper(0.3)]),
    "epsilon_cutoff": ({"epsilon_cutoff": 0.2}, lambda: [EpsilonLogitsWarper(0.2)]),
    "eta_cutoff": ({"eta_cutoff": 0.3}, lambda: [EtaLogitsWarper(0.3)]),
    "synthid": (
        {"watermarking_config": SynthIDTextWatermarkingConfig(**SYNTHID)},
        lambda: [SynthIDTextWatermarkLogitsProcessor(**SYNTHID, device=torch.device("cpu"))],
    ),
    "all together": (
        {"temperature": 1.7, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.4, "renormalize_logits": True},
        lambda: [
            RepetitionPenaltyLogitsProcessor(1.4),
            TemperatureLogitsWarper(1.7),
            TopKLogitsWarper(9),
            TopPLogitsWarper(0.9),
            LogitNormalization(),
        ],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_processors_change_the_scores_of_the_mixture(cases, name):
    options, processors = CHANGES[name]
    expected = {}
    for kind in SOME_KINDS:
        case = cases(kind)
        expected[kind] = decode_with(case, processors(), ends=options.get("eos_token_id", ()))
        assert generate(case.model, [PROMPT], **options) == [expected[kind]]
    assert any(row != decode_with(cases(kind), []) for kind, row in expected.items())


@pytest.mark.parametrize("name", WARPS)
def test_warpers_change_what_is_sampled_from_the_mixture(cases, name):
    options, processors = WARPS[name]
    changed = False
    for kind in SOME_KINDS:
        case = cases(kind)
        expected = decode_with(case, processors(), do_sample=True, seed=1)
        torch.manual_seed(1)
        assert generate(case.model, [PROMPT], **{"do_sample": True, "top_k": 0, **options}) == [expected]
        changed |= expected != decode_with(case, [], do_sample=True, seed=1)
    assert changed


def test_watermark_is_detected_in_what_a_mixture_writes(cases):
    model = cases("llama+gpt2").model
    mark = WatermarkingConfig(bias=6.0)
    detector = WatermarkDetector(
        model_config=model.config, device="cpu", watermarking_config=mark, ignore_repeated_ngrams=True
    )
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 40}
    torch.manual_seed(0)
    marked, plain = (
        torch.tensor(generate(model, [[BOS, 7, 11, 3]], **settings, **extra))
        for extra in ({"watermarking_config": mark}, {})
    )
    assert detector(marked).item() and not detector(plain).item()


def test_invalid_scores_are_removed(cases):
    case = cases("llama+gpt2")
    spoil = [lambda ids, scores: torch.where(torch.arange(VOCAB) % 3 == 0, torch.nan, scores)]
    expected = decode_with(case, [*spoil, lambda ids, scores: torch.nan_to_num(scores, nan=0.0)])
    assert generate(case.model, [PROMPT], logits_processor=spoil, remove_invalid_values=True) == [expected]


def test_guidance_runs_with_the_weights_of_the_call_and_a_negative_prompt(some_case):
    count, scale, negative = len(some_case.components), 1.5, [BOS, 9, 4]
    weights = torch.arange(1, count + 1) / (count * (count + 1) / 2)
    for way in ({}, {"use_cache": False}):
        completion = []
        for _ in range(5):
            given, without = (
                pooled_logps(some_case.components, weights, [prompt + completion]).log_softmax(-1)
                for prompt in (PROMPT, negative)
            )
            completion.append((scale * (given - without) + without).argmax().item())
        options = {"guidance_scale": scale, "negative_prompt_ids": torch.tensor([negative]), "max_new_tokens": 5}
        assert generate(some_case.model, [PROMPT], mixture_weights=weights, **options, **way) == [completion]


# ---- when to stop ----


def test_stopping_criteria_and_strings(some_case):
    expected = greedy(some_case.components, some_case.weights, [PROMPT], STEPS, ends=())[0]
    until = expected.index(expected[3])
    # names of one length, so that none begins with another; Transformers looks for the word "abcdef"
    tokenizer = tiny_tokenizer([*(f"t{i:02}" for i in range(VOCAB)), "abcdef"])
    own = [lambda ids, scores, **kwargs: torch.full((len(ids),), ids.shape[1] == len(PROMPT) + until + 1)]
    for options in (
        {"stopping_criteria": StoppingCriteriaList(own)},
        {"stop_strings": [f"t{expected[until]:02}"], "tokenizer": tokenizer},
    ):
        assert generate(some_case.model, [PROMPT], **options) == [expected[: until + 1]]
    assert len(generate(some_case.model, [PROMPT], max_time=1e-9)[0]) == 1


def test_first_token_can_be_forced(cases):
    case = cases("llama+gpt2")
    expected = [9, *greedy(case.components, case.weights, [[BOS, 9]], STEPS - 1, ends=())[0]]
    assert generate(case.model, [[BOS]], forced_bos_token_id=9) == [expected]


def test_lengths_by_total(some_case):
    expected = greedy(some_case.components, some_case.weights, [PROMPT], STEPS, ends=ENDS, min_new_tokens=4)
    options = {"max_new_tokens": None, "max_length": AT_END, "min_length": len(PROMPT) + 4, "eos_token_id": ENDS}
    assert generate(some_case.model, [PROMPT], **options)[0] == expected[0]


def test_last_token_of_a_prompt_is_healed(cases):
    case = cases("llama+gpt2")
    tokens = ["t0", "t1", *(f"w{i}" for i in range(2, VOCAB - 3)), "a", "ab", "abc"]
    tokenizer = tiny_tokenizer(tokens)
    tokenizer.add_special_tokens({"pad_token": "t0", "bos_token": "t1"})
    prompt = [4, 9, tokens.index("a")]
    scores = pooled_logps(case.components, case.weights, [prompt[:-1]])[0]
    scores[[tokens.index(word) for word in ("a", "ab", "abc")]] += torch.tensor([11.0, 10.0, 10.0])
    expected = [*prompt[:-1], scores.argmax().item()]
    assert expected != prompt
    expected += greedy(case.components, case.weights, [expected], 4, ends=())[0]
    options = {"token_healing": True, "tokenizer": tokenizer, "max_new_tokens": 4}
    assert case.model.generate(torch.tensor([prompt]), **{**SETTINGS, **options}).tolist() == [expected]
    with pytest.raises(ValueError, match="`token_healing`.*Assign them"):
        generate(case.model, [prompt], **options, mixture_weights=[0.1, 0.9])


# ---- what comes out ----


def test_hidden_states_and_attentions_are_those_of_every_component_in_turn(cases):
    case = cases("llama+gpt2")
    model = MixturePolicyModel.from_policies([tiny("llama", 10), tiny("gpt2", 11)], case.weights)
    model.set_attn_implementation("eager")
    output = model.generate(
        torch.tensor([PROMPT]), **{**SETTINGS, "max_new_tokens": 3}, return_dict_in_generate=True,
        output_hidden_states=True, output_attentions=True,
    )  # fmt: skip
    ids = output.sequences[:, :-1]
    for component in case.components:
        component.set_attn_implementation("eager")
    runs = [component(ids, output_hidden_states=True, output_attentions=True) for component in case.components]
    for field, expected in (
        ("hidden_states", [state for run in runs for state in run.hidden_states]),
        ("attentions", [weights for run in runs for weights in run.attentions]),
    ):
        steps = getattr(output, field)
        assert len(steps) == 3 and {len(step) for step in steps} == {len(expected)}
        for step, layers in enumerate(steps):
            seen = len(PROMPT) + step
            new = slice(0, seen) if step == 0 else slice(seen - 1, seen)
            for layer, whole in zip(layers, expected):
                part = whole[:, new] if field == "hidden_states" else whole[:, :, new, :seen]
                torch.testing.assert_close(layer, part, **CLOSE)


def test_transition_scores_are_log_probabilities_of_the_mixture(some_case):
    torch.manual_seed(3)
    inputs = left_pad(PROMPTS)
    output = some_case.model.generate(
        **inputs, **{**SETTINGS, "do_sample": True, "top_k": 0}, return_dict_in_generate=True, output_scores=True
    )
    scores = some_case.model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions_of(output.sequences, inputs))):
        for step, token in enumerate(completion):
            logps = pooled_logps(some_case.components, some_case.weights, [prompt + completion[:step]])[0]
            assert scores[row, step].item() == close(logps.log_softmax(-1)[token].item())


def test_transition_scores_of_beams_add_up(some_case):
    inputs = left_pad(PROMPTS)
    output = some_case.model.generate(
        **inputs,
        **{**SETTINGS, "eos_token_id": ENDS},
        num_beams=3,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    steps = some_case.model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    best = [
        beam_search(some_case.components, some_case.weights, p, STEPS, 3, ends=ENDS, length_penalty=0.0)[0]
        for p in PROMPTS
    ]
    for row, (_, tokens) in zip(completions_of(output.sequences, inputs), best):
        assert row[: len(tokens)] == tokens
    torch.testing.assert_close(steps.sum(1), torch.tensor([score for score, _ in best]), **CLOSE)


@pytest.mark.parametrize("options", [{"num_return_sequences": 3}, {"num_return_sequences": 2, "temperature": 3.0}])
def test_sampled_beams_of_padded_prompts_are_those_of_each_prompt(some_case, options):
    """With beams drawn by Gumbel noise of their own, a row must not depend on its neighbors, padding or cache."""
    settings = {"num_beams": 3, "do_sample": True, "top_k": 0, "eos_token_id": ENDS, **options}
    outputs = []
    for way in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(14)
        outputs.append(generate(some_case.model, PROMPTS, **settings, **way))
    assert outputs[0] == outputs[1] == outputs[2]


# ---- caches ----

CACHES = {
    "dynamic": {"cache_implementation": "dynamic"},
    "static, long": {"cache_implementation": "static", "max_cache_len": 40},
    "static, prefill in chunks": {"cache_implementation": "static", "prefill_chunk_size": 3},
    "hybrid": {"cache_implementation": "hybrid"},
}


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES.keys())
def test_caches_change_nothing(some_case, options):
    expected = greedy(some_case.components, some_case.weights, PROMPTS, STEPS, ends=())
    assert generate(some_case.model, PROMPTS, **options) == expected


def test_static_cache_of_the_users_own_serves_again_after_reset(some_case):
    cache = StaticCache(config=some_case.model.config, max_cache_len=24)
    for prompts in (PROMPTS, PROMPTS[::-1]):
        expected = greedy(some_case.components, some_case.weights, prompts, STEPS, ends=())
        assert generate(some_case.model, prompts, cache=cache) == expected
        cache.reset()


def quantized_decode(case, prompt, steps):
    """Greedy, with every component in a quantized cache of its own."""
    caches = [QuantizedCache("fp8", component.config) for component in case.components]
    ids, completion = torch.tensor([prompt]), []
    while len(completion) < steps:
        pooled = sum(
            weight * component(ids, **{CACHE_NAME: cache}).logits[:, -1].float().log_softmax(-1)
            for component, weight, cache in zip(case.components, case.weights, caches)
        )
        completion.append(pooled.argmax().item())
        ids = torch.tensor([completion[-1:]])
    return completion


@torch.no_grad()
@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this version has no fp8 cache, as 5.20 has not"
)
@pytest.mark.parametrize("kind", ["llama+gpt2+qwen2", "base+two adapters"])
def test_quantized_cache_quantizes_every_component_as_its_own_would(cases, kind):
    case = cases(kind)
    expected = quantized_decode(case, PROMPT, 30)
    options = {"max_new_tokens": 30, "cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    assert generate(case.model, [PROMPT], **options) == [expected]
    with pytest.raises(ValueError, match="full attention"):
        generate(cases("mistral+gemma3").model, [PROMPT], **options)


def test_caches_that_do_not_fit_are_refused(cases):
    model = cases("llama+gpt2").model
    other = tiny("llama", 3, num_hidden_layers=4)
    foreign = DynamicCache(config=other.config)
    generate(other, PROMPTS, **{CACHE_NAME: foreign})
    own = DynamicCache(config=model.config)
    generate(model, PROMPTS, cache=own)
    for cache, message in (
        ("dynamic", "must be a cache of a decoder.*got str"),
        (((torch.zeros(1),),), "tuple"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), "got EncoderDecoderCache"),
        (DynamicCache(config=other.config), None),
        (foreign, "holds 14 tokens of a model that is not this mixture"),
        (DynamicCache(config=cases("mistral+gemma3").model.config), "has 5 layers"),
        (DynamicCache(config=tiny("llama", 3).config), "has 2 layers"),
        (own, "holds 14 tokens already, but the input has 7"),
        (StaticCache(config=model.config, max_cache_len=9), "room for 9 tokens, but 14 are needed"),
    ):
        if message is None:  # four layers, and empty: it fits
            assert generate(model, PROMPTS, cache=cache) == generate(model, PROMPTS)
            continue
        with pytest.raises(ValueError, match=message):
            generate(model, PROMPTS, cache=cache)
    with pytest.raises(ValueError, match="holds 3 sequences, but 2 are to be generated"):
        generate(model, [PROMPT * 3, PROMPT * 2], cache=own)
    with pytest.raises(ValueError, match="not this mixture"):
        model(torch.tensor([PROMPT]), cache=foreign)


@pytest.mark.slow  # compiles every component twice: four minutes
def test_compiled_static_cache_changes_nothing(cases):
    case = cases("mistral+gemma3")
    config = CompileConfig(mode="default")
    config._compile_all_devices = True
    for way in ({}, {"prefill_chunk_size": 3}):
        options = {"cache_implementation": "static", "compile_config": config, **way}
        assert generate(case.model, PROMPTS, **options) == greedy(
            case.components, case.weights, PROMPTS, STEPS, ends=()
        )
    assert case.model.__dict__.get("_compiled_call") is not None


# ---- assisted decoding ----


def small_case():
    """A mixture of few tokens, whose distribution can be enumerated, and a draft model unlike it."""
    policies, components = (
        [tiny(name, 50 + i, vocab_size=6) for i, name in enumerate(("llama", "gpt2"))] for _ in range(2)
    )
    model = MixturePolicyModel.from_policies(policies, [0.6, 0.4])
    return SimpleNamespace(model=model, components=components, weights=[0.6, 0.4]), tiny("llama", 61, vocab_size=6)


def distribution(components, weights, prompt):
    """Probabilities of all pairs of next tokens, `(V * V,)`."""
    first = pooled_logps(components, weights, [prompt])[0].log_softmax(-1)
    second = pooled_logps(components, weights, [[*prompt, token] for token in range(len(first))]).log_softmax(-1)
    return (first[:, None] + second).exp().flatten()


@pytest.mark.parametrize("who", ["mixture is assisted", "mixture assists"])
def test_assisted_sampling_is_exact(who):
    case, draft = small_case()
    target, assistant, components, weights = case.model, draft, case.components, case.weights
    if who == "mixture assists":
        target, assistant, components, weights = draft, case.model, [draft], [1.0]
    prompt, samples = [1, 4, 3], 200
    probabilities = distribution(components, weights, prompt)
    torch.manual_seed(5)
    counts = torch.zeros(36, dtype=torch.float64)
    config = GenerationConfig(max_new_tokens=3, do_sample=True, top_k=0, pad_token_id=0, num_assistant_tokens=2)
    for _ in range(samples):
        ids = target.generate(
            torch.tensor([prompt]), generation_config=config, assistant_model=assistant, eos_token_id=[]
        )
        counts[ids[0, 3] * 6 + ids[0, 4]] += 1

    def chi_square(expected):
        rare = expected * samples < 5
        seen, due = ((x[~rare].tolist() + [x[rare].sum().item()]) for x in (counts, expected * samples))
        return sum((s - d) ** 2 / d for s, d in zip(seen, due) if d), len(due) - 1

    statistic, freedom = chi_square(probabilities)
    assert statistic < freedom + 3.5 * math.sqrt(2 * freedom)
    # the assistant's own distribution would be far off
    own = (
        distribution([assistant], [1.0], prompt)
        if who == "mixture is assisted"
        else distribution(case.components, case.weights, prompt)
    )
    statistic, freedom = chi_square(own)
    assert statistic > 3 * (freedom + 3.5 * math.sqrt(2 * freedom))


DRAFTS = {
    "reference": lambda model: model.reference_policy,
    "component": lambda model: model.policy(0),
    "itself": lambda model: model,
}


@pytest.mark.parametrize("kind", ["llama+gpt2", "base+two adapters", "mistral+gemma3"])
@pytest.mark.parametrize("way", ["assistant", "lookup"])
def test_drafts_with_a_static_cache_are_right_or_refused_by_transformers(cases, kind, way):
    case, prompt = cases(kind), PROMPT * 2
    # with room: Transformers 5.24 makes one too small for the last drafts by prompt lookup, of any model
    options = {CACHE_NAME: StaticCache(config=case.model.config, max_cache_len=48), "max_new_tokens": 12}
    options |= {"assistant_model": tiny("llama", 44)} if way == "assistant" else {"prompt_lookup_num_tokens": 2}
    if getattr(StaticLayer, "is_croppable", False) and kind != "mistral+gemma3":
        expected = greedy(case.components, case.weights, [prompt], 12, ends=())
        assert generate(case.model, [prompt], **options) == expected
    else:  # before Transformers 5.24, and for windows that are shorter than the text, which cannot go back
        with pytest.raises(ValueError, match="Static|[Ss]liding|crop"):
            generate(case.model, [prompt], **options)


@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS.keys())
def test_assistants_that_share_weights_with_the_mixture(cases, draft):
    case = cases("adapters+reference")
    weights = [0.9, 0.1]
    expected = greedy(case.components, weights, [PROMPT], 16, ends=())
    options = {"max_new_tokens": 16, "assistant_model": draft(case.model), "mixture_weights": weights}
    assert generate(case.model, [PROMPT], **options) == expected
    assert generate(case.model, [PROMPT], **options, num_assistant_tokens=1) == expected


def test_assistants_with_weights_of_their_own(cases):
    # weights in the generation config of one model must not reach the other, which has another number of components
    target, assistant = cases("llama+gpt2"), cases("llama+gpt2+qwen2")
    expected = greedy(target.components, [0.1, 0.9], [PROMPT], STEPS, ends=())
    config = GenerationConfig(mixture_weights=[0.1, 0.9], **SETTINGS)
    inputs = left_pad([PROMPT])
    output = target.model.generate(**inputs, generation_config=config, assistant_model=assistant.model)
    assert completions_of(output, inputs) == expected


def test_weights_in_a_generation_config_are_those_of_its_calls(cases):
    case = cases("llama+gpt2")
    model = copy.copy(case.model)
    model.generation_config = GenerationConfig(mixture_weights=[0.1, 0.9])
    expected = {w: greedy(case.components, [w, 1 - w], PROMPTS, STEPS, ends=()) for w in (0.1, 0.55, 0.8)}
    assert generate(case.model, PROMPTS) == expected[0.55]
    assert generate(model, PROMPTS) == expected[0.1]
    assert generate(model, PROMPTS, mixture_weights=[0.8, 0.2]) == expected[0.8]


def test_assistant_with_another_tokenizer(cases):
    case = cases("llama+gpt2")
    words = [f"t{i}" for i in range(VOCAB)]
    own, foreign = tiny_tokenizer(words), tiny_tokenizer([*words[::-1], "more"])
    assistant = tiny("llama", 44, vocab_size=VOCAB + 1)
    tokenizers = {"tokenizer": own, "assistant_tokenizer": foreign}
    expected = greedy(case.components, case.weights, [PROMPT], STEPS, ends=())
    assert generate(case.model, [PROMPT], assistant_model=assistant, **tokenizers) == expected
    with pytest.raises(ValueError, match="`assistant_tokenizer`.*greedily only"):
        generate(case.model, [PROMPT], assistant_model=assistant, **tokenizers, do_sample=True)
    # and the mixture as the assistant
    tokenizers = {"tokenizer": foreign, "assistant_tokenizer": own}
    target = tiny("llama", 44, vocab_size=VOCAB + 1)
    expected = greedy([target], [1.0], [PROMPT], STEPS, ends=())
    assert generate(target, [PROMPT], assistant_model=case.model, **tokenizers) == expected


def test_component_with_more_tokens_is_no_assistant_by_itself():
    policies, components = ([tiny("llama", 1), tiny("gpt2", 2, vocab_size=VOCAB + 1)] for _ in range(2))
    model = MixturePolicyModel.from_policies(policies, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"model\.policy\(k\)"):
        generate(model, [PROMPT], assistant_model=policies[1])
    components[1].resize_token_embeddings(VOCAB)
    expected = greedy(components, [0.5, 0.5], [PROMPT], STEPS, ends=())
    assert generate(model, [PROMPT], assistant_model=model.policy(1)) == expected


# ---- decoding of the user's own ----


def own_decoding(model, input_ids, logits_processor, stopping_criteria, generation_config, sharpness=1.0, **kwargs):
    """Takes the least likely of the two most likely tokens."""
    while not stopping_criteria(input_ids, None).all():
        logits = model(input_ids, mixture_weights=kwargs.get("mixture_weights")).logits[:, -1]
        input_ids = torch.cat([input_ids, logits.topk(2).indices[:, -1:]], 1)
    return input_ids


def test_custom_generate_as_a_function(cases):
    case = cases("llama+gpt2")
    expected: list[int] = []
    for _ in range(4):
        expected.append(pooled_logps(case.components, [0.2, 0.8], [PROMPT + expected])[0].topk(2).indices[1].item())
    options = {"custom_generate": own_decoding, "sharpness": 2.0, "max_new_tokens": 4, "mixture_weights": [0.2, 0.8]}
    assert generate(case.model, [PROMPT], **options) == [expected]


def test_custom_generate_in_a_folder(cases):
    case = cases("llama+gpt2")
    options = {"custom_generate": str(PROGRAMS), "trust_remote_code": True, "do_sample": True}
    assert generate(case.model, [PROMPT], **options) == greedy(case.components, case.weights, [PROMPT], 3, ends=())


# ---- refused by name ----

REFUSED = {
    "assistant_early_exit": ({"assistant_early_exit": 1}, "`assistant_early_exit=1`.*assistant_model"),
    "use_mtp": ({"use_mtp": True}, "`use_mtp=True`.*assistant_model"),
    "speculation_type": ({"speculation_type": "dflash"}, "`speculation_type='dflash'`"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "`penalty_alpha=0.6`.*from_contrast"),
    "dola": ({"dola_layers": "high"}, "`dola_layers='high'`.*one component"),
    "dola of the user's own": ({"dola_layers": "high", "custom_generate": own_decoding}, "`dola_layers"),
    "group beams": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "trust_remote_code"),
    "constrained beams": ({"num_beams": 4, "force_words_ids": [[5]]}, "trust_remote_code"),
    "paged": ({"cache_implementation": "paged"}, "padded batch"),
    "offloaded": ({"cache_implementation": "offloaded"}, "'offloaded'.*runs on the CPU"),
    "offloaded static": ({"cache_implementation": "offloaded_static"}, "'offloaded_static'.*runs on the CPU"),
    "unknown cache": ({"cache_implementation": "nonsense"}, "nonsense"),
    "chunks without cache": ({"prefill_chunk_size": 2, "use_cache": False}, "prefill chunking without a cache"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 9, 16)}, "`inputs_embeds`.*`input_ids`"),
    "return_dict": ({"return_dict": True}, "return_dict_in_generate"),
    "encoder outputs": ({"encoder_outputs": (torch.zeros(1, 2, 3),)}, "encoder_outputs"),
    "decoder ids": ({"decoder_input_ids": torch.zeros(1, 1).long()}, "decoder_input_ids"),
    "typo": ({"max_new_tokes": 3}, "max_new_tokes"),
    "too many weights": ({"mixture_weights": [0.2, 0.2, 0.6]}, "Expected 2 mixture weights"),
    "weights off the simplex": ({"mixture_weights": [0.2, 0.2]}, "sum to 1"),
    "weights of other rows": ({"mixture_weights": [[0.5, 0.5]] * 2}, "weights for 2 rows, but the batch has 1"),
    "streamed beams": ({"num_beams": 2, "streamer": object()}, "streamer"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_name(cases, options, message):
    with pytest.raises(ValueError, match=message):
        generate(cases("llama+gpt2").model, [PROMPT], **options)


def test_continuous_batching_is_refused_by_name(cases):
    model = cases("base+two adapters").model
    with pytest.raises(ValueError, match="Continuous batching.*padded batch"):
        model.generate_batch([PROMPT], max_new_tokens=2)
    with pytest.raises(ValueError, match="Continuous batching"):
        model.init_continuous_batching()
    with pytest.raises(ValueError, match="Continuous batching"):
        generate(model, [PROMPT], generation_config=GenerationConfig(cache_implementation="paged"))
