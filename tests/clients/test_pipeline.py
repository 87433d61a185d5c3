"""`pipeline("text-generation")` and streamers run a mixture like any other model: token for token as without a cache."""

from threading import Thread

import pytest
import torch
from helpers import PAD, greedy, multinomial
from transformers import TextIteratorStreamer, TextStreamer, pipeline

from mpo_hf import MixturePolicyModel


pytestmark = pytest.mark.integration
PROMPTS = ["What is a cloud?", "Why?", "Tell me about rivers."]
CHATS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a cloud?"}],
    [{"role": "user", "content": "Why?"}],
]
STEPS = 12
# Enough tokens that end a completion for rows to end at different times.
ENDS = list(range(2, 259, 5))
SETTINGS = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": PAD}


@pytest.fixture(params=["folder", "model"])
def generator(request, saved):
    """The pipeline of a folder, or of a model in memory."""
    if request.param == "folder":
        return pipeline("text-generation", model=saved.folder)
    return pipeline("text-generation", model=saved.model, tokenizer=saved.tokenizer)


def prompt_ids(saved, prompts) -> list[list[int]]:
    """Token ids of texts, or of chats with the beginning of an answer."""
    if isinstance(prompts[0], str):
        return saved.tokenizer(prompts).input_ids
    return [saved.tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]


def expected_tokens(saved, prompts, search=greedy, **kwargs) -> list[list[int]]:
    """Completions up to and including the token that ends them."""
    completions = search(saved.components, saved.weights, prompt_ids(saved, prompts), STEPS, ends=ENDS, **kwargs)
    ends = [next((i for i, token in enumerate(c) if token in ENDS), STEPS) for c in completions]
    return [completion[: end + 1] for completion, end in zip(completions, ends)]


def texts(saved, completions) -> list[str]:
    return saved.tokenizer.batch_decode(completions, skip_special_tokens=True)


def test_pipeline_opens_a_folder_as_a_mixture(saved):
    generator = pipeline("text-generation", model=saved.folder)
    assert isinstance(generator.model, MixturePolicyModel)
    assert generator.model.mixture_weights.tolist() == pytest.approx(saved.weights)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_completions_do_not_depend_on_the_batch(generator, saved, batch_size):
    expected = expected_tokens(saved, PROMPTS)
    assert len({len(completion) for completion in expected}) > 1
    results = generator(PROMPTS, batch_size=batch_size, **SETTINGS)
    assert [result["generated_text"] for [result] in results] == [
        prompt + text for prompt, text in zip(PROMPTS, texts(saved, expected))
    ]
    new = generator(PROMPTS, batch_size=batch_size, return_full_text=False, **SETTINGS)
    assert [result["generated_text"] for [result] in new] == texts(saved, expected)
    tokens = generator(PROMPTS, batch_size=batch_size, return_tensors=True, **SETTINGS)
    for [result], prompt, completion in zip(tokens, prompt_ids(saved, PROMPTS), expected):
        row = torch.tensor(result["generated_token_ids"])
        row = row[int((row == PAD).long().cumprod(0).sum()) :]  # padding on the left
        assert row[: len(prompt) + len(completion)].tolist() == prompt + completion
        assert (row[len(prompt) + len(completion) :] == PAD).all()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_chats_are_answered(generator, saved, batch_size):
    answers = texts(saved, expected_tokens(saved, CHATS))
    results = generator(CHATS, batch_size=batch_size, **SETTINGS)
    assert [result["generated_text"] for [result] in results] == [
        [*chat, {"role": "assistant", "content": answer}] for chat, answer in zip(CHATS, answers)
    ]
    results = generator(CHATS, batch_size=batch_size, return_full_text=False, **SETTINGS)
    assert [result["generated_text"] for [result] in results] == answers


def test_several_samples_of_one_prompt(generator, saved):
    expected = expected_tokens(saved, PROMPTS[:1] * 4, multinomial, seed=5)
    torch.manual_seed(5)
    settings = {**SETTINGS, "do_sample": True, "top_k": 0, "temperature": 1.0}
    results = generator(PROMPTS[0], num_return_sequences=4, return_full_text=False, **settings)
    assert [result["generated_text"] for result in results] == texts(saved, expected)
    assert len({result["generated_text"] for result in results}) == 4


def test_weights_of_a_call_pass_through_the_pipeline(generator, saved):
    weights = saved.weights[::-1]
    expected = greedy(saved.components, weights, prompt_ids(saved, PROMPTS), STEPS, ends=ENDS)
    results = generator(PROMPTS, batch_size=3, return_full_text=False, mixture_weights=weights, **SETTINGS)
    assert [result["generated_text"] for [result] in results] == texts(saved, expected)
    assert expected != greedy(saved.components, saved.weights, prompt_ids(saved, PROMPTS), STEPS, ends=ENDS)


def test_iterator_streamer_yields_the_completion(saved):
    [completion] = expected_tokens(saved, PROMPTS[:1])
    streamer = TextIteratorStreamer(saved.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    inputs = saved.tokenizer(PROMPTS[:1], return_tensors="pt")
    thread = Thread(target=saved.model.generate, kwargs={**inputs, **SETTINGS, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == texts(saved, [completion])[0]


def test_streamer_gets_every_token_once(saved):
    [completion] = expected_tokens(saved, PROMPTS[2:])

    class Recorder(TextStreamer):
        tokens: list[int] = []

        def put(self, value):
            self.tokens = [*self.tokens, *value.flatten().tolist()]
            super().put(value)

    streamer = Recorder(saved.tokenizer)
    saved.model.generate(**saved.tokenizer(PROMPTS[2:], return_tensors="pt"), **SETTINGS, streamer=streamer)
    assert streamer.tokens == prompt_ids(saved, PROMPTS[2:])[0] + completion


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_text_streamer_prints_the_completion(saved, capsys, skip_prompt):
    [completion] = expected_tokens(saved, PROMPTS[2:])
    streamer = TextStreamer(saved.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
    saved.model.generate(**saved.tokenizer(PROMPTS[2:], return_tensors="pt"), **SETTINGS, streamer=streamer)
    expected = ("" if skip_prompt else PROMPTS[2]) + texts(saved, [completion])[0]
    assert capsys.readouterr().out == expected + "\n"


def test_pipeline_streams(generator, saved, capsys):
    [answer] = texts(saved, expected_tokens(saved, CHATS[:1]))
    streamer = TextStreamer(saved.tokenizer, skip_prompt=True, skip_special_tokens=True)
    generator(CHATS[0], streamer=streamer, **SETTINGS)
    assert capsys.readouterr().out == answer + "\n"
