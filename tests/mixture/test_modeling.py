"""`MixturePolicyModel.forward`: its arguments, its outputs, and what it refuses."""

import pytest
import torch
from helpers import CLOSE, PAD, PROMPTS, VOCAB, greedy, left_pad, pooled_logps, tiny
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from mpo_hf import MixturePolicyConfig, MixturePolicyModel
from mpo_hf.mixture.compat import CACHE_NAME


@pytest.fixture
def ids():
    return torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))


def count_runs(model: MixturePolicyModel) -> list[int]:
    """How often every backbone has run, counted from now on."""
    runs = [0] * len(model.backbones)

    def counter(k):
        def count(*args):
            runs[k] += 1

        return count

    for k, backbone in enumerate(model.backbones):
        backbone.register_forward_hook(counter(k))
    return runs


def three(weights=(0.6, 0.0, 0.4)) -> MixturePolicyModel:
    policies = [tiny("llama", 1), tiny("mistral", 2), tiny("gpt2", 3)]
    return MixturePolicyModel.from_policies(policies, weights)


# ---- loss and logits ----


@torch.no_grad()
def test_loss_is_the_cross_entropy_of_the_renormalized_mixture(case, ids):
    labels = ids.clone()
    labels[0, :4] = -100
    output = case.model(ids, labels=labels)
    logps = output.logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(output.loss, -logps[counted].mean(), **CLOSE)
    summed = case.model(ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(summed, -logps[counted].sum() / 7, **CLOSE)


def test_loss_has_gradients_to_every_component_that_counts(ids):
    model = three()
    model(ids, labels=ids).loss.backward()
    lone = [backbone.get_input_embeddings().weight.grad for backbone in model.backbones]
    assert lone[0].abs().sum() > 0 and lone[1] is None and lone[2].abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("keep", [0, 1, 4, torch.tensor([2, 5]), torch.tensor([0])], ids=str)
def test_logits_are_computed_for_the_positions_to_keep(case, keep, ids):
    every = case.model(ids).logits
    kept = case.model(ids, logits_to_keep=keep).logits
    expected = every[:, keep] if isinstance(keep, torch.Tensor) else every[:, -keep:]
    torch.testing.assert_close(kept, expected, **CLOSE)


def test_generation_computes_logits_of_one_position_a_step(case):
    shapes = []
    case.model.generate(
        **left_pad(PROMPTS), max_new_tokens=1, do_sample=False, pad_token_id=PAD
    )  # adapters are tried out
    heads = {id(head): head for b in case.model.backbones if (head := b.get_output_embeddings()) is not None}
    hooks = [h.register_forward_hook(lambda _, args, out: shapes.append(out.shape[:2])) for h in heads.values()]
    case.model.generate(**left_pad(PROMPTS), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=PAD)
    for hook in hooks:
        hook.remove()
    assert len(shapes) >= 3 and {length for _, length in shapes} == {1}


class OlderLlama(LlamaForCausalLM):
    """A Llama whose forward knows neither `logits_to_keep` nor `position_ids`."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        assert not {"logits_to_keep", "position_ids"} & set(kwargs)
        return super().forward(input_ids, attention_mask, use_cache=use_cache, **{CACHE_NAME: past_key_values})


@torch.no_grad()
@pytest.mark.parametrize("keep", [0, 2, torch.tensor([2, 5]), torch.tensor([0])], ids=str)
def test_logits_of_older_architectures_are_cut_afterwards(keep, ids):
    torch.manual_seed(1)
    policies = [OlderLlama(tiny("llama", 1).config).eval(), tiny("gpt2", 2)]
    mixture = MixturePolicyModel.from_policies(policies, [0.7, 0.3])
    every = 0.7 * policies[0](ids).logits.log_softmax(-1) + 0.3 * policies[1](ids).logits.log_softmax(-1)
    expected = every[:, keep] if isinstance(keep, torch.Tensor) else every[:, -keep:]
    torch.testing.assert_close(mixture(ids, logits_to_keep=keep).logits, expected, **CLOSE)


@torch.no_grad()
def test_architectures_without_positions_are_mixed_on_padded_batches():
    torch.manual_seed(1)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2)).eval()
    mixture = MixturePolicyModel.from_policies([bloom, tiny("gpt2", 2)], [0.7, 0.3])
    expected = pooled_logps([bloom, tiny("gpt2", 2)], [0.7, 0.3], PROMPTS).float()
    torch.testing.assert_close(mixture(**left_pad(PROMPTS)).logits[:, -1], expected, **CLOSE)
    output = mixture.generate(
        **left_pad(PROMPTS), max_new_tokens=4, do_sample=False, eos_token_id=[], pad_token_id=PAD
    )
    assert output[:, 7:].tolist() == greedy([bloom, tiny("gpt2", 2)], [0.7, 0.3], PROMPTS, 4, ends=())


@torch.no_grad()
def test_vocab_size_cuts_the_token_ids_behind_it(ids):
    policies = [tiny("llama", 1, vocab_size=VOCAB), tiny("gpt2", 2, vocab_size=VOCAB + 6)]
    mixture = MixturePolicyModel.from_policies(policies, vocab_size=30)
    logits = mixture(ids.clamp(max=29)).logits
    expected = [policy(ids.clamp(max=29)).logits[..., :30].log_softmax(-1) for policy in policies]
    torch.testing.assert_close(logits, (expected[0] + expected[1]) / 2, **CLOSE)


@torch.no_grad()
def test_positions_come_from_the_mask(case):
    inputs = left_pad(PROMPTS)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 2, 3, 4]])
    logits = case.model(**inputs).logits
    torch.testing.assert_close(case.model(**inputs, position_ids=positions).logits[:, -1], logits[:, -1], **CLOSE)
    expected = pooled_logps(case.components, case.weights, PROMPTS).float()
    torch.testing.assert_close(logits[:, -1], expected, **CLOSE)


@torch.no_grad()
def test_positions_that_are_given_are_used(case, ids):
    positions = (3 * torch.arange(9)).expand(3, -1)
    logits = [c(input_ids=ids, position_ids=positions).logits.log_softmax(-1) for c in case.components]
    expected = sum(weight * logps for weight, logps in zip(case.weights, logits))
    torch.testing.assert_close(case.model(ids, position_ids=positions).logits, expected, **CLOSE)


@torch.no_grad()
def test_half_precision_components_are_mixed_in_float32(ids):
    models = [tiny("llama", 1).bfloat16(), tiny("gpt2", 2).bfloat16()]
    mixture = MixturePolicyModel.from_policies(models, [0.4, 0.6])
    logits = mixture(ids).logits
    assert mixture.dtype == torch.bfloat16 and logits.dtype == torch.float32
    expected = [model(ids).logits.float().log_softmax(-1) for model in models]
    torch.testing.assert_close(logits, 0.4 * expected[0] + 0.6 * expected[1], **CLOSE)
    assert mixture.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (3, 12)


# ---- mixture weights ----


@torch.no_grad()
def test_component_of_weight_zero_does_not_run(ids):
    model = three()
    runs = count_runs(model)
    model(ids)
    assert runs == [1, 0, 1]
    model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert runs == [4, 0, 4]
    model(ids, mixture_weights=[0, 1, 0])
    assert runs == [4, 1, 4]
    model(ids, mixture_weights=torch.tensor([[0.5, 0.5, 0], [1, 0, 0], [0, 1, 0]]))
    assert runs == [5, 2, 4]


@torch.no_grad()
def test_nan_of_a_component_of_weight_zero_does_not_spread(ids):
    model = three()
    for parameter in model.backbones[1].parameters():
        parameter.fill_(torch.nan)
    assert model(ids).logits.isfinite().all()
    assert model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None).shape == (3, 11)


@torch.no_grad()
def test_weights_of_a_call_go_before_those_of_the_model(case, ids):
    count = len(case.components)
    weights = torch.arange(1, count + 1) / (count * (count + 1) / 2)
    logps = [component(input_ids=ids).logits.log_softmax(-1) for component in case.components]
    expected = sum(weight * logp for weight, logp in zip(weights, logps))
    for given in (weights, weights.tolist(), weights.double(), weights.expand(3, -1)):
        torch.testing.assert_close(case.model(ids, mixture_weights=given).logits, expected, **CLOSE)
    assert case.model.config.mixture_weights == pytest.approx(case.weights)


@torch.no_grad()
def test_every_row_has_its_own_weights(case, ids):
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(3, len(case.components), generator=generator).softmax(-1)
    weights[1] = torch.eye(len(case.components))[0]
    batch = case.model(ids, mixture_weights=weights).logits
    for row in range(3):
        alone = case.model(ids[row : row + 1], mixture_weights=weights[row]).logits
        torch.testing.assert_close(batch[row : row + 1], alone, **CLOSE)


@torch.no_grad()
def test_weights_of_the_model_can_be_assigned(ids):
    model = three()
    model.mixture_weights = [0.0, 0.25, 0.75]
    assert model.mixture_weights.tolist() == [0.0, 0.25, 0.75] == model.config.mixture_weights
    assert model.mixture_weights.dtype == torch.float32
    torch.testing.assert_close(model(ids).logits, model(ids, mixture_weights=[0.0, 0.25, 0.75]).logits, **CLOSE)
    with pytest.raises(ValueError, match="sum to 1"):
        model.mixture_weights = [0.5, 0.5, 0.5]
    assert model.config.mixture_weights == [0.0, 0.25, 0.75]


@pytest.mark.parametrize(
    "weights, message",
    [
        ([0.5, 0.5], "Expected 3"),
        ([[0.2, 0.3, 0.5]] * 2, "2 rows, but the batch has 3"),
        ([1.5, -0.5, 0.0], "allow_off_simplex"),
        ([float("nan"), 0.5, 0.5], "finite"),
        ([0.0, 0.0, 0.0], "all be zero"),
    ],
)
def test_bad_weights_of_a_call_are_refused(ids, weights, message):
    with pytest.raises(ValueError, match=message):
        three()(ids, mixture_weights=weights)
    with pytest.raises(ValueError, match=message):
        three().generate(ids, mixture_weights=weights, max_new_tokens=2)


@torch.no_grad()
def test_off_simplex_mixtures_extrapolate(ids):
    policies = [tiny("llama", 1), tiny("gpt2", 2)]
    model = MixturePolicyModel.from_policies(policies, [1.5, -1.0], allow_off_simplex=True)
    expert, amateur = (policy(ids).logits.log_softmax(-1) for policy in policies)
    torch.testing.assert_close(model(ids).logits, 1.5 * expert - amateur, **CLOSE)
    torch.testing.assert_close(model(ids, mixture_weights=[-1, 3]).logits, 3 * amateur - expert, **CLOSE)


# ---- outputs ----


@torch.no_grad()
def test_tuples_hold_what_the_output_class_holds(ids):
    model = three()
    output = model(ids, labels=ids)
    assert isinstance(output, CausalLMOutputWithPast)
    loss, logits, cache = model(ids, labels=ids, return_dict=False)
    torch.testing.assert_close((loss, logits), (output.loss, output.logits), **CLOSE)
    assert isinstance(cache, DynamicCache)
    (logits,) = model(ids, return_dict=False, use_cache=False)
    torch.testing.assert_close(logits, output.logits, **CLOSE)


@torch.no_grad()
def test_hidden_states_are_those_of_the_components_that_run(ids):
    model = three()
    states = model(ids, output_hidden_states=True).hidden_states
    running = [model.backbones[0], model.backbones[2]]
    expected = [state for backbone in running for state in backbone(ids, output_hidden_states=True).hidden_states]
    assert len(states) == 6
    torch.testing.assert_close(list(states), expected, **CLOSE)
    assert model(ids).hidden_states is None and model(ids).attentions is None


@torch.no_grad()
def test_attentions_are_those_of_the_components_that_run(ids):
    model = three()
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    running = [model.backbones[0], model.backbones[2]]
    expected = [state for backbone in running for state in backbone(ids, output_attentions=True).attentions]
    assert len(attentions) == 4
    torch.testing.assert_close(list(attentions), expected, **CLOSE)


@torch.no_grad()
def test_hidden_states_can_be_asked_for_by_the_config(ids):
    model = three()
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 6
    assert model(ids, output_hidden_states=False).hidden_states is None


@torch.no_grad()
def test_cache_comes_back_only_when_it_is_wanted(ids):
    model = three()
    assert model(ids, use_cache=False).get(CACHE_NAME) is None
    assert model(ids)[CACHE_NAME].get_seq_length() == 9
    model.config.use_cache = False
    assert model(ids).get(CACHE_NAME) is None
    assert model(ids, use_cache=True)[CACHE_NAME].get_seq_length() == 9


# ---- caches ----


@torch.no_grad()
@pytest.mark.parametrize("make", ["dynamic", "growing", "static"])
def test_cache_refuses_weights_that_wake_a_component(make, ids):
    model = three()
    cache = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "growing": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
    }[make]()
    model(ids[:, :5], cache=cache)
    with pytest.raises(ValueError, match=r"components \[0, 2\] only.*also run \[1\]"):
        model(ids[:, 5:], cache=cache, mixture_weights=[0.2, 0.4, 0.4])


@torch.no_grad()
def test_cache_keeps_components_that_fall_silent_up_to_date(ids):
    model = three([0.5, 0.2, 0.3])
    runs = count_runs(model)
    cache = model(ids[:, :4])[CACHE_NAME]
    model(ids[:, 4:7], cache=cache, mixture_weights=[0, 0, 1])
    assert runs == [2, 2, 2]
    logits = model(ids[:, 7:], cache=cache).logits
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, 7:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("build", [lambda config: DynamicCache(config=config), lambda config: DynamicCache()])
def test_cache_of_another_model_is_refused(build, ids):
    other = tiny("qwen2", 9)
    cache = build(other.config)
    other(ids[:, :4], **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="cache holds 4 tokens of a model that is not this mixture"):
        three()(ids[:, 4:], cache=cache)


@torch.no_grad()
def test_cache_of_another_mixture_is_refused(ids):
    other = MixturePolicyModel.from_policies([tiny("llama", 1), tiny("gemma3", 2)])
    for cache in (
        other(ids[:, :4])[CACHE_NAME],
        other(ids[:, :4], cache=DynamicCache())[CACHE_NAME],
    ):
        with pytest.raises(ValueError, match="cache.*5 layers.*components"):
            MixturePolicyModel.from_policies([tiny("llama", 1), tiny("gpt2", 2)])(ids[:, 4:], cache=cache)


def test_empty_cache_of_another_shape_is_refused(ids):
    with pytest.raises(ValueError, match="cache.*2 layers.*components"):
        three()(ids, cache=DynamicCache(config=tiny("qwen2", 9).config))


# ---- token ids and embeddings ----


@torch.no_grad()
def test_padding_ids_beyond_the_common_vocabulary_are_accepted_under_the_mask():
    policies = [tiny("llama", 1), tiny("gpt2", 2, vocab_size=VOCAB + 1)]
    model = MixturePolicyModel.from_policies(policies, vocab_size=VOCAB)
    foreign, usual = left_pad(PROMPTS, pad=VOCAB), left_pad(PROMPTS, pad=PAD)
    torch.testing.assert_close(model(**foreign).logits[:, -1], model(**usual).logits[:, -1], **CLOSE)
    unmasked = foreign["input_ids"]
    for mask in (None, torch.ones_like(unmasked)):
        with pytest.raises(ValueError, match=f"token id {VOCAB} is not among the {VOCAB}"):
            model(unmasked, attention_mask=mask)


@torch.no_grad()
def test_mixture_lends_the_embeddings_of_its_first_component():
    model = three()
    assert model.get_input_embeddings() is model.backbones[0].get_input_embeddings()
    with pytest.raises(ValueError, match="no embeddings of its own"):
        model.resize_token_embeddings(40)


def test_mixture_is_made_for_evaluation():
    training = tiny("llama", 1).train()
    assert not MixturePolicyModel.from_policies([training, tiny("gpt2", 2)]).training
    assert not training.training


def test_mixture_without_components_is_refused():
    with pytest.raises(ValueError, match="at least one component"):
        MixturePolicyModel(MixturePolicyConfig())


@torch.no_grad()
def test_config_alone_builds_random_components(ids):
    config = MixturePolicyConfig(component_configs=[tiny("llama", 0).config, tiny("gpt2", 0).config])
    model = MixturePolicyModel(config).eval()
    assert [type(b).__name__ for b in model.backbones] == ["LlamaForCausalLM", "GPT2LMHeadModel"]
    assert model(ids).logits.isfinite().all()
