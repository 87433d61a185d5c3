r"""
A mixture as one backbone with one linear head, for trainers that never materialize the logits.

TRL's trainers multiply the last hidden states by the weight of the output embeddings themselves, in chunks of tokens.
Up to a constant at each position, to which softmax is invariant, the pooled log-probabilities are linear in the hidden
states:

$$ \sum_k \lambda_k \log \pi_k(v) = \sum_k \lambda_k (W_k h_k + b_k)_v + \text{const} $$

So the concatenated weighted hidden states are those of one model, whose head is the concatenation of the heads. The
weighted hidden states of components that share a head, as adapters over one base do, are summed instead.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from .adapter_switching import call_with_adapter
from .compat import without_peft
from .component_running import ComponentRunningMixin


class PooledHead(nn.Linear):
    """
    The output embeddings of a mixture: the concatenated heads of its components. It has no parameters of its own.

    Args:
        mixture ([`MixturePolicyModel`]): the mixture.
    """

    _is_hf_initialized = True  # there is nothing to initialize

    def __init__(self, mixture: ComponentRunningMixin):
        nn.Module.__init__(self)
        # not a submodule: the mixture is the parent
        object.__setattr__(self, "mixture", mixture)
        self._checked = False

    @property
    def linears(self) -> list[nn.Linear]:
        """The distinct heads of the components with nonzero weight."""
        return list(dict.fromkeys(self.linear_of(k) for k in self.active))

    @property
    def active(self) -> list[int]:
        """The components with nonzero weight."""
        return [k for k, weight in enumerate(self.mixture.config.mixture_weights) if weight != 0]

    def linear_of(self, k: int) -> nn.Linear:
        """The head of component `k`."""
        head = without_peft(self.mixture.backbones[self.mixture.policies[k].backbone]).get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"{self._component(k)} has a {type(head).__module__}.{type(head).__name__} as output embeddings. Trainers that "
                "never materialize the logits need a plain linear layer, without an adapter: merge the adapter into its base."
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
        """Refuses a mixture whose logits are not linear in its hidden states. Checked at the first call only."""
        if self._checked:
            return
        if self.mixture.config.plausibility:
            raise ValueError("A mixture with `plausibility` has logits of -inf, which no linear head gives.")
        ids = torch.arange(min(8, self.out_features), device=self.mixture.device)[None]
        training = self.mixture.training
        self.mixture.eval()  # dropout would make a difference
        try:
            with torch.no_grad():
                for k in self.active:
                    self._check_component(k, self.mixture._inputs_for_all(ids, None, None))
        finally:
            self.mixture.train(training)
        self._checked = True

    def _check_component(self, k: int, inputs: dict) -> None:
        logits = self.mixture._run_policy(k, {**inputs, "logits_to_keep": 0, "use_cache": False}, {})
        linear, hidden = self.linear_of(k), last_hidden_state(self.mixture, k, inputs)
        expected = nn.functional.linear(hidden.to(linear.weight.dtype), linear.weight, linear.bias)
        error = (expected[..., : self.out_features] - logits.to(expected.device)).abs().max()
        # by the head's own, as logits of -inf would allow any error; NaN is no match
        if not error <= 8 * torch.finfo(expected.dtype).eps * expected.abs().max():
            raise ValueError(
                f"{self._component(k)} applies more than a linear layer to its last hidden states: its logits "
                f"differ from theirs by up to {error:.3g} (soft-capping, scaled or masked logits?). Trainers that never materialize the "
                "logits cannot take such a mixture. TRL's GKDTrainer does materialize them."
            )

    def _component(self, k: int) -> str:
        config = self.mixture.config
        return f"The component {config.labels[k]!r} ({config.component_configs[k].model_type})"


class PooledBackbone:
    """
    The `base_model` of a mixture, which returns the hidden states for [`PooledHead`].

    Args:
        mixture ([`MixturePolicyModel`]): the mixture.
    """

    _tp_plan = _pp_plan = None  # read by PreTrainedModel

    def __init__(self, mixture: ComponentRunningMixin):
        self.mixture = mixture

    def __call__(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Takes the arguments of a mixture. Returns the hidden states of all positions, and no cache."""
        mixture, head = self.mixture, self.mixture.get_output_embeddings()
        head.check()
        inputs = mixture._inputs_for_all(input_ids, attention_mask, position_ids)
        mixture._check_text(head.active, inputs, {}, is_step=False)
        linears = head.linears
        pooled: dict[nn.Linear, torch.Tensor | float] = dict.fromkeys(linears, 0.0)
        for k in head.active:
            hidden, weight = last_hidden_state(mixture, k, inputs), mixture.config.mixture_weights[k]
            # summed in float32: half precision would round once more than the components do
            term = weight * hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            pooled[head.linear_of(k)] = pooled[head.linear_of(k)] + term
        return BaseModelOutput(last_hidden_state=torch.cat([h.to(linears[0].weight) for h in pooled.values()], dim=-1))


def last_hidden_state(mixture: ComponentRunningMixin, k: int, inputs: dict) -> torch.Tensor:
    """The input of component `k`'s head, of shape `(batch_size, sequence_length, hidden_size)`."""
    backbone, inputs = mixture._ready_policy(k, inputs)
    body = without_peft(backbone).base_model
    inputs = {**inputs, "use_cache": False}
    return call_with_adapter(body, inputs, backbone, mixture.policies[k].adapter).last_hidden_state
