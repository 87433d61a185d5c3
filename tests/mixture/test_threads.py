"""One mixture in several threads: each gets what it would get alone, from PEFT or from a run of one thread."""

import sys
import threading
from collections.abc import Callable

import pytest
import torch
from helpers import BOS, CLOSE, PAD, load_lora, tiny_tokenizer
from transformers import AutoModelForCausalLM, TextIteratorStreamer

from mpo_hf import MixtureLogitsProcessor, MixturePolicyModel, sequence_level_beam_search
from mpo_hf.rollouts import completion_logps, sample_completions


IDS = torch.tensor([[BOS, 5, 9, 3]])
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": [], "pad_token_id": PAD}
WEIGHTS = [[0.1, 0.3, 0.6], [0.6, 0.3, 0.1], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]


@pytest.fixture(autouse=True)
def threads_take_turns_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def mixture(folders):
    return MixturePolicyModel.from_policies([folders.base, folders.kind, folders.terse])


@pytest.fixture(scope="module")
def alone(folders):
    """The three policies, each over a base of its own."""
    base = AutoModelForCausalLM.from_pretrained(folders.base).eval()
    return [base, load_lora(folders.kind, folders.base), load_lora(folders.terse, folders.base)]


@pytest.fixture(params=["side by side", "one after another"])
def run(request, mixture):
    mixture.stack_adapters = request.param == "side by side"
    yield mixture
    mixture.stack_adapters = True


def written(model, **kwargs) -> list[list[int]]:
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), **{**GREEDY, **kwargs}).tolist()


def at_once(*calls: Callable, repeats: int = 3) -> list[list]:
    """What each call returns in each round, in a thread of its own; all begin a round together."""
    found: list[list] = [[] for _ in calls]
    together = threading.Barrier(len(calls))

    def work(call: Callable, results: list) -> None:
        for _ in range(repeats):
            together.wait(timeout=60)
            try:
                results.append(call())
            except Exception as error:
                results.append(error)

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in zip(calls, found)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["dynamic", "none", "static"],
)
def test_weights_of_a_call_are_those_of_its_thread(run, options):
    calls = [lambda weights=weights: written(run, mixture_weights=weights, **options) for weights in WEIGHTS]
    expected = [call() for call in calls]
    assert len({str(tokens) for tokens in expected}) == len(WEIGHTS)
    assert at_once(*calls) == [[tokens] * 3 for tokens in expected]


def test_all_views_of_one_base_are_themselves(run, alone):
    mixed = written(run)
    policies = [run.policy(k) for k in range(3)]
    nested = MixturePolicyModel.from_policies([run])
    nested.stack_adapters = False
    prompts = [IDS[0].tolist()]
    drawn = sample_completions(alone_mixture(alone), prompts, 2, 6, PAD)
    own_logps = torch.cat([completion_logps([alone_mixture([policy])], drawn) for policy in alone], dim=1)

    calls = [
        *(lambda policy=policy: written(policy) for policy in policies),
        lambda: written(run),
        lambda: written(nested),
        lambda: written(policies[0], logits_processor=[MixtureLogitsProcessor([policies[1], policies[2]])]),
        lambda: completion_logps(policies, drawn),
    ]
    *texts, logps = at_once(*calls, repeats=2)
    assert texts == [[tokens] * 2 for tokens in [*map(written, alone), mixed, mixed, mixed]]
    for found in logps:
        torch.testing.assert_close(found, own_logps, **CLOSE)


def alone_mixture(policies: list) -> MixturePolicyModel:
    return MixturePolicyModel.from_policies(policies)


def test_streams_do_not_mix(run, alone):
    tokenizer = tiny_tokenizer([f"t{i}" for i in range(32)])

    def stream(model):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=written, args=(model,), kwargs={"streamer": streamer}, daemon=True)
        thread.start()
        text = "".join(streamer)
        thread.join(timeout=60)
        return text

    expected = [tokenizer.decode(written(policy)[0][IDS.shape[1] :]) for policy in alone[1:]]
    calls = [lambda policy=policy: stream(policy) for policy in map(run.policy, (1, 2))]
    assert at_once(*calls) == [[text] * 3 for text in expected]


def test_hidden_states_for_trainers_are_those_of_each_policy(run, alone):
    def head_logps(model):
        with torch.no_grad():
            hidden, head = model.base_model(IDS).last_hidden_state, model.get_output_embeddings()
            return torch.nn.functional.linear(hidden, head.weight, head.bias).log_softmax(-1)

    with torch.no_grad():
        expected = [policy(input_ids=IDS).logits.log_softmax(-1) for policy in alone]
    found = at_once(*(lambda policy=policy: head_logps(policy) for policy in map(run.policy, range(3))))
    for rounds, own in zip(found, expected):
        for logps in rounds:
            torch.testing.assert_close(logps, own, **CLOSE)


def test_a_reference_is_loaded_once(folders):
    model = MixturePolicyModel.from_policies([folders.kind, folders.terse], reference=folders.gpt2)
    reference = AutoModelForCausalLM.from_pretrained(folders.gpt2).eval()
    found = at_once(*[lambda: written(model.reference_policy)] * 3, repeats=1)
    assert found == [[written(reference)]] * 3 and len(model.backbones) == 2


def test_what_sampling_sets_is_of_its_thread(run):
    own = run.generation_config
    calls = [
        lambda weights=weights, temperature=temperature: sample_completions(
            run, [IDS[0].tolist()], 2, 6, PAD, mixture_weights=torch.tensor(weights), temperature=temperature
        )
        for weights, temperature in zip(WEIGHTS[:2], [0.7, 1.3])
    ]
    found = at_once(*calls)
    assert run.generation_config is own and run.component_hook is None
    policies = [run.policy(k) for k in range(3)]
    for rounds in found:
        for drawn in rounds:
            torch.testing.assert_close(drawn.policy_logps, completion_logps(policies, drawn), **CLOSE)


def test_beams_are_scored_by_the_forward_passes_of_their_thread(run):
    options = {"num_beams": 3, "custom_generate": sequence_level_beam_search, "eos_token_id": 7, "length_penalty": 0.0}
    calls = [lambda weights=weights: written(run, mixture_weights=weights, **options) for weights in WEIGHTS[:3]]
    expected = [call() for call in calls]
    assert at_once(*calls) == [[tokens] * 3 for tokens in expected]


def test_a_processor_keeps_the_text_of_each_thread(alone):
    processor = MixtureLogitsProcessor(alone[1:])
    lengths: list[int] = []
    processor.others.register_forward_pre_hook(lambda model, args: lengths.append(args[0].shape[1]))
    prompts = [torch.tensor([[BOS, token, 9, 3]]) for token in (5, 12, 20)]

    def call(prompt):
        return alone[0].generate(
            prompt, attention_mask=torch.ones_like(prompt), logits_processor=[processor], **GREEDY
        )

    model = alone_mixture(alone)
    expected = [model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY) for prompt in prompts]
    found = at_once(*(lambda prompt=prompt: call(prompt).tolist() for prompt in prompts))
    assert found == [[tokens.tolist()] * 3 for tokens in expected]
    # nine calls read their prompt once, and go on from their own keys and values
    assert sorted(lengths) == [1] * 9 * 7 + [IDS.shape[1]] * 9


def test_a_processor_of_another_adapter_leaves_the_calling_model_alone(folders, alone):
    model = load_lora(folders.kind, folders.base)
    model.load_adapter(folders.terse, "terse")
    model.set_adapter("terse")
    processor = MixtureLogitsProcessor(model)
    model.set_adapter("default")
    calls = [lambda: written(model, logits_processor=[processor]), lambda: written(model)]
    expected = [written(alone_mixture(alone[1:])), written(alone[1])]
    assert at_once(*calls) == [[tokens] * 3 for tokens in expected]
    parameters = {id(parameter) for parameter in model.parameters()}
    assert parameters == {id(parameter) for parameter in processor.others.parameters()}


def test_each_thread_saves_code_or_none(mixture, tmp_path):
    def save(name, with_code):
        mixture.save_pretrained(tmp_path / name, with_code=with_code)
        return (tmp_path / name / "modeling_mixture.py").exists(), "auto_map" in (
            tmp_path / name / "config.json"
        ).read_text()

    names = {f"{k}": k % 2 == 0 for k in range(4)}
    found = at_once(*(lambda pair=pair: save(*pair) for pair in names.items()))
    assert found == [[(with_code, with_code)] * 3 for with_code in names.values()]
    assert type(mixture)._auto_class is None


class Interrupted:
    """Interrupts the last layer of a model once, as Ctrl-C does."""

    def __init__(self, model):
        layer = model.get_base_model().model.layers[-1]
        self.hook = layer.register_forward_pre_hook(self.interrupt)

    def interrupt(self, layer, args):
        self.hook.remove()
        raise KeyboardInterrupt


@pytest.mark.parametrize("active", ["kind", None])
def test_a_model_is_left_as_it_was_also_after_an_interrupt(folders, alone, active):
    model = load_lora(folders.kind, folders.base)
    model.load_adapter(folders.terse, "terse")
    mixtures = []
    for name in ("terse", "default"):
        model.set_adapter(name)
        mixtures.append(MixturePolicyModel.from_policies([model]))
    if active is None:
        model.base_model.disable_adapter_layers()
    expected = written(alone[0 if active is None else 1])
    trained = [parameter.requires_grad for parameter in model.parameters()]
    Interrupted(model)
    with pytest.raises(KeyboardInterrupt):
        written(mixtures[0])
    assert written(model) == expected
    assert written(mixtures[0]) == written(alone[2]) and written(model) == expected
    assert model.active_adapter == "default"
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    # nobody waits for a lock that the interrupted call held
    assert at_once(lambda: written(mixtures[0]), repeats=1) == [[written(alone[2])]]
