"""
What the weights that a fit finds by default reach on held-out prompts, against uniform weights, each policy and soups.

The three adapters over SmolLM2-135M of `examples/policies`, the rewards of `examples/rewards.py`, completions of up to 96
tokens, drawn token by token at temperature 1 in bfloat16:

    python examples/benchmarks/decoded_smollm2.py --folder decoded-smollm2

1. The weights are fitted to training prompts by `MPOTrainer` with its default objective, on rewards as they are.
2. Completions of held-out prompts are drawn from the reference, each policy, the uniform and the fitted mixture, and from
   soups (averages of the adapters) with the same weights.
3. Prints the rewards, the divergence from the reference, the smallest reward, the welfare (the smallest reward less β times the
   divergence) and the smallest normalized gain (0 = the reference, 1 = the objective's own policy), with 95% intervals by the
   bootstrap over prompts, which are paired between rows.

Every batch of completions is written once it is drawn, so that the command can be interrupted and started again.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from scipy.stats import bootstrap
from transformers.trainer_utils import get_last_checkpoint


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from prompts import load_prompts  # noqa: E402
from quickstart import OBJECTIVES  # noqa: E402
from rewards import REWARD_FUNCS  # noqa: E402
from smollm2 import base_spec, load_tokenizer  # noqa: E402

from mpo_hf import MixturePolicyModel, MPOConfig, MPOTrainer  # noqa: E402
from mpo_hf.rollouts import completion_logps, eos_token_ids, sample_completions, tokenize_prompts  # noqa: E402


LENGTH, PROMPTS_A_BATCH = 96, 12
UNIFORM = [1 / 3] * 3
NUM_RESAMPLES = 2000


class Policies:
    """The mixture of the examples, soups of its adapters, and completions of them."""

    def __init__(self, dtype: str):
        folder = HERE.parent / "policies"
        components = [
            {**base_spec(), "adapter": str(folder / name), "label": name, "dtype": dtype} for name in OBJECTIVES
        ]
        self.model, self.tokenizer = MixturePolicyModel.from_policies(components), load_tokenizer()

    def get(self, name: str, weights: Sequence[float]) -> MixturePolicyModel:
        """The policy of a row of the table."""
        if name == "reference":
            return self.model.reference_policy
        if name in OBJECTIVES:
            return self.model.policy(OBJECTIVES.index(name))
        if name.endswith("soup"):
            return self._soup(weights)
        self.model.mixture_weights = weights
        return self.model

    def _soup(self, weights: Sequence[float]) -> MixturePolicyModel:
        """The base with the weighted sum of the adapters' updates, which PEFT's "cat" makes without rounding."""
        view = self.model.policy(0)
        peft_model = view.backbones[0]
        if "soup" in peft_model.peft_config:
            peft_model.delete_adapter("soup")
        names = [self.model.policies[k].adapter for k in range(3)]
        peft_model.add_weighted_adapter(names, list(weights), "soup", combination_type="cat")
        view.policies[0] = type(view.policies[0])(view.policies[0].backbone, "soup")
        return view

    def draw(self, name: str, weights: Sequence[float], prompts: list, num_generations: int) -> Dataset:
        """Completions of a policy with all numbers that a fit and the table need."""
        policy = self.get(name, weights)
        drawn = sample_completions(
            policy,
            tokenize_prompts(prompts, self.tokenizer),
            num_generations=num_generations,
            max_completion_length=LENGTH,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=eos_token_ids(self.model, self.tokenizer),
        )
        texts = self.tokenizer.batch_decode(drawn.id_lists(), skip_special_tokens=True)
        repeated = [prompt for prompt in prompts for _ in range(num_generations)]
        rows = {
            "prompt": repeated,
            "completion": [[{"role": "assistant", "content": text}] for text in texts],
            "completion_ids": drawn.id_lists(),
            "proposal_logps": drawn.proposal_logps.tolist(),
            "reference_logps": drawn.proposal_logps.tolist(),
            "rewards": np.array([REWARD_FUNCS[name](repeated, texts) for name in OBJECTIVES]).T.tolist(),
        }
        if name != "reference":
            rows["reference_logps"] = completion_logps([self.model.reference_policy], drawn)[:, 0].tolist()
        return Dataset.from_dict(rows)


def completions(
    policies: Policies, folder: Path, split: str, name: str, weights: Sequence[float], num_prompts: int, count: int
) -> Dataset:
    """Completions of a split of the prompts, from the files of an earlier run as far as there are any."""
    prompts = load_prompts(split).shuffle(seed=0)["prompt"][:num_prompts]
    mark = "" if name in ("reference", *OBJECTIVES) else "-" + "-".join(f"{w:.3f}" for w in weights)
    parts = []
    for start in range(0, len(prompts), PROMPTS_A_BATCH):
        path = folder / f"{split}-{name.replace(' ', '_')}{mark}-{start:03d}.parquet"
        if not path.is_file():
            began = time.monotonic()
            torch.manual_seed(start)
            drawn = policies.draw(name, weights, prompts[start : start + PROMPTS_A_BATCH], count)
            drawn.to_parquet(path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
            print(f"{path.stem}: {time.monotonic() - began:.0f} s", flush=True)
        parts.append(Dataset.from_parquet(str(path), keep_in_memory=True))
    return concatenate_datasets(parts)


def fit(policies: Policies, folder: Path, beta: float, num_steps: int, free_sum: bool = False) -> list[float]:
    """The weights that a fit by default finds on training prompts, from the folder of an earlier run if there is one."""
    output = folder / f"fit-{beta}{'-free' if free_sum else ''}"
    policies.model.mixture_weights = UNIFORM
    trainer = MPOTrainer(
        model=policies.model,
        reward_funcs=[REWARD_FUNCS[name] for name in OBJECTIVES],
        args=MPOConfig(
            output_dir=str(output),
            normalize_rewards="none",
            beta=beta,
            free_sum=free_sum,
            num_generations=8,
            per_device_train_batch_size=64,
            max_steps=num_steps,
            max_completion_length=LENGTH,
            logps_batch_size=32,
            report_to="none",
        ),
        train_dataset=load_prompts("train"),
        processing_class=policies.tokenizer,
    )
    last = get_last_checkpoint(output) if output.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    return trainer.model.config.mixture_weights


# ---- the table ----


class Held:
    """
    Rewards and log-ratios of the completions of held-out prompts, by row of the table, prompt and completion.

    Args:
        rows (`dict[str, Dataset]`): completions by row of the table, equally many of each prompt.
        beta (`float`): KL coefficient, in units of the rewards.
        num_prompts (`int`): how many prompts there are.
    """

    def __init__(self, rows: dict[str, Dataset], beta: float, num_prompts: int):
        self.beta, self.names, self.num_prompts = beta, list(rows), num_prompts
        numbers = [
            np.column_stack([data["rewards"], np.subtract(data["proposal_logps"], data["reference_logps"])])
            for data in rows.values()
        ]
        # means over the completions of a prompt: rows, prompts, rewards and the log-ratio
        self.means = np.stack([values.reshape(num_prompts, -1, len(OBJECTIVES) + 1).mean(1) for values in numbers])
        self.cut = [float(np.mean([len(ids) == LENGTH for ids in data["completion_ids"]])) for data in rows.values()]

    def gains(self, prompts: np.ndarray) -> np.ndarray:
        """Normalized gains of all rows, on some prompts: shape `(rows, K)`."""
        rewards = self.means[:, prompts, :-1].mean(1)
        reference = rewards[self.names.index("reference")]
        own = np.array([rewards[self.names.index(name)][k] for k, name in enumerate(OBJECTIVES)])
        return (rewards - reference) / (own - reference)

    def measure(self, prompts: np.ndarray) -> np.ndarray:
        """The smallest reward, the welfare and the smallest normalized gain of all rows, shape `(3, rows)`."""
        means = self.means[:, prompts].mean(1)
        smallest = means[:, :-1].min(-1)
        return np.stack([smallest, smallest - self.beta * means[:, -1], self.gains(prompts).min(-1)])

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """
        95% intervals of what the fitted mixture has more than each row, the prompts paired, by the BCa bootstrap: lower and
        upper ends, shape `(3, rows)` each.
        """
        first = self.names.index("fitted")

        def more(prompts: np.ndarray) -> np.ndarray:
            found = self.measure(prompts)
            return (found[:, first : first + 1] - found).flatten()

        # no difference of a row from itself, which has no distribution
        keep = [i for i in range(3 * len(self.names)) if i % len(self.names) != first]
        result = bootstrap(
            (np.arange(self.num_prompts),),
            lambda prompts: more(prompts)[keep],
            vectorized=False,
            n_resamples=NUM_RESAMPLES,
            method="BCa",
            random_state=0,
        )
        ends = np.zeros((2, 3 * len(self.names)))
        ends[:, keep] = result.confidence_interval
        low, high = ends.reshape(2, 3, -1)
        return low, high

    def table(self) -> str:
        """The table in Markdown."""
        everyone = np.arange(self.num_prompts)
        measured, (low, high), first = self.measure(everyone), self.intervals(), self.names.index("fitted")
        head = ["", *OBJECTIVES, "KL", "cut"]
        head += [f"{name} | fitted has more" for name in ("smallest reward", "welfare", "worst-off gain")]
        lines = [" | ".join(head), "|".join(["---"] * (len(head) + 3))]
        for i, name in enumerate(self.names):
            cells = [name, *(f"{mean:.2f}" for mean in self.means[i, :, :-1].mean(0))]
            cells += [f"{self.means[i, :, -1].mean():.1f}", f"{self.cut[i]:.0%}"]
            for value, a, b in zip(measured, low[:, i], high[:, i]):
                more = "" if i == first else f"{value[first] - value[i]:.2f} ({a:.2f} to {b:.2f})"
                cells += [f"{value[i]:.2f}", more]
            lines.append(" | ".join(cells))
        return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("decoded-smollm2"), help="where completions and the fit go"
    )
    parser.add_argument("--beta", type=float, default=0.05, help="KL coefficient, in units of the rewards")
    parser.add_argument("--max_steps", type=int, default=12, help="steps of the fit, of 8 prompts × 8 completions")
    parser.add_argument("--num_prompts", type=int, default=96, help="held-out prompts")
    parser.add_argument("--num_completions", type=int, default=4, help="completions of each")
    parser.add_argument("--dtype", default="bfloat16", help="of the policies")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    policies = Policies(args.dtype)
    weights = fit(policies, args.folder, args.beta, args.max_steps)
    print("weights:", dict(zip(OBJECTIVES, (round(w, 3) for w in weights))))
    rows = {"fitted": weights, "uniform": UNIFORM, "fitted soup": weights, "uniform soup": UNIFORM}
    rows |= dict.fromkeys(("reference", *OBJECTIVES), UNIFORM)
    drawn = {
        name: completions(policies, args.folder, "test", name, of_row, args.num_prompts, args.num_completions)
        for name, of_row in rows.items()
    }
    print(Held(drawn, args.beta, args.num_prompts).table())


if __name__ == "__main__":
    main()
