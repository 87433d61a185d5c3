"""
Fits by default of policies that exclude tokens and of rewards that nothing improves: the weights are as good as the best of a
grid, by sums over all completions, or an error names the objective.
"""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from decoded_worlds import DecodedWorld
from optima import ALL_PROMPTS
from toy import LENGTH, TabularPolicy, reward_functions, toy_tokenizer

from mpo_hf import MixturePolicyModel, MPOConfig, MPOTrainer
from mpo_hf.estimation import InfeasibleError


pytestmark = pytest.mark.integration
BETA, UNIFORM, LABELS = 0.2, [1 / 3] * 3, ["kind", "safe", "short"]


class HostileWorld(DecodedWorld):
    """A world whose policies or rewards are changed before anything is made of them."""

    def __init__(self, change):
        super().__init__(seed=0, beta=BETA, kind="undertrained")
        change(self)
        self.policies = self.policies.log_softmax(1)
        self.models = [TabularPolicy(logps, ALL_PROMPTS) for logps in self.policies.unbind(-1)]
        optimum = torch.logsumexp(self.reference.unsqueeze(-1) + self.rewards / BETA, dim=1, keepdim=True)
        self.gains = self.rewards / BETA - optimum

    def logps(self, weights, temperature=1.0):
        weights = torch.as_tensor(weights, dtype=torch.float64)
        used = weights.nonzero().squeeze(-1).tolist()  # what has no weight excludes nothing
        total = torch.zeros(())
        for tables in list(zip(*(self.models[k].tables for k in used)))[:LENGTH]:
            pooled = sum(weights[k] * table.log_softmax(-1) for k, table in zip(used, tables))
            total = total.unsqueeze(-1) + pooled.log_softmax(-1)
        return total.reshape(len(self.reference), -1)

    def reached_by(self, logps):
        gains = torch.einsum("py,pyk->k", logps.exp(), self.gains) / len(logps)
        return gains, (logps.exp() * (logps - self.reference).nan_to_num(neginf=0)).sum(-1).mean()

    def value(self, weights, welfare: str) -> float:
        """The welfare that a fit maximizes, in nats."""
        gains, divergence = self.reached(weights)
        return ((gains.min() if welfare == "max_min" else gains.mean()) - divergence).item()


def excludes_a_token(world):
    world.policies[:, ::6, 1] = -math.inf


def exclude_different_tokens(world):
    world.policies[:, ::6, 1] = world.policies[:, 1::6, 2] = -math.inf


def constant(world):
    world.rewards[..., 1] = 0.3


def of_the_prompt_alone(world):
    world.rewards[..., 1] = torch.linspace(0, 1, len(world.rewards)).unsqueeze(-1)


def opposed(world):
    world.rewards[..., 2] = 1 - world.rewards[..., 0]


def large(world):
    world.rewards *= 3


def tiny(world):
    world.rewards *= 1e-9


def equal_policies(world):
    world.policies[..., 2] = world.policies[..., 0]


CHANGES = [
    excludes_a_token, exclude_different_tokens, constant, of_the_prompt_alone, opposed, large, tiny, equal_policies,
]  # fmt: skip
EXCLUDED = {excludes_a_token: ["safe"], exclude_different_tokens: ["safe", "short"]}
QUICK = [(excludes_a_token, "max_min", "mixture"), (of_the_prompt_alone, "nash", "reference")]
CASES = [
    pytest.param(*case, id="-".join([case[0].__name__, *case[1:]]), marks=[] if case in QUICK else pytest.mark.slow)
    for case in itertools.product(CHANGES, ["max_min", "weighted_sum", "nash"], ["mixture", "reference"])
]


@pytest.mark.parametrize("change, welfare, proposal", CASES)
def test_weights_are_good_or_an_error_names_the_objective(tmp_path, caplog, change, welfare, proposal):
    world = HostileWorld(change)
    trainer = MPOTrainer(
        model=MixturePolicyModel.from_policies(world.models, reference=world.reference_model, labels=LABELS),
        reward_funcs=reward_functions(world.rewards, world.completions, ALL_PROMPTS),
        args=MPOConfig(
            output_dir=str(tmp_path),
            beta=BETA,
            welfare=welfare,
            proposal=proposal,
            num_generations=48,
            per_device_train_batch_size=576,
            logps_batch_size=1024,
            max_steps=9,
            tolerance=0.0,
            max_completion_length=LENGTH,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": ALL_PROMPTS}),
        processing_class=toy_tokenizer(),
    )
    if welfare == "nash" and change in (constant, of_the_prompt_alone, opposed):
        with pytest.raises(InfeasibleError, match="Leave (kind|safe|short)"):
            trainer.train()
        return
    trainer.train()
    weights = trainer.model.config.mixture_weights
    assert all(map(math.isfinite, weights)), weights
    if welfare == "nash":  # whose weights may leave the simplex
        return
    assert min(weights) >= 0 and sum(weights) == pytest.approx(1)
    excluded = EXCLUDED.get(change, [])
    told = [name for name in LABELS if f"The policy of {name!r} gives the probability 0" in caplog.text]
    assert told == excluded
    # what those reach that leave such a policy out is not known, as the warning says
    grid = [(i / 20, j / 20, 1 - (i + j) / 20) for i in range(21) for j in range(21 - i)]
    grid = [point for point in grid if all(point[LABELS.index(name)] for name in excluded)]
    values = [world.value(point, welfare) for point in grid]
    gap, bound = max(values) - world.value(weights, welfare), trainer.certificate.optimality_gap_bound
    assert gap < (0.7 if excluded else 0.25) * (max(values) - min(values)) + 0.01
    assert not bound < 0.2 * gap  # without a bound, nothing is said
