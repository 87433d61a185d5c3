r"""
A mixture seen as one backbone under one linear head, for trainers that never build the logits.

TRL's trainers multiply the last hidden states by the weight of the output embeddings themselves, some tokens at a time. Up
to a constant of each position, which no softmax sees, the pooled log-probabilities are linear in the hidden states:

$$ \sum_k \lambda_k \log \pi_k(v) = \sum_k \lambda_k (W_k h_k + b_k)_v + \text{const} $$

So the weighted hidden states side by side are those of one model, whose head is the heads side by side. Components that
share their head, as adapters over one base do, have their weighted hidden states added up instead.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from .compat import without_peft


if TYPE_CHECKING:
    from .modeling_mixture import MixturePolicyModel


class PooledHead(nn.Linear):
    """
    The output embeddings of a mixture: the heads of its components side by side. It has no parameters of its own.

    Args:
        mixture ([`MixturePolicyModel`]): the mixture.
    """

    _is_hf_initialized = True  # there is nothing to initialise

    def __init__(self, mixture: "MixturePolicyModel"):
        nn.Module.__init__(self)
        # not a submodule: the mixture is the parent
        object.__setattr__(self, "mixture", mixture)
        self._checked = False

    @property
    def linears(self) -> list[nn.Linear]:
        """The heads of the components that have weight, each of them once."""
        return list(dict.fromkeys(self.linear_of(k) for k in self.active))

    @property
    def active(self) -> list[int]:
        """The components that have weight."""
        return [k for k, weight in enumerate(self.mixture.config.mixture_weights) if weight != 0]

    def linear_of(self, k: int) -> nn.Linear:
        """The head of component `k`."""
        head = without_peft(self.mixture.backbones[self.mixture.policies[k].backbone]).get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"{self._component(k)} has a {type(head).__module__}.{type(head).__name__} as output embeddings. Trainers that "
                "never build the logits need a plain linear layer, without an adapter: merge the adapter into its base."
            )
        return head

    @property
    def weight(self) -> torch.Tensor:
        weights = [linear.weight[: self.out_features] for linear in self.linears]
        return torch.cat([weight.to(weights[0]) for weight in weights], dim=1) if len(weights) > 1 else weights[0]

    @property
    def bias(self) -> torch.Tensor | None:
        weighted = [(self.mixture.config.mixture_weights[k], self.linear_of(k).bias) for k in self.active]
        terms = [weight * bias[: self.out_features] for weight, bias in weighted if bias is not None]
        return sum(terms) if terms else None

    @property
    def in_features(self) -> int:
        return sum(linear.in_features for linear in self.linears)

    @property
    def out_features(self) -> int:
        return self.mixture.config.vocab_size

    def check(self) -> None:
        """Refuses, at the first call, a mixture whose logits are not those of linear heads."""
        if self._checked:
            return
        if self.mixture.config.plausibility:
            raise ValueError(
                "A mixture with `plausibility` has logits of -inf, and is no linear head on hidden states."
            )
        ids = torch.arange(min(8, self.out_features), device=self.mixture.device)[None]
        training = self.mixture.training
        self.mixture.eval()  # dropout would make a difference
        with torch.no_grad():
            for k in self.active:
                self._check_component(k, self.mixture._inputs_for_all(ids, None, None))
        self.mixture.train(training)
        self._checked = True

    def _check_component(self, k: int, inputs: dict) -> None:
        logits = self.mixture._run_policy(k, {**inputs, "logits_to_keep": 0, "use_cache": False}, {})
        linear, hidden = self.linear_of(k), last_hidden_state(self.mixture, k, inputs)
        expected = nn.functional.linear(hidden.to(linear.weight.dtype), linear.weight, linear.bias)
        error = (expected[..., : self.out_features] - logits.to(expected.device)).abs().max()
        if error > 8 * torch.finfo(expected.dtype).eps * logits.abs().max():
            raise ValueError(
                f"{self._component(k)} does more than a linear layer to get from its last hidden states to its logits: they "
                f"differ by up to {error:.3g} (soft-capping, or scaled logits?). Trainers that never build the logits "
                "cannot take such a mixture. Of TRL's, GKDTrainer builds them."
            )

    def _component(self, k: int) -> str:
        config = self.mixture.config
        return f"The component {config.labels[k]!r} ({config.component_configs[k].model_type})"


class PooledBackbone:
    """
    The `base_model` of a mixture: gives the hidden states that [`PooledHead`] takes.

    Args:
        mixture ([`MixturePolicyModel`]): the mixture.
    """

    _tp_plan = _pp_plan = None  # PreTrainedModel asks for them

    def __init__(self, mixture: "MixturePolicyModel"):
        self.mixture = mixture

    def __call__(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Takes what a mixture takes. Always returns the hidden states of all positions, and never keys and values."""
        mixture, head = self.mixture, self.mixture.get_output_embeddings()
        head.check()
        inputs = mixture._inputs_for_all(input_ids, attention_mask, position_ids)
        linears = head.linears
        pooled: dict[nn.Linear, torch.Tensor | float] = dict.fromkeys(linears, 0.0)
        for k in head.active:
            hidden, weight = last_hidden_state(mixture, k, inputs), mixture.config.mixture_weights[k]
            # added up in float32: half precision would round once more than the components do
            term = weight * hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            pooled[head.linear_of(k)] = pooled[head.linear_of(k)] + term
        return BaseModelOutput(last_hidden_state=torch.cat([h.to(linears[0].weight) for h in pooled.values()], dim=-1))


def last_hidden_state(mixture: "MixturePolicyModel", k: int, inputs: dict) -> torch.Tensor:
    """What the head of component `k` is given: `(batch_size, sequence_length, hidden_size)`."""
    backbone, inputs = mixture._ready_policy(k, inputs)
    return without_peft(backbone).base_model(**inputs, use_cache=False).last_hidden_state
