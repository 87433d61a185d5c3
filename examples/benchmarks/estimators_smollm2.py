r"""
The number of completions needed for good weights of real policies: the paper's mirror descent and multiple importance sampling.

The three adapters over SmolLM2-135M of `examples/policies`, the rewards of `examples/rewards.py`, 8 prompts, completions of
up to 32 tokens. What is measured is the duality gap F(λ) - F(λ*) of the fitted weights λ by the number of sampled tokens.
Prints a table with effective sample sizes, and draws it:

    python examples/benchmarks/estimators_smollm2.py --pool smollm2-pool --output docs/images/estimators_smollm2.png

F of real policies cannot be summed over all completions. So a pool of completions is drawn once, equally many from the reference,
the uniform mixture and each policy, and scored under all of them. This takes a quarter of an hour on one busy core; files are
written one at a time, so that the command can be resumed. From then on the pool represents the policies. F(λ), its minimum
and all gaps are those of `mpo_hf.estimation`'s table of the whole pool; estimators sample from the pool,
with replacement, with the probability of each completion under the proposal relative to the density that the pool was
drawn from. So gaps are exact, and repetitions are cheap. The limits of this:

- λ* of the pool differs from that of the policies. Its distance is bootstrapped over the completions of the pool, and
  printed: smaller gaps are differences between estimators, not distances from the policies' own optimum.
- Completions that are not in the pool have no weight. If importance weights have a heavy tail, as for proposals far from
  their target, the true effective sample sizes are smaller and the true gaps larger.
- The log-probability under the mixture at any weights, which mirror descent samples from, is exact on a lattice of weights
  and interpolated in between; the error is printed.

Estimators use `MPOTrainer`'s own computations with its defaults (16 completions per prompt, 2 prompts per step), except that
early stopping is off. With rewards and the mixture as proposal, mirror descent finds weights at which the objectives
are equal under the actual mixture. If policies are not optimal for their rewards, this point is not λ*, and its
gap remains. The rewards' offsets, which the trainer estimates first, are those of the pool, at no cost.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from prompts import load_prompts  # noqa: E402
from quickstart import OBJECTIVES, open_policies  # noqa: E402
from rewards import REWARD_FUNCS  # noqa: E402
from smollm2 import load_tokenizer  # noqa: E402

from mpo_hf import MirrorDescent, MixturePolicyModel, MPOConfig  # noqa: E402
from mpo_hf.estimation import (  # noqa: E402
    DualTable,
    balance_heuristic,
    implicit_table,
    minimize_dual,
    reward_table,
)
from mpo_hf.estimation.objectives import (  # noqa: E402
    dual_objective,
    effective_sample_size,
    implicit_dual_objective,
    on_policy_objective,
)
from mpo_hf.rewards import normalize_rewards  # noqa: E402
from mpo_hf.rollouts import (  # noqa: E402
    completion_logps,
    eos_token_ids,
    mixture_logps,
    sample_completions,
    tokenize_prompts,
)
from mpo_hf.rollouts.columns import GROWTH  # noqa: E402
from mpo_hf.trainer.row_scoring import DEFENSIVE_SHARE  # noqa: E402


DEFAULTS = MPOConfig("unused", use_cpu=True)
LENGTH = 32
NUM_GENERATIONS, PROMPTS_A_STEP = DEFAULTS.num_generations, DEFAULTS.train_prompts_per_device
DRAWS = 16  # completions in each file of the pool
STEPS = [4, 16, 64, 256]
DEGREE = 4
POWERS = [(i, j) for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i)]
NODES = torch.tensor([(i, j, DEGREE - i - j) for i, j in POWERS], dtype=torch.float64) / DEGREE
UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)
PROPOSALS = ["reference", "uniform", *OBJECTIVES]


# ---- the pool ----


def draw_pool(folder: Path, num_prompts: int, num_rounds: int, seconds: float) -> bool:
    """Draws the missing files of the pool, one at a time; `False` if the time limit was reached before the end."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = itertools.product(range(num_rounds), range(len(PROPOSALS)), range(num_prompts))
    missing = [where for where in wanted if not pool_file(folder, *where).is_file()]
    if not missing:
        return True
    end = time.monotonic() + seconds
    tokenizer, model = load_tokenizer(), open_policies()
    prompts = load_prompts("train").shuffle(seed=0)["prompt"][:num_prompts]
    for round_, proposal, x in missing:
        if time.monotonic() > end:
            return False
        start = time.monotonic()
        torch.manual_seed(10_000 * round_ + 100 * proposal + x)
        columns = draw_completions(model, tokenizer, prompts[x], PROPOSALS[proposal])
        np.savez(pool_file(folder, round_, proposal, x), **columns)
        print(f"{pool_file(folder, round_, proposal, x).stem}: {time.monotonic() - start:.0f} s", flush=True)
    return True


def pool_file(folder: Path, round_: int, proposal: int, prompt: int) -> Path:
    return folder / f"{round_:02d}-{PROPOSALS[proposal]}-{prompt:02d}.npz"


def draw_completions(model: MixturePolicyModel, tokenizer, prompt: list, proposal: str) -> dict[str, np.ndarray]:
    """Completions of a policy or of the uniform mixture, with all values that the estimators need."""
    policies = {label: model.policy(k) for k, label in enumerate(OBJECTIVES)}
    drawn = sample_completions(
        {"reference": model.reference_policy, "uniform": model, **policies}[proposal],
        tokenize_prompts([prompt], tokenizer),
        num_generations=DRAWS,
        max_completion_length=LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=eos_token_ids(model, tokenizer),
    )
    nodes = torch.stack([*NODES, UNIFORM])
    policy_logps, pooled = mixture_logps(list(policies.values()), drawn, nodes.tolist(), batch_size=DRAWS)
    reference_logps = completion_logps([model.reference_policy], drawn, batch_size=DRAWS)
    texts = tokenizer.batch_decode(drawn.id_lists(), skip_special_tokens=True)
    rewards = [REWARD_FUNCS[name]([prompt] * DRAWS, texts) for name in OBJECTIVES]
    return {
        "tokens": drawn.completion_mask.sum(-1).numpy(),
        "policy_logps": torch.cat([policy_logps, reference_logps], dim=-1).numpy(),
        # the sum of log Z over the tokens
        "log_normalizers": (policy_logps @ nodes.T - pooled).numpy(),
        "rewards": np.array(rewards).T,
    }


class Pool:
    """All completions of the pool, shape `(prompts, N, ...)`, and how probable each is under any mixture."""

    def __init__(self, folder: Path, num_prompts: int, num_rounds: int):
        parts = list(itertools.product(range(num_rounds), range(len(PROPOSALS))))
        files = [[np.load(pool_file(folder, *part, x)) for part in parts] for x in range(num_prompts)]
        self.rewards, self.tokens, policies, log_normalizers = (
            torch.from_numpy(np.stack([np.concatenate([f[name] for f in row]) for row in files])).double()
            for name in ("rewards", "tokens", "policy_logps", "log_normalizers")
        )
        self.num_prompts, self.size = self.tokens.shape
        self.policies, self.reference = policies[..., :-1], policies[..., -1]
        at_nodes, at_uniform = log_normalizers[..., :-1], log_normalizers[..., -1]
        self._coefficients = at_nodes @ torch.linalg.inv(_monomials(NODES)).T
        error = self._coefficients @ _monomials(UNIFORM) - at_uniform
        self.interpolation_error = error.square().mean().sqrt().item()

        # the mixture of all proposals, which the completions were drawn from
        self.prompt = torch.arange(num_prompts).repeat_interleave(self.size)
        drew = torch.tensor([proposal for _, proposal in parts]).repeat_interleave(DRAWS).repeat(num_prompts)
        uniform = self.policies @ UNIFORM - at_uniform
        logps = torch.cat([self.reference.unsqueeze(-1), uniform.unsqueeze(-1), self.policies], dim=-1)
        self.density = balance_heuristic(self.prompt, drew, logps.flatten(0, 1)).view_as(self.tokens)

    def mixture(self, weights: torch.Tensor) -> torch.Tensor:
        """Log-probabilities when the policies are mixed token by token, `(prompts, N)`."""
        return self.policies @ weights - self._coefficients @ _monomials(weights)

    def proposal(self, weights: torch.Tensor | None) -> torch.Tensor:
        """
        Log-probabilities of samples from the reference (`None`) or a mixture, restricted to the pool, in the unit of
        `density`: shifted by prompt so that they sum to 1 over the pool.
        """
        logps = self.reference if weights is None else self.mixture(weights)
        excess = (logps - self.density).logsumexp(-1, keepdim=True) - math.log(self.size)
        return logps - excess

    def draw(self, prompts: torch.Tensor, proposal: torch.Tensor, m: int, generator: torch.Generator) -> torch.Tensor:
        """Indices of the completions of the pool that are drawn for each prompt, `(len(prompts), m)`."""
        return torch.multinomial((proposal - self.density)[prompts].exp(), m, True, generator=generator)


def _monomials(weights: torch.Tensor) -> torch.Tensor:
    return torch.stack([weights[..., 0] ** i * weights[..., 1] ** j for i, j in POWERS], dim=-1)


# ---- objectives and estimators ----


@dataclass
class Goal:
    """An objective of `MPOTrainer` on the pool, with its exact minimum there."""

    name: str
    pool: Pool
    beta: float | None = None  # None for the implicit objective

    def __post_init__(self):
        pool = self.pool
        self.exact = self.table(pool.prompt, torch.arange(pool.size).repeat(pool.num_prompts), pool.density.flatten())
        (self.optimum,), (minimum,) = minimize_dual(self.exact)
        self.minimum = minimum.item()
        if self.beta is not None:
            self.offsets = self._offsets()

    def table(self, prompt: torch.Tensor, row: torch.Tensor, density: torch.Tensor) -> DualTable:
        """The table of a subset of the completions of the pool."""
        _, number = prompt.unique(return_inverse=True)
        if self.beta is None:
            return implicit_table(number, self.pool.policies[prompt, row], density)
        advantages = self.pool.rewards[prompt, row] / self.beta
        return reward_table(number, advantages, self.pool.reference[prompt, row], density)

    def gap(self, weights: torch.Tensor) -> float:
        return self.exact.by_prompt(weights.unsqueeze(0))[0].mean().item() - self.minimum

    def loss(
        self,
        weights: torch.Tensor,
        prompts: torch.Tensor,
        drawn: torch.Tensor,
        proposal: torch.Tensor,
        is_mixture: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a mirror descent step of `MPOTrainer`."""
        at = (prompts.unsqueeze(-1), drawn)
        pool, proposal_logps = self.pool, proposal[at]
        if self.beta is None:
            return implicit_dual_objective(weights, pool.policies[at], proposal_logps)
        if is_mixture:
            advantages, pooled = (pool.rewards[at] - self.offsets) / self.beta, pool.policies[at] @ weights.detach()
            return on_policy_objective(weights, advantages, pooled, proposal_logps, pool.reference[at])
        return dual_objective(weights, normalize_rewards(pool.rewards[at], self.beta) / self.beta)

    def _offsets(self) -> torch.Tensor:
        """`MPOTrainer.reward_offsets`, with expectations over the pool."""
        pool = self.pool
        shares = (pool.policies - pool.density.unsqueeze(-1)).softmax(1)
        kl = (shares * (pool.policies - pool.reference.unsqueeze(-1))).sum(1)
        return ((shares * pool.rewards).sum(1) - self.beta * kl).mean(0)


def steps_of(num_prompts: int, num_steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The prompts of every step: epochs of all prompts in random order."""
    for step in range(num_steps):
        at = step * PROMPTS_A_STEP % num_prompts
        if at == 0:
            order = torch.randperm(num_prompts, generator=generator)
        yield order[at : at + PROMPTS_A_STEP]


@dataclass
class Fit:
    """Weights, the number of tokens sampled for them, and the mean effective sample size as a fraction."""

    weights: torch.Tensor
    tokens: float
    effective_sample_size: float


def mirror_descent(goal: Goal, is_mixture: bool, generator: torch.Generator) -> list[Fit]:
    """`estimator="bsmd"`: one fit for each number of steps, since the step size depends on it."""
    return [_mirror_descent(goal, is_mixture, steps, generator) for steps in STEPS]


def _mirror_descent(goal: Goal, is_mixture: bool, num_steps: int, generator: torch.Generator) -> Fit:
    weights = torch.nn.Parameter(UNIFORM.clone())
    optimizer = MirrorDescent([weights], lr=DEFAULTS.step_size(num_steps))
    proposal, tokens, fractions = goal.pool.proposal(None), 0.0, []
    for prompts in steps_of(goal.pool.num_prompts, num_steps, generator):
        if is_mixture:
            proposal = goal.pool.proposal(weights.detach())
        drawn = goal.pool.draw(prompts, proposal, NUM_GENERATIONS, generator)
        weights.grad = None
        loss, log_weights = goal.loss(weights, prompts, drawn, proposal, is_mixture)
        loss.backward()
        optimizer.step()
        tokens += goal.pool.tokens[prompts.unsqueeze(-1), drawn].sum().item()
        fractions.append(effective_sample_size(log_weights.detach()).mean().item() / NUM_GENERATIONS)
    return Fit(optimizer.average(weights), tokens, statistics.fmean(fractions))


def table_minimum(goal: Goal, is_mixture: bool, generator: torch.Generator) -> list[Fit]:
    """`estimator="mis"`: one fit, evaluated after each number of steps."""
    pool, fits, fitted = goal.pool, [], 0
    weights, tokens = UNIFORM, 0.0
    proposals = [pool.proposal(UNIFORM if is_mixture else None)]
    prompt, row, drew = (torch.empty(0, dtype=torch.long) for _ in range(3))
    for step, prompts in enumerate(steps_of(pool.num_prompts, max(STEPS), generator), start=1):
        drawn = pool.draw(prompts, proposals[-1], NUM_GENERATIONS, generator)
        prompt = torch.cat([prompt, prompts.repeat_interleave(NUM_GENERATIONS)])
        row = torch.cat([row, drawn.flatten()])
        drew = torch.cat([drew, torch.full((drawn.numel(),), len(proposals) - 1)])
        # with the reference as proposal, samples do not depend on the weights
        if len(prompt) >= fitted * (1 + GROWTH) and (is_mixture or step in STEPS):
            fitted = len(prompt)
            _, number = prompt.unique(return_inverse=True)
            density = balance_heuristic(number, drew, torch.stack([q[prompt, row] for q in proposals], dim=-1))
            table = goal.table(prompt, row, density)
            (weights,), _ = minimize_dual(table, start=0.99 * weights + 0.01 * UNIFORM)
            fraction = table.effective_sample_fractions(weights).mean().item()
            if is_mixture and fraction < DEFAULTS.refresh_below:
                proposals.append(pool.proposal((1 - DEFENSIVE_SHARE) * weights + DEFENSIVE_SHARE * UNIFORM))
        if step in STEPS:
            tokens = pool.tokens[prompt, row].sum().item()
            fits.append(Fit(weights, tokens, fraction))
    return fits


# estimator and proposal of the trainer
METHODS = {
    "bsmd, reference (the paper's)": (mirror_descent, False),
    "bsmd, mixture": (mirror_descent, True),
    "mis, reference": (table_minimum, False),
    "mis, mixture": (table_minimum, True),
}


# ---- the measurement ----


def bootstrap(goal: Goal, replicates: int = 50) -> tuple[torch.Tensor, list[float]]:
    """Standard errors of λ* of the pool, and the gaps of the minimizers of resampled pools."""
    generator = torch.Generator().manual_seed(0)
    pool, found = goal.pool, []
    for _ in range(replicates):
        row = torch.randint(pool.size, (pool.num_prompts, pool.size), generator=generator).flatten()
        (weights,), _ = minimize_dual(goal.table(pool.prompt, row, pool.density[pool.prompt, row]))
        found.append(weights)
    return torch.stack(found).std(0), [goal.gap(weights) for weights in found]


def measure(goal: Goal, repetitions: int) -> dict:
    """Gaps, tokens and effective sample sizes of every method, by number of steps and repetition."""
    errors, gaps = bootstrap(goal)
    result = {
        "optimum": goal.optimum.tolist(),
        "standard_errors": errors.tolist(),
        "bootstrap_gap": statistics.median(gaps),
        "minimum": goal.minimum,
        "uniform_gap": goal.gap(UNIFORM),
        "of_each_policy": [goal.gap(e_k) + goal.minimum for e_k in torch.eye(3, dtype=torch.float64)],
        "methods": {},
    }
    for name, (method, is_mixture) in METHODS.items():
        runs = [method(goal, is_mixture, torch.Generator().manual_seed(seed)) for seed in range(repetitions)]
        by_steps = list(zip(*runs))
        result["methods"][name] = {
            "tokens": [statistics.fmean(fit.tokens for fit in fits) for fits in by_steps],
            "gaps": [[goal.gap(fit.weights) for fit in fits] for fits in by_steps],
            "effective_sample_sizes": [[fit.effective_sample_size for fit in fits] for fits in by_steps],
        }
    return result


def print_result(name: str, result: dict) -> None:
    weights = ", ".join(f"{w:.3f} ± {e:.3f}" for w, e in zip(result["optimum"], result["standard_errors"]))
    print(f"\n{name}: λ* = {weights} ({', '.join(OBJECTIVES)}), F(λ*) = {result['minimum']:.4f}")
    if "implicit" in name:
        of_each = ", ".join(f"{value:.3f}" for value in result["of_each_policy"])
        print(f"F of each policy alone: {of_each}; would be 0 but for the error of the pool")
    print(f"gap of uniform weights {result['uniform_gap']:.5f}, of the bootstrapped λ* {result['bootstrap_gap']:.5f}")
    print(f"{'median gap, nats (effective sample size)':<44}" + "".join(f"{steps:>12} steps" for steps in STEPS))
    for method, found in result["methods"].items():
        cells = [
            f"{statistics.median(gaps):>11.5f} ({statistics.median(sizes):>3.0%})"
            for gaps, sizes in zip(found["gaps"], found["effective_sample_sizes"])
        ]
        print(f"{method:<44}" + "".join(cells))


def draw_figure(results: dict[str, dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4.5 * len(results), 4.2), sharey=True, layout="constrained")
    for axis, (name, result) in zip(axes, results.items()):
        for method, found in result["methods"].items():
            low, middle, high = zip(*[statistics.quantiles(row, n=4, method="inclusive") for row in found["gaps"]])
            line_style = "--" if "bsmd" in method else "-"
            (line,) = axis.plot(found["tokens"], middle, label=method, marker="o", linestyle=line_style)
            axis.fill_between(found["tokens"], low, high, color=line.get_color(), alpha=0.15)
        axis.axhline(result["uniform_gap"], label="uniform weights", color="grey", linestyle="--", linewidth=1)
        axis.axhline(result["bootstrap_gap"], label="error of the pool's own λ*", color="grey", linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="sampled tokens", title=name)
    axes[0].set_ylabel("duality gap $F(\\lambda) - F(\\lambda^*)$, nats")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True, help="folder of the pool; what is missing is drawn")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of the pool, an even number")
    parser.add_argument(
        "--rounds", type=int, default=1, help=f"size of the pool: {len(PROPOSALS) * DRAWS} completions a prompt each"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="draw no longer than this, and go on next time"
    )
    parser.add_argument("--repetitions", type=int, default=12, help="fits of every kind")
    parser.add_argument("--output", help="where the picture goes")
    parser.add_argument("--json", type=Path, help="where all numbers go")
    args = parser.parse_args()
    if not draw_pool(args.pool, args.prompts, args.rounds, args.seconds):
        return
    pool = Pool(args.pool, args.prompts, args.rounds)
    print(
        f"{pool.num_prompts} prompts, {pool.size} completions each, {pool.tokens.mean():.1f} tokens; interpolated "
        f"log-probabilities of mixtures are off by {pool.interpolation_error:.3f} nats (root mean square)"
    )
    goals = [Goal("rewards, β = 0.1", pool, 0.1), Goal("rewards, β = 0.2", pool, 0.2), Goal("implicit rewards", pool)]
    results = {}
    for goal in goals:
        results[goal.name] = measure(goal, args.repetitions)
        print_result(goal.name, results[goal.name])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    if args.output:
        draw_figure(results, args.output)


if __name__ == "__main__":
    main()
