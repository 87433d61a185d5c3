"""lm-evaluation-harness scores a mixture with its stock wrapper: as an enumeration of next-token probabilities does."""

import json
import math

import pytest
import torch
import yaml
from helpers import EOS, close, greedy
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


pytestmark = pytest.mark.integration
QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " made of stone", " a"], "answer": 0},
    {"question": "Rivers flow", "choices": [" down the hill", " up"], "answer": 0},
    {"question": "It rains when", "choices": [" clouds cool", " it does", " you sing", " never"], "answer": 1},
]
# the second is longer than the 128 tokens of a context
TEXTS = ["Rain is water that falls from clouds.", "A river runs from the hills to the sea. " * 5]
STOPS = ["4", "#"]
TASKS = {
    "team_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "team_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
        ],
    },
    "team_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": STOPS, "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Tasks of a team's own, in a folder: YAML files, and the data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    data = {"questions": QUESTIONS, "texts": [{"text": text} for text in TEXTS]}
    for name, rows in data.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    for name, task in TASKS.items():
        file = folder / ("texts.json" if name == "team_perplexity" else "questions.json")
        source = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
        settings = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test", **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module", params=["object", "folder"])
def results(request, saved, tasks):
    """What the harness finds, given the mixture as a model or by its folder."""
    if request.param == "object":
        model = {"model": HFLM(pretrained=saved.model, tokenizer=saved.tokenizer, batch_size=2)}
    else:
        model = {"model": "hf", "model_args": {"pretrained": saved.folder}, "device": "cpu", "batch_size": 2}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(**model, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0)


def encode(saved, text: str) -> list[int]:
    return saved.tokenizer(text).input_ids


@torch.no_grad()
def log_likelihood(saved, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """
    Log-probability of a continuation under the token-level mixture, normalized at every step, in float64; and whether it
    is what greedy decoding would have chosen.
    """
    pooled = 0
    for weight, component in zip(saved.weights, saved.components):
        logits = component(torch.tensor([(context + continuation)[:-1]]), use_cache=False).logits[0]
        pooled = pooled + weight * logits[len(context) - 1 :].double().log_softmax(-1)
    logps, target = pooled.log_softmax(-1), torch.tensor(continuation)
    return logps.gather(-1, target[:, None]).sum().item(), bool((logps.argmax(-1) == target).all())


def samples(results, task):
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def test_choices_have_the_log_likelihoods_of_the_mixture(results, saved):
    hits = []
    for sample, doc in zip(samples(results, "team_choice"), QUESTIONS, strict=True):
        expected = [log_likelihood(saved, encode(saved, doc["question"]), encode(saved, c)) for c in doc["choices"]]
        assert [r[0][1] for r in sample["resps"]] == [is_greedy for _, is_greedy in expected]
        found, scores = [r[0][0] for r in sample["resps"]], [score for score, _ in expected]
        assert found == close(scores)
        hits.append(scores.index(max(scores)) == doc["answer"])
    assert results["results"]["team_choice"]["acc,none"] == pytest.approx(sum(hits) / len(hits))


def test_perplexity_is_that_of_the_mixture(results, saved):
    expected = []
    for text in TEXTS:
        tokens = [EOS, *encode(saved, text)]  # the harness puts the end token first where there is no first token
        scores = [log_likelihood(saved, tokens[:1], tokens[1:129])[0]]
        if rest := tokens[129:]:
            # the last window is full: it reaches back as far as the context allows
            scores.append(log_likelihood(saved, tokens[len(tokens) - 129 : 129], rest)[0])
        expected.append(sum(scores))
    assert len(encode(saved, TEXTS[1])) > 128
    found = [sample["resps"][0][0] for sample in samples(results, "team_perplexity")]
    assert found == close(expected)
    # a token of these models is a byte
    count = sum(len(encode(saved, text)) for text in TEXTS)
    perplexity = math.exp(-sum(expected) / count)
    assert results["results"]["team_perplexity"]["byte_perplexity,none"] == close(perplexity)


def test_generations_are_those_of_the_mixture(results, saved):
    prompts = [encode(saved, doc["question"]) for doc in QUESTIONS]
    completions = greedy(saved.components, saved.weights, prompts, 16)
    found = []
    for sample, completion in zip(samples(results, "team_generation"), completions, strict=True):
        text = saved.tokenizer.decode(completion, skip_special_tokens=True)
        cut = min((text.find(stop) for stop in STOPS if stop in text), default=len(text))
        found.append(cut < len(text))
        assert sample["resps"][0][0] == text[:cut]
    assert any(found) and not all(found)
