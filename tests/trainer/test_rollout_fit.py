"""Fits that keep every completion: exactness, what is kept, fitting it again, interruptions, errors."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, load_dataset
from fits import FAR, Interrupt, count_b, count_c, fit, make_args, make_trainer, renewal
from helpers import CLOSE, close, program
from toy import PROMPTS, sequence_logps, toy_tokenizer
from transformers import AutoModelForCausalLM, HfArgumentParser, QuantoConfig

from mpo_hf import MixturePolicyModel, MPOConfig, MPOTrainer
from mpo_hf.estimation import DualTable, certify, minimize_dual
from mpo_hf.rewards import RewardError
from mpo_hf.rollouts.store import write_whole
from mpo_hf.trainer import rollout_fit, row_scoring
from mpo_hf.trainer.fit_problem import FitProblem


pytestmark = pytest.mark.integration
LABELS = ["a", "b"]


@pytest.fixture
def trainer(toy_folder, tmp_path):
    def make(name="run", mixture=None, **kwargs):
        if mixture is None:
            policies = [toy_folder / label for label in LABELS]
            mixture = MixturePolicyModel.from_policies(policies, reference=toy_folder / "ref", labels=LABELS)
        options = {"estimator": "mis", **kwargs}
        if options["estimator"] == "mis":
            options = {"num_resamples": 20, **options}
        return make_trainer(mixture, tmp_path / name, **options)

    return make


def refit(toy_folder, store, tmp_path, name="again", labels=LABELS, rewards=None, **kwargs):
    mixture = MixturePolicyModel.from_policies(
        [toy_folder / label for label in labels], reference=toy_folder / "ref", labels=list(labels)
    )
    return MPOTrainer(
        model=mixture,
        reward_funcs=rewards,
        args=make_args(tmp_path / name, estimator="mis", num_resamples=20, **kwargs),
        processing_class=toy_tokenizer(),
        rollouts=store,
    )


def never(*args, **kwargs):
    raise AssertionError("this should not have been called")


# ---- exactness ----


@pytest.mark.parametrize(
    "objective, proposal, factor",
    [("reward", "mixture", 0.1), ("reward", "reference", 0.5), ("implicit", "mixture", 0.1)],
)
def test_few_completions_close_most_of_the_gap(tmp_path, objective, proposal, factor):
    """A tenth of what mirror descent is given in `test_fit_exactness`, and less."""
    gap, uniform_gap, _ = fit(
        tmp_path, objective, proposal, FAR, num_generations=32, steps=30, estimator="mis", num_resamples=10
    )
    assert uniform_gap > 0.05
    assert 0 <= gap <= factor * uniform_gap


def test_the_fit_ends_when_it_has_converged(trainer):
    prompts = Dataset.from_dict({"prompt": [f"{a} {b}" for a in "abcd" for b in "abcd"]})
    run = trainer(dataset=prompts, tolerance=0.02, max_steps=200, per_device_train_batch_size=16, beta=1.0)
    run.train()
    assert 3 <= run.state.global_step < 200  # not before ten prompts, of which a step has four
    assert 0 < run.certificate.duality_gap_bound <= 0.02
    assert run.state.log_history[-2]["duality_gap_bound"] == pytest.approx(run.certificate.duality_gap_bound)


# ---- what is kept ----


def test_everything_that_is_known_of_a_completion_is_kept(trainer, toy_folder, tmp_path):
    run = trainer(proposal="mixture", gradient_accumulation_steps=2, max_steps=3)
    run.train()
    files = sorted(os.listdir(tmp_path / "run" / "_rollouts"))
    assert [f for f in files if f.startswith("rollouts-")] == [
        f"rollouts-0000000{step}-000{part}.parquet" for step in (1, 2, 3) for part in (0, 1)
    ]
    table = load_dataset("parquet", data_files=str(tmp_path / "run/_rollouts/rollouts-*.parquet"), split="train")
    assert len(table) == 3 * 2 * 8 and len(set(table["id"])) == len(table)
    policies = {label: run.policy_models[k] for k, label in enumerate(LABELS)}
    for row in table.select(range(0, len(table), 7)):
        ids = torch.tensor([row["completion_ids"]])
        assert toy_tokenizer()(row["prompt"])["input_ids"] == row["prompt_ids"]
        assert row["completion"] == toy_tokenizer().decode(row["completion_ids"], skip_special_tokens=True)
        expected = [sequence_logps(policies[label], row["prompt_ids"], ids).item() for label in LABELS]
        assert row["policy_logps"] == close(expected)
        assert row["reference_logps"] == close(sequence_logps(run.reference_policy, row["prompt_ids"], ids).item())
        mixture = MixturePolicyModel.from_policies([toy_folder / n for n in LABELS], weights=row["proposal"])
        assert row["proposal_logps"] == close(sequence_logps(mixture, row["prompt_ids"], ids).item())
        assert row["rewards"] == [count_c([row["completion"]])[0], count_b([row["completion"]])[0]]


@pytest.mark.parametrize("estimator", ["mis", "bsmd"])
@pytest.mark.parametrize("proposal, told", [("mixture", "policy_scorer"), ("reference", "reference_scorer")])
def test_what_sampling_has_told_is_not_computed(trainer, estimator, proposal, told):
    options = {"estimator": estimator, "proposal": proposal, **renewal(estimator, proposal, 0.0)}
    run = trainer(normalize_rewards=False, max_steps=3, **options)
    run.train()
    made = {name for name in vars(run) if name.endswith("_scorer")}
    assert told not in made
    if (estimator, proposal) != ("bsmd", "reference"):  # which needs no log-probabilities at all
        assert len(made) == 1


def test_proposals_that_drew_for_one_prompt_are_weighed_together(trainer, toy_folder, monkeypatch):
    """The proposal is renewed at every step; densities are compared with those of independent models."""
    run = trainer(proposal="mixture", refresh_below=1.0, max_steps=4, per_device_train_batch_size=16)
    run.train()
    numbers = run.rollout_fit.columns
    proposals = list(numbers.proposals)
    assert len(proposals) == 4
    rows = run.rollout_fit.store.read(("prompt_ids", "completion_ids"))
    models = {p: MixturePolicyModel.from_policies([toy_folder / n for n in LABELS], weights=p) for p in proposals}
    logps = {
        p: [
            sequence_logps(model, prompt, torch.tensor([ids])).item()
            for prompt, ids in zip(rows["prompt_ids"], rows["completion_ids"])
        ]
        for p, model in models.items()
    }
    expected = []
    for i, prompt in enumerate(numbers["prompt"]):
        drew = [proposals[s] for s in numbers["proposal"][numbers["prompt"] == prompt]]
        of_drawn = torch.tensor([logps[p][i] for p in drew], dtype=torch.float64)
        expected.append(torch.logsumexp(of_drawn, 0) - math.log(len(drew)))
    found = torch.from_numpy(numbers.log_densities(len(numbers), all_under_reference=True))
    torch.testing.assert_close(found, torch.stack(expected), **CLOSE)


@pytest.mark.parametrize("given", [False, True])
def test_no_row_is_left_out_at_the_end_and_none_is_used_early(trainer, toy_folder, tmp_path, monkeypatch, given):
    """
    Two batches a step. The table is made at the first one of the second step, without the rows of the second one, and
    would not be made again for it if this were not the last step.
    """
    run = trainer(max_steps=3, gradient_accumulation_steps=2, proposal="mixture")
    if given:
        run.train()
        run = refit(
            toy_folder, tmp_path / "run" / "_rollouts", tmp_path, gradient_accumulation_steps=2, proposal="mixture"
        )
    monkeypatch.setattr(rollout_fit, "GROWTH", 0.5)
    sizes = []
    make_estimator = run.rollout_fit.make_estimator
    monkeypatch.setattr(
        run.rollout_fit,
        "make_estimator",
        lambda *rows: sizes.append(len(run.rollout_fit.columns)) or make_estimator(*rows),
    )
    run.train()
    assert sizes == ([8, 16, 32, 48] if given else [8, 16, 24, 40, 48])
    (weights,), _ = minimize_dual(make_estimator().table)
    torch.testing.assert_close(run.weights.detach(), weights, atol=1e-9, rtol=0)
    assert run.certificate.rewards.tolist() == pytest.approx(
        certify(make_estimator().table, weights, run.rollout_fit.rewards).rewards.tolist()
    )


def test_the_loss_is_computed_once_for_an_estimate_and_weights(trainer, monkeypatch):
    run = trainer(max_steps=2)
    run.train()
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    expected = run.rollout_fit.estimator.loss(weights)
    (gradient,) = torch.autograd.grad(expected, weights)
    for _ in range(2):
        found = run.rollout_fit.loss(weights)
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found, weights)[0], gradient)
        monkeypatch.setattr(DualTable, "by_prompt", never)
    with pytest.raises(AssertionError, match="should not have been called"):
        run.rollout_fit.loss(weights.detach() + torch.tensor([0.1, -0.1]))


def test_without_scores_of_the_policies_the_weights_are_the_same(trainer, toy_folder, tmp_path, monkeypatch):
    whole = trainer("whole", seed=3)
    whole.train()
    run = trainer("fast", seed=3, score_policies=False)
    with monkeypatch.context() as patch:
        patch.setattr(type(run), "policy_scorer", property(never))
        run.train()
    assert torch.equal(run.weights, whole.weights)
    assert run.certificate.duality_gap_bound == whole.certificate.duality_gap_bound
    assert run.certificate.mixture_rewards is None and run.certificate.mixture_duality_gap is None
    assert whole.certificate.mixture_rewards is not None
    assert set(run.rollout_fit.store.read(("policy_logps",))["policy_logps"]) == {None}
    # what another objective needs is computed when it does
    later = refit(
        toy_folder,
        tmp_path / "fast" / "_rollouts",
        tmp_path,
        objective="achieved",
        mixing="sequence",
        proposal="reference",
    )
    later.train()
    assert later.certificate.of_mixture and later.certificate.mixture_rewards is not None


MANY = Dataset.from_dict({"prompt": [f"{a} {b}" for a in "abcd" for b in "abcd"]})


def scored_by_prompt(store):
    """For every prompt, which of its completions have log-probabilities under the policies."""
    found = {}
    rows = store.read(("prompt", "policy_logps"))
    for prompt, logps in zip(rows["prompt"], rows["policy_logps"]):
        found.setdefault(prompt, []).append(logps is not None)
    return found


def test_a_share_of_the_prompts_is_scored_under_the_policies(trainer, tmp_path):
    options = {"seed": 3, "dataset": MANY, "max_steps": 16, "tolerance": 0}
    whole = trainer("whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer("part", score_policies=0.5, callbacks=[Interrupt(9)], **options).train()
    run = trainer("part", score_policies=0.5, **options)
    run.train(resume_from_checkpoint=True)
    scored = scored_by_prompt(run.rollout_fit.store)
    assert set(map(len, scored.values())) == {8}  # every prompt was visited twice
    for prompt, rows in scored.items():
        assert set(rows) == {int(rollout_fit.prompt_key({"prompt": prompt}), 16) < 0.5 * 16**16}
    assert len(scored) == 16 and 2 <= sum(map(all, scored.values())) < 16
    assert torch.equal(run.weights, whole.weights)
    for name in ("duality_gap_bound", "effective_sample_fraction"):
        assert getattr(run.certificate, name) == getattr(whole.certificate, name)
    covered = torch.tensor([all(scored[prompt]) for prompt in run.rollout_fit.store.read(("prompt",))["prompt"]])
    table = run.rollout_fit.estimator.mixture
    assert torch.equal(table.rows, covered.nonzero().squeeze(-1))
    shares, _ = table.shares(run.weights.detach())
    rewards = run.rollout_fit.rewards[covered]
    means = [shares[of] @ rewards[of] for of in (table.prompt == prompt for prompt in table.prompt.unique())]
    torch.testing.assert_close(run.certificate.mixture_rewards, torch.stack(means).mean(0))
    logged = [entry for entry in run.state.log_history if "loss" in entry][-1]
    assert logged["mixture_rewards/a"] == pytest.approx(run.certificate.mixture_rewards[0].item())
    # shards in which nothing is scored are part of one dataset with the others
    files = str(tmp_path / "part/_rollouts/rollouts-*.parquet")
    assert len(load_dataset("parquet", data_files=files, split="train")) == 16 * 8


def test_a_later_fit_scores_what_is_not_scored_yet(trainer, toy_folder, tmp_path, monkeypatch):
    options = {"seed": 3, "dataset": MANY, "max_steps": 8, "tolerance": 0}
    whole = trainer("whole", **options)
    whole.train()
    part = trainer("part", score_policies=0.5, **options)
    part.train()
    store, counts = tmp_path / "part" / "_rollouts", []
    policy_logps = MPOTrainer.policy_logps
    monkeypatch.setattr(MPOTrainer, "reference_logps", never)
    with monkeypatch.context() as patch:
        patch.setattr(MPOTrainer, "policy_logps", never)
        same = refit(toy_folder, store, tmp_path, "same", score_policies=0.5)
        same.train()
    assert torch.equal(same.certificate.mixture_rewards, part.certificate.mixture_rewards)
    assert same.rollout_fit.columns == part.rollout_fit.columns
    monkeypatch.setattr(
        MPOTrainer, "policy_logps", lambda self, part: counts.append(len(part)) or policy_logps(self, part)
    )
    later = refit(toy_folder, store, tmp_path, "later")
    later.train()
    found, before = (run.rollout_fit.columns["policy_logps"] for run in (later, part))
    known = ~torch.from_numpy(before).isnan().any(-1)
    assert 0 < known.sum() < len(known) and sum(counts) == (~known).sum()
    assert (found[known] == before[known]).all()
    # float32 in batches of other sizes
    for one, other in [
        (torch.from_numpy(found), torch.from_numpy(whole.rollout_fit.columns["policy_logps"])),
        (later.certificate.mixture_rewards, whole.certificate.mixture_rewards),
    ]:
        torch.testing.assert_close(one, other, **CLOSE)
    achieved = refit(toy_folder, store, tmp_path, "achieved", objective="achieved", mixing="sequence")
    achieved.train()
    assert achieved.rollout_fit.estimator.mixture.rows is None and achieved.certificate.of_mixture


@pytest.mark.parametrize("scored, expected", [({0, 2, 3}, [0, 1, 4, 5, 6, 7]), ({2}, None), (set(), None)])
def test_only_prompts_that_are_scored_wholly_tell_what_a_mixture_reaches(tmp_path, scored, expected):
    generator = torch.Generator().manual_seed(0)
    prompt = torch.arange(4).repeat_interleave(2)
    policy_logps, rewards = torch.randn(2, 8, 2, generator=generator, dtype=torch.float64)
    for x in set(range(4)) - scored:
        policy_logps[2 * x] = torch.nan  # the other completion of the prompt is scored
    zeros = torch.zeros(8, dtype=torch.float64)
    problem = FitProblem(make_args(tmp_path, estimator="mis"), LABELS)
    estimator = problem.make_estimator(prompt, zeros, policy_logps, zeros, rewards)
    certificate = estimator.certify(torch.tensor([0.4, 0.6]), torch.tensor([0.4, 0.6]).double(), rewards)
    if expected is None:
        assert (
            estimator.mixture is None
            and certificate.mixture_rewards is None
            and certificate.mixture_duality_gap is None
        )
        return
    assert estimator.mixture.rows.tolist() == expected and estimator.mixture.prompt.tolist() == [0, 0, 1, 1, 2, 2]
    columns = (column[expected] for column in (zeros, policy_logps, zeros, rewards))
    alone = problem.make_estimator(estimator.mixture.prompt, *columns)
    alone = alone.certify(certificate.weights, certificate.weights, rewards[expected])
    for name in ("mixture_rewards", "mixture_reward_errors", "mixture_duality_gap", "mixture_duality_gap_error"):
        assert torch.equal(*(torch.as_tensor(getattr(c, name)) for c in (certificate, alone))), name
    problem = FitProblem(make_args(tmp_path, estimator="mis", objective="achieved", mixing="sequence"), LABELS)
    with pytest.raises(ValueError, match="those of 1 of 8 are not numbers"):
        problem.make_estimator(prompt, zeros, policy_logps, zeros, rewards)


def test_shares_begin_with_no_prompt_and_end_with_all():
    keys = [rollout_fit.prompt_key({"prompt": str(i)}) for i in range(1000)] + ["0" * 16, "f" * 16]
    parts = [{key for key in keys if row_scoring.in_share(key, share)} for share in (0.0, 0.25, 0.5, 1.0)]
    assert not parts[0] and parts[1] < parts[2] < parts[3] == set(keys)
    assert [len(part) / 1000 for part in parts[1:3]] == pytest.approx([0.25, 0.5], abs=0.05)


@pytest.mark.parametrize(
    "words, share", [([], 1.0), (["--score_policies", "0.25"], 0.25), (["--score_policies", "0"], 0.0)]
)
def test_the_share_is_a_number_on_the_command_line(tmp_path, words, share):
    (args,) = HfArgumentParser(MPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--objective", "reward", *words]
    )
    assert args.score_policies == share


# ---- fitting what is kept ----


def test_a_second_fit_costs_no_generation(trainer, toy_folder, tmp_path, monkeypatch):
    first = trainer(proposal="mixture", refresh_below=0.99)
    first.train()
    store = tmp_path / "run" / "_rollouts"
    monkeypatch.setattr(MixturePolicyModel, "generate", never)
    monkeypatch.setattr(MixturePolicyModel, "forward", never)
    same = refit(toy_folder, store, tmp_path, proposal="mixture", per_device_train_batch_size=16)
    same.train()
    (weights,), _ = minimize_dual(first.rollout_fit.make_estimator().table)
    assert len(first.rollout_fit.columns.proposals) > 1
    torch.testing.assert_close(same.weights.detach(), weights, atol=1e-9, rtol=0)
    assert len(same.rollout_fit.columns) == len(first.rollout_fit.columns)
    other = refit(toy_folder, store, tmp_path, "implicit", objective="implicit")
    other.train()
    assert other.weights.sum().item() == pytest.approx(1)
    alone = refit(toy_folder, store, tmp_path, "alone", labels=["b"], beta=2.0)
    alone.train()
    assert alone.model.config.mixture_weights == [1.0]
    assert alone.certificate.rewards.tolist() == pytest.approx([alone.rollout_fit.rewards.mean().item()], abs=0.5)


def test_completions_scored_under_other_policies_are_refused(trainer, toy_folder, tmp_path, caplog):
    """Policies are known by their weights: those of a folder that has moved are the same."""
    trainer(max_steps=1).train()
    store = tmp_path / "run" / "_rollouts"

    def refit_with(a, b, ref, tokenizer=None):
        mixture = MixturePolicyModel.from_policies([a, b], reference=ref, labels=["a", "b"])
        args = make_args(tmp_path / "others", estimator="mis")
        return MPOTrainer(model=mixture, args=args, processing_class=tokenizer or toy_tokenizer(), rollouts=store)

    a, b, ref = (toy_folder / name for name in ("a", "b", "ref"))
    moved = shutil.copytree(b, tmp_path / "moved")
    refit_with(a, moved, ref)
    with pytest.raises(ValueError, match="the policy of 'b' is .*ref.* now. .* to have them scored anew"):
        refit_with(a, ref, ref)
    with pytest.raises(ValueError, match="the reference is .*'.*b'.* now"):
        refit_with(a, b, b)
    other = toy_tokenizer()
    other.add_tokens(["g"])
    with pytest.raises(ValueError, match="the tokenizer is"):
        refit_with(a, b, ref, other)
    assert "were scored under" not in caplog.text
    # an older store has places alone
    info = json.loads((store / "rollouts.json").read_text())
    for part in (*info["policies"], info["reference"]):
        del part["content"]
    (store / "rollouts.json").write_text(json.dumps(info))
    refit_with(a, moved, ref)
    (message,) = [r.getMessage() for r in caplog.records if "were scored under" in r.getMessage()]
    assert "policy of 'b'" in message and "If that is another model, give them as a dataset" in message


def test_a_table_from_elsewhere_is_completed(trainer, toy_folder, tmp_path):
    """All completions of the reference policy, with nothing but their texts: their log-probabilities are computed."""
    run = trainer(proposal="reference", max_steps=8, per_device_train_batch_size=16)
    run.train()
    rows = run.rollout_fit.store.read(("prompt", "completion_ids"))
    given = refit(toy_folder, Dataset.from_dict(rows), tmp_path, rewards=[count_c, count_b])
    given.train()
    torch.testing.assert_close(given.weights, run.weights, **CLOSE)
    texts = Dataset.from_dict(
        {"prompt": rows["prompt"], "completion": toy_tokenizer().batch_decode(rows["completion_ids"])}
    )
    given = refit(toy_folder, texts, tmp_path, "texts", rewards=[count_c, count_b])
    given.train()
    torch.testing.assert_close(given.weights, run.weights, **CLOSE)


# ---- policies on devices of their own ----


PLACES = {
    "second on disk": {"component_0": "cpu", "component_1": "disk"},
    "reference on disk": {"component_0": "cpu", "component_1": "cpu", "reference": "disk"},
    "all on disk": "disk",
}


@pytest.mark.parametrize("estimator", ["bsmd", "mis"])
@pytest.mark.parametrize("proposal", ["mixture", "reference"])
def test_where_policies_lie_changes_nothing(trainer, toy_folder, tmp_path, estimator, proposal):
    """Accelerate's offloading moves weights in and out as on a GPU; here they compute on the CPU all the same."""
    found = {}
    for place, device_map in {"in memory": None, **PLACES}.items():
        kwargs = {"device_map": device_map, "offload_folder": tmp_path / "offload"} if device_map else {}
        mixture = MixturePolicyModel.from_policies(
            [toy_folder / label for label in LABELS], reference=toy_folder / "ref", labels=LABELS, **kwargs
        )
        options = {"estimator": estimator, "proposal": proposal, **renewal(estimator, proposal, 1.0)}
        run = trainer(place, mixture, max_steps=3, save_strategy="no", **options)
        run.train()
        on_disk = [
            any(p.is_meta for p in policy.parameters()) for policy in (*run.policy_models, run.reference_policy)
        ]
        assert any(on_disk) == (device_map is not None)
        found[place] = run.weights.tolist()
    assert set(map(tuple, found.values())) == {tuple(found["in memory"])}
    assert found["in memory"] != [0.5, 0.5]


@pytest.mark.parametrize("estimator", ["bsmd", "mis"])
def test_a_quantized_policy_beside_a_plain_one_is_fitted_as_it_is(trainer, toy_folder, estimator):
    quantization = QuantoConfig(weights="int8")
    found = []
    for policies, kwargs in (
        ([toy_folder / "a", toy_folder / "b"], {"quantization_config": {"component_1": quantization}}),
        (
            [
                toy_folder / "a",
                AutoModelForCausalLM.from_pretrained(toy_folder / "b", quantization_config=quantization),
            ],
            {},
        ),
        ([toy_folder / "a", toy_folder / "b"], {}),
    ):
        mixture = MixturePolicyModel.from_policies(policies, reference=toy_folder / "ref", labels=LABELS, **kwargs)
        options = {"estimator": estimator, "proposal": "mixture", "max_steps": 3, "save_strategy": "no"}
        run = trainer(str(len(found)), mixture, **options)
        run.train()
        found.append(run.weights.tolist())
    assert found[0] == found[1] != found[2]


# ---- interruptions ----


@pytest.mark.parametrize(
    "objective, proposal", [("reward", "mixture"), ("reward", "reference"), ("implicit", "mixture")]
)
def test_resuming_gives_the_same_to_the_last_bit(trainer, objective, proposal):
    options = {"objective": objective, "proposal": proposal, **renewal("mis", proposal, 0.98)}
    whole = trainer("whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer("broken", callbacks=[Interrupt(3)], **options).train()
    resumed = trainer("broken", **options)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(resumed.weights, whole.weights)
    assert resumed.rollout_fit.columns == whole.rollout_fit.columns
    assert resumed.certificate.duality_gap_bound == whole.certificate.duality_gap_bound


@pytest.mark.parametrize("moment", ["while a shard is written", "after a shard was written"])
def test_a_full_disk_leaves_no_half_shard_and_doubles_none(trainer, tmp_path, monkeypatch, moment):
    whole = trainer("whole")
    whole.train()
    run, write = trainer("broken"), pyarrow.parquet.write_table
    count = iter(range(100))

    def fails(table, path, **kwargs):
        if next(count) != 3:
            return write(table, path, **kwargs)
        if moment == "while a shard is written":
            Path(path).write_bytes(b"PAR1 half of it")
        raise OSError(28, "No space left on device")

    def fails_afterwards(self, *args):
        raise OSError(28, "No space left on device")

    if moment == "while a shard is written":
        monkeypatch.setattr(pyarrow.parquet, "write_table", fails)
    else:
        monkeypatch.setattr(run, "_save_checkpoint", fails_afterwards)
    with pytest.raises(OSError, match="No space left"):
        run.train()
    monkeypatch.undo()
    assert not [name for name in os.listdir(tmp_path / "broken" / "_rollouts") if name.endswith(".tmp")]
    resumed = trainer("broken")
    if moment == "after a shard was written":
        # there was no checkpoint yet: what lies there is not touched unless somebody says so
        with pytest.raises(ValueError, match="holds completions already"):
            resumed.train()
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(resumed.weights, whole.weights)
    assert resumed.rollout_fit.columns == whole.rollout_fit.columns


def test_shards_of_a_process_that_is_ahead_are_not_read_before_it_tells_of_them(trainer, tmp_path, monkeypatch):
    """A process that begins late finds what others have written in the meantime."""
    trainer().train()
    store = tmp_path / "run" / "_rollouts"
    ahead = {path: path.read_bytes() for path in store.glob("*-00000004-0000.parquet")}
    run = trainer()
    discard = run.rollout_fit.store.discard_after

    def discard_and_see_others_go_ahead(step):
        discard(step)
        for path, content in ahead.items():
            path.write_bytes(content)

    monkeypatch.setattr(run.rollout_fit.store, "discard_after", discard_and_see_others_go_ahead)
    run.rollout_fit.begin(3, None)
    assert len(ahead) > 0 and len(run.rollout_fit.store.shards()) == 4
    assert len(run.rollout_fit.columns) == 3 * 8


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda p: p.write_text("first"))

    def half(p):
        p.write_text("sec")
        raise OSError("pulled")

    with pytest.raises(OSError, match="pulled"):
        write_whole(path, half)
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["file"]


def test_a_reward_that_dies_loses_nothing(trainer):
    calls = []

    def dies(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 4:
            raise ConnectionError("the judge went away")
        return count_b(completions)

    with pytest.raises(RewardError, match="dies"):
        trainer(rewards=[count_c, dies]).train()
    resumed = trainer(rewards=[count_c, dies])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6 and len(calls) == 4 + 3


@pytest.mark.slow
def test_forty_kills_end_where_uninterrupted_runs_do(toy_folder, tmp_path):
    """Also in the middle of a shard, a checkpoint and the result: none may fail to go on, or find anything else."""
    values = {"policies": str(toy_folder), "out": str(tmp_path), "kills": 40, "seed": 0}
    done = subprocess.run(**program("killed_fit.py", values), capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 40 and len(found["moments"]) >= 6 and found["rows"] == [8 * 8, 8 * 8]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_find_what_one_finds_on_the_same_completions(toy_folder, tmp_path, processes):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    values = {"policies": str(toy_folder), "out": str(tmp_path / "run"), "weights": str(tmp_path)}
    done = subprocess.run(**program("parallel_fit.py", values, launcher), capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    assert all(weights == found[0] for weights in found)
    alone = refit(toy_folder, tmp_path / "run" / "_rollouts", tmp_path, proposal="mixture")
    alone.train()
    shards = alone.rollout_fit.store.read(("id",))["id"]
    assert len(alone.rollout_fit.columns) == len(shards) == len(set(shards)) >= 4 * processes * 8
    assert alone.model.config.mixture_weights == pytest.approx(found[0], abs=1e-6)


# ---- errors ----


def test_completions_of_another_run_are_never_mixed_in_or_overwritten(trainer, tmp_path):
    trainer().train()
    before = {p.name: p.read_bytes() for p in (tmp_path / "run" / "_rollouts").iterdir()}
    with pytest.raises(ValueError, match="holds completions already"):
        trainer().train()
    with pytest.raises(ValueError, match=r"'temperature' was 1.0 there and is 1.5 here"):
        trainer(temperature=1.5)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run" / "_rollouts").iterdir()} == before


def test_rollouts_that_cannot_be_used_are_refused(toy_folder, tmp_path):
    with pytest.raises(ValueError, match="no rollouts.json"):
        refit(toy_folder, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="'prompt' and 'completion'"):
        refit(toy_folder, Dataset.from_dict({"prompt": PROMPTS}), tmp_path)
    with pytest.raises(ValueError, match='needs `estimator="mis"`'):
        MPOTrainer(model=[toy_folder / "a", toy_folder / "b"], args=make_args(tmp_path), rollouts="x")
    table = Dataset.from_dict({"prompt": PROMPTS, "completion": ["a b c"] * 4})
    with pytest.raises(ValueError, match="rewards of .* are not all known"):
        refit(toy_folder, table, tmp_path, "unknown").train()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"estimator": "snis"}, "`estimator` must be one of"),
        ({"tolerance": 0.1}, "does not estimate how far"),
        ({"estimator": "mis", "confidence": 1.0}, "`confidence` must be between"),
        ({"estimator": "mis", "num_resamples": 0}, "`num_resamples` must be at least 1"),
        *(({"score_policies": bad}, "`score_policies` must be a share") for bad in (1.5, -0.1, float("nan"), "half")),
    ],
)
def test_bad_options_are_refused(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **kwargs)
