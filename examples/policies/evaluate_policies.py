"""Sample every policy on the held-out prompts, and print and plot its rewards.

```bash
python examples/policies/evaluate_policies.py
```
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from peft import PeftModel
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase, set_seed


sys.path.append(str(Path(__file__).resolve().parents[1]))
from make_pairs import CACHE, EOS, sample
from prompts import load_prompts
from rewards import REWARD_FUNCS
from smollm2 import load_base, load_tokenizer
from train_reward_model import load_reward_model, neural_scores


HERE = Path(__file__).parent
POLICIES = ["reference", *REWARD_FUNCS]
REWARDS = [*REWARD_FUNCS, "neural positive"]

Table = dict[str, dict[str, np.ndarray]]  # policy -> reward -> one mean reward per prompt


@dataclass
class EvaluationArguments:
    num_generations: int = field(default=2, metadata={"help": "Completions a prompt."})
    max_new_tokens: int = field(default=64)
    batch_size: int = field(default=96)
    seed: int = field(default=1)


def sample_policy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[dict]], args: EvaluationArguments
) -> list[str]:
    """Sample a completion for every prompt, with the same seed for every policy."""
    set_seed(args.seed)
    completions = []
    for start in range(0, len(prompts), args.batch_size):
        completions += sample(model, tokenizer, prompts[start : start + args.batch_size], args.max_new_tokens)
    return [completion.removesuffix(EOS) for completion in completions]


def sample_all(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[dict]], args: EvaluationArguments
) -> dict[str, list[str]]:
    """Completions of the reference policy and of every adapter, in turn on one base model."""
    model = load_base()
    completions = {"reference": sample_policy(model, tokenizer, prompts, args)}
    for policy in REWARD_FUNCS:
        model = PeftModel.from_pretrained(model, HERE / policy)
        completions[policy] = sample_policy(model, tokenizer, prompts, args)
        model = model.unload()
    return completions


def score_all(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[dict]], completions: dict[str, list[str]], num_prompts: int
) -> Table:
    """Every reward of every policy, averaged over the completions of a prompt."""
    reward_model = load_reward_model()
    table = {}
    for policy, texts in completions.items():
        scores = {name: func(prompts, texts) for name, func in REWARD_FUNCS.items()}
        answers = [[{"role": "assistant", "content": text}] for text in texts]
        conversations = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        scores["neural positive"] = neural_scores(reward_model, tokenizer, conversations)
        table[policy] = {name: np.reshape(values, (-1, num_prompts)).mean(0) for name, values in scores.items()}
    return table


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    return values.mean(), values.std(ddof=1) / np.sqrt(len(values))


def to_markdown(table: Table) -> str:
    """The table of means and standard errors."""
    lines = ["| policy | " + " | ".join(REWARDS) + " |", "|---|" + "---|" * len(REWARDS)]
    for policy, scores in table.items():
        cells = ["{:.3f} ± {:.3f}".format(*mean_and_error(scores[name])) for name in REWARDS]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def own_gains(table: Table) -> str:
    """How far each policy raises its own objective, in standard errors of the difference over the same prompts."""
    lines = []
    for policy in REWARD_FUNCS:
        gain, error = mean_and_error(table[policy][policy] - table["reference"][policy])
        lines.append(f"{policy}: {gain:+.3f} ± {error:.3f} ({gain / error:.1f} standard errors)")
    return "\n".join(lines)


def plot(table: Table, file: Path) -> None:
    """One panel per reward, one bar per policy."""
    figure, axes = plt.subplots(1, len(REWARDS), figsize=(3 * len(REWARDS), 3), layout="constrained")
    for axis, name in zip(axes, REWARDS, strict=True):
        means, errors = zip(*(mean_and_error(table[policy][name]) for policy in POLICIES), strict=True)
        colors = ["tab:blue" if policy in name else "0.4" if policy == "reference" else "0.75" for policy in POLICIES]
        axis.bar(POLICIES, means, yerr=errors, capsize=3, color=colors)
        axis.axhline(means[0], color="0.4", linewidth=0.8, linestyle="--")
        axis.set_title(f"{name} reward")
        axis.tick_params("x", rotation=30)
    figure.savefig(file, dpi=120)


def main(args: EvaluationArguments) -> None:
    tokenizer = load_tokenizer()
    test_prompts = load_prompts("test")["prompt"]
    prompts = list(test_prompts) * args.num_generations
    completions = sample_all(tokenizer, prompts, args)
    CACHE.mkdir(exist_ok=True)
    (CACHE / "evaluation.json").write_text(json.dumps(completions, indent=1))
    table = score_all(tokenizer, prompts, completions, len(test_prompts))
    print(to_markdown(table), own_gains(table), sep="\n\n")
    plot(table, HERE / "scores.png")


if __name__ == "__main__":
    main(HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses()[0])
