"""
Measures the difference between token-level and sequence-level mixing on real policies, and the cost of a particle filter.

The mixture is that of `quickstart.py` at uniform weights. Completions are sampled token by token; the sum of log Z over their
steps is log W, the exact log importance weight for the sequence-level mixture, at every length:

    python examples/sequence_level.py
"""

import argparse
import statistics
import time

import torch
from prompts import load_prompts
from quickstart import open_policies
from smollm2 import load_tokenizer
from transformers import set_seed
from transformers.utils import logging

from mpo_hf import MixturePolicyModel, sequential_monte_carlo
from mpo_hf.estimation.objectives import effective_sample_size


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_prompts", type=int, default=6, help="held-out prompts")
    parser.add_argument("--num_particles", type=int, default=16, help="completions a prompt")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--num_rounds", type=int, default=5, help="timings of each way to decode")
    parser.add_argument(
        "--dtype", default="float32", help="of the policies; auto: bfloat16 where this processor is fast in it"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def tokenize(tokenizer, prompts: list) -> dict[str, torch.Tensor]:
    return tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True, padding_side="left"
    )


def sample_log_weights(
    model: MixturePolicyModel, inputs: dict, num_particles: int, max_new_tokens: int
) -> torch.Tensor:
    """log W of completions of the token-level mixture, truncated after each of their tokens: `(prompts, particles, tokens)`."""
    log_z = []
    hook = model.register_forward_hook(lambda _, args, output: log_z.append(output.logits[:, -1].logsumexp(-1)))
    with hook:
        sequences = model.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            num_return_sequences=num_particles,
            max_new_tokens=max_new_tokens,
        )
    completions = sequences[:, inputs["input_ids"].shape[1] :]
    ended = torch.isin(completions, torch.tensor(model.generation_config.eos_token_id)).long()
    counts = ended.cumsum(-1) - ended == 0
    log_weights = (torch.stack(log_z, dim=-1) * counts).double().cumsum(-1)
    columns = torch.arange(max_new_tokens).clamp(max=log_weights.shape[-1] - 1)  # all may have ended earlier
    return log_weights[:, columns].view(-1, num_particles, max_new_tokens)


def gap_table(log_weights: torch.Tensor, ess_of: list[int]) -> None:
    """KL(token level ‖ sequence level) = log E W − E log W, and the effective sample size of importance resampling."""
    print(
        "\n| tokens | mean log W | its standard deviation | KL | " + " | ".join(f"ESS of {n}" for n in ess_of) + " |"
    )
    print("|---|---|---|---|" + "---|" * len(ess_of))
    num_tokens = log_weights.shape[-1]
    for length in sorted({min(length, num_tokens) for length in (8, 16, 32, 64, num_tokens)}):
        log_w = log_weights[..., length - 1]
        log_mean = log_w.logsumexp(-1) - torch.tensor(log_w.shape[-1]).log()
        gap = log_mean - log_w.mean(-1)
        sizes = [effective_sample_size(log_w.unflatten(-1, (-1, n))).mean().item() for n in ess_of]
        cells = [f"{log_w.mean():.2f}", f"{log_w.std(-1).mean():.2f}"]
        cells += [f"{gap.mean():.2f} ± {gap.std() / len(gap) ** 0.5:.2f}", *(f"{size:.1f}" for size in sizes)]
        print(f"| {length} | " + " | ".join(cells) + " |", flush=True)


def compare_estimates(model: MixturePolicyModel, tokenizer, prompts: list, args: argparse.Namespace) -> None:
    """Spread of the estimated log-normalizer over repetitions: the smaller, the closer a draw is to the target."""
    repeats, num_particles = 6, args.num_particles // 2
    inputs = tokenize(tokenizer, [prompt for prompt in prompts for _ in range(repeats)])
    print(f"\n{num_particles} particles, {repeats} repetitions, {args.max_new_tokens} tokens at most")
    for threshold in (0.0, 0.5):
        set_seed(args.seed)
        output = model.generate(
            **inputs,
            custom_generate=sequential_monte_carlo,
            num_particles=num_particles,
            ess_threshold=threshold,
            do_sample=True,
            top_k=0,
            max_new_tokens=args.max_new_tokens,
            return_dict_in_generate=True,
        )
        estimates = output.log_normalizer.view(len(prompts), repeats)
        print(
            f"ess_threshold={threshold}: standard deviation of log_normalizer {estimates.std(-1).mean():.2f}, "
            f"final effective sample size {output.effective_sample_size.mean():.1f}",
            flush=True,
        )


def time_decoding(model: MixturePolicyModel, inputs: dict, num_rounds: int, rows: int = 8, tokens: int = 16) -> None:
    """Times plain sampling and the particle filter with the same number of rows, interleaved: the first token, and each further one."""
    settings = {"do_sample": True, "top_k": 0, "eos_token_id": []}
    ways = {"plain sampling": {"num_return_sequences": rows}}
    for threshold in (0.0, 0.5, 1.0):
        particles = {"custom_generate": sequential_monte_carlo, "num_particles": rows, "ess_threshold": threshold}
        ways[f"sequential Monte Carlo, ess_threshold={threshold}"] = particles
    times = {(name, length): [] for name in ways for length in (1, 1 + tokens)}
    for _ in range(num_rounds):
        for name, length in times:
            start = time.perf_counter()
            model.generate(**inputs, **settings, **ways[name], max_new_tokens=length)
            times[name, length].append(1000 * (time.perf_counter() - start))
    medians = {way: statistics.median(values) for way, values in times.items()}
    print(f"\n{rows} rows, a prompt of {inputs['input_ids'].shape[1]} tokens, medians of {num_rounds} rounds")
    for name in ways:
        first, further = medians[name, 1], (medians[name, 1 + tokens] - medians[name, 1]) / tokens
        print(f"{name}: first token {first:.0f} ms, each further one {further:.0f} ms", flush=True)


def main() -> None:
    args = parse_args()
    logging.set_verbosity_error()
    tokenizer, model = load_tokenizer(), open_policies(args.dtype)
    prompts = load_prompts("test").shuffle(seed=args.seed)["prompt"][: args.num_prompts]
    start = time.perf_counter()
    set_seed(args.seed)
    log_weights = []
    for prompt in prompts:
        inputs = tokenize(tokenizer, [prompt])
        log_weights.append(sample_log_weights(model, inputs, args.num_particles, args.max_new_tokens))
    log_weights = torch.cat(log_weights)
    gap_table(log_weights, [n for n in (4, 8, 16, 32, 64) if n <= args.num_particles])
    time_decoding(model, tokenize(tokenizer, prompts[:1]), args.num_rounds)
    compare_estimates(model, tokenizer, prompts[:1], args)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
