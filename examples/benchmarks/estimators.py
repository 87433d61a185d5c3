"""
The number of completions needed for good weights: the paper's mirror descent and multiple importance sampling.

Policies small enough to enumerate (six tokens, completions of three, 36 prompts), each the exact optimum of its reward, so
that the duality gap of fitted weights is known exactly. Prints a table, and draws it:

    python examples/benchmarks/estimators.py --output docs/images/estimators.png
"""

import argparse
import math
import statistics

import torch

from mpo_hf import MirrorDescent
from mpo_hf.estimation import DualTable, balance_heuristic, minimize_dual, reward_table
from mpo_hf.estimation.objectives import dual_objective
from mpo_hf.rewards import normalize_rewards


NUM_PROMPTS, VOCAB_SIZE, LENGTH, NUM_POLICIES = 36, 6, 3, 3
UNIFORM = torch.full((NUM_POLICIES,), 1 / NUM_POLICIES, dtype=torch.float64)
BUDGETS = [288, 1152, 4608, 18432]


class World:
    """A reference, rewards in [0, 1], and the policies that are optimal for them, all of them enumerated."""

    def __init__(self, seed: int, beta: float):
        generator = torch.Generator().manual_seed(seed)
        shape = (NUM_PROMPTS, *[VOCAB_SIZE] * LENGTH)
        self.beta = beta
        reference = torch.randn(shape, generator=generator, dtype=torch.float64).flatten(1)
        self.reference = reference.log_softmax(-1)
        # rewards of tokens add up, plus a part that is specific to each completion
        tokens = torch.randn(NUM_POLICIES, NUM_PROMPTS, LENGTH, VOCAB_SIZE, generator=generator, dtype=torch.float64)
        own = torch.randn(NUM_POLICIES, *shape, generator=generator, dtype=torch.float64)
        first, second, third = tokens.unbind(2)
        total = first[..., :, None, None] + second[..., None, :, None] + third[..., None, None, :] + own
        # with different spreads, so that uniform weights are not optimal
        spread = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
        self.rewards = torch.sigmoid(total.flatten(2).permute(1, 2, 0) * spread).contiguous()
        self.policies = (self.reference.unsqueeze(-1) + self.rewards / beta).log_softmax(1)
        ratios = self.policies - self.reference.unsqueeze(-1)
        prompt = torch.arange(NUM_PROMPTS).repeat_interleave(ratios.shape[1])
        self.exact = DualTable(prompt, self.reference.flatten(), ratios.flatten(0, 1))
        self.minimum = minimize_dual(self.exact)[1].item()

    def gap(self, weights: torch.Tensor) -> float:
        """The duality gap F(λ) - F(λ*)."""
        return self.exact.by_prompt(weights.unsqueeze(0))[0].mean().item() - self.minimum

    def token_mixture(self, weights: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of all completions when the policies are mixed token by token, `(prompts, completions)`."""
        joint = self.policies.reshape(NUM_PROMPTS, *[VOCAB_SIZE] * LENGTH, NUM_POLICIES)
        total = torch.zeros(NUM_PROMPTS, *[1] * LENGTH, dtype=torch.float64)
        for t in range(1, LENGTH + 1):
            rest = tuple(range(t + 1, LENGTH + 1))
            prefix = joint.logsumexp(rest, keepdim=True) if rest else joint
            total = total + (prefix.log_softmax(t) @ weights).log_softmax(t)
        return total.flatten(1)


def mirror_descent(
    world: World, budget: int, generator: torch.Generator, m: int = 32, prompts: int = 3
) -> torch.Tensor:
    """The paper's Algorithm 2: every step samples new completions from the reference."""
    steps = budget // (m * prompts)
    weights = torch.nn.Parameter(UNIFORM.clone())
    optimizer = MirrorDescent([weights], lr=2 / math.sqrt(steps))
    for _ in range(steps):
        rows = torch.randint(NUM_PROMPTS, (prompts,), generator=generator)
        drawn = torch.multinomial(world.reference[rows].exp(), m, True, generator=generator)
        rewards = normalize_rewards(world.rewards[rows.unsqueeze(-1), drawn], world.beta)
        weights.grad = None
        dual_objective(weights, rewards / world.beta)[0].backward()
        optimizer.step()
    return optimizer.average(weights)


def table_minimum(
    world: World, budget: int, generator: torch.Generator, proposals: list[torch.Tensor]
) -> torch.Tensor:
    """The minimum on a table of completions of several proposals, each with an equal share of the budget."""
    m = budget // (NUM_PROMPTS * len(proposals))
    drawn = torch.cat([torch.multinomial(q.exp(), m, True, generator=generator).flatten() for q in proposals])
    prompt = torch.arange(NUM_PROMPTS).repeat_interleave(m).repeat(len(proposals))
    proposal = torch.arange(len(proposals)).repeat_interleave(NUM_PROMPTS * m)
    density = balance_heuristic(prompt, proposal, torch.stack([q[prompt, drawn] for q in proposals], dim=-1))
    advantages = world.rewards[prompt, drawn] / world.beta
    table = reward_table(prompt, advantages, world.reference[prompt, drawn], density)
    return minimize_dual(table)[0][0]


def from_reference(world: World, budget: int, generator: torch.Generator) -> torch.Tensor:
    return table_minimum(world, budget, generator, [world.reference])


def from_mixture(world: World, budget: int, generator: torch.Generator) -> torch.Tensor:
    """Half of the completions from uniform weights, half from the weights fitted to the former."""
    first = world.token_mixture(UNIFORM)
    weights = table_minimum(world, budget // 2, generator, [first])
    return table_minimum(world, budget, generator, [first, world.token_mixture(0.9 * weights + 0.1 * UNIFORM)])


METHODS = {
    "mirror descent (the paper's)": mirror_descent,
    "all completions, of the reference": from_reference,
    "all completions, of the mixture": from_mixture,
}


def measure(beta: float, repetitions: int) -> dict[str, list[list[float]]]:
    """Duality gaps by method, budget and repetition; every repetition has new policies."""
    worlds = [World(seed, beta) for seed in range(repetitions)]
    gaps = {name: [] for name in METHODS}
    for budget in BUDGETS:
        for name, method in METHODS.items():
            generators = [torch.Generator().manual_seed(seed) for seed in range(repetitions)]
            gaps[name].append([w.gap(method(w, budget, g)) for w, g in zip(worlds, generators)])
    gaps["uniform weights"] = [[w.gap(UNIFORM) for w in worlds]] * len(BUDGETS)
    return gaps


def draw(results: dict[float, dict[str, list[list[float]]]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4.5 * len(results), 3.8), sharey=True)
    tokens = [budget * LENGTH for budget in BUDGETS]
    for axis, (beta, gaps) in zip(axes, results.items()):
        for name, rows in gaps.items():
            low, middle, high = zip(*[statistics.quantiles(row, n=4) for row in rows])
            style = {"color": "grey", "linestyle": "--"} if name == "uniform weights" else {"marker": "o"}
            (line,) = axis.plot(tokens, middle, label=name, **style)
            axis.fill_between(tokens, low, high, color=line.get_color(), alpha=0.15)
        axis.set(xscale="log", yscale="log", xlabel="sampled tokens", title=f"rewards span {1 / beta:.0f} nats")
    axes[0].set_ylabel("duality gap $F(\\lambda) - F(\\lambda^*)$, nats")
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="where the picture goes")
    parser.add_argument("--repetitions", type=int, default=12, help="sets of policies")
    args = parser.parse_args()
    results = {beta: measure(beta, args.repetitions) for beta in (1 / 5, 1 / 10, 1 / 20)}
    for beta, gaps in results.items():
        print(f"\nrewards span {1 / beta:.0f} nats; median duality gap of {args.repetitions} sets of policies")
        print(f"{'completions':<36}" + "".join(f"{budget:>10}" for budget in BUDGETS))
        for name, rows in gaps.items():
            print(f"{name:<36}" + "".join(f"{statistics.median(row):>10.5f}" for row in rows))
    if args.output:
        draw(results, args.output)


if __name__ == "__main__":
    main()
