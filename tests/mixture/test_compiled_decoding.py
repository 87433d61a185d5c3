"""
Compiled steps of decoding: one graph, which a GPU can record and replay.

There is no GPU here, but what would keep a CUDA graph from being recorded shows in the graph that the compiler is given:
tensors it writes to that may have moved by the next step, and numbers kept on the CPU.
"""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import BOS, CLOSE, PAD, VOCAB, left_pad, save_lora, save_tiny, tiny
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from transformers import CompileConfig, StaticCache

from mpo_hf import MixturePolicyModel
from mpo_hf.mixture import stacked_rows
from mpo_hf.mixture.compat import CACHE_NAME
from mpo_hf.mixture.mixture_cache import StepCache


pytestmark = pytest.mark.integration
INPUTS = left_pad([[BOS, 7, 11, 3, 22, 8, 14], [BOS, 30], [BOS, 6, 6, 19, 27]])
SETTINGS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": [], "pad_token_id": PAD}
ROWS, LENGTH = INPUTS["input_ids"].shape
# input ids, positions and a mask as long as the cache: all that a step should have to bring to a recorded graph
SMALL = ROWS * (LENGTH + SETTINGS["max_new_tokens"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and two adapters over it."""
    folder = tmp_path_factory.mktemp("compiled")
    base = save_tiny(folder / "base", "llama", 20, num_hidden_layers=1)
    return base, *(save_lora(folder / f"adapter_{i}", base, 30 + i, r=2 + i) for i in range(2))


@pytest.fixture
def pair(folders):
    return MixturePolicyModel.from_policies(list(folders[1:]), [0.4, 0.6])


class Recorder:
    """A backend that runs graphs as they are, and notes what a CUDA graph could not be made of."""

    def __init__(self):
        self.side_by_side: list[bool] = []  # by graph, whether adapters run in one pass there
        self.obstacles: list[str] = []
        self.kept: list[int] = []  # by graph, how many tensors it writes to that stay where they are
        backend = aot_autograd(fw_compiler=lambda module, _: self._look(module), keep_inference_input_mutations=True)
        self.config = CompileConfig(fullgraph=True, backend=backend, mode=None)
        self.config._compile_all_devices = True  # Transformers compiles on accelerators only, unless told so
        torch._dynamo.reset()

    def _look(self, module: fx.GraphModule):
        nodes = module.graph.nodes
        self.side_by_side.append(any(node.target is torch.ops.aten.baddbmm.default for node in nodes))
        stay = set(TracingContext.get().fw_metadata.static_input_indices)
        written = {node.args[0] for node in nodes if node.target is torch.ops.aten.copy_.default}
        self.kept.append(0)
        for i, node in enumerate(node for node in nodes if node.op == "placeholder"):
            self.kept[-1] += i in stay and node in written
            if i in stay or not isinstance(node.meta["val"], torch.Tensor):
                continue
            if node in written:
                self.obstacles.append(f"writes to an input that may move: {node.meta['val']}")
            elif node.meta["val"].numel() > SMALL:
                self.obstacles.append(f"copies a large input at every step: {node.meta['val']}")
        self.obstacles += [
            f"brings a constant to the device: {node.format_node()}" for node in nodes if node.op == "get_attr"
        ]
        return make_boxed_func(module.forward)

    def generate(self, model, **kwargs):
        return model.generate(
            **INPUTS, **SETTINGS, cache_implementation="static", compile_config=self.config, **kwargs
        ).tolist()


def written_alone(model, **kwargs):
    """What is written without compiling anything, one adapter after another."""
    model.stack_adapters = False
    output = model.generate(**INPUTS, **SETTINGS, **kwargs).tolist()
    model.stack_adapters = True
    return output


def test_a_step_is_one_graph_that_a_gpu_can_record(pair):
    recorder = Recorder()
    for weights in ([0.4, 0.6], [0.9, 0.1], [0.2, 0.8]):  # other weights are other numbers for the same code
        pair.mixture_weights = weights
        assert recorder.generate(pair) == written_alone(pair)
    assert (recorder.side_by_side, recorder.obstacles) == ([True], [])
    assert recorder.kept == [3]  # keys, values and lengths of the one layer, not those of each adapter


@pytest.mark.parametrize("prompt", [INPUTS["input_ids"], INPUTS["input_ids"][:, :1]], ids=["long", "one token"])
def test_a_cache_that_was_handed_out_is_an_ordinary_one(pair, prompt):
    config = Recorder().config
    given = {"attention_mask": torch.ones_like(prompt), "return_dict_in_generate": True, **SETTINGS}
    output = pair.generate(prompt, cache_implementation="static", compile_config=config, **given)
    cache, length = output[CACHE_NAME], output.sequences.shape[1] - 1
    assert type(cache) is StaticCache
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [length] * 2
    grown = pair.generate(prompt, **given)[CACHE_NAME]
    for layer, other in zip(cache.layers, grown.layers):
        torch.testing.assert_close(layer.keys[:, :, :length], other.keys, **CLOSE)
        torch.testing.assert_close(layer.values[:, :, :length], other.values, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("change", ["nothing", "reorder", "copy", "reset", "alone", "other keys", "other layers"])
def test_what_happens_to_a_cache_between_two_steps_is_noticed(pair, change):
    def step(ids, cache):
        given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1]).expand(ids.shape)}
        inputs = pair.prepare_inputs_for_generation(ids, next_sequence_length=1, cache=cache, **given)
        return type(inputs[CACHE_NAME]) is StepCache, pair(**inputs).logits[:, -1]

    ids, cache = INPUTS["input_ids"][:, :4].clamp(min=3), StaticCache(config=pair.config, max_cache_len=12)
    pair(ids[:, :3], cache=cache)
    assert step(ids, cache)[0]
    if change == "reorder":
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        ids = ids[[2, 0, 1]]
    elif change == "copy":
        original, cache = cache, copy.deepcopy(cache)
        step(torch.cat([ids, ids[:, :1] + 1], 1), original)
    elif change == "reset":
        cache.reset()
        ids = ids[:, :0]
    elif change == "alone":
        ids = torch.cat([ids, ids[:, 2:3]], 1)
        pair.stack_adapters = False
        assert step(ids, cache)[0]  # how they run is decided later
        pair.stack_adapters = True
    elif change == "other keys":
        cache.layers[1].keys = cache.layers[1].keys.flip(0).flip(0)
    elif change == "other layers":
        cache.layers = copy.deepcopy(cache.layers)
    joined = change not in ("reorder", "copy", "other keys", "other layers")
    for new in (4, 21, 8):
        ids = torch.cat([ids, torch.full((ROWS, 1), new)], 1)
        was_joined, logits = step(ids, cache)
        assert was_joined == joined
        torch.testing.assert_close(logits, pair(ids).logits[:, -1], **CLOSE)
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {ids.shape[1]}


@pytest.mark.parametrize(
    "weights",
    [[[0.4, 0.6], [0.9, 0.1]], [torch.tensor([[0.5, 0.5], [1.0, 0.0], [w, 1 - w]]) for w in (0.1, 0.3)]],
    ids=["for the call", "by row"],
)
def test_weights_of_a_call_break_no_graph(pair, weights):
    recorder = Recorder()
    for own in weights:
        assert recorder.generate(pair, mixture_weights=own) == written_alone(pair, mixture_weights=own)
    assert (recorder.side_by_side, recorder.obstacles) == ([True], [])


def test_adapters_run_side_by_side_behind_a_prompt_that_was_too_long_for_it(pair, monkeypatch):
    monkeypatch.setattr(stacked_rows, "MAX_STACKED_TOKENS", 2 * ROWS)
    recorder = Recorder()
    for _ in range(2):
        assert recorder.generate(pair) == written_alone(pair)
    assert (recorder.side_by_side, recorder.obstacles) == ([True], [])


@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}], ids=["growing", "static"])
def test_adapters_that_have_changed_are_noticed_behind_a_long_prompt(pair, monkeypatch, way):
    monkeypatch.setattr(stacked_rows, "MAX_STACKED_TOKENS", 2 * ROWS)
    before = pair.generate(**INPUTS, **SETTINGS, **way).tolist()
    with torch.no_grad():
        for name, parameter in pair.named_parameters():
            if "lora_A" in name:
                parameter.mul_(-3)
    after = pair.generate(**INPUTS, **SETTINGS, **way).tolist()
    assert after == written_alone(pair) != before


@pytest.mark.slow  # three graphs
def test_chunks_of_a_prompt_are_compiled_side_by_side(pair):
    recorder = Recorder()
    assert recorder.generate(pair, prefill_chunk_size=4) == written_alone(pair)
    assert (recorder.side_by_side, recorder.obstacles) == (
        [True] * 3,
        [],
    )  # chunks of four and three tokens, and a step


def test_one_after_another_is_one_graph_too(pair):
    expected = pair.generate(**INPUTS, **SETTINGS).tolist()
    pair.stack_adapters = False
    recorder = Recorder()
    assert recorder.generate(pair) == expected
    assert (recorder.side_by_side, recorder.obstacles) == ([False], [])


def test_models_with_embeddings_of_different_sizes_are_one_graph():
    model = MixturePolicyModel.from_policies(
        [tiny("llama", 1, num_hidden_layers=1), tiny("gpt2", 2, num_hidden_layers=1, vocab_size=VOCAB + 8)],
        [0.4, 0.6],
        vocab_size=VOCAB,
    )
    recorder = Recorder()
    assert recorder.generate(model) == written_alone(model)
    assert (recorder.side_by_side, recorder.obstacles) == ([False], [])


def test_a_component_that_the_cache_lacks_is_noticed_between_compiled_steps(pair):
    class Turn:
        def __call__(self, ids, scores):
            pair.mixture_weights = [0.5, 0.5]
            return scores

    pair.mixture_weights = [1.0, 0.0]
    with pytest.raises(ValueError, match=r"holds keys and values of the components \[0\] only"):
        Recorder().generate(pair, logits_processor=[Turn()])
