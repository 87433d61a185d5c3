"""What reward models read: special tokens, pairs, empty and long texts, padding; each against the model run by hand."""

import pytest
import torch
from helpers import CLOSE
from reward_cases import ANSWERS, CHATS, COMPLETIONS, PROMPTS, make_model, make_tokenizer
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from mpo_hf.rewards import ModelReward, RewardEnsemble, RewardModelSpec


WORDS = "[PAD] [UNK] [CLS] [SEP] the a cat dog sat ran on mat good bad very is , .".split()
PAD, CLS, SEP = 0, 2, 3
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SIZES |= {"initializer_range": 0.5, "max_position_embeddings": 16, "pad_token_id": PAD}
TEMPLATES = {
    "encoder": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "bos": ("[CLS] $A", None),
    "eos": ("$A [SEP]", None),
    "none": ("$A", None),
}


def tokenizer(kind: str, **kwargs) -> PreTrainedTokenizerFast:
    """A tokenizer of words that adds special tokens as an encoder's, a BOS, an EOS, or none."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single, pair = TEMPLATES[kind]
    words.post_processor = processors.TemplateProcessing(
        single=single, pair=pair or "$A $B", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    own = {"pad_token": "[PAD]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    if kind == "encoder":
        own = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        own["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    given = {name: value for name, value in (own | kwargs).items() if value is not None}
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **given)


def encoder(labels=("fine", "toxic")) -> BertForSequenceClassification:
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return BertForSequenceClassification(BertConfig(**SIZES, **names)).eval()


def reward_of(model, kind="none", tokens=None, **kwargs) -> ModelReward:
    return ModelReward(RewardModelSpec(model, processing_class=tokens or tokenizer(kind), label="kind", **kwargs))


@torch.no_grad()
def by_hand(model, rows: list[list[int]], segments=None) -> torch.Tensor:
    """The first logit of token ids, one row at a time, without padding."""
    more = [{} if segments is None else {"token_type_ids": torch.tensor([part])} for part in segments or rows]
    return torch.cat([model(input_ids=torch.tensor([r]), **m).logits for r, m in zip(rows, more)]).double()[:, 0]


def ids_of(*texts: str) -> list[list[int]]:
    return [[WORDS.index(word) for word in text.split()] for text in texts]


# ---- special tokens ----


@pytest.mark.parametrize("completions", [COMPLETIONS, ["", " ", "cat", "[SEP]", "[CLS] the cat"]])
def test_encoders_get_the_special_tokens_that_they_were_trained_with(completions):
    model = encoder(["toxic", "fine"])
    reward = reward_of(model, "encoder", logit="toxic", sign=-1, template="{completion}")
    rows = [[CLS, *ids, SEP] for ids in ids_of(*completions)]
    torch.testing.assert_close(reward(["a"] * 5, completions), -by_hand(model, rows), **CLOSE)


def t5() -> T5ForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    ids = {"decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": SEP}
    return T5ForSequenceClassification(T5Config(**sizes, **ids, num_labels=1)).eval()


def test_models_with_an_encoder_are_told_by_their_config():
    """The tokenizer of a T5 adds an EOS, as those of some decoders do."""
    model, completions = t5(), ["the cat", "", "a dog sat on the mat"]
    expected = by_hand(model, [[*ids, SEP] for ids in ids_of(*completions)])
    rewards = reward_of(model, "eos", template="{completion}")(["a"] * 3, completions)
    torch.testing.assert_close(rewards, expected, **CLOSE)


def test_pairs_of_texts_are_encoded_as_pairs():
    model = encoder()
    reward = reward_of(model, "encoder", template=["{prompt}", "{completion}"], logit="fine")
    pairs = [ids_of(*pair) for pair in zip(PROMPTS, COMPLETIONS)]
    rows = [[CLS, *first, SEP, *second, SEP] for first, second in pairs]
    segments = [[0] * (len(first) + 2) + [1] * (len(second) + 1) for first, second in pairs]
    expected = by_hand(model, rows, segments)
    for prompts, completions in ((PROMPTS, COMPLETIONS), (CHATS, ANSWERS)):
        torch.testing.assert_close(reward(prompts, completions), expected, **CLOSE)
    last = reward_of(model, "encoder", template=lambda p, c: (p[-1]["content"], c[0]["content"]), logit="fine")
    torch.testing.assert_close(last(CHATS, ANSWERS), expected, **CLOSE)
    some = reward_of(model, "encoder", template=lambda p, c: c if "cat" in p else (p, c), logit="fine")
    with pytest.raises(ValueError, match="'kind' makes a text of some completions and a pair of others"):
        some(PROMPTS, COMPLETIONS)


def test_decoders_with_a_template_must_be_told_of_their_special_tokens():
    model, cats = make_model(), ids_of("cat", "the cat sat")
    with pytest.raises(ValueError, match=r"'kind' adds \['\[CLS\]'\] .* Set `add_special_tokens=True`"):
        reward_of(model, "bos", template="{completion}")
    for adds, rows in ((True, [[CLS, *ids] for ids in cats]), (False, cats)):
        reward = reward_of(model, "bos", template="{completion}", add_special_tokens=adds)
        torch.testing.assert_close(reward(["a"] * 2, ["cat", "the cat sat"]), by_hand(model, rows), **CLOSE)
    assert reward_of(model, "none", template="{completion}").max_length == 64  # there are none to be told of


def test_plain_texts_without_special_tokens_are_told(caplog):
    reward = reward_of(make_model(), "bos")
    for _ in range(2):
        rewards = reward(["the"], [" cat"])
    torch.testing.assert_close(rewards, by_hand(reward.model, ids_of("the cat")), **CLOSE)
    assert "reward 'kind' without the ['[CLS]'] that its tokenizer would add" in caplog.text
    assert caplog.text.count("add_special_tokens") == 1


@pytest.mark.parametrize("kind, template", [("bos", "[CLS] {completion}"), ("eos", "{completion} [SEP]")])
def test_special_tokens_that_a_template_writes_are_not_doubled(kind, template):
    model, completions = make_model(), ["cat", "the cat sat", ""]
    reward = reward_of(model, kind, template=template, add_special_tokens=True)
    rows = [[CLS, *ids] if kind == "bos" else [*ids, SEP] for ids in ids_of(*completions)]
    torch.testing.assert_close(reward(["a"] * 3, completions), by_hand(model, rows), **CLOSE)


def test_chats_begin_with_one_bos_whoever_writes_it():
    model = make_model()
    once, twice = (reward_of(model, tokens=make_tokenizer(), add_special_tokens=adds) for adds in (None, True))
    torch.testing.assert_close(once(CHATS, ANSWERS), twice(CHATS, ANSWERS), atol=0, rtol=0)


# ---- texts without tokens, and with too many ----


@pytest.mark.parametrize(
    "kind, adds, scored", [("bos", True, [CLS]), ("bos", False, [CLS]), ("eos", False, [SEP]), ("none", None, [SEP])]
)
@pytest.mark.parametrize("has_pad", [True, False])
def test_texts_without_tokens_are_scored_as_special_tokens(kind, adds, scored, has_pad, caplog):
    """Also where padding is the EOS token, at whose first place the classifier then reads."""
    model, completions = make_model(), ["", "the cat sat", "  "]
    tokens = tokenizer(kind, **({} if has_pad else {"pad_token": None}))
    reward = reward_of(model, tokens=tokens, template="{completion}", add_special_tokens=adds)
    rewards = reward(["a"] * 3, completions)
    torch.testing.assert_close(rewards[[0, 2]], by_hand(model, [scored] * 2), **CLOSE)
    for row in range(3):
        torch.testing.assert_close(reward(["a"], completions[row : row + 1])[0], rewards[row], **CLOSE)
    assert adds or f"got a text without any token. Such texts get the reward of ['{WORDS[scored[0]]}']" in caplog.text


def test_a_tokenizer_without_any_special_token_cannot_score_an_empty_text():
    reward = reward_of(make_model(), tokens=tokenizer("none", bos_token=None, eos_token=None), template="{completion}")
    with pytest.raises(ValueError, match="'kind' got a text without any token.* Give `template` as a callable"):
        reward(["a"], [""])


@pytest.mark.parametrize("side, kept", [("left", "on the mat"), ("right", "the cat sat")])
def test_longer_texts_lose_the_end_that_is_told(side, kept, caplog):
    model, long = make_model(), "the cat sat on the mat"
    reward = reward_of(model, "none", template="{completion}", max_length=3, truncation_side=side)
    expected = by_hand(model, ids_of("a dog", kept))
    torch.testing.assert_close(reward(["a"] * 2, ["a dog", long]), expected, **CLOSE)
    assert f"'kind' have more than 3 tokens. The {side} end" in caplog.text
    encoded = reward_of(encoder(), "encoder", logit=0, template="{completion}", max_length=5, truncation_side=side)
    assert encoded.inputs(["a"], [long])["input_ids"] == [[CLS, *ids_of(kept)[0], SEP]]
    assert reward.processing_class.truncation_side == "right"  # that of the user is left alone
    with pytest.raises(
        ValueError, match="'kind' takes 1 to 3 tokens, but the input of completion 1 has 6, .*`truncation_side`"
    ):
        reward_of(model, "none", template="{completion}", max_length=3)(["a"] * 2, ["cat", long])


def test_truncation_needs_a_length():
    with pytest.raises(ValueError, match="`truncation_side='left'` of reward 'kind' needs a `max_length`"):
        reward_of(t5(), "eos", truncation_side="left")


def test_a_roberta_takes_as_many_tokens_as_it_has_positions():
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES, num_labels=1)).eval()
    reward = reward_of(model, "encoder", template="{completion}")
    assert reward.max_length == 15
    assert reward(["a"], ["cat " * 13]).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        by_hand(model, [[CLS, *ids_of("cat " * 14)[0], SEP]])


# ---- padding ----


def test_a_model_that_padding_changes_scores_one_length_at_a_time(caplog):
    """An XLNet reads the last position, whatever is there."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "initializer_range": 0.5}
    model = XLNetForSequenceClassification(XLNetConfig(**sizes, num_labels=1, pad_token_id=PAD)).eval()
    reward = reward_of(model, "none", template="{completion}", batch_size=3)
    expected = by_hand(model, ids_of(*COMPLETIONS))
    for _ in range(2):
        torch.testing.assert_close(reward(PROMPTS, COMPLETIONS), expected, **CLOSE)
    assert caplog.text.count("'kind' gives a text another reward if it is padded") == 1


def test_a_classifier_whose_config_has_no_pad_token_is_batched():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": CLS, "eos_token_id": SEP}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=1, initializer_range=0.5)).eval()
    assert model.config.pad_token_id is None
    reward = reward_of(model, tokens=tokenizer("none", pad_token=None))
    expected = by_hand(model, ids_of(*(p + c for p, c in zip(PROMPTS, COMPLETIONS))))
    torch.testing.assert_close(reward(PROMPTS, COMPLETIONS), expected, **CLOSE)


# ---- what does not fit together ----


def test_tokens_and_labels_that_the_model_does_not_have_are_refused():
    few = make_model()
    few.config.vocab_size = 5
    with pytest.raises(ValueError, match="'kind' gives completion 1 the token id 6, but the model has 5 tokens"):
        reward_of(few, "none", template="{completion}")(["a"] * 2, ["the", "cat"])
    with pytest.raises(ValueError, match="pad token of reward 'kind' has the id 17, but the model has 5"):
        reward_of(few, tokens=tokenizer("none", pad_token="."))
    with pytest.raises(ValueError, match="Several outputs of reward 'kind' are called 'toxic'"):
        model = encoder()
        model.config.id2label = {0: "toxic", 1: "toxic"}
        reward_of(model, "encoder", logit="toxic")
    model.config.id2label = {0: "toxic"}
    with pytest.raises(ValueError, match=r"logits of shape \(batch, 1\), one for each label .* have \(1, 2\)"):
        reward_of(model, "encoder")(["a"], [" cat"])


def test_chats_that_have_no_text_are_refused_by_prompt_before_there_are_completions():
    reward = reward_of(make_model(), "none")
    with pytest.raises(ValueError, match="tokenizer of reward 'kind' has no chat template.*'{completion}'"):
        reward.check(CHATS, [])
    with pytest.raises(ValueError, match="tokenizer of reward 'kind' has no chat template"):
        RewardEnsemble([reward, lambda completions, **kwargs: [0.0]]).check(CHATS, [])
    reward.check(PROMPTS, [])
    tokens = make_tokenizer()
    tokens.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    strict = reward_of(make_model(), tokens=tokens)
    strict.check(CHATS, [])
    chat = [{"role": "system", "content": "good"}]
    with pytest.raises(
        ValueError, match="chat template of reward 'kind' fails .* prompt .*'good'.*: TemplateError: no system"
    ):
        strict.check([*CHATS, chat], [])
    single = reward_of(make_model(), "none", template="{prompt}{completion}")
    with pytest.raises(
        ValueError, match="'kind' takes a text or a single message of text, but for .* prompt .*'good'"
    ):
        single.check([chat + CHATS[0]], [])
