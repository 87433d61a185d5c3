"""Toy policies on disk, and a mixture of them, for the trainer."""

import pytest
from toy import toy_policy, toy_tokenizer

from mpo_hf import MixturePolicyModel


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    """A folder with a reference, `ref`, and two policies, `a` and `b`, each with its tokenizer."""
    root = tmp_path_factory.mktemp("policies")
    reference = toy_policy(100, 0.5)
    for name, policy in {
        "ref": reference,
        "a": toy_policy(1, 0.1, reference),
        "b": toy_policy(2, 0.1, reference),
    }.items():
        policy.save_pretrained(root / name)
        toy_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def mixture(toy_folder):
    return MixturePolicyModel.from_policies(
        [toy_folder / "a", toy_folder / "b"], reference=toy_folder / "ref", labels=["a", "b"]
    )
