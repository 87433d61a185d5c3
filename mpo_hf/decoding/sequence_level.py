r"""
Decoding from the sequence-level mixture \\(\prod_k \pi_k(y)^{\lambda_k}\\), as `custom_generate` of `generate()`.

Sampling token by token draws from \\(\pi_{tok}(y) = \prod_t \pi(y_t|s_t)\\) with \\(\pi(v|s) \propto \prod_k
\pi_k(v|s)^{\lambda_k}\\). Renormalizing at every step loses the factors \\(Z_t = \sum_v \prod_k
\pi_k(v|s_t)^{\lambda_k}\\):

$$ \prod_k \pi_k(y)^{\lambda_k} = \pi_{tok}(y) \prod_t Z_t $$

so the log Z of a step, the logsumexp of the mixture's logits, is the exact incremental log-weight of a particle filter
with the mixture as its proposal.
"""

import math
import threading
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..estimation.objectives import effective_sample_size
from ..mixture.compat import CACHE_NAME
from ..mixture.configuration_mixture import MixturePolicyConfig
from ..mixture.invalid_logits import NoTokenLeft
from ..mixture.modeling_mixture import MixturePolicyModel


# With these processors, the logsumexp of the scores is the weight of a well-defined target: temperature T divides λ,
# and processors that only exclude tokens condition the mixture on completions without them.
PROCESSORS = (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
)


@dataclass
class SequentialMonteCarloOutput(GenerateDecoderOnlyOutput):
    r"""
    What [`sequential_monte_carlo`] returns with `return_dict_in_generate=True`, for P prompts and N particles each.

    Args:
        sequences (`torch.LongTensor` of shape `(P * num_return_sequences, sequence_length)`):
            Prompts and completions, drawn from the weighted particles.
        particles (`torch.LongTensor` of shape `(P, N, sequence_length)`): all particles.
        log_weights (`torch.Tensor` of shape `(P, N)`):
            Their log-weights in float64, on the CPU. Without resampling that is \\(\log W(y)\\), the ratio of the
            unnormalized sequence-level mixture to the proposal.
        log_normalizer (`torch.Tensor` of shape `(P,)`):
            Log of the estimate of \\(\sum_y \prod_k \pi_k(y)^{\lambda_k}\\), which is unbiased before the logarithm.
        effective_sample_size (`torch.Tensor` of shape `(P,)`): that of the final weights, between 1 and N.
    """

    particles: torch.LongTensor | None = None
    log_weights: torch.Tensor | None = None
    log_normalizer: torch.Tensor | None = None
    effective_sample_size: torch.Tensor | None = None


def sequential_monte_carlo(
    model: MixturePolicyModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    num_particles: int = 16,
    ess_threshold: float = 0.5,
    proposal_temperature: float = 1.0,
    **model_kwargs,
) -> SequentialMonteCarloOutput | torch.LongTensor:
    r"""
    Draws from the sequence-level mixture \\(\prod_k \pi_k(y)^{\lambda_k}\\) with a particle filter: pass it to `generate()`
    of a [`MixturePolicyModel`] as `custom_generate`, and the arguments below beside it.

    N particles a prompt are drawn from the token-level mixture and carry \\(\prod_t Z_t\\) as their weight. Before a
    token is drawn they are resampled if their effective sample size is low. Finished particles keep their weight.
    `num_return_sequences` completions are then drawn from the weighted particles, with replacement. The law of a
    completion tends to the sequence-level mixture as N grows, and with one particle it is the token-level mixture.

    `temperature` changes the target, to \\(\prod_k \pi_k(y)^{\lambda_k/T}\\). `bad_words_ids`, `min_new_tokens`,
    `no_repeat_ngram_size`, `suppress_tokens` and their like condition the mixture on completions that satisfy them.
    Any other processor is refused.

    Args:
        model ([`MixturePolicyModel`]): passed by `generate()`, like the next four.
        input_ids (`torch.LongTensor`): prompts, each `num_return_sequences` times.
        logits_processor (`LogitsProcessorList`): processors of the scores.
        stopping_criteria (`StoppingCriteriaList`): when a completion is finished.
        generation_config (`GenerationConfig`): with `do_sample=True` and `top_k=0`.
        num_particles (`int`, *optional*, defaults to 16): particles per prompt, N.
        ess_threshold (`float`, *optional*, defaults to 0.5):
            Particles are resampled when their effective sample size is below this fraction of N: 1 resamples at every
            step, 0 never, which is importance resampling of whole completions.
        proposal_temperature (`float`, *optional*, defaults to 1.0):
            Temperature at which tokens are drawn, if not that of the target. The weights correct for it.
        model_kwargs: inputs of the model, such as `attention_mask` and `mixture_weights`.

    Returns:
        [`SequentialMonteCarloOutput`] with `return_dict_in_generate=True`, else its `sequences`.

    Raises:
        `ValueError`: for arguments out of range, a model that is not a mixture, and processors that would change the
            distribution.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from mpo_hf import MixturePolicyModel, sequential_monte_carlo

    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> model = MixturePolicyModel.from_policies([LlamaForCausalLM(config), LlamaForCausalLM(config)])
    >>> output = model.generate(
    ...     torch.tensor([[1, 5, 9]]),
    ...     custom_generate=sequential_monte_carlo,
    ...     num_particles=8,
    ...     do_sample=True,
    ...     top_k=0,
    ...     max_new_tokens=4,
    ...     return_dict_in_generate=True,
    ... )
    >>> output.sequences.shape, output.particles.shape, output.log_normalizer.shape
    (torch.Size([1, 7]), torch.Size([1, 8, 7]), torch.Size([1]))
    ```
    """
    _check_is_mixture(model)
    _check_range("num_particles", num_particles, num_particles == int(num_particles) >= 1, "a whole number from 1 on")
    _check_range("ess_threshold", ess_threshold, 0 <= ess_threshold <= 1, "between 0 and 1")
    _check_range("proposal_temperature", proposal_temperature, 0 < proposal_temperature < math.inf, "positive")
    copies = generation_config.num_return_sequences
    _check_generation_config(generation_config, model_kwargs.get(CACHE_NAME))
    # particles may end where no token is left
    logits_processor = LogitsProcessorList(p for p in logits_processor if type(p).__name__ != NoTokenLeft.__name__)
    _check_processors(logits_processor)

    input_ids, model_kwargs = _one_row_a_prompt(input_ids, model_kwargs, copies)
    shape = len(input_ids), num_particles
    input_ids, logits, model_kwargs = _read_prompts(model, input_ids, generation_config, model_kwargs, num_particles)
    log_weights = torch.zeros(shape, dtype=torch.float64)
    running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while True:
        scores = logits_processor(input_ids, logits.to(input_ids.device, torch.float32, copy=True))
        log_z = scores.logsumexp(-1)
        log_weights += torch.where(running, log_z, 0.0).cpu().double().view(shape)
        running &= log_z > -torch.inf  # a particle without a possible next token is dead

        # before the next token, so that copies of a particle can diverge
        rows = _resample(log_weights, ess_threshold, running.view(shape).any(-1).cpu())
        if rows is not None:
            rows = rows.to(input_ids.device)
            input_ids, scores, running = input_ids[rows], scores[rows], running[rows]
            _reorder_cache(model_kwargs, rows)

        tokens, corrections = _draw(scores.masked_fill(~running[:, None], 0.0), proposal_temperature)
        log_weights += torch.where(running, corrections, 0.0).cpu().double().view(shape)
        if generation_config._pad_token_tensor is not None:
            tokens = torch.where(running, tokens, generation_config._pad_token_tensor.to(tokens.device))
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        running &= ~stopping_criteria(input_ids, None)
        if not running.any():
            break
        logits, model_kwargs = _next_logits(model, input_ids, model_kwargs)

    particles = input_ids.view(*shape, -1)
    weights = _final_weights(log_weights)
    drawn = torch.multinomial(weights, copies, replacement=True).to(particles.device)
    sequences = particles.gather(1, drawn[..., None].expand(-1, -1, particles.shape[-1])).flatten(0, 1)
    if not generation_config.return_dict_in_generate:
        return sequences
    return SequentialMonteCarloOutput(
        sequences=sequences,
        particles=particles,
        log_weights=log_weights,
        log_normalizer=log_weights.logsumexp(-1) - math.log(num_particles),
        effective_sample_size=effective_sample_size(log_weights),
    )


def sequence_level_beam_search(
    model: MixturePolicyModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs,
):
    r"""
    Beam search for the most likely completions under the sequence-level mixture: pass it to `generate()` of a
    [`MixturePolicyModel`] as `custom_generate`.

    This is Transformers' beam search with the scores of the mixture, \\(\sum_k \lambda_k \log \pi_k(y)\\). By itself,
    it renormalizes at every step, and searches for the most likely completion of the token-level mixture. With
    `length_penalty=0` beams are compared by that sum; the default of 1 divides it by the length, as usual.

    Args:
        model ([`MixturePolicyModel`]): passed by `generate()`, like the others.
        input_ids (`torch.LongTensor`): prompts, each `num_beams` times.
        logits_processor (`LogitsProcessorList`): processors of the scores.
        stopping_criteria (`StoppingCriteriaList`): when a completion is finished.
        generation_config (`GenerationConfig`): with `num_beams` of 2 or more.
        model_kwargs: inputs of the model, such as `attention_mask` and `mixture_weights`.

    Returns:
        What `generate()` with `num_beams` returns; with `output_scores=True`, `sequences_scores` are those
        of the sequence-level mixture.

    Raises:
        `ValueError`: for a model that is not a mixture, or without `num_beams`.
    """
    _check_is_mixture(model)
    beams = generation_config.num_beams
    _check_range("num_beams", beams, beams is not None and beams > 1, "2 or more for a beam search")
    undo = _UndoNormalization()
    hook = model.register_forward_hook(undo.remember)
    try:
        return model._beam_search(
            input_ids,
            logits_processor=LogitsProcessorList([undo, *logits_processor]),
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )
    finally:
        hook.remove()


class _UndoNormalization(LogitsProcessor):
    """Adds the log Z that the log_softmax of beam search removes from the mixture's logits."""

    log_z: torch.Tensor

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def remember(self, model: MixturePolicyModel, args: tuple, output: CausalLMOutputWithPast) -> None:
        if threading.get_ident() == self._thread:  # other threads may use the model too
            self.log_z = output.logits[:, -1].logsumexp(-1, keepdim=True)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        log_z = self.log_z.to(scores.device)
        # of a beam that no token may follow, log_softmax is NaN
        return (scores + log_z).masked_fill(torch.isneginf(log_z), -torch.inf)


def _check_is_mixture(model: MixturePolicyModel) -> None:
    # by its model type, as the class may come from the code of a Hub repo
    if model.config.model_type != MixturePolicyConfig.model_type:
        raise ValueError(
            f"Sequence-level decoding needs the pooled log-probabilities that a MixturePolicyModel has as logits; "
            f"{type(model).__name__} has none."
        )


def _check_range(name: str, value: float, holds: bool, range_: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {range_}, got {value}.")


def _check_generation_config(config: GenerationConfig, cache: Cache | None) -> None:
    if not config.do_sample:
        raise ValueError("`sequential_monte_carlo` draws completions: pass `do_sample=True`.")
    if config.num_beams is not None and config.num_beams > 1:
        raise ValueError(
            f"`sequential_monte_carlo` has particles, not beams, got num_beams={config.num_beams}. For the most likely "
            "completion use `sequence_level_beam_search`."
        )
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ValueError(
                f"`{name}` is not available from `sequential_monte_carlo`, whose particles are resampled."
            )
    if config.num_return_sequences > 1 and getattr(cache, "_is_user_defined", False):
        raise ValueError(
            f"`{CACHE_NAME}` has a row for each prompt, which num_return_sequences={config.num_return_sequences} "
            "cannot follow. Pass one of the two."
        )


def _check_processors(processors: LogitsProcessorList) -> None:
    for processor in processors:
        if type(processor) not in PROCESSORS:
            raise ValueError(
                f"{type(processor).__name__} would change the distribution that `sequential_monte_carlo` draws from. "
                "Leave out the argument that creates it (sampling has top_k=50 by default: pass `top_k=0`). Supported are: "
                f"{', '.join(allowed.__name__ for allowed in PROCESSORS)}."
            )


def _one_row_a_prompt(
    input_ids: torch.LongTensor, model_kwargs: dict, copies: int
) -> tuple[torch.LongTensor, dict[str, object]]:
    """Undoes the repetition of rows for `num_return_sequences`, so that each prompt is read once."""

    def first_copies(name: str, value: object) -> object:
        shared = name == "mixture_weights" and getattr(value, "ndim", 1) == 1  # (K,) is not a batch of K rows
        return value[::copies] if isinstance(value, torch.Tensor) and not shared else value

    return input_ids[::copies], {name: first_copies(name, value) for name, value in model_kwargs.items()}


def _read_prompts(
    model: MixturePolicyModel,
    input_ids: torch.LongTensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, object],
    num_particles: int,
) -> tuple[torch.LongTensor, torch.Tensor, dict[str, object]]:
    """
    Runs the model once on every prompt. Ids, next-token logits and model inputs are repeated for `num_particles` rows.
    """
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    rows = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(num_particles)
    _reorder_cache(model_kwargs, rows)
    input_ids, model_kwargs = model._expand_inputs_for_generation(num_particles, input_ids=input_ids, **model_kwargs)
    return input_ids, outputs.logits[:, -1].repeat_interleave(num_particles, 0), model_kwargs


def _next_logits(
    model: MixturePolicyModel, input_ids: torch.LongTensor, model_kwargs: dict[str, object]
) -> tuple[torch.Tensor, dict[str, object]]:
    new_tokens = 1 if model_kwargs["use_cache"] else None
    inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=new_tokens, **model_kwargs)
    outputs = model(**inputs, return_dict=True)
    return outputs.logits[:, -1], model._update_model_kwargs_for_generation(outputs, model_kwargs)


def _reorder_cache(model_kwargs: dict[str, object], rows: torch.LongTensor) -> None:
    if (cache := model_kwargs.get(CACHE_NAME)) is not None:
        cache.reorder_cache(rows)


def _resample(log_weights: torch.Tensor, threshold: float, running: torch.Tensor) -> torch.LongTensor | None:
    """
    Systematic resampling of the particles of prompts whose effective sample size is too low.

    Args:
        log_weights (`torch.Tensor` of shape `(P, N)`): changed in place, to the log of their mean.
        threshold (`float`): smallest effective sample size without resampling, as a fraction of N.
        running (`torch.Tensor` of shape `(P,)`): whether a prompt has unfinished particles.

    Returns:
        `torch.LongTensor` of shape `(P * N,)`: for every row, the row that it continues; `None` without resampling.
    """
    num_prompts, num_particles = log_weights.shape
    low = running & (effective_sample_size(log_weights) < threshold * num_particles)
    if not low.any():
        return None
    own = torch.arange(num_particles).expand(num_prompts, -1)
    positions = (torch.rand(num_prompts, 1, dtype=torch.float64) + own) / num_particles
    cumulative = log_weights.softmax(-1).cumsum(-1)
    ancestors = torch.searchsorted(cumulative, positions * cumulative[:, -1:], right=True)
    ancestors = torch.where(low[:, None], ancestors.clamp(max=num_particles - 1), own)
    log_weights[low] = (log_weights.logsumexp(-1, keepdim=True) - math.log(num_particles)).expand_as(log_weights)[low]
    return (ancestors + num_particles * torch.arange(num_prompts)[:, None]).flatten()


def _draw(scores: torch.Tensor, proposal_temperature: float) -> tuple[torch.LongTensor, torch.Tensor]:
    """
    Draws a token for every row. Also returns the log-ratio of its probability under `scores` to that of the draw.
    """
    if proposal_temperature == 1:
        tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        return tokens, torch.zeros_like(tokens, dtype=scores.dtype)
    proposal = (scores / proposal_temperature).log_softmax(-1)
    tokens = torch.multinomial(proposal.exp(), 1)
    ratios = scores.log_softmax(-1).gather(1, tokens) - proposal.gather(1, tokens)
    return tokens.squeeze(1), ratios.squeeze(1)


def _final_weights(log_weights: torch.Tensor) -> torch.Tensor:
    weights = log_weights.softmax(-1)
    if (dead := weights.isnan().any(-1)).any():
        raise ValueError(
            f"No completion is left for prompt {dead.nonzero()[0].item()}: no token may follow any of its particles. "
            "Relax the constraints on tokens."
        )
    return weights
