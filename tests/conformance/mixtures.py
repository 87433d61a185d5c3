"""The two mixtures that Transformers' tests are run against."""

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, GPT2Config, LlamaConfig

from mpo_hf import MixtureComponent, MixturePolicyConfig, MixturePolicyModel
from mpo_hf.mixture.component_loading import PolicyHandle


SHAPE = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HIDDEN_SIZE, NUM_HEADS = 32, 4
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def llama_config(**kwargs) -> LlamaConfig:
    """A decoder with rotary positions, grouped heads and a head of its own."""
    return LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=2,
        **{**SHAPE, **kwargs},
    )


def gpt2_config(**kwargs) -> GPT2Config:
    """A decoder with learned positions, dropout and tied embeddings."""
    return GPT2Config(n_embd=HIDDEN_SIZE, n_layer=1, n_head=NUM_HEADS, n_positions=512, **{**SHAPE, **kwargs})


def families_config(**kwargs) -> MixturePolicyConfig:
    """Two components of different families."""
    return MixturePolicyConfig(
        component_configs=[llama_config(**kwargs), gpt2_config(**kwargs)], mixture_weights=[0.4, 0.6]
    )


def adapters_config(**kwargs) -> MixturePolicyConfig:
    """Two components that are adapters over one base."""
    base = llama_config(**kwargs)
    return MixturePolicyConfig(component_configs=[base, copy.deepcopy(base)], mixture_weights=[0.4, 0.6])


class AdapterMixture(MixturePolicyModel, GenerationMixin):
    """
    A mixture of adapters as the tests need it: random when built from a config alone, saved with all that it refers to.
    """

    def __init__(
        self,
        config: MixturePolicyConfig,
        backbones: Sequence[nn.Module] | None = None,
        policies: Sequence[PolicyHandle] | None = None,
        *args,
    ):
        random = backbones is None
        if random:
            names = [f"component_{k}" for k in range(len(config.components))]
            backbones = [random_adapters(config, names)]
            policies = [PolicyHandle(0, name) for name in names]
        super().__init__(config, backbones, policies, *args)
        self._built_from_config = random

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes the base and the adapters into the folder, and the mixture as one that refers to them."""
        (peft_model,) = self.backbones
        peft_model.save_pretrained(save_directory)
        with torch.no_grad():
            base = copy.deepcopy(peft_model).unload()
        base.save_pretrained(os.path.join(save_directory, "base"))
        components = self.config.components
        self.config.components = [
            MixtureComponent(name_or_path="./base", adapter=f"./{handle.adapter}") for handle in self.policies
        ]
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.config.components = components


def random_adapters(config: MixturePolicyConfig, names: Sequence[str]) -> nn.Module:
    """A base with one adapter a component; adapters start as zero, so they are moved away from it."""
    lora = LoraConfig(r=16, target_modules=ADAPTED, init_lora_weights=False, task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_config(config.component_configs[0])
    base.enable_input_require_grads()
    config.component_configs = [base.config] * len(names)  # adapters over one base share its configuration
    model = get_peft_model(base, lora, names[0])
    for name in names[1:]:
        model.add_adapter(name, lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name  # PEFT itself would train the active adapter only
    return model
