"""What is tried with every decoder, and what is expected: a loop that recomputes every step, one row at a time."""

import copy
import dis
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from decoders import tiny_decoder
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from mpo_hf import MixtureLogitsProcessor, MixturePolicyModel
from mpo_hf.mixture.compat import CACHE_NAME


LONG, SHORT = [1, 5, 9, 33, 17, 40, 21, 8, 50], [1, 30, 12, 7]
STEPS, BEAMS, PAD = 4, 2, 0
WEIGHTS = [0.6, 0.4]
ADAPTER = {"r": 2, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
# A wrong mask, position or state moves log-probabilities by 1e-2 and more, another order of sums by less than 1e-4.
CLOSE = 2e-3


class Wrong(AssertionError):
    """A result that differs from the one computed by hand."""


class ByHand:
    """
    The log-linear mixture of models, from one forward pass over the whole text for every token, without a cache.

    Args:
        models (`Sequence[nn.Module]`): the components, each of them alone.
        weights (`Sequence[float]`): their weights.
    """

    def __init__(self, models: Sequence[nn.Module], weights: Sequence[float] = WEIGHTS):
        self.models = models
        self.weights = weights
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    @torch.no_grad()
    def next(self, text: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the token after a text."""
        if (key := tuple(text)) not in self._known:
            logits = [model(input_ids=torch.tensor([key]), use_cache=False).logits[0, -1] for model in self.models]
            pooled = sum(w * row.double().log_softmax(-1) for w, row in zip(self.weights, logits))
            self._known[key] = pooled.log_softmax(-1)
        return self._known[key]

    def beams(self, text: list[int], count: int = BEAMS) -> list[tuple[float, list[int]]]:
        """The best continuations by beam search, of `STEPS` tokens."""
        beams: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(STEPS):
            extended = [(s + p, [*b, v]) for s, b in beams for v, p in enumerate(self.next(text + b).tolist())]
            beams = sorted(extended, reverse=True)[:count]
        return beams

    def check(self, prompts: Sequence[list[int]], tokens: torch.Tensor, scores: Sequence[torch.Tensor]) -> None:
        """Compares the scores of every step with those after the same text."""
        for prompt, row, row_scores in zip(prompts, tokens.tolist(), torch.stack(list(scores), 1)):
            for step, found in enumerate(row_scores):
                expected = self.next(prompt + row[:step])
                others = found[PAD + 1 : len(expected)].double().log_softmax(-1)
                compare(others, expected[PAD + 1 :].log_softmax(-1), f"at step {step}")
                if expected[PAD + 1 :].max() - expected[row[step]] > CLOSE:
                    raise Wrong(f"token {row[step]} at step {step} is not the most likely one")


def compare(found: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    apart = (found - expected).abs().max()
    if not apart <= CLOSE:
        raise Wrong(f"log-probabilities are {apart:.2g} apart {where}")


def inputs_of(prompts: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
    }


def generated(model: nn.Module, prompts: Sequence[list[int]], **options) -> tuple[torch.Tensor, Any]:
    """The new tokens of `generate()`, and all that it returns."""
    fixed = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    fixed |= {"return_dict_in_generate": True, "output_scores": True}
    inputs = inputs_of(prompts)
    output = model.generate(**inputs, **{**fixed, **options})
    return output.sequences[:, inputs["input_ids"].shape[1] :], output


def decodes(model: nn.Module, by_hand: ByHand, prompts: Sequence[list[int]], **options) -> None:
    # some models leave out the positions of padding, also where the token is one of the text
    tokens, output = generated(model, prompts, suppress_tokens=[PAD], **options)
    by_hand.check(prompts, tokens, output.scores)


def beams(model: nn.Module, by_hand: ByHand, prompts: Sequence[list[int]], **options) -> None:
    tokens, output = generated(model, [LONG], num_beams=BEAMS, num_return_sequences=BEAMS, **options)
    expected = by_hand.beams(LONG)
    compare(output.sequences_scores * STEPS, torch.tensor([score for score, _ in expected]), "in the scores of beams")
    apart = expected[0][0] - expected[1][0]
    if apart > CLOSE and tokens.tolist() != [tokens for _, tokens in expected]:
        raise Wrong("beams hold other tokens")


def static_cache(model: nn.Module, by_hand: ByHand, prompts: Sequence[list[int]]) -> None:
    decodes(model, by_hand, prompts, cache_implementation="static", disable_compile=True)


def resumed(model: nn.Module, by_hand: ByHand, prompts: Sequence[list[int]]) -> None:
    """Goes on from the cache of a `generate()` call with new tokens, and reads a text in two parts."""
    tokens, output = generated(model, [LONG], suppress_tokens=[PAD])
    text = [*LONG, *tokens[0].tolist(), 7, 44]
    decodes(model, by_hand, [text], **{CACHE_NAME: output[CACHE_NAME]})
    ids = torch.tensor([LONG])
    with torch.no_grad():
        first = model(input_ids=ids[:, :5], use_cache=True)
        second = model(input_ids=ids[:, 5:], use_cache=True, **{CACHE_NAME: first[CACHE_NAME]})
    for i in range(4):
        expected = by_hand.next(LONG[: 6 + i])
        compare(
            second.logits[0, i, : len(expected)].double().log_softmax(-1), expected, "in the second part of a text"
        )


def reads(model: nn.Module, by_hand: ByHand) -> None:
    """A pass over two rows without a cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([LONG, LONG[::-1]]), use_cache=False).logits
    for text, row in zip((LONG, LONG[::-1]), logits):
        for i in range(4, len(text)):
            expected = by_hand.next(text[: i + 1])
            compare(row[i, : len(expected)].double().log_softmax(-1), expected, "without a cache")


class Trial:
    """
    One architecture in all modes.

    Args:
        model_type (`str`): the decoder that is tried.
    """

    def __init__(self, model_type: str):
        self.model, self.other, self.llama = (
            tiny_decoder(model_type, 1),
            tiny_decoder(model_type, 2),
            tiny_decoder("llama", 3),
        )
        for model in (self.model, self.other):
            model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=PAD)
        self.prompts = [LONG, SHORT]  # the first one only, where left padding does not work

    @cached_property
    def mixture(self) -> MixturePolicyModel:
        return MixturePolicyModel.from_policies([self.model, self.llama], WEIGHTS)

    @cached_property
    def by_hand(self) -> ByHand:
        return ByHand([self.model, self.llama])

    @cached_property
    def alone(self) -> ByHand:
        return ByHand([self.model], [1.0])

    def reference(self) -> None:
        """Whether the model can be a reference: later tokens must not change the logits of earlier ones."""
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([LONG]), use_cache=False).logits[0].double().log_softmax(-1)
        for i in range(4, len(LONG)):
            compare(
                logits[i],
                self.alone.next(LONG[: i + 1])[: logits.shape[-1]],
                f"where {len(LONG) - i - 1} tokens follow",
            )

    def run(self, mode: str) -> None:
        if mode in PLAIN:
            PLAIN[mode](self.mixture, self.by_hand, self.prompts)
        else:
            getattr(self, mode)()

    def without(self, mode: str) -> None:
        """The same without what is tried: the model without a mixture, a mixture without a stack or a processor."""
        if mode == "adapters":
            decodes(self.adapted[0], ByHand([self.adapted[0]], [1.0]), self.prompts)
        elif mode == "stacked":
            self.stacked(side_by_side=False)
        elif mode == "processor" and outcome(self.as_other)[0] != "right":
            decodes(self.mixture, self.by_hand, self.prompts)
        else:
            PLAIN.get(mode, decodes)(self.model, self.alone, self.prompts)

    def processor(self) -> None:
        """The model as one of the other policies, and as the one that calls."""
        self.as_other()
        mask = inputs_of(self.prompts)["attention_mask"]
        processor = MixtureLogitsProcessor([self.llama], WEIGHTS, attention_mask=mask)
        decodes(self.model, self.by_hand, self.prompts, logits_processor=[processor])

    def as_other(self) -> None:
        by_hand, mask = ByHand([self.llama, self.model]), inputs_of(self.prompts)["attention_mask"]
        processor = MixtureLogitsProcessor([self.model], WEIGHTS, attention_mask=mask)
        decodes(self.llama, by_hand, self.prompts, logits_processor=[processor])
        processor.attention_mask = None
        beams(self.llama, by_hand, self.prompts, logits_processor=[processor])

    def stacked(self, side_by_side: bool = True) -> None:
        """Two models of the architecture, side by side where they can run so."""
        mixture = MixturePolicyModel.from_policies([self.model, self.other], WEIGHTS)
        by_hand = ByHand([copy.deepcopy(self.model), copy.deepcopy(self.other)])
        mixture.stack_models = side_by_side
        decodes(mixture, by_hand, self.prompts)
        reads(mixture, by_hand)

    def adapters(self) -> None:
        """Two LoRA adapters over one base, opened from their folders."""
        mixture, by_hand = self.adapter_mixture, ByHand(self.adapted)
        decodes(mixture, by_hand, self.prompts)
        reads(mixture, by_hand)

    @cached_property
    def adapted(self) -> list[PeftModel]:
        """Both adapters as PEFT runs them, each over a base of its own."""
        base, folders = self.folders
        models = [PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), f).eval() for f in folders]
        first, second = (ByHand([model], [1.0]).next(LONG) for model in models)
        for found, expected in zip((first, second), self._saved):
            compare(found, expected, "after PEFT saved the adapter and opened it again")
        if (first - second).abs().max() < 10 * CLOSE:
            raise Wrong("the adapters hardly differ")
        return models

    @cached_property
    def adapter_mixture(self) -> MixturePolicyModel:
        base, folders = self.folders
        return MixturePolicyModel.from_policies([{"name_or_path": base, "adapter": f} for f in folders], WEIGHTS)

    @cached_property
    def folders(self) -> tuple[str, list[str]]:
        self._folder = tempfile.TemporaryDirectory()
        base = f"{self._folder.name}/base"
        self.model.save_pretrained(base)
        self._saved: list[torch.Tensor] = []
        folders = [f"{self._folder.name}/adapter_{k}" for k in range(2)]
        # PEFT refuses the first in models of the Mamba family; routers return tuples, which it cannot add to
        recurrent = self.model.config.model_type in ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
        excluded = ["out_proj"] * recurrent + ["router"]
        for k, folder in enumerate(folders):
            torch.manual_seed(k)
            settings = LoraConfig(target_modules="all-linear", exclude_modules=excluded, **ADAPTER)
            adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).eval()
            self._saved.append(ByHand([adapted], [1.0]).next(LONG))
            adapted.save_pretrained(folder)
        return base, folders


PLAIN: dict[str, Callable] = {
    "greedy": lambda model, by_hand, prompts: decodes(model, by_hand, [LONG]),
    "padding": decodes,
    "beams": beams,
    "static": static_cache,
    "resumed": resumed,
}
MODES = ["greedy", "padding", "beams", "static", "resumed", "processor", "stacked", "adapters"]


def outcome(function: Callable, *arguments) -> tuple[str, str]:
    """`right`, `refused`, `wrong` or `fails`, and what was said."""
    try:
        function(*arguments)
    except Wrong as difference:
        return "wrong", str(difference)
    except (ValueError, NotImplementedError) as error:
        return "refused" if _is_raised_on_purpose(error) else "fails", f"{type(error).__name__}: {error}"
    except Exception as error:
        return "fails", f"{type(error).__name__}: {error}"
    return "right", ""


def _is_raised_on_purpose(error: Exception) -> bool:
    """Whether a `raise` of mpo_hf, Transformers or PEFT is where an error comes from, with a sentence to read."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    by_statement = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    ours = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("mpo_hf", "transformers", "peft")
    return by_statement and ours and len(str(error).split()) > 3


def try_decoder(model_type: str, modes: Sequence[str] = MODES) -> dict[str, tuple[str, str]]:
    """
    What comes of every mode: `right`, `refused`, `alone` where the model is not right in the same mode without a
    mixture, `wrong` or `fails`. Or one entry `none`, where there is no model to try or nothing to compare with.
    """
    trials: list[Trial] = []
    made, reason = outcome(lambda: trials.append(Trial(model_type)))
    if made == "right":
        made, reason = outcome(trials[0].reference)
    if made != "right":
        return {"none": (made, reason)}
    trial, found = trials[0], {}
    for mode in modes:
        found[mode] = outcome(trial.run, mode)
        if found[mode][0] in ("wrong", "fails"):
            alone, reason = outcome(trial.without, mode)
            if alone != "right":
                found[mode] = ("alone", f"{alone}: {reason}")
        if mode == "padding" and found[mode][0] != "right":
            trial.prompts = [LONG]
    return found
