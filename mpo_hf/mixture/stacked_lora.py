"""
K LoRA adapters over one base in one forward pass.

The rows of the K policies are concatenated as blocks, so that the weights of the base are read once for all of them,
and the factors of the adapters are stacked, so that one batched product applies them. For this a model is copied
without its weights: the copy has stacked layers in place of PEFT's, and shares every other module with the original.

PEFT's own way to run several adapters in one batch, `adapter_names`, registers a hook on every adapted layer at each
call, and each layer loops over the adapters, with two products and an indexed read and write of the rows for each.
Here a layer takes two batched products for any K, and tensors of fixed shapes that torch.compile can trace. Layers that
read the same input share the first of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .adapter_loading import is_from_peft
from .adapter_switching import lock_of
from .stacked_rows import StackedModules, StackingError, attributes_of, check_rows, reason_of
from .tuned_modules import Tuner


logger = logging.get_logger(__name__)

# Number of stacks that are kept, for different sets of adapters. Each holds a copy of their factors.
KEPT_STACKS = 8


class StackedLoraLinear(nn.Module):
    """
    A linear layer with an adapter for each block of rows.

    Args:
        base_layer (`nn.Module`): the layer that the adapters were trained over.
        factors_a (`torch.Tensor` of shape `(K, in_features, r)`): first factors, padded with zeros to one rank.
        factors_b (`torch.Tensor` of shape `(K, r, out_features)`): second factors, scaled.
        bias (`torch.Tensor` of shape `(K, 1, out_features)`, *optional*): biases of the adapters, scaled.
    """

    def __init__(
        self, base_layer: nn.Module, factors_a: torch.Tensor, factors_b: torch.Tensor, bias: torch.Tensor | None
    ):
        super().__init__()
        self.base_layer = base_layer
        self.register_buffer("factors_a", factors_a, persistent=False)
        self.register_buffer("factors_b", factors_b, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.shared_input: SharedInput | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.base_layer(hidden_states)
        if self.shared_input is None or torch.compiler.is_compiling():
            inner = _first_product(hidden_states, self.factors_a)
        else:
            inner = self.shared_input.product_for(self, hidden_states)
        blocks = _add_product(output, inner, self.factors_b)
        if self.bias is not None:
            blocks.add_(self.bias)
        return output


class SharedInput:
    """
    The first product of layers that read the same input, computed when the first of them runs.

    Args:
        layers (`Sequence[StackedLoraLinear]`): the layers, in the order in which they run.
    """

    def __init__(self, layers: Sequence[StackedLoraLinear]):
        self.ranks = [layer.factors_a.shape[2] for layer in layers]
        # stored transposed, as those of one layer
        self.factors = torch.cat([layer.factors_a.transpose(1, 2) for layer in layers], 1).transpose(1, 2)
        self.positions = {layer: i for i, layer in enumerate(layers)}
        for layer, own in zip(layers, self.factors.split(self.ranks, 2)):
            layer.factors_a, layer.shared_input = own, self
        # one object, so that threads which run at the same time cannot mix the input of one with the products of another
        self._last: tuple[torch.Tensor | None, tuple[torch.Tensor, ...]] = (None, ())

    def product_for(self, layer: StackedLoraLinear, hidden_states: torch.Tensor) -> torch.Tensor:
        """The input times the first factors of one of the layers: `(K, tokens, r)`."""
        source, products = self._last
        if source is not hidden_states:
            products = _first_product(hidden_states, self.factors).split(self.ranks, 2)
        i = self.positions[layer]
        self._last = (None, ()) if i == len(products) - 1 else (hidden_states, products)
        return products[i]


class StackedLoraEmbedding(nn.Module):
    """
    An embedding with an adapter for each block of rows.

    Args:
        base_layer (`nn.Module`): the embedding that the adapters were trained over.
        factors_a (`torch.Tensor` of shape `(K, num_embeddings, r)`): first factors, padded with zeros to one rank.
        factors_b (`torch.Tensor` of shape `(K, r, embedding_dim)`): second factors, scaled.
    """

    def __init__(self, base_layer: nn.Module, factors_a: torch.Tensor, factors_b: torch.Tensor):
        super().__init__()
        self.base_layer = base_layer
        self.register_buffer("factors_a", factors_a, persistent=False)
        self.register_buffer("factors_b", factors_b, persistent=False)

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        output = self.base_layer(input_ids)
        count = len(self.factors_a)
        block = torch.arange(count, device=input_ids.device)[:, None]
        _add_product(output, self.factors_a[block, input_ids.reshape(count, -1)], self.factors_b)
        return output


def _first_product(hidden_states: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The blocks of an input times first factors: `(K, tokens, r)`."""
    blocks = hidden_states.reshape(factors.shape[0], -1, hidden_states.shape[-1])
    return torch.bmm(blocks.to(factors.dtype), factors)


def _add_product(output: torch.Tensor, inner: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Adds `inner @ factors` to the blocks of `output` in place, and returns these: `(K, tokens, features)`."""
    blocks = output.view(factors.shape[0], -1, output.shape[-1])
    if output.dtype == inner.dtype:
        return blocks.baddbmm_(inner, factors)
    return blocks.add_(torch.bmm(inner, factors))  # rounded once, after the sum


class AdapterStacks:
    """
    Copies of a PEFT model in which several of its adapters run side by side. They are built at first use.

    Args:
        model (`PeftModel`): a model with LoRA adapters. It is not changed.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._refusals: dict[str | None, str | None] = {}
        self._stacks: dict[tuple[str | None, ...], tuple[list, nn.Module | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stacks": {}}  # a copy builds its own

    def allows(self, adapter: str | None) -> bool:
        """Whether an adapter can be stacked; see [`why_not_stacked`]."""
        if torch.compiler.is_compiling():
            return self._refusals.get(adapter, "unknown") is None
        if adapter not in self._refusals:
            try:
                reason = why_not_stacked(self.model, adapter)
            except Exception as error:
                reason = reason_of(error)
            self._refusals[adapter] = reason
            if reason is not None:
                logger.info(f"The adapter {adapter} does not run in one pass with others, because {reason}.")
        return self._refusals[adapter] is None

    def get(self, adapters: Sequence[str | None], check: bool = True) -> nn.Module | None:
        """
        A model whose rows are those of `adapters` (`None` for the base itself), one block after another.

        Args:
            adapters (`Sequence[str]`): names of adapters, each of them allowed.
            check (`bool`, *optional*, defaults to `True`):
                Whether to check if the adapters have changed since they were stacked.

        Returns:
            `nn.Module`, or `None` when these adapters cannot run side by side.
        """
        key = tuple(adapters)
        if torch.compiler.is_compiling():
            return self._stacks.get(key, (None, None))[1]
        with lock_of(self.model):  # views of a mixture share its stacks
            return self._get(key, check)

    def _get(self, key: tuple[str | None, ...], check: bool) -> nn.Module | None:
        state, stack = self._stacks.pop(key, (None, None))
        if state is None or (check and state != _state(self.model, key)):
            stack = stack_adapters(self.model, key)
            state = _state(self.model, key)
        self._stacks[key] = (state, stack)
        if len(self._stacks) > KEPT_STACKS:  # the least recently used
            del self._stacks[next(iter(self._stacks))]
        return stack


def why_not_stacked(model: nn.Module, adapter: str | None) -> str | None:
    """
    The reason why an adapter cannot run in one pass with others, `None` where there is none.

    Args:
        model (`nn.Module`): the model that runs it.
        adapter (`str`, *optional*): name of the adapter, `None` for the base itself.
    """
    if not hasattr(model, "get_base_model"):
        return "the model has no adapters"
    if adapter is None:
        return None
    config = model.peft_config[adapter]
    if config.peft_type != "LORA":
        return f"it is of type {getattr(config.peft_type, 'value', config.peft_type)}"
    if getattr(config, "trainable_token_indices", None):
        return "it has `trainable_token_indices`"
    for name, layer in model.get_base_model().named_modules():
        if not (is_from_peft(layer, "r") and adapter in layer.r):
            continue
        kind = type(layer)
        if kind.__module__ != "peft.tuners.lora.layer" or kind.__name__ not in ("Linear", "Embedding"):
            return f"its layer {name} is a {kind.__module__}.{kind.__name__}"
        if adapter in layer.lora_variant:
            return f"its layer {name} is a {type(layer.lora_variant[adapter]).__name__}"
        if type(layer.base_layer.weight) is not nn.Parameter:
            return f"the weight of its layer {name} is a {type(layer.base_layer.weight).__name__}"
    return None


def stack_adapters(model: nn.Module, adapters: Sequence[str | None]) -> nn.Module | None:
    """
    A copy of a PEFT model's base, without its weights, in which the rows are those of `adapters`, block after block.

    Args:
        model (`PeftModel`): a model with LoRA adapters.
        adapters (`Sequence[str]`): names of the adapters that run side by side; `None` for the base itself.

    Returns:
        `nn.Module`, or `None` when its results would differ from those of the adapters, with the reason in the log.
    """
    stacked: list[nn.Module] = []
    try:
        for adapter in adapters:
            if reason := why_not_stacked(model, adapter):
                raise StackingError(f"of the adapter {adapter}: {reason}")
        stack = _Copier(adapters, stacked).copy(model.get_base_model())
        for layers in check_rows(stack, stacked, len(adapters)):
            _share_input(layers)
    except Exception as error:
        logger.info(f"The adapters {list(adapters)} run one after another, because {reason_of(error)}.")
        return None
    return stack


class _Copier:
    """
    Copies modules without their weights, with stacked layers in place of PEFT's and tuned ones in place of linear layers.

    Args:
        adapters (`Sequence[str]`): names of the adapters that run side by side; `None` for the base itself.
        stacked (`list[nn.Module]`): the stacked layers, to which those of the copies are added.
    """

    def __init__(self, adapters: Sequence[str | None], stacked: list[nn.Module]):
        self.adapters = adapters
        self.stacked = stacked
        self._memo: dict[int, nn.Module] = {}
        self._tuner = Tuner()

    def copy(self, module: nn.Module) -> nn.Module:
        """A copy that shares parameters, buffers and hooks; the module itself where nothing in it is replaced."""
        if id(module) not in self._memo:
            if is_from_peft(module, "base_layer"):
                twin = self._copy_adapted(module)
            elif is_from_peft(module, "original_module"):
                twin = self._copy_saved(module)
            else:
                twin = self._copy_other(module)
            self._memo[id(module)] = twin
        return self._memo[id(module)]

    def _copy_adapted(self, layer: nn.Module) -> nn.Module:
        twin = self.copy(layer.base_layer)
        if is_from_peft(layer, "r") and any(adapter in layer.r for adapter in self.adapters):
            *factors, bias = _stacked_factors(layer, self.adapters)
            twin = StackedLoraLinear(twin, *factors, bias) if layer.lora_A else StackedLoraEmbedding(twin, *factors)
            self.stacked.append(twin)
        return twin

    def _copy_saved(self, wrapper: nn.Module) -> nn.Module:
        """The copy of a module that some adapters have of their own (`modules_to_save`)."""
        before = len(self.stacked)
        twin = self.copy(wrapper.original_module)
        saved = getattr(wrapper, "modules_to_save", {})
        if any(adapter in saved for adapter in self.adapters):
            if len(self.stacked) > before:
                raise StackingError(
                    f"a {type(wrapper.original_module).__name__} is saved by some and adapted by others"
                )
            twin = StackedModules([_own(saved[a], a) if a in saved else twin for a in self.adapters])
            self.stacked.append(twin)
        return twin

    def _copy_other(self, module: nn.Module) -> nn.Module:
        twin = self._tuner.layer(module)
        if twin is not module:
            return twin
        if "forward" in module.__dict__ and not any(is_from_peft(part, "base_layer") for part in module.modules()):
            return module  # what runs is not known
        children = {name: child and self.copy(child) for name, child in module._modules.items()}
        return self._tuner.with_children(module, children)


def _own(saved: nn.Module, adapter: str) -> nn.Module:
    """A module from an adapter's `modules_to_save`, without PEFT's wrappers inside."""
    layers: list[nn.Module] = []
    twin = _Copier([adapter], layers).copy(saved)
    if layers:
        raise StackingError(f"a {type(saved).__name__} that the adapter {adapter} saves is also adapted by it")
    return twin


def _share_input(layers: Sequence[nn.Module]) -> None:
    """Joins the first products of layers that read the same input."""
    linear = [layer for layer in layers if isinstance(layer, StackedLoraLinear)]
    if len(linear) > 1 and len({layer.factors_a.dtype for layer in linear}) == 1 and len(set(linear)) == len(linear):
        SharedInput(linear)


@torch.no_grad()
def _stacked_factors(
    layer: nn.Module, adapters: Sequence[str | None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Factors of one layer for its stacked form, zeros for the blocks without an adapter here."""
    if layer.merged_adapters:
        raise StackingError(f"the adapters {layer.merged_adapters} are merged into the base")
    if any("forward" in part.__dict__ for part in (layer, *layer.lora_A.values(), *layer.lora_B.values())):
        raise StackingError("the forward of an adapter's layer is replaced, as by offloading")
    pairs = {adapter: _factors(layer, adapter) for adapter in adapters if adapter in layer.r}
    first = next(iter(pairs.values()))[0]
    like = {"device": first.device, "dtype": first.dtype}
    if first.device.type == "cpu":  # where small products in half precision take several times as long
        like["dtype"] = torch.promote_types(first.dtype, torch.float32)
    for first, *_ in pairs.values():
        like["dtype"] = torch.promote_types(like["dtype"], first.dtype)
    rank = max(len(first) for first, *_ in pairs.values())
    # some embeddings scale their output, and PEFT scales that of the adapter likewise
    output_scale = getattr(layer.base_layer, "embed_scale", 1)
    # stored transposed, which makes the product faster
    factors_a = torch.zeros(len(adapters), rank, layer.in_features, **like).transpose(1, 2)
    factors_b = torch.zeros(len(adapters), rank, layer.out_features, **like)
    bias = torch.zeros(len(adapters), 1, layer.out_features, **like)
    for k, adapter in enumerate(adapters):
        if adapter in pairs:
            first, second, *biases = pairs[adapter]
            factors_a[k, :, : len(first)] = first.T
            factors_b[k, : len(first)] = second.T * layer.scaling[adapter] * output_scale
            for own in biases:
                bias[k] = own * layer.scaling[adapter]
    return factors_a, factors_b, bias if bias.any() else None


def _factors(layer: nn.Module, adapter: str) -> list[torch.Tensor]:
    """The factors of an adapter in a layer, of shapes `(r, in)` and `(out, r)`, and the bias of the second, if any."""
    if adapter in layer.lora_A:
        return [*layer.lora_A[adapter].parameters(), *layer.lora_B[adapter].parameters()]
    return [layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]]


def _state(model: nn.Module, adapters: Sequence[str | None]) -> list[Any]:
    """A list that differs when modules or the values of factors have changed since a stack was built."""
    state: list[Any] = []
    pending = [model.get_base_model()]
    while pending:
        module = pending.pop()
        state += [module, attributes_of(module)]
        if is_from_peft(module, "base_layer"):
            pending.append(module.base_layer)
        else:
            pending += filter(None, module._modules.values())
        if is_from_peft(module, "lora_A"):
            state += map(tuple, (module.merged_adapters, [module.scaling.get(a) for a in adapters]))
            for adapter in adapters:
                if adapter in module.r:
                    state += map(_mark, _factors(module, adapter))
    return state


def _mark(parameter: torch.Tensor) -> tuple[int, int, int]:
    return id(parameter), parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version
