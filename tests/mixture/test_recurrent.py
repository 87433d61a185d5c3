"""Components with states of fixed size instead of keys and values: Mamba, Mamba2, FalconMamba, alone and beside others."""

import pytest
import torch
from helpers import (
    CLOSE,
    EOS,
    PAD,
    PROMPTS,
    SIZES,
    beam_search,
    close,
    completions_of,
    greedy,
    left_pad,
    multinomial,
    pooled_logps,
    tiny,
)
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    DynamicCache,
    FalconH1Config,
    FalconMambaConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    OlmoHybridConfig,
    Qwen3NextConfig,
    StaticCache,
    xLSTMConfig,
)

from mpo_hf import MixtureLogitsProcessor, MixturePolicyModel, sequential_monte_carlo
from mpo_hf.mixture.compat import CACHE_NAME


STATES = {"state_size": 4, "expand": 2, "conv_kernel": 4}
KINDS = {
    "mamba": (MambaConfig, {**STATES, "time_step_rank": 4}),
    "mamba2": (Mamba2Config, {**STATES, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "falcon_mamba": (FalconMambaConfig, {**STATES, "time_step_rank": 4}),
}
PAIRS = [
    ("mamba", "llama"),
    ("llama", "mamba2"),
    ("falcon_mamba", "gemma3"),
    ("mamba", "mamba2"),
    ("mamba2", "mamba2"),
]
WEIGHTS, STEPS = [0.6, 0.4], 8
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": [], "pad_token_id": PAD}

since_5_24 = pytest.mark.skipif(CACHE_NAME != "cache", reason="Mamba takes a cache of its own name before 5.24")


def recurrent(kind: str, seed: int):
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range", "eos_token_id", "pad_token_id")
    config, own = KINDS[kind]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(**{name: SIZES[name] for name in names}, **own))
    with torch.no_grad():  # their own initialization makes models that hardly disagree
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def components(pair: tuple[str, ...]) -> list:
    return [recurrent(name, i) if name in KINDS else tiny(name, 10 + i) for i, name in enumerate(pair)]


@pytest.fixture(params=PAIRS, ids="+".join)
def pair(request):
    return request.param


def generate(model, prompts=PROMPTS, **kwargs) -> list[list[int]]:
    inputs = left_pad(prompts)
    return completions_of(model.generate(**inputs, **{**GREEDY, **kwargs}), inputs)


def is_alone(pair: tuple[str, ...]) -> bool:
    """Whether no component has keys and values."""
    return all(name in KINDS for name in pair)


@since_5_24
@torch.no_grad()
def test_logits_and_every_mode_of_generate_agree_with_a_loop_without_a_cache(pair):
    policies = components(pair)
    mixture = MixturePolicyModel.from_policies(policies, WEIGHTS)
    logits = mixture(**left_pad(PROMPTS)).logits[:, -1]
    torch.testing.assert_close(logits, pooled_logps(policies, WEIGHTS, PROMPTS).float(), **CLOSE)

    expected = greedy(policies, WEIGHTS, PROMPTS, STEPS, ends=())
    static = {"cache_implementation": "static"}
    for way in (
        {},
        {"use_cache": False},
        static,
        {"cache": DynamicCache(config=mixture.config)},
        {"cache": StaticCache(config=mixture.config, max_cache_len=32)},
    ):
        assert generate(mixture, **way) == expected, way
    processor = MixtureLogitsProcessor(policies[1:], WEIGHTS, attention_mask=left_pad(PROMPTS)["attention_mask"])
    assert generate(policies[0], logits_processor=[processor]) == expected
    for k, policy in enumerate(policies):
        assert generate(mixture.policy(k)) == greedy([policy], [1.0], PROMPTS, STEPS, ends=())

    torch.manual_seed(0)
    sampled = generate(mixture, do_sample=True, top_k=0)
    assert sampled == multinomial(policies, WEIGHTS, PROMPTS, STEPS, 0, ends=())
    best = [beam_search(policies, WEIGHTS, prompt, 5, 3)[0][1] for prompt in PROMPTS]
    for way in ({}, static):
        found = generate(mixture, num_beams=3, max_new_tokens=5, eos_token_id=EOS, **way)
        assert [tokens[: len(b)] for tokens, b in zip(found, best)] == best
    weights = torch.tensor([[0.6, 0.4], [0.1, 0.9], [1.0, 0.0]])
    assert generate(mixture, mixture_weights=weights) == greedy(policies, weights, PROMPTS, STEPS, ends=())
    guided = [generate(mixture, guidance_scale=1.5, use_cache=cached) for cached in (True, False)]
    assert guided[0] == guided[1]


@since_5_24
def test_generation_goes_on_from_a_returned_cache():
    pair = ("mamba2", "llama")
    policies = components(pair)
    mixture = MixturePolicyModel.from_policies(policies, WEIGHTS)
    inputs = left_pad(PROMPTS)
    first = mixture.generate(**inputs, **{**GREEDY, "max_new_tokens": 3}, return_dict_in_generate=True)
    more = torch.tensor([[5, 9], [21, 4], [13, 13]])
    ids = torch.cat([first.sequences, more], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
    output = mixture.generate(ids, attention_mask=mask, cache=first.cache, **GREEDY)
    prompts = [p + row + new for p, row, new in zip(PROMPTS, completions_of(first.sequences, inputs), more.tolist())]
    assert output[:, ids.shape[1] :].tolist() == greedy(policies, WEIGHTS, prompts, STEPS, ends=())


@since_5_24
@torch.no_grad()
def test_prompts_in_chunks_are_right_or_refused():
    policies = components(("llama", "mamba2"))
    mixture = MixturePolicyModel.from_policies(policies, WEIGHTS)
    expected = greedy(policies, WEIGHTS, PROMPTS, STEPS, ends=())
    for way in ({}, {"cache_implementation": "static"}):
        assert generate(mixture, prefill_chunk_size=3, **way) == expected
    with pytest.raises(ValueError, match="`prefill_chunk_size=1`.*padding"):
        generate(mixture, prefill_chunk_size=1)
    alone = MixturePolicyModel.from_policies(components(("mamba2", "mamba2")))
    with pytest.raises(ValueError, match="`prefill_chunk_size=3` needs a cache that records"):
        generate(alone, prefill_chunk_size=3)


HYBRIDS = {
    "qwen3_next": (
        Qwen3NextConfig,
        {
            **{"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"shared_expert_intermediate_size": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "lfm2": (Lfm2Config, {"layer_types": ["conv", "full_attention"]}),
}
MAMBA = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
MORE_HYBRIDS = {
    "bamba": (BambaConfig, {**MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": (FalconH1Config, {**MAMBA, "mamba_d_ssm": 32, "head_dim": 8}),
    "granite": (
        GraniteMoeHybridConfig,
        {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "olmo": (
        OlmoHybridConfig,
        {
            **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
            **{"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        },
    ),
}


def hybrid(kind: str):
    config, own = (HYBRIDS | MORE_HYBRIDS)[kind]
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config(**{**SIZES, **own})).eval()


@pytest.mark.parametrize("kind", HYBRIDS)
@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}], ids=str)
def test_padding_is_none_of_the_text_for_layers_of_both_kinds(kind, way):
    policies = [hybrid(kind), tiny("llama", 2)]
    mixture = MixturePolicyModel.from_policies(policies, WEIGHTS)
    assert generate(mixture, **way) == greedy(policies, WEIGHTS, PROMPTS, STEPS, ends=())


@pytest.mark.parametrize("kind", MORE_HYBRIDS)
def test_padding_in_a_static_cache_is_none_of_the_text(kind):
    policies = [hybrid(kind), tiny("llama", 2)]
    mixture = MixturePolicyModel.from_policies(policies, WEIGHTS)
    static = {"cache_implementation": "static", "max_new_tokens": 4}
    assert generate(mixture, **static) == greedy(policies, WEIGHTS, PROMPTS, 4, ends=())
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(mixture, PROMPTS[:1], prompt_lookup_num_tokens=2)


FORGETFUL = {
    "mamba": lambda: recurrent("mamba", 1),
    "falcon_mamba": lambda: recurrent("falcon_mamba", 1),
    "jamba": lambda: AutoModelForCausalLM.from_config(
        JambaConfig(
            **{**SIZES, "num_key_value_heads": 1},
            **{"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1},
            **{"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
            use_mamba_kernels=False,
        )
    ).eval(),
}


@since_5_24
@torch.no_grad()
@pytest.mark.parametrize("kind", FORGETFUL)
def test_a_component_that_forgets_its_state_is_not_given_several_tokens_behind_it(kind):
    """Mamba's first version does, in Transformers; one token at a time it is right."""
    model = FORGETFUL[kind]()
    ids = torch.tensor([PROMPTS[0]])
    cache, whole = DynamicCache(config=model.config), model(ids).logits
    parts = [model(part, cache=cache).logits for part in (ids[:, :4], ids[:, 4:])]
    assert (torch.cat(parts, 1) - whole).abs().max() > 0.01  # should that ever be mended, the refusal can go

    mixture = MixturePolicyModel.from_policies([model, tiny("llama", 2)], labels=["first", "second"])
    expected = mixture(ids, use_cache=False).logits
    cache = DynamicCache(config=mixture.config)
    parts = [mixture(part, cache=cache).logits for part in (ids[:, :4], *ids[:, 4:].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)
    with pytest.raises(ValueError, match="'first'.*cannot go on from a cache with 3 new tokens"):
        mixture(ids[:, :3], cache=cache)
    with pytest.raises(ValueError, match="leave out `prefill_chunk_size`"):
        generate(mixture, prefill_chunk_size=3)


@since_5_24
def test_particles_follow_the_mixture():
    policies = components(("mamba", "llama"))
    mixture = MixturePolicyModel.from_policies(policies, WEIGHTS)
    prompt = torch.tensor(PROMPTS[:1])
    options = {**GREEDY, "do_sample": True, "top_k": 0, "max_new_tokens": 3, "return_dict_in_generate": True}
    output = mixture.generate(
        prompt, custom_generate=sequential_monte_carlo, num_particles=4, ess_threshold=0, **options
    )
    for particle, log_weight in zip(output.particles[0].tolist(), output.log_weights[0].tolist()):
        prefixes = [particle[: prompt.shape[1] + t] for t in range(3)]
        expected = sum(pooled_logps(policies, WEIGHTS, [prefix]).logsumexp(-1).item() for prefix in prefixes)
        assert log_weight == close(expected)


@since_5_24
def test_what_states_cannot_do_is_refused_in_words_of_their_own(pair):
    policies = components(pair)
    mixture = MixturePolicyModel.from_policies(policies, WEIGHTS)
    for draft in ({"assistant_model": tiny("llama", 5)}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="not supported with stateful models"):
            generate(mixture, PROMPTS[:1], **draft)
    with pytest.raises(ValueError, match="made without a config"):
        generate(mixture, cache=DynamicCache())
    if not is_alone(pair):
        return
    filled = mixture.generate(torch.tensor(PROMPTS[:1]), **GREEDY, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="do not record how many tokens"):
        generate(mixture, PROMPTS[:1], cache=filled.cache)
    other = MixturePolicyModel.from_policies(components(("mamba",)), [1.0])
    own = DynamicCache(config=policies[0].config)
    policies[0](torch.tensor(PROMPTS[:1]), cache=own)
    with pytest.raises(ValueError, match="the state of a model that is not this mixture"):
        other(torch.tensor(PROMPTS[:1]), cache=own)


def test_models_with_a_cache_of_their_own_kind_are_refused(tmp_path):
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")}
    refused = [AutoModelForCausalLM.from_config(xLSTMConfig(**sizes, num_heads=2))]
    if CACHE_NAME != "cache":
        refused.append(recurrent("mamba", 1))
    for model in refused:
        model.save_pretrained(tmp_path / type(model).__name__)
        for policy in (model, str(tmp_path / type(model).__name__)):
            with pytest.raises(ValueError, match=f"{type(model).__name__}.*cache of its own"):
                MixturePolicyModel.from_policies([policy])
