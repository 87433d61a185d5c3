"""
The rank that a full fine-tune needs: how much of it adapters of several sizes keep.

    python examples/policies/make_pairs.py                     # completions to train on, once
    python examples/benchmarks/extraction.py --objective concise

All parameters of SmolLM2-135M are trained for some steps on the completions that score best in one objective. Then
adapters are extracted from the result, and compared with it by mean token KL divergence on held-out prompts and their
completions, next to the base without an adapter.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpo_hf.extraction.adapter_extraction import extract_adapter


EXAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(EXAMPLES))
from rewards import REWARD_FUNCS  # noqa: E402
from smollm2 import load_base, load_tokenizer  # noqa: E402


COMPLETIONS = EXAMPLES / "policies" / ".cache" / "completions.jsonl"
BATCH_SIZE = 8
SETTINGS = [
    {"rank": 8},
    {"rank": 32},
    {"rank": 32, "embeddings": True},
    {"rank": 128},
    {"energy": 0.9},
    {"energy": 0.99},
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=REWARD_FUNCS, default="concise")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--texts", type=int, default=16, help="held-out texts to measure on")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def load_pairs(objective: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[tuple[str, str]]]:
    """Prompts and completions by split, those that score best first."""
    rows = [json.loads(line) for line in COMPLETIONS.read_text().splitlines()]
    scores = REWARD_FUNCS[objective]([row["prompt"] for row in rows], [row["completion"] for row in rows])
    pairs: dict[str, list[tuple[str, str]]] = {}
    for _, row in sorted(zip(scores, rows), key=lambda scored: -scored[0]):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        pairs.setdefault(row["split"], []).append((prompt, row["completion"]))
    return pairs


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    steps: int,
    learning_rate: float,
) -> None:
    """Trains all parameters on such completions."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    model.train()
    for step in range(steps):
        own = pairs[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        batch = tokenizer([prompt + completion for prompt, completion in own], return_tensors="pt", padding=True)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        for row, (_, completion) in zip(labels, own):  # padded on the left
            row[: -len(tokenizer(completion).input_ids)] = -100
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.eval()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base, tokenizer = load_base(), load_tokenizer()
    pairs = load_pairs(args.objective, tokenizer)
    texts = ["".join(pair) for pair in pairs["test"][: args.texts]]
    tuned = copy.deepcopy(base)
    fine_tune(tuned, tokenizer, pairs["train"], args.steps, args.learning_rate)
    print("| setting | ranks | parameters, share of the base | kept energy | KL | KL of the base | seconds |")
    print("|" + "---|" * 7)
    for setting in SETTINGS:
        start = time.perf_counter()
        adapter = extract_adapter(tuned, base, **setting)
        seconds = time.perf_counter() - start
        adapter.measure(tuned, base, texts, tokenizer)
        report = adapter.report
        ranks = [module.rank for module in report.modules]
        name = ", ".join(f"{key} {value}" for key, value in setting.items())
        share = report.adapter_parameters / report.base_parameters
        cells = [name, f"{min(ranks)} to {max(ranks)}", f"{share:.2f}", f"{report.kept_energy:.3f}"]
        cells += [f"{report.mean_kl:.2g}", f"{report.mean_kl_base:.2g}", f"{seconds:.0f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\n{report}")


if __name__ == "__main__":
    main()
