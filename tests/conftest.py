"""Shared fixtures. Nothing here reaches for a network: every model is made from a seed."""

import os
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"
# where Transformers copies the code that comes with a checkpoint
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()
# two test processes share two cores, and so do the programs that they start; other numbers stand for other machines, where
# sums are added up in other orders
THREADS = os.environ.setdefault("MPO_HF_TEST_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", THREADS)

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import KINDS, VOCAB, Folders, build_case, save_lora, save_tiny, tiny_tokenizer  # noqa: E402


torch.set_num_threads(int(THREADS))


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """Every kind of mixture by name, built when it is first asked for."""
    built = {}

    def get(kind):
        if kind not in built:
            built[kind] = build_case(kind, tmp_path_factory.mktemp("case"))
        return built[kind]

    return get


@pytest.fixture(params=KINDS)
def case(request, cases):
    """One kind of mixture after another: the mixture, and its components as independent models."""
    return cases(request.param)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Saved policies: two models, and two adapters over the first. Not to be written to."""
    root = tmp_path_factory.mktemp("policies")
    base = save_tiny(root / "base", "llama", 20)
    adapters = [save_lora(root / name, base, seed, r=r) for name, seed, r in [("kind", 30, 2), ("terse", 31, 4)]]
    return Folders(root, base, save_tiny(root / "gpt2", "gpt2", 21), *adapters)


@pytest.fixture
def tokenizer():
    """A tokenizer with the vocabulary of the tiny models: `t0`, `t1` and so on."""
    return tiny_tokenizer([f"t{i}" for i in range(VOCAB)])
