"""
The memory and time of pooling the logits of K components.

    python examples/benchmarks/pooling.py --threads 2

`log_linear_pool` adds components in place, some rows at a time. It is compared with tensors of the full size, as in calls
that are differentiated. The two take turns, and the ratio of their times is printed as median and quartiles.
Memory is what a call allocates in addition to the logits of a component (Linux), in copies of these in float32:
one copy is the result.
"""

import argparse
import time

import torch
from common import describe_machine, interleaved, peak_memory, ratios, show, table

from mpo_hf.mixture.pooling import log_linear_pool


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--components", type=int, default=3, help="number of components, K")
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[49152, 128256])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu_time", action="store_true", help="count the CPU time of the process, for machines that have other work"
    )
    return parser.parse_args()


def pool_whole(logits: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Pooling with tensors of the full size."""
    pooled = None
    for component_logits, weight in zip(logits, weights):
        term = weight * torch.log_softmax(component_logits, dim=-1, dtype=torch.float32)
        pooled = term if pooled is None else pooled + term
    return pooled


@torch.no_grad()
def measure(logits: torch.Tensor, args: argparse.Namespace) -> list[str]:
    """Cells of a row, with one tensor in place of all components, whose own memory is not counted."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    components, weights = [logits] * args.components, [1 / args.components] * args.components
    ways = {
        "in place": lambda: log_linear_pool(components, weights),
        "whole": lambda: pool_whole(components, weights),
    }
    seconds = interleaved(ways, args.repetitions, clock)
    copy = logits.numel() * 4 / 2**20
    copies = [f"{peak_memory(way) / copy:.2f}" for way in ways.values()]
    return [f"{copy:.1f}", *copies, show(ratios(seconds, "in place")["whole"])]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.components} components, batch {args.batch_size}; {describe_machine()}\n")
    header = [
        "logits",
        "length",
        "vocabulary",
        "a copy, MiB",
        "in place, copies",
        "whole, copies",
        "time: whole / in place",
    ]
    rows = []
    for dtype in args.dtypes:
        for length in args.lengths:
            for vocab_size in args.vocab_sizes:
                logits = torch.randn(args.batch_size, length, vocab_size, dtype=getattr(torch, dtype))
                rows.append([dtype, length, vocab_size, *measure(logits, args)])
    print(table(header, rows))


if __name__ == "__main__":
    main()
