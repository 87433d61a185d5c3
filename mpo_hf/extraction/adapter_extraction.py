"""
From a full fine-tune to a low-rank adapter of its base.

K checkpoints made from one base become the base and K adapters, which a mixture keeps in memory once and runs in one
forward pass. What of the difference has no low-rank form is saved as it is or left out, and the report says how much
that is.
"""

import collections
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..mixture.component_loading import Policy
from ..mixture.hub import ADAPTER_WEIGHTS
from .checkpoint import Checkpoint


DEFAULT_RANK = 32
# A sketch of the largest singular values is taken where it is at most this part of all of them: it is then the faster way.
SKETCHED_PART = 0.25
FIRST_SKETCH = 32
OVERSAMPLING = 8
PREFIX = "base_model.model."


@dataclass
class FactoredModule:
    """
    What became of the difference of one layer.

    Args:
        name (`str`): name of the layer.
        shape (`tuple[int, ...]`): shape of its weight.
        rank (`int`): rank of its factors.
        squared_norm (`float`): squared Frobenius norm of the difference.
        kept_energy (`float`): share of it that the factors hold, as they are saved.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    squared_norm: float
    kept_energy: float

    @property
    def relative_error(self) -> float:
        """Frobenius norm of what is lost, relative to that of the difference."""
        return math.sqrt(1 - self.kept_energy)


@dataclass
class OtherParameter:
    """A parameter that differs, and has no factors."""

    name: str
    shape: tuple[int, ...]
    squared_norm: float


@dataclass
class ExtractionReport:
    """
    What an extracted adapter keeps of a fine-tune.

    A weight that two layers share, as embeddings and the head often do, counts for each of them.

    Args:
        modules (`list[FactoredModule]`): the layers with factors.
        saved (`list[OtherParameter]`): parameters that are part of the adapter as they are.
        left_out (`list[OtherParameter]`): parameters whose difference is lost.
        adapter_parameters (`int`): number of parameters of the adapter.
        base_parameters (`int`): number of parameters of the base.
        mean_kl (`float`, *optional*): mean KL(fine-tune || base with adapter) in nats a token, on texts.
        mean_kl_base (`float`, *optional*): the same for the base without the adapter.
        num_tokens (`int`, *optional*): the number of tokens that both are means over.
    """

    modules: list[FactoredModule] = field(default_factory=list)
    saved: list[OtherParameter] = field(default_factory=list)
    left_out: list[OtherParameter] = field(default_factory=list)
    adapter_parameters: int = 0
    base_parameters: int = 0
    mean_kl: float | None = None
    mean_kl_base: float | None = None
    num_tokens: int | None = None

    @property
    def kept_energy(self) -> float:
        """Share of the squared norm of the whole difference that the adapter holds."""
        factored = sum(module.squared_norm * module.kept_energy for module in self.modules)
        saved = sum(parameter.squared_norm for parameter in self.saved)
        return (factored + saved) / self._squared_norm

    @property
    def relative_error(self) -> float:
        """Frobenius norm of what is lost, relative to that of the whole difference."""
        return math.sqrt(max(0.0, 1 - self.kept_energy))

    @property
    def _squared_norm(self) -> float:
        return sum(part.squared_norm for part in (*self.modules, *self.saved, *self.left_out))

    def __str__(self) -> str:
        rows = [("layers", "number", "rank", "kept energy", "relative error")]
        by_kind = collections.defaultdict(list)
        for module in self.modules:
            by_kind[module.name.rpartition(".")[2]].append(module)
        for kind, modules in by_kind.items():
            errors = [module.relative_error for module in modules]
            kept = [module.kept_energy for module in modules]
            ranks = [module.rank for module in modules]
            rows.append((kind, str(len(modules)), _span(ranks, "d"), _span(kept, ".4f"), _span(errors, ".3g")))
        rows.append(("all, and all else", "", "", f"{self.kept_energy:.4f}", f"{self.relative_error:.3g}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines += [
            "",
            f"parameters  {self.adapter_parameters:,} of an adapter for {self.base_parameters:,} of the base",
        ]
        lines += [self._describe(name) for name in ("saved", "left_out") if getattr(self, name)]
        if self.mean_kl is not None:
            lines += [
                f"KL to the fine-tune  {self.mean_kl:.3g} nats a token, without the adapter {self.mean_kl_base:.3g} "
                f"({self.num_tokens} tokens)"
            ]
        return "\n".join(lines)

    def _describe(self, which: str) -> str:
        parameters: list[OtherParameter] = getattr(self, which)
        share = sum(parameter.squared_norm for parameter in parameters) / self._squared_norm
        count = sum(math.prod(parameter.shape) for parameter in parameters)
        kinds = collections.Counter(".".join(parameter.name.split(".")[-2:]) for parameter in parameters)
        names = ", ".join(f"{number} x {kind}" if number > 1 else kind for kind, number in kinds.items())
        return f"{which.replace('_', ' ')}  {names}: {count:,} parameters with {share:.2%} of the squared norm"


@dataclass
class ExtractedAdapter:
    """
    A LoRA adapter in memory.

    Args:
        config (`LoraConfig`): its configuration.
        state_dict (`dict[str, torch.Tensor]`): its weights, by the names that PEFT saves them under.
        report ([`ExtractionReport`]): what it keeps of the fine-tune.
    """

    config: LoraConfig
    state_dict: dict[str, torch.Tensor]
    report: ExtractionReport

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Saves the adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

        Args:
            save_directory (`str` or `os.PathLike`): folder to save to; it is created where needed.
        """
        os.makedirs(save_directory, exist_ok=True)
        self.config.save_pretrained(os.fspath(save_directory))
        save_file(self.state_dict, os.path.join(save_directory, ADAPTER_WEIGHTS), metadata={"format": "pt"})

    def put_on(self, base: PreTrainedModel) -> PeftModel:
        """The adapter over a base in memory, which is changed by it as by `get_peft_model`."""
        model = get_peft_model(base, self.config)
        result = set_peft_model_state_dict(model, self.state_dict)
        assert not result.unexpected_keys, result.unexpected_keys
        return model.eval()

    @torch.no_grad()
    def measure(
        self,
        tuned: PreTrainedModel,
        base: PreTrainedModel,
        texts: Sequence[str],
        processing_class: PreTrainedTokenizerBase,
        max_length: int = 512,
    ) -> None:
        """
        Adds to the report how far base and adapter are from the fine-tune, by token, on texts.

        Args:
            tuned (`PreTrainedModel`): the fine-tune.
            base (`PreTrainedModel`): its base, which is left as it is.
            texts (`Sequence[str]`): the texts.
            processing_class (`PreTrainedTokenizerBase`): their tokenizer.
            max_length (`int`, *optional*, defaults to 512): the number of tokens that a text is cut off at.
        """
        tuned.eval()
        adapted = self.put_on(base)
        total, total_base, count = 0.0, 0.0, 0
        for text in texts:
            ids = processing_class(text, return_tensors="pt", truncation=True, max_length=max_length).input_ids
            if ids.numel() == 0:
                continue
            logps = tuned(ids.to(tuned.device)).logits.float().log_softmax(-1)
            total += _kl(logps, adapted(ids.to(base.device)).logits)
            with adapted.disable_adapter():
                total_base += _kl(logps, adapted(ids.to(base.device)).logits)
            count += ids.numel()
        adapted.unload()
        if count == 0:
            raise ValueError("`texts` are all empty.")
        self.report.mean_kl, self.report.mean_kl_base = total / count, total_base / count
        self.report.num_tokens = count


def extract_adapter(
    model: Policy,
    base: Policy,
    *,
    rank: int | None = None,
    energy: float | None = None,
    target_modules: Sequence[str] | None = None,
    embeddings: bool = False,
    modules_to_save: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    texts: Sequence[str] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    max_length: int = 512,
    **kwargs,
) -> ExtractedAdapter:
    r"""
    Turns a full fine-tune into a LoRA adapter of its base, by a singular value decomposition of the difference of every
    linear layer.

    Checkpoints are read tensor by tensor, so that neither model need be in memory.

    Args:
        model (`str`, `os.PathLike`, `dict`, [`MixtureComponent`] or `PreTrainedModel`):
            The fine-tune.
        base (`str`, `os.PathLike`, `dict`, [`MixtureComponent`] or `PreTrainedModel`):
            The model that it was made from, of the same architecture. The adapter names it, with its commit.
        rank (`int`, *optional*):
            Rank of the factors. With `energy`, the highest rank; without, 32.
        energy (`float`, *optional*):
            Chooses the lowest rank of each layer that keeps this share of the squared Frobenius norm of its difference.
            A fine-tune of all weights may need a high rank for little: measure on `texts`.
        target_modules (`Sequence[str]`, *optional*):
            Names of layers, or the ends of them, such as `"q_proj"`. Defaults to all linear layers that differ, without
            a head that is tied to the embeddings.
        embeddings (`bool`, *optional*, defaults to `False`):
            Whether to factor embeddings too, and a head that is tied to them. A pair of these cannot be merged into the
            base by PEFT without untying it.
        modules_to_save (`Sequence[str]`, *optional*):
            Names of modules, or the ends of them, whose parameters become part of the adapter as they are, such as
            `"norm"`.
        dtype (`torch.dtype`, *optional*):
            dtype of the adapter. Defaults to that of the fine-tune.
        device (`str` or `torch.device`, *optional*):
            Where to compute. Defaults to the CPU.
        texts (`Sequence[str]`, *optional*):
            Texts on which to measure how far base and adapter are from the fine-tune. Both models are loaded for it.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer for the texts. Defaults to that of the fine-tune.
        max_length (`int`, *optional*, defaults to 512):
            The number of tokens that a text is cut off at.
        kwargs:
            Arguments for both models' `from_pretrained`, such as `token`. Revisions and subfolders belong into
            dictionaries: `{"name_or_path": ..., "revision": ...}`.

    Returns:
        [`~adapter_extraction.ExtractedAdapter`], with `save_pretrained` and the `report`.

    Raises:
        `ValueError`: for models of different architectures, shapes or vocabularies, for models that do not differ, and for
        names that no module has.

    Example:

    ```python
    >>> import copy
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from mpo_hf.extraction.adapter_extraction import extract_adapter

    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> base = LlamaForCausalLM(config)
    >>> tuned = copy.deepcopy(base)
    >>> with torch.no_grad():
    ...     _ = tuned.model.layers[0].mlp.up_proj.weight.add_(torch.outer(torch.ones(32), torch.ones(16)))
    >>> adapter = extract_adapter(tuned, base, energy=0.999)
    >>> adapter.report.modules[0].name, adapter.report.modules[0].rank
    ('model.layers.0.mlp.up_proj', 1)
    ```
    """
    if energy is None:
        rank = DEFAULT_RANK if rank is None else rank
    elif not 0 < energy <= 1:
        raise ValueError(f"`energy` is a share, from above 0 up to 1, got {energy!r}.")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ValueError(f"`rank` must be a positive integer, got {rank!r}.")
    if texts is not None and (isinstance(texts, str) or not texts):
        raise ValueError(f"`texts` must be a list of texts, got {texts!r}.")
    tuned, origin = Checkpoint(model, kwargs), Checkpoint(base, kwargs)
    _check_comparable(tuned, origin)
    if texts is not None:
        processing_class = processing_class or tuned.tokenizer()
    saved = _find_modules(tuned, modules_to_save, "modules_to_save")
    layers = _layers_to_factor(tuned, target_modules, embeddings)
    adapter = _Extraction(tuned, origin, layers, saved, rank, energy, dtype, device).run()
    if texts is not None:
        adapter.measure(tuned.load(device), origin.load(device), texts, processing_class, max_length)
    return adapter


class _Extraction:
    """Goes through the parameters of two models, one by one."""

    def __init__(
        self,
        tuned: Checkpoint,
        origin: Checkpoint,
        layers: dict[str, nn.Module],
        saved: Sequence[str],
        rank: int | None,
        energy: float | None,
        dtype: torch.dtype | None,
        device: str | torch.device | None,
    ):
        self.tuned, self.origin = tuned, origin
        self.layers, self.saved = layers, saved
        self.rank, self.energy = rank, energy
        self.device = device or "cpu"
        self.dtype = dtype or tuned.get(next(iter(tuned.shapes))).dtype
        self.state: dict[str, torch.Tensor] = {}
        self.report = ExtractionReport(base_parameters=sum(p.numel() for p in origin.skeleton.parameters()))

    @torch.no_grad()
    def run(self) -> ExtractedAdapter:
        for name in logging.tqdm(self.tuned.shapes, desc="Extracting"):
            self._take(name)
        if not self.report.modules:
            raise ValueError(
                f"None of the layers to factor differs between {self.tuned} and {self.origin}: there is nothing to extract."
            )
        has_biases = self._take_biases()
        self.report.adapter_parameters = sum(tensor.numel() for tensor in self.state.values())
        return ExtractedAdapter(self._make_config(has_biases), self.state, self.report)

    def _take(self, name: str) -> None:
        module, _, parameter = name.rpartition(".")
        difference = self._difference(name)
        squared_norm = _squared_norm(difference)
        if any(f"{module}.".startswith(f"{saved}.") for saved in self.saved):
            self.state[PREFIX + name] = self._to_save(self.tuned.get(name))
            self.report.saved.append(OtherParameter(name, tuple(difference.shape), squared_norm))
        elif squared_norm == 0:
            return
        elif module in self.layers and parameter == "weight":
            self._factor(module, difference, squared_norm)
        else:
            self.report.left_out.append(OtherParameter(name, tuple(difference.shape), squared_norm))

    def _difference(self, name: str) -> torch.Tensor:
        tuned, origin = (model.get(name).to(self.device, torch.float32) for model in (self.tuned, self.origin))
        return tuned - origin

    def _to_save(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu", self.dtype, copy=True).contiguous()

    def _factor(self, module: str, difference: torch.Tensor, squared_norm: float) -> None:
        layer = self.layers[module]
        shape = tuple(difference.shape)
        if isinstance(layer, Conv1D | nn.Embedding):  # these keep their weights the other way round
            difference = difference.T
        factor_a, factor_b = map(self._to_save, low_rank_factors(difference, self.rank, self.energy))
        product = factor_b.to(difference) @ factor_a.to(difference)
        kept = max(0.0, 1 - _squared_norm(difference - product) / squared_norm)
        parts = ("lora_embedding_A", "lora_embedding_B")
        if not isinstance(layer, nn.Embedding):
            parts = ("lora_A.weight", "lora_B.weight")
        for part, factor in zip(parts, (factor_a, factor_b)):
            self.state[f"{PREFIX}{module}.{part}"] = factor
        self.report.modules.append(FactoredModule(module, shape, len(factor_a), squared_norm, kept))

    def _take_biases(self) -> bool:
        """Differences of biases as biases of the second factors, which PEFT wants in all layers or in none."""
        modules = [module.name for module in self.report.modules]
        biases = {f"{module}.bias" for module in modules}
        different = [parameter for parameter in self.report.left_out if parameter.name in biases]
        if not different or not biases <= set(self.tuned.shapes):
            return False
        for module in modules:
            self.state[f"{PREFIX}{module}.lora_B.bias"] = self._to_save(self._difference(f"{module}.bias"))
        self.report.saved += different
        self.report.left_out = [parameter for parameter in self.report.left_out if parameter not in different]
        return True

    def _make_config(self, has_biases: bool) -> LoraConfig:
        ranks = {module.name: module.rank for module in self.report.modules}
        usual = collections.Counter(ranks.values()).most_common(1)[0][0]
        unusual = {name: rank for name, rank in ranks.items() if rank != usual}
        return LoraConfig(
            r=usual,
            lora_alpha=usual,
            rank_pattern=unusual,
            alpha_pattern=dict(unusual),
            target_modules=_shorten(ranks, self.tuned.skeleton),
            modules_to_save=list(self.saved) or None,
            lora_bias=has_biases,
            fan_in_fan_out=all(isinstance(self.layers[name], Conv1D) for name in ranks),
            base_model_name_or_path=self.origin.name_or_path,
            revision=self.origin.revision,
            task_type="CAUSAL_LM",
            inference_mode=True,
        )


def low_rank_factors(
    matrix: torch.Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The best approximation of a matrix of low rank, as the two factors of LoRA.

    Args:
        matrix (`torch.Tensor` of shape `(out, in)`): the matrix, not zero.
        rank (`int`, *optional*): the rank; the highest one, if `energy` is given.
        energy (`float`, *optional*): share of the squared Frobenius norm to keep, with the lowest rank that does.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: factors of shapes `(r, in)` and `(out, r)`, the norm shared between them.
    """
    highest = min(*matrix.shape, rank or matrix.numel())
    left, values, right = _singular_values(matrix, highest, energy)
    count = highest
    if energy is not None:
        # rounding is no part of the matrix
        significant = (values > values[0] * max(matrix.shape) * torch.finfo(values.dtype).eps).sum().item()
        squares = values.double().square().cumsum(0)
        # of the same sum as the parts, for rounding not to cut off the last of them
        total = squares[-1] if len(squares) == min(matrix.shape) else _squared_norm(matrix)
        enough = torch.searchsorted(squares, energy * total).item() + 1
        count = min(highest, significant, enough)
    root = values[:count].sqrt()
    return root[:, None] * right[:, :count].T, left[:, :count] * root


def _singular_values(
    matrix: torch.Tensor, highest: int, energy: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values, at least as many as are needed, with their vectors as columns."""
    count = highest if energy in (None, 1) else min(highest, FIRST_SKETCH)
    while count + OVERSAMPLING <= SKETCHED_PART * min(matrix.shape):
        # the same factors every time, and nobody else's random numbers disturbed
        with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, q=count + OVERSAMPLING, niter=4)
        if energy is None or count == highest or _squared_norm(values[:count]) >= energy * _squared_norm(matrix):
            return left, values, right
        count = min(highest, 2 * count)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right.T


def _squared_norm(tensor: torch.Tensor) -> float:
    return tensor.square().sum(dtype=torch.float64).item()


def _span(values: Sequence[float], spec: str) -> str:
    texts = [format(value, spec) for value in (min(values), max(values))]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def _check_comparable(tuned: Checkpoint, origin: Checkpoint) -> None:
    if tuned.config.model_type != origin.config.model_type:
        raise ValueError(
            f"{tuned} is a {tuned.config.model_type} and {origin} a {origin.config.model_type}: an adapter is extracted "
            "from models of one architecture."
        )
    sizes = [model.skeleton.get_input_embeddings().weight.shape[0] for model in (tuned, origin)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The vocabulary of {tuned} has {sizes[0]} tokens, that of {origin} {sizes[1]}. Resize the embeddings of the "
            f"base (`resize_token_embeddings({sizes[0]})`), save it, and extract the adapter over that."
        )
    shapes, others = tuned.shapes, origin.shapes
    different = [name for name in {**shapes, **others} if shapes.get(name) != others.get(name)]
    if different:
        first = different[0]
        found = [tuple(s[first]) if first in s else "none" for s in (shapes, others)]
        raise ValueError(
            f"{tuned} and {origin} differ in the shape of {len(different)} parameters, {first} first ({found[0]}, "
            f"{found[1]}): this is not the base of that fine-tune."
        )


def _layers_to_factor(
    tuned: Checkpoint, target_modules: Sequence[str] | None, embeddings: bool
) -> dict[str, nn.Module]:
    """Layers by name, in the order of the model."""
    modules = dict(tuned.skeleton.named_modules())
    embedded = {name for name, module in modules.items() if isinstance(module, nn.Embedding)}
    table = tuned.skeleton.get_input_embeddings().weight
    tied = {name for name, module in modules.items() if getattr(module, "weight", None) is table} - embedded
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    chosen = _find_modules(tuned, target_modules, "target_modules") if target_modules is not None else linear - tied
    for name in chosen:
        if name not in linear | embedded:
            raise ValueError(
                f"`target_modules` names {name}, a {type(modules[name]).__name__}. Linear layers and embeddings can be factored; "
                "others go into `modules_to_save`."
            )
    wanted = {*chosen, *(embedded | tied if embeddings else ())}
    return {name: module for name, module in modules.items() if name in wanted}


def _find_modules(model: Checkpoint, endings: Sequence[str] | None, argument: str) -> list[str]:
    """Names of the modules that have one of these names, or end in one."""
    names = [name for name, _ in model.skeleton.named_modules()]
    if isinstance(endings, str):
        raise ValueError(f"`{argument}` must be a list of names, got {endings!r}.")
    found = []
    for ending in endings or ():
        matches = [name for name in names if name == ending or name.endswith(f".{ending}")]
        if not matches:
            known = sorted(
                {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdecimal()} - {""}
            )
            raise ValueError(f"`{argument}` names {ending!r}, but {model} has no such module. It has {known}.")
        found += matches
    return found


def _shorten(names: dict[str, int], skeleton: nn.Module) -> list[str]:
    """The last parts of names, where all modules with these are among them."""
    every = collections.defaultdict(set)
    for name, _ in skeleton.named_modules():
        every[name.rpartition(".")[2]].add(name)
    whole = {ending for ending, modules in every.items() if modules <= set(names)}
    return sorted({name.rpartition(".")[2] if name.rpartition(".")[2] in whole else name for name in names})


def _kl(logps: torch.Tensor, logits: torch.Tensor) -> float:
    """KL divergence from the second to the first, summed over tokens."""
    others = logits.float().log_softmax(-1).to(logps.device)
    return (logps.exp() * (logps - others)).sum(dtype=torch.float64).item()
