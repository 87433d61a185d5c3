"""
The speedup from drafts: assisted generation with several kinds of drafts, compared with plain generation.

    python examples/benchmarks/speculative.py --threads 2

The mixture has the three adapters of `examples/policies/` over SmolLM2-135M, which run in one forward pass, or with
`--one_after_another` in three, as three full checkpoints would. A pass of the mixture over all drafted tokens verifies them;
the output is that of the mixture, token for token in greedy decoding.

- reference: the base without adapters writes drafts (`assistant_model=model.reference_policy`)
- component: the first adapter alone does (`assistant_model=model.policy(0)`)
- prompt lookup: drafts are copied from the previous text (`prompt_lookup_num_tokens`)

The methods take turns, prompt by prompt. Printed are the median time per token relative to plain generation, and the mean number
of tokens per pass of the mixture, which is 1 without drafts and bounds the speedup of a draft at no cost.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import describe_machine, ratios, show, table
from transformers import PreTrainedTokenizerBase

from mpo_hf import MixturePolicyModel


EXAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(EXAMPLES))
from prompts import load_prompts  # noqa: E402
from smollm2 import base_spec, load_tokenizer  # noqa: E402


ADAPTERS = ["positive", "concise", "readable"]
# prompts whose text is likely to be repeated
COPYING = "Repeat this text with all its mistakes corrected: "


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, help="prompts of each kind")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--draft_tokens", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for greedy decoding")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--one_after_another", action="store_true", help="run the adapters in turn, as full checkpoints would"
    )
    parser.add_argument("--cpu_time", action="store_true", help="count CPU time, for machines that have other work")
    return parser.parse_args()


def load_mixture() -> MixturePolicyModel:
    base = base_spec()
    policies = [{**base, "adapter": str(EXAMPLES / "policies" / name), "label": name} for name in ADAPTERS]
    return MixturePolicyModel.from_policies(policies, reference=base)


def make_ways(model: MixturePolicyModel, draft_tokens: list[int]) -> dict[str, dict[str, Any]]:
    """Arguments of `generate` for every kind of draft."""
    ways: dict[str, dict[str, Any]] = {"plain": {}}
    for count in draft_tokens:
        for name, assistant in (("reference", model.reference_policy), ("component", model.policy(0))):
            assistant.generation_config.num_assistant_tokens = count
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
            assistant.generation_config.assistant_confidence_threshold = 0.0
            ways[f"{name}, {count} tokens"] = {"assistant_model": assistant}
        ways[f"prompt lookup, {count} tokens"] = {"prompt_lookup_num_tokens": count}
    return ways


def load_questions(tokenizer: PreTrainedTokenizerBase, count: int) -> dict[str, list[torch.Tensor]]:
    """Token ids of prompts: questions, and texts to repeat."""
    questions = [row["prompt"][0]["content"] for row in load_prompts("test").select(range(count * 4))][::4]
    texts = {
        "questions": questions,
        "copying": [COPYING + " ".join(questions[i:] + questions[:i]) for i in range(count)],
    }
    return {
        kind: [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids
            for text in own
        ]
        for kind, own in texts.items()
    }


def run(
    model: MixturePolicyModel, ids: torch.Tensor, settings: dict[str, Any], clock: Callable[[], float]
) -> tuple[float, int, int]:
    """Seconds, generated tokens, and passes of the mixture."""
    passes: list[int] = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    start = clock()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=[], **settings)
    seconds = clock() - start
    hook.remove()
    return seconds, output.shape[1] - ids.shape[1], len(passes)


@torch.no_grad()
def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.process_time if args.cpu_time else time.perf_counter
    tokenizer, model = load_tokenizer(), load_mixture()
    model.stack_adapters = not args.one_after_another
    common = {"max_new_tokens": args.max_new_tokens, "pad_token_id": tokenizer.pad_token_id, "do_sample": False}
    if args.temperature:
        common |= {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    ways = make_ways(model, args.draft_tokens)
    way = "one after another" if args.one_after_another else "side by side"
    print(f"SmolLM2-135M, float32, K = {len(ADAPTERS)} {way}, {args.threads} threads, {clock.__name__}\n")
    rows = []
    for kind, prompts in load_questions(tokenizer, args.prompts).items():
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        yields: dict[str, list[float]] = {way: [] for way in ways}
        for ids in [prompts[0], *prompts]:  # the first prompt runs twice: its first run is not counted
            for way, settings in ways.items():
                time_taken, tokens, passes = run(model, ids, {**common, **settings}, clock)
                seconds[way].append(time_taken / tokens)
                yields[way].append(tokens / passes)
        relative = ratios({way: own[1:] for way, own in seconds.items()}, "plain")
        for way in ways:
            milliseconds = statistics.median(seconds[way][1:]) * 1000
            rows.append(
                [kind, way, show(relative[way]), f"{statistics.mean(yields[way][1:]):.2f}", f"{milliseconds:.0f}"]
            )
            print(rows[-1], flush=True)
    print("\n" + table(["prompts", "draft", "time per token, relative", "tokens a pass", "ms a token"], rows))
    print(f"\n{describe_machine()}")


if __name__ == "__main__":
    main()
