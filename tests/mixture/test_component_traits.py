"""What components need beside their `forward`: positions, frequencies, shared layers, states; right, or refused when built."""

import logging

import pytest
import torch
from helpers import (
    CLOSE,
    EOS,
    PROMPTS,
    SIZES,
    VOCAB,
    beam_search,
    completions_of,
    greedy,
    left_pad,
    pooled_logps,
    tiny,
)
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    CompileConfig,
    CpmAntConfig,
    DeepseekV4Config,
    DynamicCache,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GenerationConfig,
    GPTNeoXConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MiniMaxConfig,
    NemotronHConfig,
    Phi3Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    RecurrentGemmaConfig,
    RobertaConfig,
    StaticCache,
)

from mpo_hf import MixtureLogitsProcessor, MixturePolicyConfig, MixturePolicyModel
from mpo_hf.mixture.compat import CACHE_NAME


WEIGHTS, STEPS = [0.6, 0.4], 6
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
WAYS = {
    "growing": {},
    "static": {"cache_implementation": "static"},
    "in chunks": {"prefill_chunk_size": 3},
    "no cache": {"use_cache": False},
}
SHARED = {
    **{"sliding_window": 4, "head_dim": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
    **{"layer_types": ["sliding_attention", "full_attention"] * 2},
    **{"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
}
KINDS = {
    "gemma3n": (
        Gemma3nTextConfig,
        {
            **SHARED,
            **{"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
            "intermediate_size": [24] * 4,
        },
    ),
    "gemma4": (Gemma4TextConfig, {**SHARED, "global_head_dim": 8}),
    "nemotron_h": (  # has layers without any cache
        NemotronHConfig,
        {
            **{"num_hidden_layers": None, "layers_block_type": ["mamba", "moe", "attention", "mlp"], "head_dim": 8},
            **{"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "chunk_size": 8},
            **{"n_routed_experts": 4, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
            "num_experts_per_tok": 2,
        },
    ),
    "roberta": (RobertaConfig, {"is_decoder": True}),
    "gpt_neox": (GPTNeoXConfig, {}),  # reads from left to right, whatever `is_decoder` says
    "bart": (BartConfig, {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}),
    "phi3": (
        Phi3Config,
        {
            "original_max_position_embeddings": 9,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 3.0, 6.0, 12.0]},
        },
    ),
}


def make(kind: str, seed: int = 1):
    config, own = KINDS[kind]
    torch.manual_seed(seed)
    sizes = {name: value for name, value in {**SIZES, **own}.items() if value is not None}
    return disagreeing(AutoModelForCausalLM.from_config(config(**sizes)))


def disagreeing(model):
    with torch.no_grad():  # their own initialization makes models whose predictions hardly depend on the text
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def generate(model, prompts=PROMPTS, **kwargs) -> list[list[int]]:
    inputs = left_pad(prompts)
    return completions_of(model.generate(**inputs, **{**GREEDY, **kwargs}), inputs)


@pytest.fixture(scope="module")
def pairs():
    made = {}

    def pair(kind):
        if kind not in made:
            made[kind] = [make(kind), tiny("llama", 7)]
        return made[kind]

    return pair


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4", "nemotron_h", "roberta", "gpt_neox"])
@torch.no_grad()
def test_every_way_of_decoding_agrees_with_a_loop_without_cache(kind, pairs):
    policies = pairs(kind)
    mixture = MixturePolicyModel.from_policies(policies, WEIGHTS)
    expected = greedy(policies, WEIGHTS, PROMPTS, STEPS, ends=())
    for name, way in WAYS.items():
        assert generate(mixture, **way) == expected, name
    best = [beam_search(policies, WEIGHTS, prompt, 4, 3)[0][1] for prompt in PROMPTS]
    found = generate(mixture, num_beams=3, max_new_tokens=4, eos_token_id=EOS)
    assert [tokens[: len(b)] for tokens, b in zip(found, best)] == best
    processor = MixtureLogitsProcessor([policies[0]], [0.4, 0.6], attention_mask=left_pad(PROMPTS)["attention_mask"])
    assert generate(policies[1], logits_processor=[processor]) == expected


@pytest.mark.parametrize("kind", ["gemma3n", "phi3"])
@torch.no_grad()
def test_such_mixtures_are_saved_and_opened(kind, pairs, tmp_path):
    mixture = MixturePolicyModel.from_policies(pairs(kind), WEIGHTS)
    mixture.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor(PROMPTS[:1])
    torch.testing.assert_close(again(ids).logits, mixture(ids).logits, **CLOSE)
    assert len(DynamicCache(config=again.config).layers) == len(again.config.layer_types)


# ---- positions ----


@torch.no_grad()
def test_positions_begin_where_those_of_a_component_do(pairs):
    policies = pairs("roberta")
    mixture, ids = MixturePolicyModel.from_policies(policies, WEIGHTS), torch.tensor(PROMPTS[:1])
    expected = sum(w * policy(ids).logits.log_softmax(-1) for w, policy in zip(WEIGHTS, policies))
    positions = torch.arange(ids.shape[1])[None]
    for given in ({}, {"attention_mask": torch.ones_like(ids)}, {"position_ids": positions}, {"use_cache": False}):
        torch.testing.assert_close(mixture(ids, **given).logits, expected, **CLOSE)
    first = mixture(ids[:, :3])
    second = mixture(ids[:, 3:], **{CACHE_NAME: first[CACHE_NAME]})
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, **CLOSE)


@torch.no_grad()
def test_padding_that_moves_the_text_of_a_component_is_refused(pairs):
    policies = pairs("bart")
    mixture = MixturePolicyModel.from_policies(policies, WEIGHTS, labels=["first", "second"])
    mixture.generation_config.forced_eos_token_id = None  # BART's own forces a last token
    for prompt in PROMPTS:
        assert generate(mixture, [prompt]) == greedy(policies, WEIGHTS, [prompt], STEPS, ends=())
    with pytest.raises(ValueError, match="'first'.*takes no positions.*padding on the left.*one at a time"):
        generate(mixture)
    for read in (mixture, mixture.base_model):
        with pytest.raises(ValueError, match="padding on the left"):
            read(**left_pad(PROMPTS))
    right = torch.tensor([[1, 5, 9], [1, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    expected = pooled_logps(policies, WEIGHTS, [[1, 5]])[0].float()
    torch.testing.assert_close(mixture(right[0], attention_mask=right[1]).logits[1, 1], expected, **CLOSE)


@torch.no_grad()
def test_positions_remembered_from_another_text_do_not_matter():
    text = {**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 1}
    torch.manual_seed(1)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()
    mixture, ids = MixturePolicyModel.from_policies([model, tiny("llama", 2)]), torch.tensor(PROMPTS[:1])
    expected = mixture(ids, use_cache=False).logits
    model.model.rope_deltas = torch.tensor([[5]])  # as after a text with an image
    first = mixture(ids[:, :3])
    second = mixture(ids[:, 3:], **{CACHE_NAME: first[CACHE_NAME]})
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, **CLOSE)


# ---- frequencies that change with the length of the text ----


@torch.no_grad()
def test_keys_are_computed_anew_where_the_frequencies_of_a_component_change(pairs):
    policies, prompt = pairs("phi3"), PROMPTS[:1]  # 7 tokens, and the frequencies change beyond 9
    mixture = MixturePolicyModel.from_policies(policies, WEIGHTS)
    expected = greedy(policies, WEIGHTS, prompt, STEPS, ends=())
    for name, way in WAYS.items():
        assert generate(mixture, prompt, **way) == expected, name
    assert generate(mixture, prompt, assistant_model=policies[1]) == expected
    best = beam_search(policies, WEIGHTS, prompt[0], 4, 3)[0][1]
    assert generate(mixture, prompt, num_beams=3, max_new_tokens=4, eos_token_id=EOS)[0][: len(best)] == best
    assert (
        generate(policies[1], prompt, logits_processor=[MixtureLogitsProcessor([policies[0]], [0.4, 0.6])]) == expected
    )
    cache = DynamicCache(config=mixture.config)
    first = mixture.generate(torch.tensor(prompt), **{**GREEDY, "max_new_tokens": 2}, **{CACHE_NAME: cache})
    longer = [first[0].tolist() + [5, 9, 13]]
    again = mixture.generate(torch.tensor(longer), **GREEDY, **{CACHE_NAME: cache})
    assert again[:, len(longer[0]) :].tolist() == greedy(policies, WEIGHTS, longer, STEPS, ends=())


@torch.no_grad()
def test_keys_of_other_frequencies_are_not_gone_on_from(pairs):
    mixture = MixturePolicyModel.from_policies(pairs("phi3"), WEIGHTS, labels=["first", "second"])
    ids = torch.tensor([PROMPTS[0] + PROMPTS[2]])
    cache = mixture(ids[:, :8])[CACHE_NAME]
    mixture(ids[:, 8:9], **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match=r"'first' rotates keys by other frequencies beyond \[9\] tokens.*new cache"):
        mixture(ids[:, 9:10], **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="`prefill_chunk_size`.*read at once"):
        generate(mixture, ids.tolist(), prefill_chunk_size=4)


# ---- refused when built ----


def recurrent_gemma():
    return RecurrentGemmaConfig(**SIZES, lru_width=16, attention_window_size=8, head_dim=8)


REFUSED = {
    "a state in modules": (recurrent_gemma, "RecurrentGemmaForCausalLM.*state in its own modules"),
    "an encoder": (lambda: BertConfig(**SIZES), r"BertLMHeadModel.*both directions.*`is_decoder=True`"),
    "text read both ways": (
        lambda: Gemma3TextConfig(**SIZES, head_dim=8, use_bidirectional_attention=True),
        "Gemma3ForCausalLM.*both directions",
    ),
    "the whole text at every step": (
        lambda: CpmAntConfig(**SIZES, dim_head=8, dim_ff=24, prompt_types=2, prompt_length=2, segment_types=2),
        "CpmAntForCausalLM.*inputs of its own.*in its cache already",
    ),
    "a cache of its own": (
        lambda: MiniMaxConfig(**SIZES, num_local_experts=2, layer_types=["linear_attention", "full_attention"]),
        "MiniMaxForCausalLM.*cache of its own",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_decoded_beside_others_are_refused_by_name(case, tmp_path):
    config, message = REFUSED[case]
    model = AutoModelForCausalLM.from_config(config())
    model.save_pretrained(tmp_path)
    for policy in (model, str(tmp_path)):
        with pytest.raises(ValueError, match=message):
            MixturePolicyModel.from_policies([policy])
    with pytest.raises(ValueError, match=message):
        MixturePolicyModel(MixturePolicyConfig(component_configs=[config()]))


def test_a_model_with_inputs_that_it_makes_itself_is_refused(monkeypatch):
    model = tiny("llama", 1)
    own = type(model).prepare_inputs_for_generation

    def shifted(self, input_ids, **kwargs):
        inputs = own(self, input_ids, **kwargs)
        return {**inputs, "position_ids": inputs["position_ids"] + 1}

    def with_language(self, input_ids, **kwargs):
        return {**own(self, input_ids, **kwargs), "langs": torch.zeros(1, 1)}

    for hook, message in ((shifted, "positions that it counts in another way"), (with_language, "'langs'")):
        monkeypatch.setattr(type(model), "prepare_inputs_for_generation", hook)
        with pytest.raises(ValueError, match=f"needs inputs of its own.*{message}"):
            MixturePolicyModel.from_policies([model])

    def strange(self, input_ids):
        raise NotImplementedError

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", strange)
    MixturePolicyModel.from_policies([model])


def test_layers_that_a_cache_would_lack_are_refused():
    model = AutoModelForCausalLM.from_config(DeepseekV4Config(**{**SIZES, "head_dim": 8}))
    mixture = MixturePolicyModel.from_policies([model, tiny("llama", 2)])
    with pytest.raises(ValueError, match="'static'`: static caches have no layers of the kinds.*Leave it out"):
        generate(mixture, cache_implementation="static")
    with pytest.raises(ValueError, match=r"made without a config.*have others \(.*DynamicCache\(config"):
        mixture(torch.tensor(PROMPTS[:1]), **{CACHE_NAME: DynamicCache()})


# ---- flags of components ----


def test_the_mixture_is_compiled_only_where_every_quantizer_can_be():
    class Quantizer:
        is_compileable = True

    models = [tiny("llama", 1), tiny("llama", 2)]
    mixture = MixturePolicyModel.from_policies(models)
    generation_config = GenerationConfig(compile_config=CompileConfig())
    generation_config.compile_config._compile_all_devices = True
    inputs = {CACHE_NAME: StaticCache(config=mixture.config, max_cache_len=8)}
    for can_compile in (True, False):
        models[1].hf_quantizer = Quantizer()
        models[1].hf_quantizer.is_compileable = can_compile
        alone = models[1]._valid_auto_compile_criteria(inputs, generation_config)
        assert mixture._valid_auto_compile_criteria(inputs, generation_config) == alone == can_compile


def test_parts_of_a_component_keep_their_attention():
    text = {**SIZES, "model_type": "llama"}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 8}
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).eval()
    model.set_attn_implementation({"text_config": "eager"})

    def attention():
        return [
            part._attn_implementation for part in (model.config, model.config.text_config, model.config.vision_config)
        ]

    before = attention()
    MixturePolicyModel.from_policies([model, tiny("llama", 2)])
    assert attention() == before and len(set(before)) == 2


# ---- the end of a text ----


def test_a_mixture_that_could_never_end_says_so(caplog):
    policies = [tiny("llama", 1, vocab_size=VOCAB + 4, eos_token_id=VOCAB + 3), tiny("llama", 2)]
    with caplog.at_level(logging.WARNING, logger="mpo_hf.mixture.mixture_building"):
        mixture = MixturePolicyModel.from_policies(policies, vocab_size=VOCAB)
    assert f"`eos_token_id=[{VOCAB + 3}]` is beyond the {VOCAB} token ids" in caplog.text
    given = {"do_sample": False, "max_new_tokens": 2, "pad_token_id": 0}
    for ends in ({}, {"eos_token_id": VOCAB}, {"eos_token_id": [VOCAB, 10000]}):
        with pytest.raises(ValueError, match=r"`eos_token_id=\[.*no text would ever end.*`\[\]`"):
            mixture.generate(torch.tensor(PROMPTS[:1]), **given, **ends)
    written = mixture.generate(torch.tensor(PROMPTS[:1]), **given, eos_token_id=[])[0, len(PROMPTS[0]) :].tolist()
    ended = mixture.generate(torch.tensor(PROMPTS[:1]), **given, eos_token_id=[VOCAB + 3, written[0]])
    assert mixture.generate(torch.tensor(PROMPTS[:1]), **given, eos_token_id=10000)[0, -2:].tolist() == written
    assert len(written) == 2 and ended[0, len(PROMPTS[0]) :].tolist() == written[:1]
    decaying = {"eos_token_id": [written[0], VOCAB + 3], "exponential_decay_length_penalty": (0, 1.1)}
    assert mixture.generate(torch.tensor(PROMPTS[:1]), **given, **decaying)[0, len(PROMPTS[0])] == written[0]
    with pytest.raises(ValueError, match=f"`forced_eos_token_id={VOCAB}` is beyond.*or to `None`"):
        mixture.generate(torch.tensor(PROMPTS[:1]), **given, eos_token_id=[], forced_eos_token_id=VOCAB)
