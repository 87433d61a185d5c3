"""`mpo-hf serve` answers an OpenAI client with what `generate()` writes."""

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from clients.conftest import save_mixture
from helpers import greedy
from openai import BadRequestError, OpenAI

from mpo_hf.cli.main import main
from mpo_hf.cli.serve_requests import _begun


pytestmark = pytest.mark.integration
MESSAGES = [{"role": "user", "content": "What is a cloud?"}]
TOKENS = 12
SAMPLING = json.dumps({"do_sample": True, "top_k": 0})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_mixture("llama+gpt2", tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(saved, tmp_path_factory):
    """A client of a server of its own on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server"
    command = [
        sys.executable,
        "-m",
        "mpo_hf.cli.main",
        "serve",
        saved.folder,
        "--host",
        "127.0.0.1",
        "--device",
        "cpu",
    ]
    with log.open("w") as output:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(0.2)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=1, timeout=60)
    finally:
        server.terminate()
        server.wait(30)


def ask(client, saved, **kwargs):
    settings = {"messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0, **kwargs}
    return client.chat.completions.create(model=saved.folder, **settings)


def expected_text(saved, weights, steps=TOKENS):
    prompt = saved.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    [tokens] = greedy(saved.components, weights, [prompt], steps, ends=[saved.tokenizer.eos_token_id])
    return saved.tokenizer.decode(tokens, skip_special_tokens=True)


def test_chat_completion_is_what_the_mixture_writes(client, saved):
    answer = ask(client, saved)
    assert answer.choices[0].message.content == expected_text(saved, saved.weights) != ""
    assert answer.usage.completion_tokens == TOKENS


def test_streamed_chat_completion_is_what_the_mixture_writes(client, saved):
    chunks = [chunk.choices[0].delta.content or "" for chunk in ask(client, saved, stream=True) if chunk.choices]
    assert "".join(chunks) == expected_text(saved, saved.weights)
    assert len([chunk for chunk in chunks if chunk]) > 1


def test_completion_of_a_prompt(client, saved):
    answer = client.completions.create(model=saved.folder, prompt="A cloud", max_tokens=TOKENS, temperature=0)
    inputs = saved.tokenizer("A cloud", return_tensors="pt")
    output = saved.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.choices[0].text == saved.tokenizer.decode(output, skip_special_tokens=True)


def test_seeded_sampling_is_that_of_generate(client, saved):
    answer = ask(client, saved, temperature=0.8, top_p=0.9, seed=7, extra_body={"generation_config": SAMPLING})
    inputs = saved.tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    torch.manual_seed(7)
    output = saved.model.generate(**inputs, **json.loads(SAMPLING), temperature=0.8, top_p=0.9, max_new_tokens=TOKENS)
    text = saved.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.choices[0].message.content == text != expected_text(saved, saved.weights)


def test_request_brings_weights_of_its_own(client, saved):
    config = json.dumps({"mixture_weights": [1.0, 0.0]})
    answer = ask(client, saved, extra_body={"generation_config": config})
    assert answer.choices[0].message.content == expected_text(saved, [1.0, 0.0]) != expected_text(saved, saved.weights)
    # and the next request has the mixture's again
    assert ask(client, saved).choices[0].message.content == expected_text(saved, saved.weights)


def with_config(**config) -> dict:
    return {"extra_body": {"generation_config": json.dumps(config)}}


MISTAKES = {
    "weights off the simplex": (with_config(mixture_weights=[0.7, 0.7]), "sum to 1"),
    "too few weights": (with_config(mixture_weights=[1.0]), "Expected 2 mixture weights"),
    "weights that are no numbers": (with_config(mixture_weights="all"), "must be numbers"),
    "weights that are not finite": (with_config(mixture_weights=[float("nan"), 1.0]), "must be finite"),
    "an option that there is not": (with_config(mixture_weight=[1.0, 0.0]), "no options of generate.*mixture_weight"),
    "a config that is no text": ({"extra_body": {"generation_config": {"top_k": 1}}}, "must be an object in JSON"),
    "a config that is no JSON": ({"extra_body": {"generation_config": "{"}}, "must be an object in JSON"),
    "no beams": (with_config(num_beams=-1), "`num_beams`"),
    "no tokens": ({"max_tokens": 0}, "`max_tokens` must be .* at least 1, got 0"),
    "half a token": ({"max_tokens": 1.5}, "`max_tokens`"),
    "more tokens than the context": ({"max_tokens": 1000}, "do not fit into the context of 128 tokens"),
    "a cold temperature": ({"temperature": -1}, "`temperature` must be a number of at least 0"),
    "a temperature in words": ({"temperature": "hot"}, "`temperature`"),
    "more than everything": ({"top_p": 2}, "`top_p`"),
    "two completions": ({"n": 2}, "`n=2` is not supported"),
    "an empty end": ({"stop": ""}, "`stop`"),
    "a seed in words": ({"seed": "x"}, "`seed`"),
    "no messages": ({"messages": []}, "`messages` must be a list"),
    "a message that is none": ({"messages": ["hi"]}, r"`messages\[0\]` must have a `role`"),
    "another role": ({"messages": [{"role": "robot", "content": "x"}]}, "got .*robot"),
    "a number for a text": ({"messages": [{"role": "user", "content": 3}]}, r"`messages\[0\].content` must be a text"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "cannot read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_mistake_of_a_client_is_told_to_it(client, saved, mistake, stream):
    changed, message = MISTAKES[mistake]
    with pytest.raises(BadRequestError, match=message):
        ask(client, saved, stream=stream, **changed)


def test_server_goes_on_after_mistakes(client, saved):
    with pytest.raises(BadRequestError, match="sum to 1"):
        ask(client, saved, **with_config(mixture_weights=[0.7, 0.7]))
    with pytest.raises(BadRequestError, match="`prompt` must be a text"):
        client.completions.create(model=saved.folder, prompt=["a", "b"], max_tokens=2)
    with pytest.raises(BadRequestError, match="`input` is needed"):
        client.post("/responses", body={"model": saved.folder}, cast_to=object)
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    answer = ask(client, saved, messages=parts, stop=[], n=1, seed=None)  # what makes sense, if it does nothing
    assert answer.choices[0].message.content == expected_text(saved, saved.weights)


def test_error_in_the_middle_of_a_stream_is_json():
    async def chunks():
        yield 'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n'
        yield 'data: {"choices":[{"delta":{"content":"a cloud"}}]}\n\n'
        yield 'data: {"choices":[{"delta":{"content":" is"}}]}\n\ndata: {"error": "it is "full""}\n\n'

    async def read():
        return "".join([chunk async for chunk in await _begun(chunks())])

    events = [json.loads(event.removeprefix("data: ")) for event in asyncio.run(read()).split("\n\n") if event]
    assert events[-1] == {"error": 'it is "full"'} and len(events) == 4


def test_address_in_use_is_told_before_anything_is_loaded(saved, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", saved.folder, "--host", "127.0.0.1", "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    assert main(["serve", saved.folder, "--port=many"]) == 2
    assert "--port must be a number" in capsys.readouterr().err


def test_continuous_batching_is_refused_before_anything_is_loaded(saved, capsys):
    assert main(["serve", saved.folder, "--continuous-batching"]) == 1
    assert "no continuous batching" in capsys.readouterr().err
