"""
K full models of one architecture in one forward pass.

The rows of the K models are concatenated as blocks, and the weights of each layer are stacked, so that one batched
product applies them to all blocks. That saves the time of Python, kernel launches and small products, not that of
reading weights. No weight is held twice: the parameters of the models become views of the stacked tensors.

`torch.func.stack_module_state` copies the weights into new tensors (`torch.stack`), so that each would be held twice
as long as the models are used by themselves. Its result runs under `vmap`, where the in-place update of a static cache
(`index_copy_`), and with it compiled decoding, is an error.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .mixture_inputs import trial_inputs
from .product_layouts import PLAIN
from .stacked_rows import StackedModules, StackingError, check_rows, reason_of, with_children
from .tuned_products import MIN_NUMEL, StackedProducts, can_be_tuned


logger = logging.get_logger(__name__)

# Fields in which the configs of stackable models may differ: names, and options that only `generate` reads.
_NAMES = {
    *("_name_or_path", "architectures", "transformers_version", "dtype", "use_cache", "task_specific_params"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id"),
}


class StackedLinear(nn.Module):
    """
    A linear layer with weights for each block of rows.

    Args:
        weight (`torch.Tensor` of shape `(K, in_features, out_features)`): the weights.
        bias (`torch.Tensor` of shape `(K, out_features)`, *optional*): the biases.
        products (`StackedProducts`): those of its shape, to which this layer is added.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, products: StackedProducts):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.unsqueeze(1), persistent=False)
        products.layers.append(self._buffers)
        self.products = products
        self.is_small = weight[0].numel() < MIN_NUMEL

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight, form = self.weight, PLAIN
        blocks = hidden_states.reshape(weight.shape[0], -1, hidden_states.shape[-1])
        if not (self.is_small or torch.compiler.is_compiling()) and can_be_tuned(blocks, weight):
            form = self.products.form(blocks.shape[1])
        return self.products.compute(form, blocks, weight, self.bias).view(*hidden_states.shape[:-1], -1)


class StackedEmbedding(nn.Module):
    """
    An embedding with a table for each block of rows.

    Args:
        weight (`torch.Tensor` of shape `(K, num_embeddings, embedding_dim)`): the tables.
        padding_idx (`int`, *optional*): the row for padding, which tells some models where positions start.
    """

    def __init__(self, weight: torch.Tensor, padding_idx: int | None = None):
        super().__init__()
        self.padding_idx = padding_idx
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        count, size, _ = self.weight.shape
        first = torch.arange(count, device=input_ids.device)[:, None] * size
        rows = input_ids.reshape(count, -1) + first
        return F.embedding(rows, self.weight.flatten(0, 1)).view(*input_ids.shape, -1)


class StackedNorm(nn.Module):
    """
    A norm that multiplies by its parameters, such as an RMS norm, with parameters for each block of rows.

    Args:
        norm (`nn.Module`): the norm of one of the models.
        parameters (`dict[str, torch.Tensor]`): the parameters of all by name, `(K, features)` each.
    """

    def __init__(self, norm: nn.Module, parameters: dict[str, torch.Tensor]):
        super().__init__()
        self.norm = with_children(norm, {})
        self.norm._parameters = {name: values.unsqueeze(1) for name, values in parameters.items()}
        self.count = len(next(iter(parameters.values())))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        blocks = hidden_states.reshape(self.count, -1, hidden_states.shape[-1])
        return self.norm(blocks).view(hidden_states.shape)


class ModelStack:
    """
    A model whose rows are those of several full models. It is built at first use.

    Args:
        models (`Sequence[PreTrainedModel]`):
            Models that [`alike`] groups together. Their parameters become views of larger tensors, with the same
            values.
    """

    def __init__(self, models: Sequence[PreTrainedModel]):
        self.models = list(models)
        self._state: list[Any] | None = None
        self._stack: nn.Module | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": None, "_stack": None}  # a copy builds its own

    def get(self, check: bool = True) -> nn.Module | None:
        """
        The model of all blocks.

        Args:
            check (`bool`, *optional*, defaults to `True`):
                Whether to check if layers or parameters have been replaced since it was built. New values in the same
                tensors take effect in any case.

        Returns:
            `nn.Module`, or `None` when these models cannot run side by side.
        """
        if torch.compiler.is_compiling():
            return self._stack
        if self._state is None or (check and self._state != _state(self.models)):
            self._stack = None  # freed first, so that the old and the new one need not fit into memory together
            self._stack = stack_models(self.models)
            self._state = _state(self.models)
        return self._stack


class ModelStacks:
    """The stacks of those components of a mixture that are full models."""

    def __init__(self):
        self._stacks: dict[tuple[int, ...], ModelStack] = {}

    def groups(self, models: Mapping[int, nn.Module], check: bool = True) -> list[tuple[list[int], ModelStack]]:
        """
        The groups of components that may run side by side, with the stack of each.

        Args:
            models (`Mapping[int, nn.Module]`): the models of the components that have no adapter.
            check (`bool`, *optional*, defaults to `True`):
                Whether to check if these are still the models of the last call.
        """
        if check and not torch.compiler.is_compiling():
            last, self._stacks = self._stacks, {}
            for members in alike(models):
                stack = last.get(members)
                own = [models[k] for k in members]
                self._stacks[members] = stack if stack is not None and stack.models == own else ModelStack(own)
        return [(list(members), stack) for members, stack in self._stacks.items()]


def alike(models: Mapping[int, nn.Module]) -> list[tuple[int, ...]]:
    """
    Groups of models that may run side by side: full models on one device that differ in nothing but their weights.

    Args:
        models (`Mapping[int, nn.Module]`): models by component.

    Returns:
        `list[tuple[int, ...]]`: two or more components each.
    """
    groups: dict[Any, list[int]] = {}
    for k, model in models.items():
        # adapters are stacked by AdapterStacks
        if isinstance(model, PreTrainedModel) and not getattr(model, "_hf_peft_config_loaded", False):
            config = {name: value for name, value in model.config.to_dict().items() if name not in _NAMES}
            own = model.config._attn_implementation, str(model.dtype), str(model.device)
            groups.setdefault((type(model), *own, json.dumps(config, sort_keys=True, default=str)), []).append(k)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def stack_models(models: Sequence[PreTrainedModel]) -> nn.Module | None:
    """
    One model whose rows are those of several, block after block.

    Args:
        models (`Sequence[PreTrainedModel]`):
            Models of one architecture. Their parameters become views of larger tensors.

    Returns:
        `nn.Module`, or `None` when its results would differ from those of the models, with the reason in the log.
    """
    builder = _Builder(models)
    try:
        builder.check()
        # tensors made in inference mode could be neither trained nor changed later
        with torch.inference_mode(False), torch.no_grad():
            stack = builder.build(tuple(models), "")
            _try(stack, models, builder.stacked)
    except Exception as error:
        logger.info(
            f"{len(models)} models of type {type(models[0]).__name__} run one after another, because {reason_of(error)}."
        )
        return None
    return stack


def _try(stack: nn.Module, models: Sequence[PreTrainedModel], stacked: Sequence[nn.Module]) -> None:
    """
    Compares a stack with its models on a few tokens: an architecture may combine its layers in ways the stack does not
    reproduce.
    """
    ids = torch.randint(
        models[0].config.get_text_config().vocab_size, (2 * len(models), 3), generator=torch.Generator().manual_seed(0)
    )
    ids = ids.to(models[0].device)
    check_rows(stack, stacked, len(models))
    found = stack(**trial_inputs(stack, ids)).logits
    expected = torch.cat([model(**trial_inputs(model, part)).logits for model, part in zip(models, ids.split(2))])
    apart, scale = (found - expected).abs().max(), expected.abs().max()
    if not apart <= scale * torch.finfo(found.dtype).eps ** 0.5:
        raise StackingError(f"logits of up to {scale:.3g} are {apart:.3g} apart")


class _Builder:
    """Stacks the layers of several models."""

    def __init__(self, models: Sequence[PreTrainedModel]):
        self.models = models
        self.stacked: list[nn.Module] = []
        self._tensors: dict[tuple[int, ...], torch.Tensor] = {}
        self._products: dict[torch.Size, StackedProducts] = defaultdict(StackedProducts)

    def check(self) -> None:
        """
        Checks, before any weight is moved, that the models differ in their parameters only, and share none of them.
        """
        first, *others = [dict(model.named_buffers()) for model in self.models]
        for buffers in others:
            for name, value in first.items():
                if name not in buffers or not torch.equal(value, buffers[name]):
                    raise StackingError(f"they have different buffers {name}")
        first, *others = [dict(model.named_parameters(remove_duplicate=False)) for model in self.models]
        for parameters in others:
            if parameters.keys() != first.keys():
                raise StackingError(f"{sorted(parameters.keys() ^ first.keys())} are not in all of them")
        seen: dict[int, int] = {}
        for k, parameters in enumerate([first, *others]):
            for name, parameter in parameters.items():
                self._check_parameter(name, parameter, first[name])
                if seen.setdefault(id(parameter), k) != k:
                    raise StackingError(f"they share the weight {name}")

    @staticmethod
    def _check_parameter(name: str, parameter: nn.Parameter, like: nn.Parameter) -> None:
        if type(parameter) is not nn.Parameter:
            raise StackingError(f"the weight {name} is a {type(parameter).__name__}")
        if parameter.is_meta:
            raise StackingError("their weights are offloaded")
        if parameter.is_inference():
            raise StackingError(f"the weight {name} was made in inference mode")
        if (parameter.shape, parameter.dtype, parameter.device) != (like.shape, like.dtype, like.device):
            raise StackingError(f"the weights {name} differ in shape, dtype or device")

    def build(self, modules: tuple[nn.Module, ...], name: str) -> nn.Module:
        """The stacked form of modules that have the same name in all models."""
        first = modules[0]
        if len({type(module) for module in modules}) > 1:
            raise StackingError(f"{name} is a {type(first).__name__} in one and another module elsewhere")
        if not any(True for _ in first.parameters()):
            return first
        if any(parameter is not None for parameter in first._parameters.values()):
            layer = self._layer(modules)
            self.stacked.append(layer)
            return layer
        children = {
            child: module
            and self.build(tuple(other._modules[child] for other in modules), f"{name}.{child}".lstrip("."))
            for child, module in first._modules.items()
        }
        return with_children(first, children)

    def _layer(self, modules: tuple[nn.Module, ...]) -> nn.Module:
        first = modules[0]
        if any("forward" in module.__dict__ for module in modules):
            raise StackingError(f"the forward of a {type(first).__name__} is replaced, as by offloading")
        if type(first) is nn.Linear:
            return self._linear(self._side_by_side(modules, "weight").transpose(1, 2), modules)
        if type(first) is Conv1D:
            return self._linear(self._side_by_side(modules, "weight"), modules)
        if type(first) is nn.Embedding and first.max_norm is None:
            return StackedEmbedding(self._side_by_side(modules, "weight"), first.padding_idx)
        norm = self._norm(modules)
        return StackedModules(modules) if norm is None else norm

    def _linear(self, weight: torch.Tensor, modules: Sequence[nn.Module]) -> StackedLinear:
        return StackedLinear(weight, self._side_by_side(modules, "bias"), self._products[weight.shape])

    def _side_by_side(self, modules: Sequence[nn.Module], name: str) -> torch.Tensor | None:
        """One tensor of the parameters of all models, which become views of it."""
        parameters = [getattr(module, name) for module in modules]
        if parameters[0] is None:
            return None
        key = tuple(map(id, parameters))  # tied weights occur more than once
        if key not in self._tensors:
            together = torch.empty(
                len(parameters), *parameters[0].shape, dtype=parameters[0].dtype, device=parameters[0].device
            )
            for part, parameter in zip(together, parameters):
                part.copy_(parameter)
                parameter.data = part
            self._tensors[key] = together
        return self._tensors[key]

    def _norm(self, modules: Sequence[nn.Module]) -> nn.Module | None:
        """
        The stacked form of norms, `None` for other modules, and for norms whose parameters do more than multiply.
        """
        first = modules[0]
        names = [name for name, parameter in first._parameters.items() if parameter is not None]
        if first._modules or any(getattr(first, name).ndim != 1 for name in names):
            return None
        norm = StackedNorm(first, {name: self._side_by_side(modules, name) for name in names})
        like = getattr(first, names[0])
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(len(modules), 3, len(like), generator=generator).to(like)
        try:
            found = norm(rows)
        except (RuntimeError, ValueError, TypeError):  # such as layer norms, which accept only vectors as parameters
            return None
        return norm if torch.equal(found, StackedModules(modules)(rows)) else None


def _state(models: Sequence[nn.Module]) -> list[Any]:
    """A list that differs when modules or the storage of parameters have been replaced since a stack was built."""
    state: list[Any] = []
    for model in models:
        state += model.modules()
        state += [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()]
    return state
