"""
The cost of pruning a small weight: KL divergence per token of the pruned mixture from the whole one, and its bound.

    python examples/benchmarks/pruning.py

The mixture has the three adapters of `examples/policies/` over SmolLM2-135M, the third with a small weight ε. The bound is
ε KL(pruned || third policy); see `mpo_hf.mixture.configuration_mixture.prune_mixture_weights`.
"""

import argparse
import sys
from pathlib import Path

import torch

from mpo_hf import MixturePolicyModel
from mpo_hf.mixture.configuration_mixture import prune_mixture_weights


EXAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(EXAMPLES))
from prompts import load_prompts  # noqa: E402
from smollm2 import base_spec, load_tokenizer  # noqa: E402


ADAPTERS = ["positive", "concise", "readable"]
SMALL = [0.01, 0.02, 0.05, 0.1, 0.2]


def divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean KL(first || second) of two tensors of log-probabilities."""
    return (first.exp() * (first - second)).sum(-1).mean().item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer, base = load_tokenizer(), base_spec()
    policies = [{**base, "adapter": str(EXAMPLES / "policies" / name)} for name in ADAPTERS]
    model = MixturePolicyModel.from_policies(policies)
    inputs = tokenizer.apply_chat_template(
        list(load_prompts("test").select(range(args.prompts))["prompt"]),
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        padding=True,
    )
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "eos_token_id": []}
    ids = model.generate(
        **inputs,
        **settings,
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        repetition_penalty=1.0,
    )
    mask = torch.nn.functional.pad(inputs.attention_mask, (0, args.max_new_tokens), value=1)

    def logps(weights) -> torch.Tensor:
        keep = args.max_new_tokens + 1
        output = model(ids, attention_mask=mask, mixture_weights=weights, use_cache=False, logits_to_keep=keep)
        return output.logits[:, :-1].double().log_softmax(-1)

    third = logps([0, 0, 1])
    print("| weight pruned | KL, nats a token | bound |\n|---|---|---|")
    for weight in SMALL:
        weights = [(1 - weight) / 2, (1 - weight) / 2, weight]
        pruned = logps(prune_mixture_weights(weights, below=min(1 / 3, 1.5 * weight)))
        print(f"| {weight} | {divergence(pruned, logps(weights)):.2g} | {weight * divergence(pruned, third):.2g} |")


if __name__ == "__main__":
    main()
