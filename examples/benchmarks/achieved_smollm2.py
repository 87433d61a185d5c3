"""
The welfare of fitted weights for real policies: those of the theorem, which assumes policies that are optimal for their rewards,
and those of `objective="achieved"`, which does not.

The policies are those of `examples/policies`, on the pool of completions that `estimators_smollm2.py` draws and describes:

    python examples/benchmarks/achieved_smollm2.py --pool smollm2-pool

Weights are fitted to one half of the completions of every prompt and measured on the other, then vice versa; both
results are printed. Rewards and the divergence from the reference are those of the sequence-level mixture, by importance
weights; the welfare is the smallest mean reward less β times the divergence.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parent))
from estimators_smollm2 import DRAWS, UNIFORM, Pool  # noqa: E402
from quickstart import OBJECTIVES  # noqa: E402

from mpo_hf.estimation import DualTable, MixtureTable, minimize_dual, reward_table  # noqa: E402
from mpo_hf.estimation.primal import maximize_primal, primal_objective  # noqa: E402
from mpo_hf.estimation.welfare import MaxMin  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True, help="folder of the pool")
    parser.add_argument("--prompts", type=int, default=8, help="prompts that the pool has")
    parser.add_argument("--rounds", type=int, default=1, help="rounds that the pool has")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.1, 0.2, 0.5, 1.0])
    return parser.parse_args()


def half_of(pool: Pool, half: int, beta: float) -> tuple[DualTable, MixtureTable, torch.Tensor]:
    """Every second completion of each proposal: the tables of the dual and of the mixture, and the rewards."""
    at = torch.arange(half, pool.size, 2)
    assert DRAWS % 2 == 0
    prompt = torch.arange(pool.num_prompts).repeat_interleave(len(at))
    density, reference = pool.density[:, at].flatten(), pool.reference[:, at].flatten()
    rewards, policies = pool.rewards[:, at].flatten(0, 1), pool.policies[:, at].flatten(0, 1)
    dual = reward_table(prompt, rewards / beta, reference, density, normalize=False)
    mixture = MixtureTable(prompt, rewards / beta, policies - density.unsqueeze(-1), reference - density)
    return dual, mixture, rewards


def fit_all(dual: DualTable, mixture: MixtureTable) -> dict[str, torch.Tensor]:
    (of_theorem,), _ = minimize_dual(dual)
    corners = 0.7 * torch.eye(len(UNIFORM), dtype=torch.float64) + 0.1
    achieved, _ = maximize_primal(mixture, MaxMin(), [UNIFORM, of_theorem, *corners])
    return {"uniform": UNIFORM, "reward (the theorem's)": of_theorem, "achieved": achieved}


def main() -> None:
    args = parse_args()
    pool = Pool(args.pool, args.prompts, args.rounds)
    names = [*OBJECTIVES, "minimum", "welfare", "effective sample size"]
    print("| β | weights of | " + " | ".join(["weights", *names]) + " |\n|" + "---|" * (len(names) + 3))
    for beta in args.betas:
        halves = [half_of(pool, half, beta) for half in (0, 1)]
        fits = [fit_all(*halves[half][:2]) for half in (0, 1)]
        for name in fits[0]:
            cells = []
            for half in (0, 1):
                weights, (_, mixture, rewards) = fits[half][name], halves[1 - half]
                shares, _ = mixture.shares(weights)
                reached = (shares.unsqueeze(-1) * rewards).sum(0) / pool.num_prompts
                welfare = beta * primal_objective(mixture, weights, MaxMin())
                numbers = [*reached, reached.min(), welfare, mixture.effective_sample_fraction(weights)]
                fitted = " ".join(f"{w:.2f}" for w in weights.tolist())
                cells.append([fitted, *(f"{float(number):.2f}" for number in numbers)])
            print(f"| {beta} | {name} | " + " | ".join(", ".join(pair) for pair in zip(*cells)) + " |")


if __name__ == "__main__":
    main()
