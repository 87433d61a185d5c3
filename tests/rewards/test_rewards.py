import asyncio
import doctest
import functools
import math
import shutil
import types
from fractions import Fraction

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import CLOSE
from peft import LoraConfig, PeftModel, get_peft_model
from reward_cases import (
    ANSWERS,
    CHAT_TEMPLATE,
    CHATS,
    COMPLETIONS,
    PROMPTS,
    Constant,
    async_length,
    length,
    make_model,
    make_tokenizer,
)
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from trl import GRPOConfig, GRPOTrainer

import mpo_hf.rewards
from mpo_hf.rewards import (
    CallableReward,
    ModelReward,
    RewardError,
    RewardModelSpec,
    make_reward_functions,
    normalize_rewards,
    validate_rewards,
)


def make_reward(model=None, tokenizer=None, **kwargs) -> ModelReward:
    model = make_model() if model is None else model
    return ModelReward(RewardModelSpec(model, processing_class=tokenizer or make_tokenizer(), **kwargs))


@torch.no_grad()
def scores_by_hand(model, texts: list[str], tokenizer=None) -> torch.Tensor:
    """One text at a time, without any padding."""
    tokenizer = tokenizer or make_tokenizer()
    inputs = [tokenizer(text, return_tensors="pt", add_special_tokens=False) for text in texts]
    return torch.cat([model(**row).logits for row in inputs]).double()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> types.SimpleNamespace:
    """A classifier, a language model, and adapters over both, on disk; all but the language model with a tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    paths = {name: str(folder / name) for name in ("classifier", "language_model", "over_lm", "over_cls", "causal")}
    make_model().save_pretrained(paths["classifier"])
    make_tokenizer().save_pretrained(paths["classifier"])
    make_model(cls=LlamaForCausalLM, num_labels=2).save_pretrained(paths["language_model"])
    for name, base in (("over_lm", "language_model"), ("over_cls", "classifier")):
        model = LlamaForSequenceClassification.from_pretrained(paths[base], num_labels=1)
        config = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], r=2, init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(paths[name])
    make_tokenizer().save_pretrained(paths["over_lm"])
    causal = LlamaForCausalLM.from_pretrained(paths["language_model"])
    get_peft_model(causal, LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(paths["causal"])
    return types.SimpleNamespace(**paths)


class TestSpec:
    @pytest.mark.parametrize(
        "field, value",
        [
            ("model", ""),
            ("model", None),
            ("model", length),
            ("template", "{prompt}"),
            ("template", "{prompt} {completion} {answer}"),
            ("template", "{} {completion}"),
            ("template", 3),
            ("template", ("{prompt}", "{prompt}")),
            ("template", ("{prompt}", "{completion}", "")),
            ("add_special_tokens", "yes"),
            ("truncation_side", "both"),
            ("logit", True),
            ("logit", 0.5),
            ("sign", 0),
            ("sign", 2),
            ("scale", 0.0),
            ("scale", -1.0),
            ("scale", math.inf),
            ("scale", math.nan),
            ("offset", math.nan),
            ("activation", "tanh"),
            ("max_length", 0),
            ("batch_size", 0),
            ("batch_size", None),
            ("adapter_revision", "main"),
            ("adapter_subfolder", "lora"),
        ],
    )
    def test_refuses(self, field, value):
        with pytest.raises(ValueError, match=f"`{field}` must be"):
            RewardModelSpec(**{"model": "org/model", field: value})

    @pytest.mark.parametrize("field", ["revision", "subfolder", "gguf_file", "model_kwargs"])
    def test_refuses_loading_arguments_for_a_loaded_model(self, field):
        value = {"dtype": "auto"} if field == "model_kwargs" else "main"
        with pytest.raises(ValueError, match=f"`{field}` must be left out"):
            RewardModelSpec(make_model(), **{field: value})

    def test_takes_paths(self, tmp_path):
        spec = RewardModelSpec(tmp_path, adapter=tmp_path / "adapter", template="{{{prompt}}} {completion}")
        assert (spec.model, spec.adapter) == (str(tmp_path), str(tmp_path / "adapter"))


class TestCallables:
    @pytest.mark.parametrize("output", [list, tuple, np.array, torch.tensor, iter])
    def test_output_types(self, output):
        rewards = CallableReward(lambda **kwargs: output([1.0, 2.5]))(["a", "b"], ["c", "d"])
        assert rewards.dtype == torch.float64
        assert rewards.tolist() == [1.0, 2.5]

    def test_gets_what_trl_passes(self):
        seen = []

        def reward(prompts, completions, completion_ids, answer, trainer_state, **kwargs):
            own = {"completion_ids": completion_ids, "answer": answer, "trainer_state": trainer_state}
            seen.append({"prompts": prompts, "completions": completions, **own, **kwargs})
            return [0.0] * len(completions)

        columns = {"completion_ids": [[1], [2]], "answer": ["x", "y"], "trainer_state": object(), "source": ["p", "q"]}
        CallableReward(reward)(["a", "b"], ["c", "d"], **columns)
        assert seen == [{"prompts": ["a", "b"], "completions": ["c", "d"], **columns}]

    def test_what_trl_logs_with_is_there_outside_of_a_trainer(self):
        def reward(completions, log_metric, log_extra, **kwargs):
            log_metric("mean", 1.0)
            log_extra("text", completions)
            return [float("log_metric" in kwargs)]

        assert CallableReward(reward)(["a"], ["b"]).tolist() == [0.0]
        seen = []
        CallableReward(reward)(
            ["a"], ["b"], log_metric=lambda *of: seen.append(of), log_extra=lambda *of: seen.append(of)
        )
        assert seen == [("mean", 1.0), ("text", ["b"])]

    def test_functions_that_cannot_be_called_are_refused_before_there_are_completions(self):
        def closed(prompts, completions):
            return [0.0]

        def needy(completions, answer, **kwargs):
            return [0.0]

        @functools.wraps(closed)
        def wrapper(**kwargs):
            return [0.0]

        CallableReward(needy).check([], ["answer", "source"])
        for function in (wrapper, functools.partial(needy, answer=1), Constant(1.0), max):
            CallableReward(function).check([], ["source"])
        with pytest.raises(
            ValueError, match="'closed' cannot be called with .*'source'.*: got an unexpected .*kwargs"
        ):
            CallableReward(closed).check([], ["source"])
        with pytest.raises(
            ValueError, match="'needy' cannot be called .*: missing a required argument: 'answer'.*dataset"
        ):
            CallableReward(needy).check([], ["source"])

    @pytest.mark.parametrize("function", [async_length, functools.partial(async_length, extra=1)])
    def test_async(self, function):
        reward = CallableReward(function)
        assert reward.name == "async_length"

        async def under_a_running_loop():
            return reward(["a"], ["bcd"])

        assert reward(["a"], ["bcd"]).tolist() == [3.0]
        assert asyncio.run(under_a_running_loop()).tolist() == [3.0]

    def test_async_calls_share_one_loop(self):
        loops = set()

        async def reward(completions, **kwargs):
            loops.add(asyncio.get_running_loop())
            return [0.0] * len(completions)

        for _ in range(2):
            CallableReward(reward)(["a"], ["b"])
        assert len(loops) == 1 and not loops.pop().is_closed()

    def test_exceptions_name_the_reward(self):
        def broken(completions, **kwargs):
            return {}["missing"]

        async def broken_async(completions, **kwargs):
            raise OSError("no judge")

        def broken_generator(completions, **kwargs):
            yield {}["missing"]

        for function, cause in ((broken, KeyError), (broken_async, OSError), (broken_generator, KeyError)):
            with pytest.raises(RewardError, match=f"'{function.__name__}' raised {cause.__name__}") as error:
                CallableReward(function)(["a"], ["b"])
            assert isinstance(error.value.__cause__, cause)


class TestValidation:
    @pytest.mark.parametrize(
        "bad",
        [
            *[
                None,
                math.nan,
                math.inf,
                -math.inf,
                "1.0",
                [1.0],
                1j,
                np.float32("nan"),
                torch.tensor(math.inf),
                object(),
            ],
            *[
                10**400,
                -(10**400),
                10**5000,
                Fraction(10**400),
            ],  # too large for a float; Python does not print the third
        ],
        ids=lambda bad: type(bad).__name__,
    )
    def test_bad_value(self, bad):
        with pytest.raises(ValueError, match="'kind' returned .* for completion 1, .* Return the reward .*'second'"):
            validate_rewards("kind", [0.0, bad], ["first", "second"])

    @pytest.mark.parametrize("bad", [np.array([0.0, math.nan]), torch.tensor([0.0, math.nan])])
    def test_bad_value_in_an_array(self, bad):
        with pytest.raises(ValueError, match="'kind' returned nan for completion 1, .*'second'"):
            validate_rewards("kind", bad, ["first", "second"])

    @pytest.mark.parametrize(
        "bad, returned",
        [
            ([1.0], "1 rewards"),
            ([], "0 rewards"),
            (torch.ones(3), "3 rewards"),
            (torch.ones(2, 1), r"shape \(2, 1\)"),
            (np.ones((1, 2)), r"shape \(1, 2\)"),
            (torch.tensor(1.0), r"tensor\(1.\)"),
            (None, "None"),
            (1.0, "1.0"),
            ("12", "'12'"),
            ({0: 1.0, 1: 1.0}, "{0: 1.0, 1: 1.0}"),
            ({1.0, 2.0}, "{1.0, 2.0}"),
        ],
    )
    def test_bad_shape(self, bad, returned):
        with pytest.raises(ValueError, match=rf"'kind' must return .* shape \(2,\), but returned {returned}\."):
            validate_rewards("kind", bad, ["first", "second"])

    def test_good_values(self):
        values = [True, 2, np.float16(0.5), np.int64(3), torch.tensor(1.5), np.bool_(True)]
        assert validate_rewards("kind", values, [""] * 6).tolist() == [1.0, 2.0, 0.5, 3.0, 1.5, 1.0]
        assert validate_rewards("kind", [Fraction(1, 4), 10**30], [""] * 2).tolist() == [0.25, 1e30]
        half = torch.tensor([0.5, 1.0], dtype=torch.bfloat16, requires_grad=True)
        assert validate_rewards("kind", half, [""] * 2).tolist() == [0.5, 1.0]

    def test_long_completions_are_shortened(self):
        with pytest.raises(ValueError) as error:
            validate_rewards("kind", [None], [[{"role": "assistant", "content": "x" * 1000}]])
        assert "xxx..." in str(error.value) and len(str(error.value)) < 500


class TestBuilder:
    def test_names(self):
        functions = make_reward_functions([length, length, Constant(1.0), functools.partial(length)])
        assert [f.name for f in functions] == ["length", "length_2", "Constant", "length_3"]
        functions = make_reward_functions([length] * 4, names=["a", "a", "a_2", None])
        assert [f.name for f in functions] == ["a", "a_3", "a_2", "length"]
        assert make_reward_functions(functions[0], names="b")[0].name == "b"

    def test_model_names(self, saved):
        tokenizer = make_tokenizer()
        model = make_model()
        spec = RewardModelSpec(saved.language_model, adapter=saved.over_lm)
        labeled = RewardModelSpec(model, processing_class=tokenizer, label="kind")
        classes = [tokenizer, tokenizer, None, None, None]
        functions = make_reward_functions([model, saved.classifier, spec, labeled, length], None, classes, "cpu")
        names = ["LlamaForSequenceClassification", "classifier", "over_lm", "kind", "length"]
        assert [f.name for f in functions] == names
        assert functions[0].model is model and functions[4].model is None

    def test_tokenizers_and_arguments_reach_the_models(self, saved):
        kwargs = {"model_kwargs": {"dtype": torch.bfloat16}, "chat_template_kwargs": {"x": 1}}
        reward = make_reward_functions(saved.classifier, processing_classes=saved.over_lm, **kwargs)[0]
        assert reward.model.dtype == torch.bfloat16
        assert reward.processing_class.name_or_path == saved.over_lm
        assert reward.spec.chat_template_kwargs == {"x": 1}

    def test_refuses(self):
        with pytest.raises(ValueError, match="`reward_funcs` is empty"):
            make_reward_functions([])
        with pytest.raises(ValueError, match="`names` has 1 entries for 2"):
            make_reward_functions([length, length], names=["a"])
        with pytest.raises(ValueError, match="`processing_classes` has 1 entries for 2"):
            make_reward_functions([length, length], processing_classes=make_tokenizer())
        with pytest.raises(ValueError, match="3 is not a reward function"):
            make_reward_functions([3])
        with pytest.raises(ValueError, match="not in both"):
            spec = RewardModelSpec(make_model(), processing_class=make_tokenizer())
            make_reward_functions(spec, processing_classes=make_tokenizer())


class TestModels:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("batch_size", [1, 2, 8])
    def test_batches_equal_one_by_one(self, side, batch_size):
        model = make_model()
        reward = make_reward(model, make_tokenizer(padding_side=side), batch_size=batch_size)
        expected = scores_by_hand(model, [p + c for p, c in zip(PROMPTS, COMPLETIONS)])[:, 0]
        rewards = reward(PROMPTS, COMPLETIONS, answer=["ignored"] * 5)
        assert rewards.dtype == torch.float64 and rewards.shape == (5,)
        torch.testing.assert_close(rewards, expected, **CLOSE)
        assert rewards.std() > 0.1
        assert reward([], []).shape == (0,)

    def test_evaluates_in_eval_mode_without_gradients(self):
        model = make_model(attention_dropout=0.5).train()
        model.requires_grad_(True)
        reward = make_reward(model)
        model.train()
        first, second = reward(PROMPTS, COMPLETIONS), reward(PROMPTS, COMPLETIONS)
        assert torch.equal(first, second) and not first.requires_grad

    def test_missing_pad_token(self):
        model, tokenizer = make_model(), make_tokenizer(pad_token=None)
        rewards = make_reward(model, tokenizer)(PROMPTS, COMPLETIONS)
        expected = make_reward(make_model())(PROMPTS, COMPLETIONS)
        assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
        torch.testing.assert_close(rewards, expected, **CLOSE)
        with pytest.raises(ValueError, match="no pad and no EOS token"):
            make_reward(tokenizer=make_tokenizer(pad_token=None, eos_token=None))

    @pytest.mark.parametrize("conversational", [False, True])
    def test_equals_grpo_trainer(self, tmp_path, conversational):
        prompts, completions = (CHATS, ANSWERS) if conversational else (PROMPTS, COMPLETIONS)
        reward_funcs = [make_model(), Constant(0.25)]
        tokenizer = make_tokenizer(padding_side="left")
        trainer = GRPOTrainer(
            model=make_model(cls=LlamaForCausalLM, num_labels=2),
            reward_funcs=list(reward_funcs),
            args=GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer,
            reward_processing_classes=[tokenizer, None],
        )
        inputs = [{"prompt": prompt} for prompt in prompts]
        expected = trainer._calculate_rewards(inputs, prompts, completions, [[0]] * len(prompts))
        functions = make_reward_functions(reward_funcs, processing_classes=[tokenizer, None])
        rewards = torch.stack([function(prompts, completions) for function in functions], dim=-1)
        torch.testing.assert_close(rewards.float(), expected, **CLOSE)

    def test_chat_template_adds_the_special_tokens(self):
        model = make_model()
        texts = [f"<s> user {p} </s> assistant {c} </s> " for p, c in zip(PROMPTS, COMPLETIONS)]
        rewards = make_reward(model)(CHATS, ANSWERS)
        torch.testing.assert_close(rewards, scores_by_hand(model, texts)[:, 0], **CLOSE)

    def test_chat_template_kwargs(self):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{{ word }}" + CHAT_TEMPLATE
        model = make_model()
        rewards = make_reward(model, tokenizer, chat_template_kwargs={"word": "cat "})(CHATS, ANSWERS)
        texts = [tokenizer.apply_chat_template(p + c, tokenize=False, word="cat ") for p, c in zip(CHATS, ANSWERS)]
        torch.testing.assert_close(rewards, scores_by_hand(model, texts)[:, 0], **CLOSE)

    @pytest.mark.parametrize(
        "template, text",
        [
            ("{completion}", "{c}"),
            ("user {prompt} assistant {completion} good", "user {p} assistant {c} good"),
            (lambda p, c: "cat" + (c if isinstance(c, str) else c[0]["content"]), "cat{c}"),
        ],
    )
    def test_template(self, template, text):
        model = make_model()
        reward = make_reward(model, template=template, add_special_tokens=False)
        expected = scores_by_hand(model, [text.format(p=p, c=c) for p, c in zip(PROMPTS, COMPLETIONS)])[:, 0]
        for prompts, completions in ((PROMPTS, COMPLETIONS), (CHATS, ANSWERS)):
            torch.testing.assert_close(reward(prompts, completions), expected, **CLOSE)

    def test_template_braces_in_texts_are_text(self):
        reward = make_reward(template="{{{prompt}}} {completion}", add_special_tokens=False)
        assert reward.inputs.text("", "{x}", "{prompt}") == "{{x}} {prompt}"

    def test_texts_it_cannot_make(self):
        two = [{"role": "system", "content": "good"}, *CHATS[0]]
        with pytest.raises(ValueError, match="single message of text, but for completion 0"):
            make_reward(add_special_tokens=False, template="{prompt}{completion}")([two], [ANSWERS[0]])
        assert make_reward(add_special_tokens=False, template="{completion}")([two], [ANSWERS[0]]).shape == (1,)
        with pytest.raises(ValueError, match="no text for completion 0"):
            make_reward()([CHATS[0]], ["plain"])
        with pytest.raises(ValueError, match="no text for completion 0"):
            make_reward(add_special_tokens=False, template=lambda prompt, completion: None)(["a"], ["b"])
        with pytest.raises(RewardError, match="raised ZeroDivisionError"):
            make_reward(add_special_tokens=False, template=lambda prompt, completion: 1 / 0)(["a"], ["b"])

    def test_logit_sign_scale_offset_activation(self):
        labels = {0: "bad", 1: "good", 2: "neither"}
        model = make_model(num_labels=3, id2label=labels, label2id={name: index for index, name in labels.items()})
        logits = scores_by_hand(model, [p + c for p, c in zip(PROMPTS, COMPLETIONS)])
        cases = [
            ({"logit": 1}, logits[:, 1]),
            ({"logit": "good"}, logits[:, 1]),
            ({"logit": 0, "sign": -1}, -logits[:, 0]),
            ({"logit": 2, "scale": 2.0, "offset": 3.0}, 2 * logits[:, 2] + 3),
            ({"logit": 1, "activation": "sigmoid"}, logits[:, 1].sigmoid()),
            ({"logit": 1, "activation": "softmax", "sign": -1, "offset": 1.0}, 1 - logits.softmax(-1)[:, 1]),
            ({"logit": "bad", "activation": "log_softmax", "scale": 0.5}, 0.5 * logits.log_softmax(-1)[:, 0]),
        ]
        for kwargs, expected in cases:
            rewards = make_reward(model, **kwargs)(PROMPTS, COMPLETIONS)
            torch.testing.assert_close(rewards, expected, **CLOSE)
        for logit in (None, 3, -1, "best"):
            with pytest.raises(ValueError, match="has 3 outputs, and `logit` must say.*'neither'"):
                make_reward(model, logit=logit)

    def test_softmax_over_one_output(self):
        with pytest.raises(ValueError, match="softmax over the one output .* is constant"):
            make_reward(activation="softmax")

    @pytest.mark.parametrize("where", ["spec", "model", "tokenizer"])
    def test_too_long(self, where):
        spec = {"max_length": 4} if where == "spec" else {}
        model = make_model()
        if where == "model":
            model.config.max_position_embeddings = 4
        tokenizer = make_tokenizer(model_max_length=4) if where == "tokenizer" else None
        reward = make_reward(model, tokenizer, label="kind", **spec)
        assert reward(["the cat"], [" sat ."]).shape == (1,)
        match = "'kind' takes 1 to 4 tokens, but the input of completion 1 has 5, .*' sat on .'"
        with pytest.raises(ValueError, match=match):
            reward(["the cat", "the cat"], [" sat .", " sat on ."])
        if where != "spec":
            assert make_reward(model, tokenizer, max_length=8)(["the cat"], [" sat on ."]).shape == (1,)

    def test_encoder_with_special_tokens(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = BertConfig(vocab_size=32, max_position_embeddings=32, num_labels=1, initializer_range=0.5, **sizes)
        model = BertForSequenceClassification(config).eval()
        # BERT reads its first token, so padding on the left would show
        tokenizer = make_tokenizer(padding_side="left")
        rewards = make_reward(model, tokenizer, add_special_tokens=True)(PROMPTS, COMPLETIONS)
        texts = [f"<s> {p}{c} </s>" for p, c in zip(PROMPTS, COMPLETIONS)]
        torch.testing.assert_close(rewards, scores_by_hand(model, texts)[:, 0], **CLOSE)

    def test_not_a_classifier(self):
        with pytest.raises(ValueError, match="needs a sequence classifier"):
            make_reward(make_model(cls=LlamaForCausalLM))(["a"], [" cat"])


class TestLoading:
    def expected(self, base: str, adapter: str) -> torch.Tensor:
        model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
        model.config.pad_token_id = make_tokenizer().pad_token_id
        model = PeftModel.from_pretrained(model, adapter).eval()
        return scores_by_hand(model, [p + c for p, c in zip(PROMPTS, COMPLETIONS)])[:, 0]

    def test_folder(self, saved):
        reward = make_reward_functions(saved.classifier)[0]
        expected = make_reward(make_model())(PROMPTS, COMPLETIONS)
        torch.testing.assert_close(reward(PROMPTS, COMPLETIONS), expected, **CLOSE)

    def test_loaded_model_finds_its_tokenizer(self, saved):
        model = LlamaForSequenceClassification.from_pretrained(saved.classifier)
        assert make_reward_functions(model)[0].processing_class.name_or_path == saved.classifier

    @pytest.mark.parametrize("base, adapter", [("language_model", "over_lm"), ("classifier", "over_cls")])
    def test_adapter_equals_peft(self, saved, base, adapter):
        base, adapter = getattr(saved, base), getattr(saved, adapter)
        plain = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
        specs = [adapter, RewardModelSpec(base, adapter=adapter)]
        if base == saved.classifier:
            specs.append(RewardModelSpec(plain, adapter=adapter))
        expected = self.expected(base, adapter)
        for spec in specs:
            rewards = make_reward_functions(spec)[0](PROMPTS, COMPLETIONS)
            torch.testing.assert_close(rewards, expected, **CLOSE)

    def test_peft_model_as_it_is(self, saved):
        base = LlamaForSequenceClassification.from_pretrained(saved.classifier)
        model = PeftModel.from_pretrained(base, saved.over_cls)
        rewards = make_reward_functions(model)[0](PROMPTS, COMPLETIONS)
        expected = self.expected(saved.classifier, saved.over_cls)
        torch.testing.assert_close(rewards, expected, **CLOSE)

    def test_tokenizer_of_adapter_before_that_of_model(self, saved, tmp_path):
        def path(spec) -> str:
            return ModelReward(spec).processing_class.name_or_path

        assert path(RewardModelSpec(saved.classifier, adapter=saved.over_cls)) == saved.classifier
        assert path(RewardModelSpec(saved.over_cls)) == saved.classifier  # has none of its own
        assert path(RewardModelSpec(saved.language_model, adapter=saved.over_lm)) == saved.over_lm
        assert path(RewardModelSpec(saved.over_lm)) == saved.over_lm
        both = str(shutil.copytree(saved.over_cls, tmp_path / "both"))
        make_tokenizer().save_pretrained(both)
        assert path(RewardModelSpec(both)) == both
        assert path(RewardModelSpec(saved.classifier, adapter=both)) == both

    def test_subfolders(self, saved, tmp_path):
        make_model().save_pretrained(tmp_path / "harmless")
        make_tokenizer().save_pretrained(tmp_path / "harmless")
        PeftModel.from_pretrained(make_model(), saved.over_cls).save_pretrained(tmp_path / "lora")
        spec = RewardModelSpec(tmp_path, subfolder="harmless", adapter=tmp_path, adapter_subfolder="lora")
        reward = ModelReward(spec)
        assert reward.name == "lora"
        assert ModelReward(RewardModelSpec(tmp_path, subfolder="harmless")).name == "harmless"
        expected = self.expected(saved.classifier, saved.over_cls)
        torch.testing.assert_close(reward(PROMPTS, COMPLETIONS), expected, **CLOSE)

    def test_a_head_that_would_be_random(self, saved):
        spec = RewardModelSpec(saved.language_model, processing_class=make_tokenizer(), logit=0)
        with pytest.raises(ValueError, match=r"not a reward model: its checkpoint lacks \['score.weight'\]"):
            ModelReward(spec)

    def test_adapters_that_do_not_fit(self, saved):
        with pytest.raises(ValueError, match="is for the task CAUSAL_LM"):
            ModelReward(saved.causal)
        with pytest.raises(ValueError, match="is itself an adapter"):
            ModelReward(RewardModelSpec(saved.over_cls, adapter=saved.over_lm))
        model = make_model()
        tokenizer = make_tokenizer()
        ModelReward(RewardModelSpec(model, adapter=saved.over_cls, processing_class=tokenizer))
        with pytest.raises(ValueError, match="already carries one"):
            ModelReward(RewardModelSpec(model, adapter=saved.over_cls, processing_class=tokenizer))

    @pytest.mark.parametrize(
        "change, message", [("drop", "it lacks '"), ("rename", "it has weights without a place: '")]
    )
    def test_adapters_are_loaded_as_a_whole(self, saved, tmp_path, change, message):
        shutil.copytree(saved.over_cls, tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        weights = load_file(file)
        key = next(key for key in sorted(weights) if "lora_B" in key)
        values = weights.pop(key)
        if change == "rename":
            weights |= {key: values, key.replace("layers.0", "layers.9"): values.clone()}
        save_file(weights, file)
        with pytest.raises(ValueError, match=message):
            ModelReward(RewardModelSpec(saved.classifier, adapter=str(tmp_path / "adapter")))

    def test_no_tokenizer(self, saved):
        with pytest.raises(ValueError, match=r"The reward 'Llama.*' has no tokenizer .* Give `processing_class`"):
            ModelReward(make_model())
        with pytest.raises(ValueError, match="no tokenizer .* Tried .*language_model'?: "):
            ModelReward(RewardModelSpec(saved.classifier, processing_class=saved.language_model))


class TestNormalization:
    rewards = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    log_weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("beta", [0.05, 1.0, 20.0])
    def test_equals_a_loop(self, beta, weighted):
        log_weights = self.log_weights if weighted else None
        normalized = normalize_rewards(self.rewards, beta, log_weights)
        for prompt in range(3):
            weights = [math.exp(w) if weighted else 1.0 for w in self.log_weights[prompt]]
            for k in range(2):
                column = [r.item() for r in self.rewards[prompt, :, k]]
                mean = sum(w * math.exp(r / beta) for w, r in zip(weights, column)) / sum(weights)
                for j in range(5):
                    assert normalized[prompt, j, k].item() == pytest.approx(column[j] - beta * math.log(mean))

    @pytest.mark.parametrize("log_weights", [None, log_weights])
    def test_idempotent_and_invariant_to_a_constant_by_prompt(self, log_weights):
        once = normalize_rewards(self.rewards, 0.5, log_weights)
        torch.testing.assert_close(normalize_rewards(once, 0.5, log_weights), once)
        shift = torch.tensor([1.0, -50.0, 1000.0], dtype=torch.float64)[:, None, None]
        torch.testing.assert_close(normalize_rewards(self.rewards + shift, 0.5, log_weights), once)
        if log_weights is not None:
            torch.testing.assert_close(normalize_rewards(self.rewards, 0.5, log_weights + shift[:, 0]), once)

    def test_small_beta_does_not_overflow(self):
        normalized = normalize_rewards(torch.tensor([[[1000.0], [-1000.0]]]), 1e-3)
        assert normalized.isfinite().all()

    def test_weight_zero_takes_a_completion_out(self):
        log_weights = torch.tensor([[0.0, 0.0, -math.inf]])
        rewards = torch.tensor([[[1.0], [2.0], [50.0]]])
        expected = normalize_rewards(rewards[:, :2], 1.0)
        torch.testing.assert_close(normalize_rewards(rewards, 1.0, log_weights)[:, :2], expected)

    def test_refuses(self):
        for beta in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="`beta` must be"):
                normalize_rewards(self.rewards, beta)
        for shape in ((3, 2), (3, 0, 2)):
            with pytest.raises(ValueError, match="`rewards` must have shape"):
                normalize_rewards(torch.zeros(shape), 1.0)
        with pytest.raises(ValueError, match=r"`log_weights` must have shape .* \(3, 5\), but has \(5,\)"):
            normalize_rewards(self.rewards, 1.0, torch.zeros(5))


@pytest.mark.parametrize("name", ["RewardModelSpec", "make_reward_functions", "validate_rewards", "normalize_rewards"])
def test_docstring_examples(name):
    docstring = getattr(mpo_hf.rewards, name).__doc__.replace("```python", "").replace("```", "")
    example = doctest.DocTestParser().get_doctest(docstring, {}, name, None, None)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
