"""The report of an extraction: what the adapter preserves of a fine-tune, by layer and in total."""

import collections
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..text_table import align_columns


@dataclass
class FactoredModule:
    """
    The factorization of one layer's difference.

    Args:
        name (`str`): name of the layer.
        shape (`tuple[int, ...]`): shape of its weight.
        rank (`int`): rank of its factors.
        squared_norm (`float`): squared Frobenius norm of the difference.
        kept_energy (`float`): share of it that the saved factors preserve.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    squared_norm: float
    kept_energy: float

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the error, relative to that of the difference."""
        return math.sqrt(1 - self.kept_energy)


@dataclass
class OtherParameter:
    """A parameter that differs and is not factored."""

    name: str
    shape: tuple[int, ...]
    squared_norm: float


@dataclass
class ExtractionReport:
    """
    What an extracted adapter preserves of a fine-tune.

    A weight that two layers share, such as embeddings and a tied head, is counted for both.

    Args:
        modules (`list[FactoredModule]`): the factored layers.
        saved (`list[OtherParameter]`): parameters that are saved in the adapter as they are.
        left_out (`list[OtherParameter]`): parameters whose difference is lost.
        adapter_parameters (`int`): number of parameters of the adapter.
        base_parameters (`int`): number of parameters of the base.
        mean_kl (`float`, *optional*): mean KL(fine-tune || base with adapter) in nats a token, on texts.
        mean_kl_base (`float`, *optional*): the same for the base without the adapter.
        num_tokens (`int`, *optional*): the number of tokens in both means.
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
        """Share of the squared norm of the whole difference that the adapter preserves."""
        factored = sum(module.squared_norm * module.kept_energy for module in self.modules)
        saved = sum(parameter.squared_norm for parameter in self.saved)
        return (factored + saved) / self._squared_norm

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the error, relative to that of the whole difference."""
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
        lines = [
            align_columns(rows),
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


def _span(values: Sequence[float], spec: str) -> str:
    texts = [format(value, spec) for value in (min(values), max(values))]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)
