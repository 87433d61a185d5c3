"""`mpo-hf serve` answers an OpenAI client with what `generate()` writes."""

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
from openai import APIStatusError, OpenAI

from mpo_hf.cli.main import main


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


def test_weights_that_make_no_sense_are_an_error_of_that_request_only(client, saved):
    config = json.dumps({"mixture_weights": [0.7, 0.7]})
    with pytest.raises(APIStatusError) as raised:
        ask(client, saved, extra_body={"generation_config": config})
    assert raised.value.status_code >= 400
    assert ask(client, saved).choices[0].message.content == expected_text(saved, saved.weights)


def test_continuous_batching_is_refused_before_anything_is_loaded(saved, capsys):
    assert main(["serve", saved.folder, "--continuous-batching"]) == 1
    assert "no continuous batching" in capsys.readouterr().err
