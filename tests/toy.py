"""Policies small enough to enumerate: real language models over six tokens, and everything about them exactly."""

import itertools
from dataclasses import dataclass

import torch
from scipy.optimize import minimize
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    DynamicCache,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast


VOCAB_SIZE, LENGTH = 6, 3
PROMPTS = ["a b", "c d", "e f", "a f"]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate("abcdef")}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="a", unk_token="a")


def toy_policy(seed: int, spread: float, reference: LlamaForCausalLM | None = None) -> LlamaForCausalLM:
    """A random policy; `spread` scales its weights' distance from `reference`, or from zero without one."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    policy = LlamaForCausalLM(config).eval()
    if reference is not None:
        with torch.no_grad():
            for own, base in zip(policy.parameters(), reference.parameters()):
                own.add_(base if own.ndim > 1 else base - 1)
    return policy


@dataclass
class Enumeration:
    """Log-probabilities of all completions of all prompts: `policies` (P, Y, K), `reference` (P, Y)."""

    policies: torch.Tensor
    reference: torch.Tensor
    completions: torch.Tensor

    def dual(self, weights, advantages: torch.Tensor | None = None) -> float:
        """F(λ) exactly, with the implicit advantages unless others are given."""
        if advantages is None:
            advantages = self.policies - self.reference.unsqueeze(-1)
        weights = torch.as_tensor(weights, dtype=torch.float64)
        return torch.logsumexp(self.reference + advantages @ weights, dim=-1).mean().item()

    def minimum(self, advantages: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
        """λ* and F(λ*), by a solver that knows nothing of mirror descent."""
        k = self.policies.shape[-1]
        result = minimize(
            lambda w: self.dual(w, advantages),
            [1 / k] * k,
            bounds=[(0, 1)] * k,
            constraints={"type": "eq", "fun": lambda w: sum(w) - 1},
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 500},
        )
        return torch.tensor(result.x), result.fun


@torch.no_grad()
def sequence_logps(policy, prompt: list[int], completions: torch.Tensor) -> torch.Tensor:
    ids = torch.cat([torch.tensor(prompt).expand(len(completions), -1), completions], dim=1)
    logps = policy(ids).logits.double().log_softmax(-1)[:, len(prompt) - 1 : -1]
    return logps.gather(-1, completions.unsqueeze(-1)).squeeze(-1).sum(-1)


def enumerate_completions(policies, reference, prompts=PROMPTS) -> Enumeration:
    completions = torch.tensor(list(itertools.product(range(VOCAB_SIZE), repeat=LENGTH)))
    prompt_ids = toy_tokenizer()(prompts)["input_ids"]
    table = [
        torch.stack([sequence_logps(p, ids, completions) for p in [*policies, reference]], dim=-1)
        for ids in prompt_ids
    ]
    table = torch.stack(table)
    return Enumeration(table[..., :-1], table[..., -1], completions)


def reward_functions(rewards: torch.Tensor, completions: torch.Tensor, prompts=PROMPTS) -> list:
    """TRL-style reward functions that look rewards up in a table of shape (P, Y, K)."""
    index = {tuple(row): i for i, row in enumerate(completions.tolist())}
    rows = {prompt: i for i, prompt in enumerate(prompts)}

    def make(k):
        def reward(prompts, completion_ids, **kwargs):
            return [rewards[rows[p], index[tuple(ids)], k].item() for p, ids in zip(prompts, completion_ids)]

        reward.__name__ = f"reward_{k}"
        return reward

    return [make(k) for k in range(rewards.shape[-1])]


class TabularConfig(PreTrainedConfig):
    model_type = "toy_tabular"

    def __init__(self, **kwargs):
        self.vocab_size, self.num_hidden_layers, self.max_position_embeddings = VOCAB_SIZE, 1, 64
        super().__init__(**kwargs)


class TabularPolicy(PreTrainedModel, GenerationMixin):
    """A policy with any given distribution over completions of every prompt: `logps` of shape (P, Y)."""

    config_class = TabularConfig

    def __init__(self, logps: torch.Tensor, prompts=PROMPTS):
        super().__init__(TabularConfig())
        self.row_of = torch.full((VOCAB_SIZE, VOCAB_SIZE), -1)
        for row, (first, second) in enumerate(toy_tokenizer()(prompts)["input_ids"]):
            self.row_of[first, second] = row
        table = logps.reshape(len(prompts), *[VOCAB_SIZE] * LENGTH)
        inner = [tuple(range(t + 2, LENGTH + 1)) for t in range(LENGTH)]
        self.tables = [table.logsumexp(dims) if dims else table for dims in inner]
        self.anchor = nn.Parameter(torch.zeros(1))  # a model without parameters has no device
        self.post_init()

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs
    ):
        ids, new = input_ids, input_ids.shape[1]
        if past_key_values is not None:  # the "keys" of this model are the token ids that it has seen
            keys = input_ids[:, None, :, None].float()
            ids = past_key_values.update(keys, keys, 0)[0][:, 0, :, 0].long()
        elif use_cache:
            past_key_values = DynamicCache()
        logits = torch.zeros(*ids.shape, VOCAB_SIZE)
        rows = self.row_of[ids[:, 0], ids[:, 1]] if ids.shape[1] > 1 else None  # a prompt has two tokens
        for t in range(2, min(ids.shape[1], LENGTH + 1) + 1):
            logits[:, t - 1] = self.tables[t - 2][(rows, *ids[:, 2:t].T)].float()
        return CausalLMOutputWithPast(logits=logits[:, -new:], past_key_values=past_key_values)
