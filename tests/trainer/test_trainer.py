"""MPOTrainer as an ordinary Trainer: arguments, logs, checkpoints, errors. What it computes is in test_fit_exactness."""

import json
import math
import os
import statistics

import pytest
import torch
from datasets import Dataset, IterableDataset
from fits import Interrupt, count_b, count_c, make_args, make_trainer
from helpers import close
from huggingface_hub import ModelCard
from toy import LENGTH, PROMPTS, sequence_logps, toy_policy, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from mpo_hf import MixturePolicyModel, MPOConfig, MPOTrainer
from mpo_hf.rewards import RewardError


# ---- what a fit leaves behind ----


def test_everything_is_logged_at_every_step(mixture, tmp_path):
    trainer = make_trainer(mixture, tmp_path)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    for entry in steps:
        assert entry["weights/a"] + entry["weights/b"] == pytest.approx(1)
        assert 0 < entry["effective_sample_size"] <= 1
        assert entry["completions/mean_length"] == LENGTH
        assert entry["dual_objective"] == pytest.approx(entry["loss"], abs=1e-4)
        assert entry["grad_norm"] > 0
        assert entry["learning_rate"] == pytest.approx(2 / math.sqrt(6))
        assert {"rewards/a", "rewards/b"} <= set(entry)
    assert [steps[-1]["weights/a"], steps[-1]["weights/b"]] == pytest.approx(trainer.model.mixture_weights.tolist())


def test_the_result_is_the_average_of_the_iterates_unless_told_otherwise(mixture, toy_folder, tmp_path):
    class Iterates(TrainerCallback):
        seen: list = []

        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            self.seen.append(optimizer.param_groups[0]["params"][0].detach().clone())

    trainer = make_trainer(mixture, tmp_path, callbacks=[Iterates()])
    trainer.train()
    average = torch.stack(Iterates.seen).mean(0)
    torch.testing.assert_close(trainer.model.mixture_weights, average.float())
    again = MixturePolicyModel.from_policies([toy_folder / "a", toy_folder / "b"], reference=toy_folder / "ref")
    last = make_trainer(again, tmp_path / "last", average_iterates=False)
    last.train()
    torch.testing.assert_close(last.model.mixture_weights, Iterates.seen[-1].float())
    assert not torch.allclose(average, Iterates.seen[-1])


def test_saving_writes_no_policy_weights_and_opens_anywhere(mixture, tmp_path):
    trainer = make_trainer(mixture, tmp_path)
    trainer.train()
    trainer.save_model()
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= files
    assert not [name for name in files if name.endswith(".safetensors") or "model.bin" in name]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(opened.mixture_weights, trainer.model.mixture_weights)
    prompt = AutoTokenizer.from_pretrained(tmp_path)("a b", return_tensors="pt")
    kwargs = {"do_sample": False, "max_new_tokens": 5}
    ids = {k: prompt[k] for k in ("input_ids", "attention_mask")}
    assert torch.equal(opened.generate(**ids, **kwargs), trainer.model.generate(**ids, **kwargs))


def test_model_card_names_objectives_weights_and_rewards(mixture, tmp_path):
    trainer = make_trainer(mixture, tmp_path)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    for weight in trainer.model.config.mixture_weights:
        assert f"{weight:.4f}" in card
    assert "2502.18699" in card and "| a |" in card
    steps = [entry["rewards/a"] for entry in trainer.state.log_history if "loss" in entry]
    assert f"| the reference, steps 1 to 6 | {sum(steps) / 6:.4f} ± {statistics.stdev(steps) / 6**0.5:.4f} |" in card
    assert "(weights.png)" in card and (tmp_path / "weights.png").exists()
    assert str(tmp_path.parent) not in card  # folders of this machine mean nothing to a reader


def test_card_takes_what_push_to_hub_is_told(mixture, tmp_path):
    trainer = make_trainer(mixture, tmp_path)
    trainer.create_model_card(model_name="mine", license="mit", language="en", tags="tea", dataset_tags=["org/tea"])
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.language, data.datasets) == ("mit", "en", ["org/tea"])
    assert {"tea", "mpo"} <= set(data.tags)


def test_mixture_is_saved_with_its_code_if_asked(mixture, tmp_path):
    for wanted in (True, False):
        trainer = make_trainer(mixture, tmp_path / str(wanted), hub_with_code=wanted)
        trainer.save_model()
        assert (tmp_path / str(wanted) / "modeling_mixture.py").exists() == wanted
        assert ("auto_map" in json.loads((tmp_path / str(wanted) / "config.json").read_text())) == wanted
        assert ("trust_remote_code=True" in (tmp_path / str(wanted) / "README.md").read_text()) == wanted


def test_policies_are_not_changed(mixture, toy_folder, tmp_path):
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    make_trainer(mixture, tmp_path).train()
    after = mixture.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(p.requires_grad for p in mixture.parameters())


def recorded(monkeypatch, trainer):
    """The prompts and completions that the trainer samples from now on."""
    batches, sample = [], type(trainer).sample

    def record(self, inputs, weights):
        batches.append(([example["prompt"] for example in inputs], sample(self, inputs, weights)))
        return batches[-1][1]

    monkeypatch.setattr(type(trainer), "sample", record)
    return batches


def logps_by_hand(policy, prompts, completions):
    """Log-probabilities under a single policy, one row of `completions` after another, shape `(N,)`."""
    prompt_ids = [toy_tokenizer()(prompt)["input_ids"] for prompt in prompts for _ in range(4)]
    rows = zip(prompt_ids, completions.completion_ids)
    return torch.cat([sequence_logps(policy, ids, row.unsqueeze(0)) for ids, row in rows])


@pytest.mark.parametrize("estimator", ["mis", "bsmd"])
@pytest.mark.parametrize(
    "objective, proposal", [("reward", "reference"), ("reward", "mixture"), ("implicit", "mixture")]
)
def test_evaluation_measures_the_mixture_on_the_prompts_given(
    toy_folder, tmp_path, monkeypatch, estimator, objective, proposal
):
    """Two batches of two prompts each; every logged number is computed again from the completions alone."""
    weights, beta = torch.tensor([0.3, 0.7], dtype=torch.float64), 0.5
    model = MixturePolicyModel.from_policies(
        [toy_folder / "a", toy_folder / "b"], weights.tolist(), reference=toy_folder / "ref", labels=["a", "b"]
    )
    options = {"estimator": estimator, "objective": objective, "proposal": proposal, "normalize_rewards": "none"}
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    trainer = make_trainer(model, tmp_path, eval_dataset=dataset, **options)
    batches = recorded(monkeypatch, trainer)
    metrics = trainer.evaluate()
    (logged,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [prompts for prompts, _ in batches] == [PROMPTS[:2], PROMPTS[2:]]

    losses, fractions, rewards = [], [], []
    for prompts, completions in batches:
        texts = toy_tokenizer().batch_decode(completions.completion_ids)
        rewards.append(torch.tensor([count_c(texts), count_b(texts)], dtype=torch.float64).T)
        reference = logps_by_hand(model.reference_policy, prompts, completions)
        policies = torch.stack([logps_by_hand(model.policy(k), prompts, completions) for k in (0, 1)], -1)
        if proposal == "reference":
            proposals = reference
        else:  # the mixture at its own weights, token by token
            proposals = logps_by_hand(model, prompts, completions)
        pooled, gains = policies @ weights, rewards[-1] @ weights / beta
        if objective == "implicit":
            log_weights = (pooled - proposals).view(2, 4)
            losses.append(log_weights.exp().mean(-1).log().mean())
        elif estimator == "bsmd" and proposal == "mixture":  # the Lagrangian at the mixture
            log_weights = (pooled - proposals).view(2, 4)
            terms = (gains - pooled + reference).view(2, 4)
            losses.append(((log_weights.softmax(-1) * terms).sum(-1) + log_weights.exp().mean(-1).log()).mean())
        else:  # self-normalized importance weights of the reference
            ratios = (reference - proposals).view(2, 4).softmax(-1)
            log_weights = ratios.log() + gains.view(2, 4)
            losses.append((ratios * gains.view(2, 4).exp()).sum(-1).log().mean())
        shares = log_weights.softmax(-1)
        fractions.append((1 / shares.square().sum(-1) / 4).mean())
    rewards = torch.cat(rewards).mean(0).tolist()
    assert [logged["eval_rewards/a"], logged["eval_rewards/b"]] == close(rewards)
    assert logged["eval_completions/mean_length"] == LENGTH
    assert logged["eval_effective_sample_size"] == close(torch.stack(fractions).mean().item())
    assert metrics["eval_loss"] == close(torch.stack(losses).mean().item())
    assert logged["eval_dual_objective"] == close(metrics["eval_loss"])


def test_step_size_follows_its_schedule(mixture, tmp_path):
    trainer = make_trainer(mixture, tmp_path, lr_scheduler_type="linear", learning_rate=0.6)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


# ---- interruption ----


@pytest.mark.parametrize(
    "objective, proposal", [("reward", "reference"), ("reward", "mixture"), ("implicit", "mixture")]
)
def test_resuming_gives_the_same_weights_to_the_last_bit(toy_folder, tmp_path, objective, proposal):
    def trainer(name, **kwargs):
        model = MixturePolicyModel.from_policies([toy_folder / "a", toy_folder / "b"], reference=toy_folder / "ref")
        return make_trainer(model, tmp_path / name, objective=objective, proposal=proposal, **kwargs)

    whole = trainer("whole")
    whole.train()
    broken = trainer("broken", callbacks=[Interrupt(3)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer("broken")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert torch.equal(resumed.weights, whole.weights)
    assert resumed.model.config.mixture_weights == whole.model.config.mixture_weights
    assert torch.equal(resumed.reward_offsets, whole.reward_offsets)
    assert resumed.reward_offsets.any() == (objective == "reward" and proposal == "mixture")


def test_a_reward_that_raises_loses_nothing(toy_folder, mixture, tmp_path):
    calls = []

    def fails_later(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 4:
            raise ConnectionError("the judge went away")
        return count_b(completions)

    trainer = make_trainer(mixture, tmp_path, rewards=[count_c, fails_later])
    with pytest.raises(RewardError, match="fails_later") as error:
        trainer.train()
    assert isinstance(error.value.__cause__, ConnectionError)
    again = MixturePolicyModel.from_policies(
        [toy_folder / "a", toy_folder / "b"], reference=toy_folder / "ref", labels=["a", "b"]
    )
    resumed = make_trainer(again, tmp_path, rewards=[count_c, fails_later])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert len(calls) == 4 + 3  # steps 1 to 3 were not repeated


def test_a_checkpoint_of_another_mixture_is_refused(toy_folder, mixture, tmp_path):
    make_trainer(mixture, tmp_path, max_steps=1).train()
    other = MixturePolicyModel.from_policies(
        [toy_folder / "a", toy_folder / "b"], reference=toy_folder / "ref", labels=["x", "y"]
    )
    with pytest.raises(ValueError, match="belongs to a mixture of"):
        make_trainer(other, tmp_path).train(resume_from_checkpoint=True)


def test_checkpoints_of_models_in_memory_hold_no_weights(tmp_path):
    reference = toy_policy(100, 0.5)
    policies = [toy_policy(1, 0.1, reference), toy_policy(2, 0.1, reference)]
    trainer = make_trainer(policies, tmp_path, objective="implicit", rewards=None, max_steps=2)
    trainer.train()
    assert not list(tmp_path.rglob("*.safetensors"))
    trainer.save_model()
    assert [p.name for p in tmp_path.rglob("*.safetensors")] == ["model.safetensors"]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(opened.mixture_weights, trainer.model.mixture_weights)


# ---- what it takes ----


def test_a_list_of_policies_and_a_reference_will_do(toy_folder, tmp_path):
    trainer = MPOTrainer(
        model=[str(toy_folder / "a"), str(toy_folder / "b")],
        ref_model=str(toy_folder / "ref"),
        reward_funcs=[count_c, count_b],
        args=make_args(tmp_path, max_steps=1),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )
    trainer.train()
    assert trainer.objective_names == ["count_c", "count_b"]
    assert trainer.processing_class.get_vocab() == toy_tokenizer().get_vocab()


def test_rewards_see_columns_and_prompts_as_trl_gives_them(mixture, tmp_path):
    seen = []

    def spy(prompts, completions, completion_ids, answer, trainer_state, **kwargs):
        seen.append((prompts, completions, completion_ids, answer, trainer_state.global_step, set(kwargs)))
        return [0.0] * len(prompts)

    data = Dataset.from_dict({"prompt": PROMPTS, "answer": [0, 1, 2, 3]})
    make_trainer(mixture, tmp_path, rewards=[spy, count_b], dataset=data, shuffle_dataset=False, max_steps=1).train()
    prompts, completions, completion_ids, answer, step, more = seen[0]
    assert prompts == [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4
    assert answer == [0] * 4 + [1] * 4
    assert step == 0 and more == {"log_metric", "log_extra"}
    assert [toy_tokenizer().decode(ids, skip_special_tokens=True) for ids in completion_ids] == completions


def test_conversational_prompts_give_conversational_completions(mixture, tmp_path):
    seen = []

    def spy(prompts, completions, **kwargs):
        seen.append((prompts[0], completions[0]))
        return [0.0] * len(prompts)

    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}f{% endif %}"
    )
    trainer = MPOTrainer(
        model=mixture,
        reward_funcs=[spy, lambda completions, **kwargs: [0.0] * len(completions)],
        args=make_args(tmp_path, max_steps=1),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "a b"}]}]),
        processing_class=tokenizer,
    )
    assert trainer._tokenize([[{"role": "user", "content": "a b"}]]) == [[0, 1, 5]]
    trainer.train()
    prompt, completion = seen[0]
    assert prompt == [{"role": "user", "content": "a b"}]
    assert [set(message) for message in completion] == [{"role", "content"}]
    assert completion[0]["role"] == "assistant" and completion[0]["content"]


@pytest.mark.parametrize("estimator", ["mis", "bsmd"])
def test_streamed_prompts_give_the_same_weights(toy_folder, tmp_path, estimator):
    def stream():
        yield from ({"prompt": prompt, "answer": prompt[0]} for prompt in PROMPTS * 2)

    def weights(name, dataset):
        """Those after every step."""
        model = MixturePolicyModel.from_policies([toy_folder / "a", toy_folder / "b"], reference=toy_folder / "ref")
        trainer = make_trainer(
            model,
            tmp_path / name,
            dataset=dataset,
            max_steps=5,
            estimator=estimator,
            shuffle_dataset=False,
            tolerance=0,
        )
        trainer.train()
        return [entry["weights/count_c"] for entry in trainer.state.log_history if "loss" in entry]

    streamed = weights("streamed", IterableDataset.from_generator(stream))
    assert len(set(streamed)) == 5  # more than a pass over the prompts, of which a step has two
    assert streamed == weights("listed", Dataset.from_list(list(stream())))


def test_gradient_accumulation_averages_over_prompts(toy_folder, tmp_path):
    def weights(name, **kwargs):
        model = MixturePolicyModel.from_policies([toy_folder / "a", toy_folder / "b"], reference=toy_folder / "ref")
        trainer = make_trainer(
            model, tmp_path / name, max_steps=1, num_generations=2000, shuffle_dataset=False, learning_rate=8, **kwargs
        )
        trainer.train()
        return trainer.weights.detach()

    together = weights("1", per_device_train_batch_size=8000, per_device_eval_batch_size=2000)
    apart = weights(
        "2", per_device_train_batch_size=2000, per_device_eval_batch_size=2000, gradient_accumulation_steps=4
    )
    # other samples, same expectation; summing instead of averaging would move four times as far
    torch.testing.assert_close(together, apart, atol=0.05, rtol=0)
    assert (together - 0.5).abs().max() > 0.1


# ---- bad input ----


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_generations": 1}, "at least 2.*vertex"),
        ({"per_device_train_batch_size": 30}, "multiple of `num_generations`"),
        ({"objective": "rewards"}, "one of"),
        ({"proposal": "policy"}, "one of"),
        ({"beta": 0.0}, "positive"),
        ({"temperature": -1.0}, "positive"),
        ({"max_completion_length": 0}, "at least 1"),
        ({"max_grad_norm": 1.0}, "no mirror descent step"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        MPOConfig(output_dir=str(tmp_path), **kwargs)


@pytest.mark.parametrize(
    "dataset, message",
    [
        (Dataset.from_dict({"prompt": []}), "empty"),
        (Dataset.from_dict({"text": ["a b"]}), "column 'prompt'.*text"),
        (Dataset.from_dict({"prompt": ["a " * 63]}), "do not fit into the context of 64"),
        (Dataset.from_dict({"prompt": [""]}), "no tokens"),
    ],
)
def test_bad_datasets_are_refused_before_anything_runs(toy_folder, tmp_path, dataset, message):
    model = MixturePolicyModel.from_policies([toy_policy(1, 0.1), toy_policy(2, 0.1)], reference=toy_policy(3, 0.1))
    for config in [model.config, *model.config.component_configs]:
        if "max_position_embeddings" in vars(config):
            config.max_position_embeddings = 64
    with pytest.raises(ValueError, match=message):
        make_trainer(model, tmp_path, dataset=dataset)


def test_arguments_that_do_not_fit_together_are_refused(toy_folder, mixture, tmp_path):
    with pytest.raises(ValueError, match="needs `reward_funcs`"):
        make_trainer(mixture, tmp_path, rewards=None)
    with pytest.raises(ValueError, match="1 `reward_funcs` for 2 policies"):
        make_trainer(mixture, tmp_path, rewards=[count_c])
    orphan = MixturePolicyModel.from_policies([toy_folder / "a", toy_folder / "b"])
    with pytest.raises(ValueError, match="no reference policy"):
        make_trainer(orphan, tmp_path)
    with pytest.raises(ValueError, match="must be a mixture or a list"):
        make_trainer(toy_policy(1, 0.1), tmp_path)
    extrapolated = MixturePolicyModel.from_policies(
        [toy_folder / "a", toy_folder / "b"], [1.5, -0.5], reference=toy_folder / "ref", allow_off_simplex=True
    )
    with pytest.raises(ValueError, match="on the simplex"):
        make_trainer(extrapolated, tmp_path)
    at_vertex = MixturePolicyModel.from_policies(
        [toy_folder / "a", toy_folder / "b"], [1.0, 0.0], reference=toy_folder / "ref"
    )
    with pytest.raises(ValueError, match="zero"):
        make_trainer(at_vertex, tmp_path)


def test_a_reward_that_is_not_a_number_stops_the_run_and_shows_the_completion(mixture, tmp_path):
    def broken(completions, **kwargs):
        return [float("nan")] + [0.0] * (len(completions) - 1)

    with pytest.raises(ValueError, match="broken"):
        make_trainer(mixture, tmp_path, rewards=[count_c, broken]).train()


def test_implicit_objective_needs_no_reference(toy_folder, tmp_path):
    model = MixturePolicyModel.from_policies([toy_folder / "a", toy_folder / "b"])
    trainer = make_trainer(model, tmp_path, rewards=None, objective="implicit", max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["dual_objective"] <= 0


def test_checkpoints_are_small_and_readable(mixture, tmp_path):
    make_trainer(mixture, tmp_path, max_steps=3).train()
    checkpoints = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("checkpoint"))
    assert checkpoints == ["checkpoint-2", "checkpoint-3"]
    assert sum(p.stat().st_size for p in (tmp_path / "checkpoint-3").iterdir()) < 200_000
    config = json.loads((tmp_path / "checkpoint-3" / "config.json").read_text())
    assert sum(config["mixture_weights"]) == pytest.approx(1)
    assert os.path.exists(tmp_path / "checkpoint-3" / "optimizer.pt")
