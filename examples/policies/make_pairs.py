"""Sample completions from the base model, score them, and pair them up for preference training.

Candidates come from the plain prompt and from system prompts that push toward each objective, for variety;
the pairs use the plain prompt, so that the policies learn the effect of the system prompts. Run once:

```bash
python examples/policies/make_pairs.py
```
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase, set_seed


sys.path.append(str(Path(__file__).resolve().parents[1]))
from prompts import load_prompts
from rewards import REWARD_FUNCS
from smollm2 import load_base, load_tokenizer


CACHE = Path(__file__).parent / ".cache"
COMPLETIONS = CACHE / "completions.jsonl"
EOS = "<|im_end|>"
SYSTEM_PROMPTS = [
    None,
    None,
    "Answer in one short sentence.",
    "Be warm, cheerful and enthusiastic.",
    "Use short, simple words and short sentences.",
]


@dataclass
class PairsArguments:
    temperature: float = field(default=0.7, metadata={"help": "Below 1, as at 1 a model this small often rambles."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest completion, in tokens."})
    batch_size: int = field(default=80, metadata={"help": "Completions sampled at a time."})
    seed: int = field(default=0)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict]],
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[str]:
    """Sample one completion per conversation.

    The text of a complete answer keeps its EOS token: a truncated one must not look complete.
    """
    inputs = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature, top_k=0, top_p=1.0
        )
    completions = []
    for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
        ended = tokenizer.eos_token_id in ids
        completions.append(tokenizer.decode(ids, skip_special_tokens=True) + EOS * ended)
    return completions


def candidates() -> list[dict]:
    """Every prompt with every system prompt; held-out prompts are for the evaluation of the reward model."""
    rows = []
    for split in ("train", "test"):
        for prompt in load_prompts(split)["prompt"]:
            for system in SYSTEM_PROMPTS:
                pushed = [{"role": "system", "content": system}, *prompt] if system else prompt
                rows.append({"split": split, "prompt": prompt, "pushed": pushed})
    return rows


def score(prompt: list[dict], completion: str) -> dict[str, float]:
    """The rule-based rewards of a completion."""
    return {name: func([prompt], [completion.removesuffix(EOS)])[0] for name, func in REWARD_FUNCS.items()}


def load_pairs(objective: str, split: str = "train", pairs_per_prompt: int = 2, min_gap: float = 0.15) -> Dataset:
    """Make (chosen, rejected) pairs from the cached completions: best with worst, second best with second worst.

    Args:
        objective: name of the reward that ranks the completions.
        split: `"train"` or `"test"`.
        pairs_per_prompt: number of pairs per prompt.
        min_gap: pairs with a smaller difference of rewards are left out.

    Returns:
        A conversational preference dataset: `prompt`, `chosen`, `rejected`, and `gap`, the difference of their rewards.
    """
    by_prompt = defaultdict(list)
    for line in COMPLETIONS.read_text().splitlines():
        row = json.loads(line)
        if row["split"] == split:
            by_prompt[json.dumps(row["prompt"])].append(row)
    pairs = []
    for rows in by_prompt.values():
        rows.sort(key=lambda row: score(row["prompt"], row["completion"])[objective])
        for low, high in zip(rows[:pairs_per_prompt], reversed(rows), strict=False):
            low_score, high_score = (score(row["prompt"], row["completion"])[objective] for row in (low, high))
            if high_score - low_score >= min_gap:
                answers = {"chosen": high["completion"], "rejected": low["completion"]}
                pairs.append(
                    {"prompt": low["prompt"], "gap": high_score - low_score}
                    | {key: [{"role": "assistant", "content": text}] for key, text in answers.items()}
                )
    return Dataset.from_list(pairs)


def main(args: PairsArguments) -> None:
    set_seed(args.seed)
    model, tokenizer = load_base(), load_tokenizer()
    rows = candidates()
    CACHE.mkdir(exist_ok=True)
    with COMPLETIONS.open("w") as file:
        for start in tqdm(range(0, len(rows), args.batch_size)):
            batch = rows[start : start + args.batch_size]
            conversations = [row.pop("pushed") for row in batch]
            completions = sample(model, tokenizer, conversations, args.max_new_tokens, args.temperature)
            file.writelines(
                json.dumps(row | {"completion": completion}) + "\n"
                for row, completion in zip(batch, completions, strict=True)
            )


if __name__ == "__main__":
    main(HfArgumentParser(PairsArguments).parse_args_into_dataclasses()[0])
