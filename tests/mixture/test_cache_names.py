"""A cache by either of its names: `past_key_values`, and `cache` as Transformers calls it from version 5.24 on."""

import warnings

import pytest
import torch
from datasets import Dataset
from helpers import CLOSE, EOS, PAD, PROMPTS, VOCAB, greedy, left_pad, load_lora, save_lora, tiny
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from mpo_hf import MixtureLogitsProcessor, MixturePolicyModel
from mpo_hf.mixture.compat import CACHE_NAME


IDS = torch.tensor([[1, 5, 9, 13, 7, 21, 30]])
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": [], "pad_token_id": PAD}


class WrittenBefore(LlamaForCausalLM):
    """As code outside of Transformers was written before 5.24: what it does not know is swallowed, `cache` too."""

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs
    ):
        states = {CACHE_NAME: past_key_values, "position_ids": position_ids, "use_cache": use_cache}
        output = self.model(input_ids, attention_mask, **states)
        return CausalLMOutputWithPast(
            logits=self.lm_head(output.last_hidden_state), **{CACHE_NAME: output.get(CACHE_NAME)}
        )


class WrittenAfter(LlamaForCausalLM):
    """The same with the new name, whatever the installed version calls it."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None, **kwargs):
        return WrittenBefore.forward(self, input_ids, attention_mask, position_ids, cache, use_cache)


def custom(kind: type, seed: int) -> LlamaForCausalLM:
    model = kind(tiny("llama", seed).config)
    model.load_state_dict(tiny("llama", seed).state_dict())
    return model.eval()


@pytest.fixture
def mixture():
    return MixturePolicyModel.from_policies([tiny("llama", 1), tiny("gpt2", 2)], [0.4, 0.6])


def warned(call) -> list[str]:
    """What is said of deprecated arguments during a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if issubclass(warning.category, FutureWarning)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_mixture_takes_and_returns_both_names(mixture, name):
    expected = mixture(IDS, use_cache=False).logits
    cache = DynamicCache(config=mixture.config)
    first = mixture(IDS[:, :4], **{name: cache})
    assert first[CACHE_NAME] is cache and first.past_key_values is cache
    second = mixture(IDS[:, 4:], **{name: first[CACHE_NAME]})
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, **CLOSE)

    mask = {"attention_mask": torch.ones_like(IDS)}
    given = DynamicCache(config=mixture.config)
    assert torch.equal(
        mixture.generate(IDS, **mask, **GREEDY, **{name: given}), mixture.generate(IDS, **mask, **GREEDY)
    )
    assert given.get_seq_length() == IDS.shape[1] + 5
    prepared = mixture.prepare_inputs_for_generation(IDS, **mask, **{name: cache}, next_sequence_length=1)
    assert prepared[CACHE_NAME] is cache and len({"cache", "past_key_values"} & prepared.keys()) == 1


def test_only_a_name_that_the_installed_version_has_given_up_is_warned_of(mixture):
    cache = DynamicCache(config=mixture.config)
    for call in (mixture, mixture.prepare_inputs_for_generation, mixture.generate):
        assert warned(lambda call=call: call(IDS, cache=DynamicCache(config=mixture.config))) == []
        found = warned(lambda call=call: call(IDS, past_key_values=DynamicCache(config=mixture.config)))
        assert len(found) == (CACHE_NAME == "cache") and all(
            "`past_key_values` is deprecated" in text for text in found
        )
    (both,) = warned(lambda: mixture(IDS, cache=cache, past_key_values=DynamicCache(config=mixture.config)))
    assert "`cache`" in both and "`past_key_values`" in both
    assert cache.get_seq_length() == IDS.shape[1]  # the new name wins


@pytest.mark.parametrize("kind", [WrittenBefore, WrittenAfter])
@pytest.mark.parametrize(
    "way", [{}, {"cache_implementation": "static"}, {"num_beams": 2, "eos_token_id": EOS}], ids=str
)
def test_models_from_elsewhere_are_given_the_name_that_they_know(kind, way):
    model = custom(kind, 1)
    mixture = MixturePolicyModel.from_policies([model, tiny("gpt2", 2)], [0.6, 0.4])
    same = MixturePolicyModel.from_policies([tiny("llama", 1), tiny("gpt2", 2)], [0.6, 0.4])
    inputs = left_pad(PROMPTS)
    way = {**GREEDY, **way}
    output = mixture.generate(**inputs, **way)
    assert torch.equal(output, same.generate(**inputs, **way))
    if "num_beams" not in way:
        expected = greedy([model, tiny("gpt2", 2)], [0.6, 0.4], PROMPTS, 6, ends=())
        assert output[:, inputs["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.parametrize("kind", [WrittenBefore, WrittenAfter])
def test_models_from_elsewhere_run_behind_a_processor_and_side_by_side(kind, tmp_path):
    expected = greedy([tiny("gpt2", 2), tiny("llama", 1)], [0.4, 0.6], [IDS[0].tolist()], 6, ends=())
    processor = MixtureLogitsProcessor([custom(kind, 1)], weights=[0.4, 0.6])
    output = tiny("gpt2", 2).generate(IDS, **GREEDY, logits_processor=[processor])
    assert output[:, IDS.shape[1] :].tolist() == expected

    stacked = MixturePolicyModel.from_policies([custom(kind, 1), custom(kind, 2)], [0.5, 0.5])
    stacked.stack_models = True
    assert stacked.stacked_components == [[0, 1]]
    expected = greedy([tiny("llama", 1), tiny("llama", 2)], [0.5, 0.5], [IDS[0].tolist()], 6, ends=())
    assert stacked.generate(IDS, **GREEDY)[:, IDS.shape[1] :].tolist() == expected


def test_adapters_over_a_model_from_elsewhere(tmp_path):
    custom(WrittenBefore, 1).save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    adapters = [save_lora(tmp_path / name, base, seed) for name, seed in (("a", 30), ("b", 31))]
    model = AutoModelForCausalLM.from_pretrained(base)
    mixture = MixturePolicyModel.from_policies(
        [{"name_or_path": base, "adapter": adapter} for adapter in adapters], [0.3, 0.7]
    )
    # the class is put in afterwards: a folder opens as the class of Transformers that it names
    type_of_base = type(model)
    mixture.backbones[0].get_base_model().__class__ = WrittenBefore
    assert issubclass(WrittenBefore, type_of_base)
    expected = greedy([load_lora(a, base) for a in adapters], [0.3, 0.7], [IDS[0].tolist()], 6, ends=())
    for side_by_side in (True, False):
        mixture.stack_adapters = side_by_side
        assert mixture.generate(IDS, **GREEDY)[:, IDS.shape[1] :].tolist() == expected


def test_trainer_gathers_no_caches(mixture, tmp_path):
    rows = Dataset.from_dict({"input_ids": IDS.repeat(3, 1), "labels": IDS.repeat(3, 1)})
    assert mixture(IDS)[CACHE_NAME] is not None  # it is in the outputs, and must not get into the predictions
    trainer = Trainer(mixture, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), eval_dataset=rows)
    predictions = trainer.predict(rows).predictions
    assert predictions.shape == (3, IDS.shape[1], VOCAB)
    assert "eval_loss" in trainer.evaluate()
