"""The tokenizer of a mixture, of a component or of a reward model."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .hub_files import Location, file_kwargs, hub_kwargs


def load_tokenizer(
    locations: Sequence[Location], whose: str, advice: str = "", **kwargs: Any
) -> PreTrainedTokenizerBase:
    """
    The tokenizer at the first of several locations that has one.

    Args:
        locations (`Sequence[Location]`): folders and repos, the most specific first.
        whose (`str`): what the tokenizer belongs to, for the error.
        advice (`str`, *optional*): how a user can provide a tokenizer, for the error.
        kwargs: arguments of `from_pretrained` for all locations, such as `token` and `trust_remote_code`.

    Raises:
        `ValueError`: when no location has a tokenizer that can be loaded, with the reason for each.
    """
    reasons = []
    for location in locations:
        try:
            return AutoTokenizer.from_pretrained(location.name_or_path, **location.kwargs, **kwargs)
        except Exception as err:  # of the tokenizers library, for broken files, too
            reasons.append(f"{location.name_or_path!r}: {' '.join(str(err).split())}")
            if _has_tokenizer(location, **kwargs):  # that of another location may have another vocabulary
                break
    sentences = [
        f"{whose} has no tokenizer that can be read.",
        advice,
        f"Tried {'; '.join(reasons)}" if reasons else "",
    ]
    raise ValueError(" ".join(filter(None, sentences)))


def _has_tokenizer(location: Location, **kwargs: Any) -> bool:
    """Whether a location has files of a tokenizer, so that a tokenizer that cannot be read is broken, and not missing."""
    kwargs = {**location.kwargs, **file_kwargs(kwargs), "_raise_exceptions_for_missing_entries": False}
    try:
        return any(
            cached_file(location.name_or_path, name, **kwargs) is not None
            for name in ("tokenizer_config.json", "tokenizer.json")
        )
    except (OSError, ValueError):
        return False


def load_mixture_tokenizer(
    model: PreTrainedModel, source: str | None = None, revision: str | None = None, *, advice: str
) -> PreTrainedTokenizerBase:
    """
    The tokenizer saved with a mixture, or that of its first component that has one.

    The arguments that the components were loaded with, such as `token` and `trust_remote_code`, apply to it too.

    Args:
        model ([`MixturePolicyModel`]): the mixture.
        source (`str`, *optional*): folder or repo id that it was loaded from. Defaults to `model.name_or_path`.
        revision (`str`, *optional*): the revision of that repo.
        advice (`str`): how a user can provide a tokenizer, for the error.
    """
    source = source or model.name_or_path
    locations = [Location(source, revision)] if source else []
    locations += [component.location for component in model.config.components if component.name_or_path is not None]
    whose = f"The mixture {source!r}" if source else "The mixture"
    return load_tokenizer(locations, whose, advice, **hub_kwargs(model._load_kwargs))
