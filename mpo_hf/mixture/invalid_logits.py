"""Logits that no token can be drawn from. Decoding would go on with token 0, or fail without a reason."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor


def watch_peaks(
    active: Sequence[int], logits: Iterator[torch.Tensor], peaks: dict[int, torch.Tensor]
) -> Iterator[torch.Tensor]:
    """
    Passes on the logits of components, and records the highest of each row's last position, which shows later whether the
    component was to blame.
    """
    for k, component_logits in zip(active, logits, strict=True):  # strict, so that the components come to their end
        if component_logits.shape[1]:
            peaks[k] = component_logits[:, -1].amax(-1)
        yield component_logits
        del component_logits  # before the next one is computed


def keep_peaks(output: Any, peaks: dict[int, torch.Tensor]) -> None:
    """Puts what [`watch_peaks`] recorded beside the fields of a model's output, for `generate` to read."""
    vars(output)["component_peaks"] = peaks


def peaks_of(output: Any) -> dict[int, torch.Tensor]:
    """What [`watch_peaks`] recorded for an output; nothing for that of compiled code."""
    return vars(output).get("component_peaks", {})


def check_numbers(logits: torch.Tensor, peaks: Mapping[int, torch.Tensor], labels: Sequence[str]) -> None:
    """
    Refuses next-token logits that are not numbers, with the components that they come from.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, vocab_size)`): pooled logits; rows of `-inf` pass.
        peaks (`Mapping[int, torch.Tensor]`): what [`watch_peaks`] recorded; empty for compiled code.
        labels (`Sequence[str]`): names of the components.

    Raises:
        `ValueError`: for NaN, and for infinite logits of a component.
    """
    if not logits.amax(-1).isnan().any():
        return
    blamed = [labels[k] for k, peak in peaks.items() if (peak.isnan() | peak.isposinf()).any()]
    who = f"The components {blamed} return" if blamed else "Some component returns"
    raise ValueError(
        f"{who} logits of NaN or +inf, from which no token can be drawn. Try them alone (`model.policy(k)`); in float16 "
        "values overflow: load them in bfloat16 or float32."
    )


class NoTokenLeft(LogitsProcessor):
    """
    Refuses a text that no token may follow, as the components rule out every token between them. The first processor of a
    call.

    Args:
        prompt_length (`int`): number of tokens before the completions.
        eos_token_id (`torch.Tensor`, *optional*): tokens that end a completion; what follows does not matter.
        num_beams (`int`): beams of a text, one of which must go on.
    """

    def __init__(self, prompt_length: int, eos_token_id: torch.Tensor | None, num_beams: int):
        self.prompt_length, self.eos_token_id, self.num_beams = prompt_length, eos_token_id, num_beams

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        peak = scores.amax(-1)
        if peak.isfinite().all():
            return scores
        stuck = ~peak.isfinite()
        if self.num_beams == 1 and self.eos_token_id is not None:
            ends = self.eos_token_id.to(input_ids.device)
            stuck &= ~torch.isin(input_ids[:, self.prompt_length :], ends).any(-1).to(stuck.device)
        texts = stuck.view(-1, self.num_beams).all(-1)
        if texts.any():
            raise ValueError(
                f"The components rule out every token between them (logits of -inf) after {input_ids.shape[1]} tokens of row "
                f"{texts.nonzero()[0].item()}, so that the mixture cannot go on. Leave out a component that masks tokens, or let "
                "all of them allow the same tokens."
            )
        # beam search has normalized the scores, which of a beam that is stuck makes NaN
        return scores.masked_fill(stuck[:, None], -torch.inf) if self.num_beams > 1 else scores
