"""Log-probabilities of completions, recorded while decoding and computed afterwards, differ by rounding of the policies only."""

import pytest
import torch
from helpers import PROMPTS, save_lora, save_tiny

from mpo_hf import MixturePolicyModel
from mpo_hf.rollouts import completion_logps, mixture_logps, sample_completions


WEIGHTS, TOKENS = [0.5, 0.3, 0.2], 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three adapters over one base."""
    root = tmp_path_factory.mktemp("rounding")
    base = save_tiny(root / "base", "llama", 1, initializer_range=0.2)
    return [save_lora(root / str(seed), base, seed=seed) for seed in range(3)]


# `units` of the dtype's epsilon are the error of a token, of logits of about 4; those of all tokens are independent. 3.3 and 1.2
# were measured, with the instructions of AVX2, of AVX-512, and of its bfloat16.
@pytest.mark.parametrize("dtype, units", [(torch.float32, 16), (torch.bfloat16, 4)])
def test_decoding_and_scoring_differ_by_rounding_only(folders, dtype, units):
    mixture = MixturePolicyModel.from_policies(folders, weights=WEIGHTS, dtype=dtype)
    policies = [mixture.policy(k) for k in range(3)]
    torch.manual_seed(0)
    drawn = sample_completions(mixture, PROMPTS, 32, TOKENS, pad_token_id=0)
    scored, pooled = mixture_logps(policies, drawn, [WEIGHTS])
    own = sample_completions(policies[0], PROMPTS, 32, TOKENS, pad_token_id=0)
    single = completion_logps(policies[:1], own)[:, 0]
    for decoded, again in [
        (drawn.policy_logps, scored),
        (drawn.proposal_logps, pooled[:, 0]),
        (own.proposal_logps, single),
    ]:
        error = (again - decoded).square().mean().sqrt()
        assert error < units * torch.finfo(dtype).eps * TOKENS**0.5
    # the completions come from the distribution that decoding computed, so that weights are blurred, and their mean is 1
    weights = (single - own.proposal_logps).exp()
    assert abs(weights.mean() - 1) < 4 * (weights - 1).square().mean().sqrt() / len(weights) ** 0.5 + 1e-4
