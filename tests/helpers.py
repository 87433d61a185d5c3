"""Tiny models, the kinds of mixtures they make, and decoding loops that keep nothing between steps."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mpo_hf import MixturePolicyModel


TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PROGRAMS = TESTS / "programs"
VOCAB, PAD, BOS, EOS = 32, 0, 1, 2
# Prompts of different lengths, for batches with padding.
PROMPTS = [[BOS, 7, 11, 3, 22, 8, 14], [BOS, 30], [BOS, 6, 6, 19, 27]]
# The one tolerance for float32 arithmetic. Other processors, instruction sets and numbers of threads add in other orders,
# and results of tiny models are then up to 5e-5 apart. Wrong weights, masks or adapters move them by 1e-2 and more.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}
# Token ids that end a completion in tests where rows should end at different times.
ENDS = [EOS, 5, 9, 13, 17, 21, 25, 29]

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    # large enough for models to disagree, and to change their minds from token to token
    "initializer_range": 0.5,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
# Windows are shorter than the prompts, so that sliding layers forget something.
WINDOW = 4


def tiny(architecture: str, seed: int, **changes) -> PreTrainedModel:
    """A random model: `"llama"`, `"gpt2"`, `"qwen2"`, `"mistral"` or `"gemma3"`."""
    torch.manual_seed(seed)
    sizes = {**SIZES, **changes}
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    elif architecture == "gpt2":
        del sizes["num_key_value_heads"]
        model = GPT2LMHeadModel(GPT2Config(**{GPT2_NAMES.get(k, k): v for k, v in sizes.items()}))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    elif architecture == "mistral":
        model = MistralForCausalLM(MistralConfig(**{"sliding_window": WINDOW, "head_dim": 8, **sizes}))
    elif architecture == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        own = {"sliding_window": WINDOW, "head_dim": 8, "num_hidden_layers": 3, "layer_types": layers}
        model = Gemma3ForCausalLM(Gemma3TextConfig(**{**sizes, **own, **changes}))
    return model.eval()


class RoutedLayer(nn.Module):
    """Two experts, each of which sees the tokens that are routed to it."""

    def __init__(self, config):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))

    def forward(self, hidden_states):
        output = torch.zeros_like(hidden_states)
        chosen = (hidden_states.sum(-1) > 0).long()
        for i, expert in enumerate(self.experts):
            output[chosen == i] = expert(hidden_states[chosen == i])
        return output


def save_tiny(folder: Path, architecture: str, seed: int, **changes) -> str:
    """Saves a random model and returns its folder."""
    tiny(architecture, seed, **changes).save_pretrained(folder)
    return str(folder)


def save_lora(folder: Path, base: str, seed: int, config: PeftConfig | None = None, **changes) -> str:
    """Saves a random LoRA adapter over the model in `base`, or an adapter of another kind, and returns its folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    settings = {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    # random factors, where LoRA's own initialization would leave the base unchanged
    adapted = get_peft_model(model, config or LoraConfig(**{**settings, "init_lora_weights": False, **changes}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return str(folder)


def load_lora(adapter: str, base: str) -> PeftModel:
    """An adapter as PEFT itself runs it, over a copy of the base of its own."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def save_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """Saves a Llama as a GGUF file, unquantised."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        for projection, count in heads.items():
            if projection in name:  # the two formats order the halves of rotary dimensions differently
                array = array.reshape(count, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fake_hub(cache: Path, repo: str, folder: str | Path, revision: str = "main") -> str:
    """Puts a folder into a Hub cache, as if it had been downloaded from `repo`."""
    store = cache / f"models--{repo.replace('/', '--')}"
    commit = hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
    (store / "refs").mkdir(parents=True, exist_ok=True)
    (store / "refs" / revision).write_text(commit)
    shutil.copytree(folder, store / "snapshots" / commit)
    return repo


def tiny_tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=tokens[0])


@dataclass
class Folders:
    """Where the policies that tests load are saved."""

    root: Path
    base: str
    gpt2: str
    kind: str
    terse: str


@dataclass
class Case:
    """A mixture, and its components as models that share nothing with it or with one another."""

    model: MixturePolicyModel
    components: list
    weights: list[float]


MEMORY_KINDS = {
    "llama+gpt2": (["llama", "gpt2"], [0.55, 0.45]),
    "llama+gpt2+qwen2": (["llama", "gpt2", "qwen2"], [0.3, 0.45, 0.25]),
    "mistral+gemma3": (["mistral", "gemma3"], [0.5, 0.5]),
    "one of three silent": (["llama", "mistral", "gpt2"], [0.6, 0.0, 0.4]),
}
ADAPTER_KINDS = {"base+two adapters": [0.2, 0.45, 0.35], "adapters+reference": [0.4, 0.6]}
KINDS = [*MEMORY_KINDS, *ADAPTER_KINDS]


def build_case(kind: str, folder: Path) -> Case:
    """Builds a mixture of one of the `KINDS`."""
    if kind in MEMORY_KINDS:
        names, weights = MEMORY_KINDS[kind]
        policies, components = ([tiny(name, 10 + i) for i, name in enumerate(names)] for _ in range(2))
        return Case(MixturePolicyModel.from_policies(policies, weights), components, weights)
    weights = ADAPTER_KINDS[kind]
    base = save_tiny(folder / "base", "llama", 20)
    adapters = [save_lora(folder / f"adapter_{i}", base, 30 + i, r=2 + 2 * i) for i in range(2)]
    components = [load_lora(adapter, base) for adapter in adapters]
    if kind == "base+two adapters":
        components.insert(0, AutoModelForCausalLM.from_pretrained(base).eval())
        return Case(MixturePolicyModel.from_policies([base, *adapters], weights), components, weights)
    model = MixturePolicyModel.from_policies(adapters, weights)
    # the reference is the base: it runs with the adapters off, and must leave them as they were
    model.reference_policy(torch.tensor([[BOS, 4]]))
    return Case(model, components, weights)


def close(expected):
    """`pytest.approx` with the tolerance of float32 arithmetic."""
    return pytest.approx(expected, abs=CLOSE["atol"], rel=CLOSE["rtol"])


def left_pad(prompts: list[list[int]], pad: int = PAD) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of prompts of different lengths."""
    longest = max(len(prompt) for prompt in prompts)
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
    }


@torch.no_grad()
def component_logps(component, prefixes: list[list[int]]) -> torch.Tensor:
    """Next-token log-probabilities of one model after prefixes of one length, all of them computed anew: `(N, V)`."""
    logits = component(input_ids=torch.tensor(prefixes), use_cache=False).logits
    return logits[:, -1].double().log_softmax(-1)


def pooled_logps(components: list, weights, prefixes: list[list[int]]) -> torch.Tensor:
    """Σ_k λ_k log π_k after every prefix, from one forward a component and length; weights `(K,)` or `(N, K)`."""
    weights = torch.as_tensor(weights, dtype=torch.float64).expand(len(prefixes), -1)
    pooled = torch.zeros(len(prefixes), components[0].config.vocab_size, dtype=torch.float64)
    for length in {len(prefix) for prefix in prefixes}:
        rows = [i for i, prefix in enumerate(prefixes) if len(prefix) == length]
        for k, component in enumerate(components):
            pooled[rows] += weights[rows, k, None] * component_logps(component, [prefixes[i] for i in rows])
    return pooled


def decode(
    components, weights, prompts, steps, choose, ends=(EOS,), min_new_tokens=0, process=None
) -> list[list[int]]:
    """
    Decodes one token after another without any cache, one prompt beside the other without padding.

    Args:
        choose (`Callable`): picks the next tokens, given the scores `(N, V)`.
        ends (`Sequence[int]`): tokens that end a completion; `PAD` follows them.
        process (`Callable`, *optional*): changes scores before a token is picked.
    """
    completions: list[list[int]] = [[] for _ in prompts]
    for step in range(steps):
        scores = pooled_logps(components, weights, [p + c for p, c in zip(prompts, completions)]).float()
        if step < min_new_tokens:
            scores[:, list(ends)] = -torch.inf
        if process is not None:
            scores = process(scores)
        for completion, token in zip(completions, choose(scores).tolist()):
            finished = any(earlier in ends for earlier in completion)
            completion.append(PAD if finished else token)
        if all(any(token in ends for token in completion) for completion in completions):
            break
    return completions


def greedy(components, weights, prompts, steps, **kwargs) -> list[list[int]]:
    """The most likely token at every step."""
    return decode(components, weights, prompts, steps, lambda scores: scores.argmax(-1), **kwargs)


def multinomial(components, weights, prompts, steps, seed, **kwargs) -> list[list[int]]:
    """Sampled tokens, drawn like `generate` draws them."""
    torch.manual_seed(seed)

    def choose(scores):
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)

    return decode(components, weights, prompts, steps, choose, **kwargs)


def beam_search(
    components, weights, prompt, steps, num_beams, ends=(EOS,), length_penalty=1.0, early_stopping=False
) -> list[tuple[float, list[int]]]:
    """Beam search over one prompt as Transformers defines it: scores and completions, best first."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, steps + 1):
        logps = pooled_logps(components, weights, [prompt + tokens for _, tokens in running]).log_softmax(-1)
        extended = [
            (score + logp, [*tokens, token])
            for (score, tokens), row in zip(running, logps.tolist())
            for token, logp in enumerate(row)
        ]
        extended = sorted(extended, reverse=True)[: max(2, 1 + len(ends)) * num_beams]
        for score, tokens in extended[:num_beams]:
            if tokens[-1] in ends or length == steps:
                finished.append((score / length**length_penalty, tokens))
        finished = sorted(finished, reverse=True)[:num_beams]
        running = [(score, tokens) for score, tokens in extended if tokens[-1] not in ends][:num_beams]
        if len(finished) == num_beams:
            longest = steps if early_stopping == "never" and length_penalty > 0 else length
            hopeless = running[0][0] / longest**length_penalty <= finished[-1][0]
            if early_stopping is True or hopeless:
                break
    return finished


def completions_of(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """The generated part of what `generate` returns."""
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def program(name: str, values: dict | None = None, launcher: Sequence[str] = ()) -> dict[str, Any]:
    """
    What `subprocess` is told to run a file of `programs/`, which can import what tests can.

    Args:
        values (`dict`, *optional*): the argument of the program, which gets it as JSON.
        launcher (`Sequence[str]`): options of Python that run the program, such as `-m torch.distributed.run`.
    """
    command = [sys.executable, *launcher, str(PROGRAMS / name)]
    if values is not None:
        command.append(json.dumps(values))
    found = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"args": command, "env": {**os.environ, "PYTHONPATH": os.pathsep.join(found)}, "text": True}
