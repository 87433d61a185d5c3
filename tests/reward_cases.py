"""Prompts and completions, their tokenizer, and reward models and functions to score them."""

import asyncio

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors, trainers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast


WORDS = "user assistant the a cat dog sat ran on mat good bad very is , ."
CHAT_TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }} {% endfor %}"
)
PROMPTS = ["the cat", "the dog ran", "a", "the very bad dog", "a cat is"]
COMPLETIONS = [" sat .", " on the mat , very good , very good .", " cat", " is bad .", " a cat"]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
ANSWERS = [[{"role": "assistant", "content": completion}] for completion in COMPLETIONS]


def make_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator([WORDS], trainers.WordLevelTrainer(special_tokens=specials))
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    kwargs = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | kwargs
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **kwargs)


def make_model(num_labels: int = 1, cls: type = LlamaForSequenceClassification, **kwargs):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    # a large range, so that scores differ clearly
    config = LlamaConfig(**sizes, **heads, num_labels=num_labels, initializer_range=0.5, **kwargs)
    return cls(config).eval()


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


async def async_length(completions, **kwargs):
    await asyncio.sleep(0)
    return length(completions)


class Constant:
    def __init__(self, value):
        self.value = value

    def __call__(self, prompts, completions, **kwargs):
        return [self.value] * len(completions)
