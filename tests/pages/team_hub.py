"""The repositories that the pages of the documentation name: tiny models of random weights, with a tokenizer for any text."""

from pathlib import Path

import torch
from datasets import Dataset
from helpers import save_lora
from hub_server import Hub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from mpo_hf import MixturePolicyModel


TOKENS = {"team-token": "my-team"}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = ["What is a cloud?", "How do I say no to a friend?", "Tell me about rivers.", "Why is it raining again?"]


def team_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, and a chat template."""
    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def team_config(tokenizer: PreTrainedTokenizerFast, **kwargs) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.3, **sizes, **ids, **kwargs
    )


def fill(hub: Hub, root: Path) -> None:
    """Makes everything that the pages find on the Hub; `root` is where it is put together."""
    tokenizer = team_tokenizer()
    for seed, name in enumerate(["sft", "helpful", "harmless"]):
        torch.manual_seed(seed)
        LlamaForCausalLM(team_config(tokenizer)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        hub.upload(f"my-team/{name}", root / name)
    for seed, name in enumerate(["helpful", "harmless"], start=3):
        adapter = root / f"{name}-lora"
        save_lora(adapter, str(root / "sft"), seed)
        config = adapter / "adapter_config.json"
        config.write_text(config.read_text().replace(str(root / "sft"), "my-team/sft"))
        hub.upload(f"my-team/{name}-lora", adapter)
    for seed, name in enumerate(["helpful-rm", "harmless-rm", "helpful-rm-2"], start=3):
        torch.manual_seed(seed)
        LlamaForSequenceClassification(team_config(tokenizer, num_labels=1)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        hub.upload(f"my-team/{name}", root / name)
    (root / "prompts").mkdir()
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    Dataset.from_dict({"prompt": conversations}).to_parquet(root / "prompts" / "train.parquet")
    hub.upload("datasets/my-team/prompts", root / "prompts")


def mix() -> None:
    """Pushes the team's mixtures, as the team would: in a process that has the Hub's address in its environment."""
    for name, ending in {"mixture": "", "lora-mixture": "-lora"}.items():
        mixture = MixturePolicyModel.from_policies(
            [f"my-team/helpful{ending}", f"my-team/harmless{ending}"],
            weights=[0.6, 0.4],
            labels=["helpful", "harmless"],
            reference="my-team/sft",
        )
        mixture.push_to_hub(f"my-team/{name}")
        team_tokenizer().push_to_hub(f"my-team/{name}")


if __name__ == "__main__":
    mix()
