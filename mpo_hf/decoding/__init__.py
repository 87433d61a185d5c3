"""Ways to decode with several policies beside the model's own `generate()`."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names
from .logits_process import MixtureLogitsProcessor
from .sequence_level import SequentialMonteCarloOutput, sequence_level_beam_search, sequential_monte_carlo


if TYPE_CHECKING:
    from .preference_selection import SelectedCompletions, neighboring_weights, select_completions

__all__ = [
    "MixtureLogitsProcessor",
    "SelectedCompletions",
    "SequentialMonteCarloOutput",
    "neighboring_weights",
    "select_completions",
    "sequence_level_beam_search",
    "sequential_monte_carlo",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    dict.fromkeys(["SelectedCompletions", "neighboring_weights", "select_completions"], "preference_selection"),
)
