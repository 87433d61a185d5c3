"""What a fit is saved with when something around it fails, and what it goes on from when something in its folder is amiss."""

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from fits import Interrupt, count_b, count_c, make_args, make_trainer
from helpers import program
from toy import PROMPTS, toy_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

from mpo_hf import MixturePolicyModel, MPOTrainer, get_product_layouts, set_product_layouts
from mpo_hf.mixture.product_layouts import current_layouts
from mpo_hf.rewards import RewardEnsemble
from mpo_hf.trainer import fit_card, saving
from mpo_hf.trainer.fingerprints import reward_fingerprint
from mpo_hf.trainer.folder_lock import LOCK, locked


pytestmark = pytest.mark.integration
OPTIONS = {"estimator": "mis", "num_resamples": 5, "proposal": "reference", "score_policies": 0, "max_steps": 3}


@pytest.fixture
def trainer(toy_folder, tmp_path):
    def make(name="run", policies=("a", "b"), **kwargs):
        mixture = MixturePolicyModel.from_policies(
            [toy_folder / policy for policy in policies], reference=toy_folder / "ref", labels=["a", "b"]
        )
        return make_trainer(mixture, tmp_path / name, **{**OPTIONS, **kwargs})

    return make


@pytest.fixture(scope="module")
def finished(toy_folder, tmp_path_factory):
    """The folder of a fit of three steps, with all of its checkpoints, and the weights that it found."""
    folder = tmp_path_factory.mktemp("finished")
    mixture = MixturePolicyModel.from_policies(
        [toy_folder / "a", toy_folder / "b"], reference=toy_folder / "ref", labels=["a", "b"]
    )
    run = make_trainer(mixture, folder, save_total_limit=None, **OPTIONS)
    run.train()
    return folder, run.weights.detach().clone()


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


# ---- the result comes first ----


def fails(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("part", ["card", "plot", "summary", "license"])
def test_the_result_is_saved_whatever_happens_to_its_ornaments(
    trainer, toy_folder, tmp_path, monkeypatch, caplog, part
):
    policies = ["a", "b"]
    if part == "license":
        policies = [tmp_path / name for name in policies]
        for path in policies:
            shutil.copytree(toy_folder / path.name, path)
            (path / "README.md").write_text("---\nlicense: other\nlicense_name: [x]\nlicense_link: [1, 2]\n---\n")
    run = trainer(policies=policies, max_steps=1)
    if part == "card":
        monkeypatch.setattr(saving, "create_model_card", fails)
    elif part == "plot":
        monkeypatch.setattr(fit_card, "plot_fit", fails)
    elif part == "summary":
        monkeypatch.setattr(run, "summary", fails)
    run.train()
    run.save_model()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert opened.config.mixture_weights == run.model.config.mixture_weights
    assert (tmp_path / "run" / "README.md").is_file() == (part in ("plot", "license"))
    said = [r.getMessage() for r in caplog.records if "No space left" in r.getMessage()]
    assert bool(said) == (part != "license")


def test_the_result_is_saved_before_the_tokenizer(trainer, tmp_path, monkeypatch):
    run = trainer(max_steps=1)
    run.train()
    monkeypatch.setattr(run.processing_class, "save_pretrained", fails)
    with pytest.raises(OSError, match="No space left"):
        run.save_model()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mixture_weights"] is not None


def test_a_fit_that_has_converged_leaves_a_checkpoint_of_its_end(trainer, tmp_path):
    class Fails(TrainerCallback):
        on_train_end = fails

    prompts = Dataset.from_dict({"prompt": [f"{a} {b}" for a in "abcd" for b in "abcd"]})
    options = {"dataset": prompts, "tolerance": 10.0, "per_device_train_batch_size": 48, "save_steps": 50}
    run = trainer(callbacks=[Fails()], max_steps=100, **options)
    with pytest.raises(OSError, match="No space left"):
        run.train()
    assert run.state.global_step < 100
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{run.state.global_step}"]


# ---- one owner of a folder at a time ----


def test_a_folder_has_one_owner_at_a_time(trainer, toy_folder, tmp_path):
    class Others(TrainerCallback):
        """Somebody who comes while a fit is at work."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                with pytest.raises(ValueError, match=f"Another run is at work in .*run.*process {os.getpid()} on "):
                    other.train()
                with pytest.raises(ValueError, match="Another run is at work"):
                    other.train(resume_from_checkpoint=True)
                with pytest.raises(ValueError, match="Another run is at work"):
                    reader(tmp_path / "run" / "_rollouts", "reads").train()

    def reader(store, name):
        mixture = MixturePolicyModel.from_policies([toy_folder / "a"], reference=toy_folder / "ref", labels=["a"])
        args = make_args(tmp_path / name, estimator="mis", num_resamples=5)
        return MPOTrainer(model=mixture, args=args, processing_class=toy_tokenizer(), rollouts=store)

    other, run = trainer(), trainer(callbacks=[Others()])
    run.train()
    assert len(run.rollout_fit.store.read(("id",))["id"]) == len(run.rollout_fit.columns) == 3 * 8
    with pytest.raises(ValueError, match="holds completions already"):  # the owner has gone
        other.train()
    reader(tmp_path / "run" / "_rollouts", "reads").train()


@pytest.mark.slow
def test_an_owner_that_was_killed_owns_nothing(tmp_path):
    values = {"folder": str(tmp_path), "seconds": 60}
    with subprocess.Popen(**program("owner.py", values), stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match=f"process {owner.pid} on"), locked(tmp_path):
            pass
        owner.kill()
        owner.stdout.close()
    assert str(owner.pid) in (tmp_path / LOCK).read_text()
    with locked(tmp_path):  # though a child of the owner still lives
        pass


# ---- what belongs together ----


CHANGES = {
    "beta": {"beta": 0.7},
    "objective": {"objective": "achieved", "mixing": "sequence", "score_policies": 1.0},
    "seed": {"seed": 7},
    "rewards": {"rewards": [count_b, count_c]},
    "policies": {"policies": ["a", "ref"]},
    "prompts": {"dataset": Dataset.from_dict({"prompt": PROMPTS[::-1]})},
    "max_completion_length": {"max_completion_length": 2},
}


@pytest.mark.parametrize("estimator", ["mis", "bsmd"])
def test_a_checkpoint_of_another_fit_is_refused_by_name(trainer, finished, copied, estimator):
    options = {} if estimator == "mis" else {"estimator": "bsmd", "num_resamples": 200, "score_policies": 1.0}
    if estimator == "bsmd":
        shutil.rmtree(copied)
        trainer(**options).train()
    for name, change in CHANGES.items():
        if estimator == "bsmd" and name == "objective":
            continue
        with pytest.raises(ValueError, match=rf"'{name}' was .* there and is .* here"):
            trainer(**{**options, **change}).train(resume_from_checkpoint=True)
    again = trainer(**{**options, "max_steps": 4})  # more steps are the same fit
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_policies_that_have_moved_are_the_same(trainer, toy_folder, finished, copied, tmp_path):
    moved = [shutil.copytree(toy_folder / name, tmp_path / f"moved-{name}") for name in ("a", "b")]
    again = trainer(policies=moved)
    again.train(resume_from_checkpoint=str(copied / "checkpoint-2"))
    assert torch.equal(again.weights, finished[1])


WORD = "c"


def make_reward(word, weight=1.0):
    def reward(completions, **kwargs):
        return [weight * c.split().count(word) for c in completions]

    return reward


def counts(completions, **kwargs):
    return [float(c.split().count(WORD)) for c in completions]


class Judge:
    """A reward with a setting, a counter and a cache."""

    def __init__(self, word):
        self.word, self.calls, self.cache = word, 0, {}

    def __call__(self, completions, **kwargs):
        self.calls += 1
        self.cache[self.calls] = completions
        return [float(c.split().count(self.word)) for c in completions]


def test_rewards_are_known_by_what_they_compute(monkeypatch):
    kinds = [
        make_reward("b"),
        make_reward("c"),
        make_reward("b", 2.0),
        functools.partial(count_b, scale=1),
        functools.partial(count_b, scale=2),
        lambda completions, **kwargs: [1.0 for _ in completions],
        lambda completions, **kwargs: [2.0 for _ in completions],
        lambda completions, **kwargs: [len(set(c) & {"a", "b", "c"}) for c in completions],
        count_b,
        count_c,
        counts,
        Judge("b"),
        Judge("c"),
        Judge("b").__call__,
        torch.nn.Linear(2, 1),
        torch.nn.Linear(2, 1),
        RewardEnsemble([count_b, count_c], label="a"),
        RewardEnsemble([count_b, counts], label="a"),
    ]
    found = [reward_fingerprint(reward) for reward in kinds]
    assert len(set(found)) == len(kinds)
    judge = Judge("b")
    judge(["b b"])
    assert reward_fingerprint(judge) == found[11] and reward_fingerprint(make_reward("b")) == found[0]
    monkeypatch.setitem(globals(), "WORD", "d")
    assert reward_fingerprint(counts) != found[10]


# ---- what is missing, or damaged ----


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda last: cut(last / "trainer_state.json"),
        lambda last: cut(last / "optimizer.pt"),
        lambda last: cut(last / "rng_state.pth"),
        lambda last: (last / "scheduler.pt").write_bytes(b""),
        lambda last: (last / "config.json").unlink(),
        lambda last: [path.unlink() for path in last.iterdir()],
        lambda last: cut(last.parent / "_rollouts" / "rollouts-00000003-0000.parquet"),
        lambda last: (last.parent / "_rollouts" / "rollouts-00000003-0000.parquet").unlink(),
        lambda last: (
            (last.parent / "_rollouts" / ".rollouts-00000003-0000.parquet.1.tmp").touch() or cut(last / "config.json")
        ),
    ],
    ids="state optimizer random scheduler config empty shard missing partial".split(),
)
def test_a_fit_goes_on_from_what_is_whole(trainer, finished, copied, caplog, damage):
    damage(copied / "checkpoint-3")
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert torch.equal(again.weights, finished[1])
    assert again._initial_global_step == 2
    assert any("checkpoint-3' is passed over" in r.getMessage() for r in caplog.records)
    assert not list((copied / "_rollouts").glob(".*"))


def test_a_checkpoint_that_is_named_is_not_passed_over(trainer, copied):
    cut(copied / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(OSError, match="checkpoint-2' cannot be resumed from: optimizer.pt is damaged"):
        trainer().train(resume_from_checkpoint=str(copied / "checkpoint-2"))
    assert len(list(copied.glob("checkpoint-*"))) == 3


@pytest.mark.parametrize("gone", ["_rollouts", "shards", "first shard", "checkpoints"])
def test_nothing_is_begun_anew_behind_ones_back(trainer, copied, gone):
    """Rows without checkpoints, or checkpoints without rows: neither is a fit that was killed before its first checkpoint."""
    for path in copied.glob(
        {"shards": "_rollouts/*.parquet", "first shard": "_rollouts/rollouts-00000001-*"}.get(gone, "-")
    ):
        path.unlink()
    for path in copied.glob({"_rollouts": "_rollouts", "checkpoints": "checkpoint-*"}.get(gone, "-")):
        shutil.rmtree(path)
    before = sorted(copied.rglob("*.*"))
    with pytest.raises(ValueError, match="no checkpoint in .* to resume from"):
        trainer().train(resume_from_checkpoint=True)
    assert set(before) <= set(copied.rglob("*.*"))


def test_resuming_from_an_earlier_checkpoint_leaves_no_later_one(trainer, finished, copied):
    """They rest on completions that are drawn anew."""
    with pytest.raises(KeyboardInterrupt):
        trainer(callbacks=[Interrupt(1)]).train(resume_from_checkpoint=str(copied / "checkpoint-1"))
    assert [path.name for path in copied.glob("checkpoint-*")] == ["checkpoint-1"]
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert torch.equal(again.weights, finished[1])


@pytest.mark.parametrize("told", [None, "plain"])
def test_products_are_computed_as_before_unless_somebody_says_how(trainer, tmp_path, told):
    """Other forms round differently, and so could draw and weigh other completions."""
    shape = "float32, 3 x 576 x 49152, 2 threads"
    try:
        set_product_layouts("measured")
        current_layouts().choices[shape] = "turned"
        trainer(max_steps=1).train()
        set_product_layouts(told or "measured")  # as in another process
        trainer(max_steps=2).train(resume_from_checkpoint=True)
        assert get_product_layouts().get(shape) == ("turned" if told is None else None)
        assert current_layouts().measures is (told is None)
        set_product_layouts("measured")
        trainer("anew").train()
        assert shape not in get_product_layouts()
    finally:
        set_product_layouts("measured")


def test_a_folder_without_anything_is_begun(trainer, finished, caplog):
    run = trainer()
    run.train(resume_from_checkpoint=True)
    assert torch.equal(run.weights, finished[1]) and "the fit begins anew" in caplog.text
