"""
Does the bound of the duality gap cover, and is it tight? Simulated fits on large finite populations with an exact F.

A fit draws n prompts of a population and m completions for each, fits the weights and certifies them. The gap of the
weights is known from the population. Prints a table in Markdown for every population:

    python examples/benchmarks/bound_coverage.py
    python examples/benchmarks/bound_coverage.py --populations normal-3 --prompts 30 --completions 16 --fits 50
    python examples/benchmarks/bound_coverage.py --stopping
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from common import table

from mpo_hf.estimation import (
    AlphaFair,
    Constrained,
    CVaR,
    DualTable,
    MaxMin,
    Welfare,
    implicit_table,
    minimize_debiased,
    minimize_dual,
    reward_table,
)
from mpo_hf.estimation.bias import estimate_bias
from mpo_hf.estimation.certificate import bootstrap_counts
from mpo_hf.estimation.gap_bound import gap_bound


@dataclass
class Kind:
    """
    A kind of population. Rewards of prompts differ in scale, and those of the objectives, too.

    Args:
        shape (`str`): distribution of the rewards of a prompt: "normal", "uniform", or "rare", 1 for 5% of the
            completions and 0 for the others.
        objectives (`int`): K.
        common (`float`): correlation of the objectives.
        fraction (`float`): effective fraction of the completions at the optimal weights; sets β.
        table (`str`): "optimal": rewards relative to the optimum of each objective, from the completions themselves
            (the default of a fit); "none": rewards on their own scale; "implicit": log-probabilities of policies;
            "reference": gains over the reference.
        spread (`float`): standard deviation of the logarithm of a prompt's scale.
        weighted (`bool`): whether another policy than the reference draws the completions.
        welfare (`Welfare`, *optional*): the welfare function. Defaults to the max-min.
    """

    shape: str
    objectives: int
    common: float
    fraction: float
    table: str = "optimal"
    spread: float = 0.3
    weighted: bool = False
    welfare: Welfare | None = None


THIRDS = [1 / 3] * 3
KINDS = {
    "normal-2": Kind("normal", 2, 0.0, 0.45),
    "normal-3": Kind("normal", 3, 0.6, 0.2),
    "normal-3-mild": Kind("normal", 3, 0.6, 0.7),
    "normal-4": Kind("normal", 4, 0.0, 0.3),
    "uniform-2": Kind("uniform", 2, 0.0, 0.45),
    "uniform-3": Kind("uniform", 3, 0.7, 0.2),
    "rare-2": Kind("rare", 2, 0.0, 0.45),
    "rare-3": Kind("rare", 3, 0.5, 0.2),
    "rare-4": Kind("rare", 4, 0.0, 0.7),
    "own scale": Kind("normal", 3, 0.5, 0.45, table="none"),
    "implicit": Kind("normal", 3, 0.5, 0.3, table="implicit"),
    "weighted": Kind("normal", 3, 0.5, 0.45, weighted=True),
    "nash": Kind("normal", 3, 0.5, 0.45, table="reference", welfare=AlphaFair(1.0, THIRDS)),
    "cvar": Kind("uniform", 3, 0.0, 0.45, welfare=CVaR(0.6, THIRDS)),
    "constrained": Kind("normal", 3, 0.5, 0.45, table="none", welfare=Constrained(MaxMin(), [2], 2.0)),
}


class Population:
    """Prompts and completions with their rewards, all of them known. Each prompt's completions are equally likely."""

    def __init__(self, kind: Kind, num_prompts: int, num_completions: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.kind, self.welfare = kind, kind.welfare if kind.welfare is not None else MaxMin()
        self.rewards = draw_rewards(kind, num_prompts, num_completions, generator)
        # logarithms of the probabilities by which the completions are drawn
        tilt = 0.7 * torch.randn(num_prompts, num_completions, generator=generator) * kind.weighted
        self.proposal = tilt.log_softmax(-1)
        self.rewards *= self._find_scale()  # divided by β from here on
        self.gains = exact_gains(kind, self.rewards)
        exact = exact_table(self.gains)
        (self.best,), (self.minimum,) = minimize_dual(exact, welfare=self.welfare)
        self.fraction = exact.effective_sample_fractions(self.best).mean().item()

    def _find_scale(self) -> float:
        """1/β for the effective fraction of the kind, from some of the prompts."""
        low, high = 1e-2, 1e3
        for _ in range(16):
            scale = math.sqrt(low * high)
            part = exact_table(exact_gains(self.kind, self.rewards[:100] * scale))
            (weights,), _ = minimize_dual(part, welfare=self.welfare)
            is_too_far = part.effective_sample_fractions(weights).mean().item() < self.kind.fraction
            low, high = (low, scale) if is_too_far else (scale, high)
        return math.sqrt(low * high)

    def gap(self, weights: torch.Tensor) -> torch.Tensor:
        """F(λ) - F(λ*) for weights of shape `(B, K)`."""
        found = torch.zeros(len(weights), dtype=torch.float64)
        for gains in self.gains.split(50):
            for part, total in zip(weights.float().split(16), found.split(16)):
                total += (gains @ part.T).logsumexp(1).double().sum(0)
        return found / len(self.gains) - math.log(self.gains.shape[1]) - self.minimum

    def sample(self, num_prompts: int, num_completions: int, generator: torch.Generator) -> DualTable:
        """The table of a fit."""
        rows = torch.randint(len(self.rewards), (num_prompts,), generator=generator)
        if self.kind.weighted:
            drawn = torch.multinomial(self.proposal[rows].exp(), num_completions, True, generator=generator)
        else:
            drawn = torch.randint(self.rewards.shape[1], (num_prompts, num_completions), generator=generator)
        at = rows.unsqueeze(-1), drawn
        prompt = torch.arange(num_prompts).repeat_interleave(num_completions)
        reference = torch.full((len(prompt),), -math.log(self.rewards.shape[1]), dtype=torch.float64)
        proposal = self.proposal[at].flatten().double()
        if self.kind.table == "implicit":
            return implicit_table(prompt, self.gains[at].flatten(0, 1).double() + reference.unsqueeze(-1), proposal)
        gains = self.rewards[at].double()
        if self.kind.table == "reference":
            gains = gains - gains.mean(1, keepdim=True)
        normalize = self.kind.table == "optimal"
        return reward_table(prompt, gains.flatten(0, 1), reference, proposal, normalize=normalize)


def draw_rewards(kind: Kind, num_prompts: int, num_completions: int, generator: torch.Generator) -> torch.Tensor:
    shape = (num_prompts, num_completions, kind.objectives)
    scale = torch.exp(kind.spread * torch.randn(num_prompts, 1, kind.objectives, generator=generator))
    own, common = torch.randn(shape, generator=generator), torch.randn(*shape[:2], 1, generator=generator)
    normal = math.sqrt(1 - kind.common**2) * own + kind.common * common
    by_objective = torch.linspace(1.0, 0.75, kind.objectives)
    if kind.shape == "rare":
        return (torch.special.ndtr(normal) > 1 - 0.05 * scale).float() * by_objective
    if kind.shape == "uniform":
        normal = torch.special.ndtr(normal) - 0.5
    return normal * scale * by_objective


def exact_gains(kind: Kind, rewards: torch.Tensor) -> torch.Tensor:
    """Gains of all completions, relative to the exact baselines of their prompts."""
    if kind.table in ("optimal", "implicit"):
        return rewards - (rewards.logsumexp(1, keepdim=True) - math.log(rewards.shape[1]))
    return rewards - rewards.mean(1, keepdim=True) if kind.table == "reference" else rewards


def exact_table(gains: torch.Tensor) -> DualTable:
    prompt = torch.arange(len(gains)).repeat_interleave(gains.shape[1])
    offsets = torch.full((len(prompt),), -math.log(gains.shape[1]), dtype=torch.float64)
    return DualTable(prompt, offsets, gains.flatten(0, 1).double())


# ---- fits ----


def bound_of(found: DualTable, plain: torch.Tensor, weights: torch.Tensor, welfare: Welfare, seed: int) -> float:
    """The bound of `certify`, without its standard errors, which take most of its time."""
    counts = bootstrap_counts(found.num_prompts, 200, seed)
    return gap_bound(found, weights, plain, estimate_bias(found, plain), counts, 0.95, welfare, seed)


def coverage(population: Population, num_prompts: int, num_completions: int, fits: int, seed: int) -> dict[str, float]:
    """Fits on samples of one size: how often the bound holds, and how it compares with the gaps."""
    bounds, weights, plain = [], [], []
    for fit in range(fits):
        generator = torch.Generator().manual_seed(1_000_000 * seed + fit)
        found = population.sample(num_prompts, num_completions, generator)
        plain.append(minimize_dual(found, welfare=population.welfare)[0][0])
        weights.append(minimize_debiased(found, population.welfare)[0][0])
        bounds.append(bound_of(found, plain[-1], weights[-1], population.welfare, fit))
    gaps, found = population.gap(torch.stack(weights)), torch.tensor(bounds, dtype=torch.float64)
    is_finite = torch.isfinite(found)
    return {
        "covered": (gaps <= found).double().mean().item(),
        "finite": is_finite.double().mean().item(),
        "covered, finite": (gaps <= found)[is_finite].double().mean().item(),
        "gap": gaps.mean().item(),
        "gap, minimize_dual": population.gap(torch.stack(plain)).mean().item(),
        "bound": found[is_finite].median().item() if is_finite.any() else math.inf,
        "quantile": gaps.quantile(0.95).item(),
    }


def looks(first: int, last: int) -> Iterator[int]:
    """Numbers of prompts at which a fit looks at its bound: whenever they have grown by one part in 64."""
    count = first
    while count <= last:
        yield count
        count = max(count + 1, math.ceil(count * (1 + 1 / 64)))


def stopping(
    population: Population, num_completions: int, fits: int, last: int, tolerance: float, seed: int
) -> dict[str, float]:
    """Fits that end as soon as the bound is below the tolerance: how often it holds then, and after how many prompts."""
    ends, weights, bounds = [], [], []
    for fit in range(fits):
        generator = torch.Generator().manual_seed(1_000_000 * seed + fit)
        whole = population.sample(last, num_completions, generator)
        for count in looks(10, last):
            rows = (whole.prompt < count).nonzero().squeeze(-1)
            found = whole.part(rows, whole.prompt[rows])
            fitted = minimize_debiased(found, population.welfare)[0][0]
            (plain,), _ = minimize_dual(found, welfare=population.welfare)
            bound = bound_of(found, plain, fitted, population.welfare, 0)
            if bound <= tolerance:
                ends.append(count), weights.append(fitted), bounds.append(bound)
                break
    if not ends:
        return {"stopped": 0.0}
    gaps = population.gap(torch.stack(weights))
    return {
        "stopped": len(ends) / fits,
        "prompts": statistics.median(ends),
        "covered": (gaps <= torch.tensor(bounds)).double().mean().item(),
        "within": (gaps <= tolerance).double().mean().item(),
        "gap": gaps.mean().item(),
    }


# ---- tables ----


def coverage_row(found: dict[str, float]) -> list[str]:
    bound, gap = found["bound"], found["gap"]
    is_finite = math.isfinite(bound)
    return [
        f"{found['covered']:.1%}",
        f"{found['finite']:.0%}",
        f"{found['covered, finite']:.1%}" if found["finite"] else "",
        f"{found['gap, minimize_dual']:.5f}",
        f"{gap:.5f}",
        f"{bound:.5f}" if is_finite else "",
        f"{bound / gap:.1f}" if is_finite else "",
        f"{found['quantile'] / gap:.1f}",
    ]


COVERAGE = "population,n,m,covered,finite,covered if finite,plain gap,gap,bound,bound ÷ gap,95% of gaps ÷ gap".split(
    ","
)
STOPPING = "population,m,ended,prompts,covered,within the tolerance,gap".split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--populations", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--prompts", nargs="+", type=int, default=[4, 10, 30, 100, 200, 300])
    parser.add_argument("--completions", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--fits", type=int, default=200)
    parser.add_argument(
        "--size", nargs=2, type=int, default=[1000, 2000], help="prompts and completions of a population"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stopping", action="store_true", help="fits that end at a tolerance, instead of fits of one size"
    )
    parser.add_argument("--tolerance", type=float, default=0.01, help="with --stopping, in nats")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, start = [], time.perf_counter()
    for name in args.populations:
        population = Population(KINDS[name], *args.size, args.seed)
        label = f"{name} ({population.fraction:.2f})"
        for m in args.completions:
            if args.stopping:
                found = stopping(population, m, args.fits, max(args.prompts), args.tolerance, args.seed)
                rest = [f"{found[key]:.1%}" for key in ("covered", "within")] if found["stopped"] else ["", ""]
                ends = [found["prompts"], *rest, f"{found['gap']:.5f}"] if found["stopped"] else ["", *rest, ""]
                rows.append([label, m, f"{found['stopped']:.0%}", *ends])
                print("|", *rows[-1], sep=" | ", flush=True)
                continue
            for n in args.prompts:
                rows.append([label, n, m, *coverage_row(coverage(population, n, m, args.fits, args.seed))])
                print("|", *rows[-1], sep=" | ", flush=True)
    print("\n" + table(STOPPING if args.stopping else COVERAGE, rows))
    print(
        f"\n{args.fits} fits, {args.size[0]} prompts of {args.size[1]} completions. {(time.perf_counter() - start) / 60:.1f} minutes."
    )


if __name__ == "__main__":
    main()
