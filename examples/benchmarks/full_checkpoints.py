"""
The cost of a decoding step of a mixture of K full models of one architecture, by several methods to run them.

    python examples/benchmarks/full_checkpoints.py --threads 2 [--dtype bfloat16]

The methods take turns, step by step, so that all of them see the same load of the machine. The ratio to the first method is
printed, as median and quartiles over the repetitions:

- one after another: the default of a mixture
- threads: the same, each model in its own thread
- vmap: `torch.func.vmap` over the stacked weights of all models
- side by side: one pass over all rows, in which every linear layer is a batched product with the weights of all models
  (`model.stack_models = True`)
- adapters: the models as extracted adapters of one base (rank 32 on all linear layers), side by side

Weights are random, as the time of a step does not depend on them.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from common import add_random_adapters, describe_machine, interleaved, mix, ratios, show, table
from torch.func import functional_call, stack_module_state, vmap
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mpo_hf import MixturePolicyModel
from mpo_hf.mixture.compat import CACHE_NAME
from mpo_hf.mixture.pooling import log_linear_pool


Step = Callable[[], torch.Tensor]

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 1024},
    "10M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 8192},
    # SmolLM2-135M
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "vocab_size": 49152},
}  # fmt: skip
KEY_VALUE_HEADS = {"tiny": 4, "10M": 4, "135M": 3}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4], help="numbers of models, K")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache before the step")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapters")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


def filled_cache(config, layers: int, rows: int, context: int) -> DynamicCache:
    """A cache of random keys and values."""
    cache = DynamicCache()
    shape = (rows, config.num_key_value_heads, context, config.head_dim)
    for layer in range(layers):
        cache.update(torch.randn(shape, dtype=config.dtype), torch.randn(shape, dtype=config.dtype), layer)
    return cache


def step_of_mixture(mixture: MixturePolicyModel, ids: torch.Tensor, context: int) -> Step:
    cache = DynamicCache(config=mixture.config)
    mixture(ids, cache=cache)
    config = mixture.config.decoder_configs[0]
    shape = (len(ids), config.num_key_value_heads, context, config.head_dim)
    for layer in cache.layers:
        layer.update(torch.randn(shape, dtype=config.dtype), torch.randn(shape, dtype=config.dtype))
    return lambda: mixture(ids, cache=cache).logits


def make_steps(models: list[PreTrainedModel], batch_size: int, context: int, rank: int) -> dict[str, Step]:
    """One decoding step of every method, each with its own cache."""
    count, config, layers = len(models), models[0].config, models[0].config.num_hidden_layers
    ids = torch.randint(config.vocab_size, (batch_size, 1))
    mixture = MixturePolicyModel.from_policies(models)
    weights = mixture.config.mixture_weights
    pool = ThreadPoolExecutor(count)
    own_caches = [filled_cache(config, layers, batch_size, context) for _ in models]
    stacked = MixturePolicyModel.from_policies(models)
    stacked.stack_models = True
    assert stacked.stacked_components == [list(range(count))]
    parameters, buffers = stack_module_state(models)
    empty = copy.deepcopy(models[0]).to("meta")
    shape = (count, 2, layers, batch_size, config.num_key_value_heads, context, config.head_dim)
    states = torch.randn(shape, dtype=config.dtype)
    positions = torch.full((batch_size, 1), context)

    def forward(model: PreTrainedModel, cache: DynamicCache) -> torch.Tensor:
        with torch.no_grad():  # this is a setting of each thread
            return model(ids, **{CACHE_NAME: cache}).logits

    def run_threads() -> torch.Tensor:
        return log_linear_pool(list(pool.map(forward, models, own_caches)), torch.tensor(weights))

    def call(parameters, buffers, states) -> torch.Tensor:
        cache = DynamicCache()
        for layer in range(layers):
            cache.update(states[0, layer], states[1, layer], layer)
        kwargs = {"input_ids": ids, CACHE_NAME: cache, "position_ids": positions}
        return functional_call(empty, (parameters, buffers), kwargs=kwargs).logits

    def run_vmap() -> torch.Tensor:
        return log_linear_pool(vmap(call)(parameters, buffers, states).unbind(), torch.tensor(weights))

    return {
        "one after another": step_of_mixture(mixture, ids, context),
        "threads": run_threads,
        "vmap": run_vmap,
        "side by side": step_of_mixture(stacked, ids, context),
        "adapters": step_of_mixture(mix(add_random_adapters(models[0], count, rank), count), ids, context),
    }


@torch.no_grad()
def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    names = ["threads", "vmap", "side by side", "adapters"]
    dtype = getattr(torch, args.dtype)
    print(f"{args.dtype}, {args.threads} threads, {args.context} tokens of context. Ratios to one after another:\n")
    rows = []
    for shape in args.shapes:
        config = LlamaConfig(**SHAPES[shape], num_key_value_heads=KEY_VALUE_HEADS[shape], tie_word_embeddings=True)
        for count in args.counts:
            models = [LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False) for _ in range(count)]
            config.dtype = dtype
            for batch_size in args.batch_sizes:
                ways = make_steps(models, batch_size, args.context, args.rank)
                seconds = interleaved(ways, args.repetitions, time.perf_counter)
                cells = ratios(seconds, "one after another")
                milliseconds = statistics.median(seconds["one after another"]) * 1000
                rows.append([shape, count, batch_size, f"{milliseconds:.1f}", *(show(cells[name]) for name in names)])
                print(rows[-1], flush=True)
    print("\n" + table(["model", "K", "batch", "one after another, ms", *names], rows))
    print(f"\n{describe_machine()}")


if __name__ == "__main__":
    main()
