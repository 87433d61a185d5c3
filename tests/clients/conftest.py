"""Mixtures that are saved the way that users save them, with a tokenizer for any text and a chat template."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import load_lora, save_lora, save_tiny
from pages.team_hub import team_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mpo_hf import MixturePolicyModel


@dataclass
class SavedMixture:
    """A mixture's folder, the mixture, and its components as models that share nothing with it."""

    folder: str
    model: MixturePolicyModel
    components: list
    weights: list[float]
    tokenizer: PreTrainedTokenizerFast


def save_mixture(kind: str, root: Path) -> SavedMixture:
    tokenizer = team_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    base = save_tiny(root / "llama", "llama", 40, **sizes)
    if kind == "llama+gpt2":
        policies, weights = [base, save_tiny(root / "gpt2", "gpt2", 41, **sizes)], [0.4, 0.6]
        components = [AutoModelForCausalLM.from_pretrained(policy) for policy in policies]
    else:
        policies, weights = [save_lora(root / f"lora_{seed}", base, seed) for seed in (42, 43)], [0.7, 0.3]
        components = [load_lora(policy, base) for policy in policies]
    for folder in (base, *policies):
        tokenizer.save_pretrained(folder)
    folder = str(root / "mixture")
    MixturePolicyModel.from_policies(policies, weights).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return SavedMixture(folder, model, components, weights, tokenizer)


@pytest.fixture(scope="module", params=["llama+gpt2", "adapters"])
def saved(request, tmp_path_factory):
    """Two models of different architectures, and two adapters over one base."""
    return save_mixture(request.param, tmp_path_factory.mktemp("saved"))
