"""
Extraction of a low-rank adapter from a full fine-tune and its base.

K checkpoints made from one base become K adapters over it, so that a mixture holds the base in memory once and runs
all policies in one forward pass. Parameters whose difference is not factored are saved as they are or left out, and
the report gives their share.

mergekit's `extract_lora.py` truncates at a maximum rank and an absolute threshold for singular values, by full SVDs,
and does not measure what is lost. It saves GPT-2's `Conv1D` layers at full rank, and its adapter configs record
neither the commit of the base nor `lora_bias`, without which PEFT ignores the biases that it saves.
"""

import collections
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..mixture.component_loading import Policy
from ..mixture.hub_files import ADAPTER_WEIGHTS
from .checkpoint import Checkpoint
from .extraction_report import ExtractionReport, FactoredModule, OtherParameter
from .low_rank import low_rank_factors, squared_norm


DEFAULT_RANK = 32
PREFIX = "base_model.model."


@dataclass
class ExtractedAdapter:
    """
    A LoRA adapter in memory.

    Args:
        config (`LoraConfig`): its configuration.
        state_dict (`dict[str, torch.Tensor]`): its weights, by the names that PEFT saves them under.
        report ([`ExtractionReport`]): what it preserves of the fine-tune.
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
        """Adds the adapter to a base in memory, which is modified as by `get_peft_model`."""
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
        Adds the mean KL divergence from the fine-tune, by token, on texts, to the report.

        Args:
            tuned (`PreTrainedModel`): the fine-tune.
            base (`PreTrainedModel`): its base, which is not changed.
            texts (`Sequence[str]`): the texts.
            processing_class (`PreTrainedTokenizerBase`): their tokenizer.
            max_length (`int`, *optional*, defaults to 512): the number of tokens after which a text is truncated.
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
    Extracts a LoRA adapter from a full fine-tune and its base, by a singular value decomposition of the difference of
    every linear layer.

    Checkpoints are read tensor by tensor, so that neither model needs to fit in memory.

    Args:
        model (`str`, `os.PathLike`, `dict`, [`MixtureComponent`] or `PreTrainedModel`):
            The fine-tune.
        base (`str`, `os.PathLike`, `dict`, [`MixtureComponent`] or `PreTrainedModel`):
            The model that it was trained from, of the same architecture. The adapter's config records it with its
            commit.
        rank (`int`, *optional*):
            Rank of the factors. With `energy`, the highest rank; without, 32.
        energy (`float`, *optional*):
            Chooses the lowest rank of each layer that keeps this share of the squared Frobenius norm of its difference.
            A full fine-tune may need a high rank for a small effect: measure it on `texts`.
        target_modules (`Sequence[str]`, *optional*):
            Names of layers, or the ends of them, such as `"q_proj"`. Defaults to all linear layers that differ, without
            a head that is tied to the embeddings.
        embeddings (`bool`, *optional*, defaults to `False`):
            Whether to factor embeddings too, and a head that is tied to them. PEFT cannot merge adapters of tied
            embeddings without untying them.
        modules_to_save (`Sequence[str]`, *optional*):
            Names of modules, or the ends of them, whose parameters become part of the adapter as they are, such as
            `"norm"`.
        dtype (`torch.dtype`, *optional*):
            dtype of the adapter. Defaults to that of the fine-tune.
        device (`str` or `torch.device`, *optional*):
            Where to compute. Defaults to the CPU.
        texts (`Sequence[str]`, *optional*):
            Texts on which to measure the KL divergence between the fine-tune and the adapter. Both models are loaded
            for it.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer for the texts. Defaults to that of the fine-tune.
        max_length (`int`, *optional*, defaults to 512):
            The number of tokens after which a text is truncated.
        kwargs:
            Arguments for both models' `from_pretrained`, such as `token`. Revisions and subfolders belong in
            dictionaries: `{"name_or_path": ..., "revision": ...}`.

    Returns:
        [`~mpo_hf.extraction.ExtractedAdapter`], with `save_pretrained` and the `report`.

    Raises:
        `ValueError`: for models of different architectures, shapes or vocabularies, for equal models, and for names that
            match no module.

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
    """Extracts an adapter, one parameter after another."""

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
        size = squared_norm(difference)
        if any(f"{module}.".startswith(f"{saved}.") for saved in self.saved):
            self.state[PREFIX + name] = self._to_save(self.tuned.get(name))
            self.report.saved.append(OtherParameter(name, tuple(difference.shape), size))
        elif size == 0:
            return
        elif module in self.layers and parameter == "weight":
            self._factor(module, difference, size)
        else:
            self.report.left_out.append(OtherParameter(name, tuple(difference.shape), size))

    def _difference(self, name: str) -> torch.Tensor:
        tuned, origin = (model.get(name).to(self.device, torch.float32) for model in (self.tuned, self.origin))
        return tuned - origin

    def _to_save(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu", self.dtype, copy=True).contiguous()

    def _factor(self, module: str, difference: torch.Tensor, size: float) -> None:
        layer = self.layers[module]
        shape = tuple(difference.shape)
        if isinstance(layer, Conv1D | nn.Embedding):  # the weights of these are transposed
            difference = difference.T
        factor_a, factor_b = map(self._to_save, low_rank_factors(difference, self.rank, self.energy))
        product = factor_b.to(difference) @ factor_a.to(difference)
        kept = max(0.0, 1 - squared_norm(difference - product) / size)
        parts = ("lora_embedding_A", "lora_embedding_B")
        if not isinstance(layer, nn.Embedding):
            parts = ("lora_A.weight", "lora_B.weight")
        for part, factor in zip(parts, (factor_a, factor_b)):
            self.state[f"{PREFIX}{module}.{part}"] = factor
        self.report.modules.append(FactoredModule(module, shape, len(factor_a), size, kept))

    def _take_biases(self) -> bool:
        """
        Saves differences of biases as biases of the second factors, which PEFT supports in all layers or in none.
        """
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
                "other modules belong in `modules_to_save`."
            )
    wanted = {*chosen, *(embedded | tied if embeddings else ())}
    return {name: module for name, module in modules.items() if name in wanted}


def _find_modules(model: Checkpoint, endings: Sequence[str] | None, argument: str) -> list[str]:
    """Names of the modules that are equal to one of these names, or end with it."""
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
    """Shortens names to their last part where all modules with that ending are among them."""
    every = collections.defaultdict(set)
    for name, _ in skeleton.named_modules():
        every[name.rpartition(".")[2]].add(name)
    whole = {ending for ending, modules in every.items() if modules <= set(names)}
    return sorted({name.rpartition(".")[2] if name.rpartition(".")[2] in whole else name for name in names})


def _kl(logps: torch.Tensor, logits: torch.Tensor) -> float:
    """KL(first || second), summed over tokens."""
    others = logits.float().log_softmax(-1).to(logps.device)
    return (logps.exp() * (logps - others)).sum(dtype=torch.float64).item()
