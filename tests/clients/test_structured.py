"""Outlines constrains a mixture: outputs are valid, and drawn from the mixture's own probabilities of what is allowed."""

import re
import string
from collections import Counter
from typing import Literal

import outlines
import pytest
import torch
from helpers import EOS, greedy, multinomial, pooled_logps
from outlines.types import Regex
from pydantic import BaseModel, Field


PROMPTS = ["Is it going to rain?", "When?", "Who said that?"]
# answers that begin alike; Outlines' own backend knows no answer that goes on where another one ends
ANSWERS = {
    "outlines_core": ["yes", "not now", "no idea", "maybe so", "maybe not"],
    "llguidance": ["yes", "not now", "no", "maybe", "maybe not"],
}
CODE = "[0-9]{2}-[a-z]{2}"
CODE_CHARACTERS = [string.digits, string.digits, "-", string.ascii_lowercase, string.ascii_lowercase]

# llguidance's matcher complains of padding in rows that have ended
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:Error in LLMatcher")]


class Forecast(BaseModel):
    """What a forecast has to look like."""

    sky: Literal["blue", "grey", "black"]
    degrees: Literal[-5, 0, 15]
    rain: bool
    town: str = Field(min_length=2, max_length=5)


@pytest.fixture(scope="module")
def model(saved):
    return outlines.from_transformers(saved.model, saved.tokenizer)


@pytest.fixture(params=["outlines_core", "llguidance"])
def backend(request):
    """What works out the tokens that are allowed."""
    return request.param


def prompt_ids(saved, prompts=PROMPTS) -> list[list[int]]:
    """Prompts as Outlines writes them: in the tokenizer's chat template."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return saved.tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)


def code_characters(saved):
    """Allows at every step what a code has at that place, and its end after that."""
    allowed = iter([*CODE_CHARACTERS, None])

    def process(scores):
        characters = next(allowed)
        ids = [EOS] if characters is None else saved.tokenizer.convert_tokens_to_ids(list(characters))
        return torch.full_like(scores, -torch.inf).index_copy(1, torch.tensor(ids), scores[:, ids])

    return process


@pytest.mark.parametrize("search", [greedy, multinomial])
def test_regex_picks_the_tokens_that_the_mixture_picks_among_the_allowed(saved, model, backend, search):
    sampled = search is multinomial
    seed = {"seed": 7} if sampled else {}
    expected = search(saved.components, saved.weights, prompt_ids(saved), 6, process=code_characters(saved), **seed)
    torch.manual_seed(7)
    found = model.batch(PROMPTS, Regex(CODE), backend=backend, max_new_tokens=8, do_sample=sampled, top_k=0)
    assert found == saved.tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert all(re.fullmatch(CODE, text) for text in found)
    assert len(set(found)) == len(found)


def test_json_follows_the_schema(model):
    generator = outlines.Generator(model, Forecast)
    settings = {"max_new_tokens": 200, "do_sample": True, "top_k": 0}
    torch.manual_seed(8)
    texts = [generator(PROMPTS[0], **settings), *generator.batch(PROMPTS * 3, **settings)]
    forecasts = [Forecast.model_validate_json(text) for text in texts]
    assert len({forecast.model_dump_json() for forecast in forecasts}) == len(forecasts)


@torch.no_grad()
def answer_probabilities(saved, prompt: list[int], answers: list[str]) -> dict[str, float]:
    """
    The answers' probabilities under the token-level mixture, with what cannot become an answer ruled out at every step
    and the rest renormalized.
    """
    paths = {answer: [*saved.tokenizer(answer).input_ids, EOS] for answer in answers}
    probabilities = {}
    for answer, path in paths.items():
        probability = 1.0
        for step, token in enumerate(path):
            allowed = sorted({other[step] for other in paths.values() if other[:step] == path[:step]})
            logps = pooled_logps(saved.components, saved.weights, [prompt + path[:step]])[0]
            probability *= logps[allowed].softmax(-1)[allowed.index(token)].item()
        probabilities[answer] = probability
    return probabilities


def test_answers_have_the_probabilities_of_the_constrained_mixture(saved, model, backend):
    count, answers = 400, ANSWERS[backend]
    expected = answer_probabilities(saved, prompt_ids(saved)[0], answers)
    assert sum(expected.values()) == pytest.approx(1)
    settings = {"max_new_tokens": 10, "do_sample": True, "top_k": 0, "num_return_sequences": count}
    torch.manual_seed(9)
    found = Counter(model(PROMPTS[0], Literal[tuple(answers)], backend=backend, **settings))
    assert set(found) <= set(answers)
    assert len(found) >= 4
    for answer, probability in expected.items():
        error = (probability * (1 - probability) / count) ** 0.5
        assert found[answer] / count == pytest.approx(probability, abs=4 * error)


def test_weights_of_a_call_pass_through(saved, model):
    weights = saved.weights[::-1]
    expected = greedy(saved.components, weights, prompt_ids(saved), 6, process=code_characters(saved))
    found = model.batch(PROMPTS, Regex(CODE), max_new_tokens=8, mixture_weights=weights)
    assert found == saved.tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert found != model.batch(PROMPTS, Regex(CODE), max_new_tokens=8)
