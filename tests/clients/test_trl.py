"""Mixtures in TRL's trainers: as reference, as teacher, as generator; policies that DPO's variants train are mixed."""

import math

import pytest
import torch
from datasets import Dataset
from helpers import CLOSE, close, load_lora, save_lora, save_tiny, tiny
from pages.team_hub import team_tokenizer
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, pipeline
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer

from mpo_hf import MixturePolicyModel


pytestmark = pytest.mark.integration
PROMPTS = ["Rain?", "What is a river?", "Why?"]
PAIRS = Dataset.from_dict(
    {
        "prompt": PROMPTS,
        "chosen": [" It falls.", " Water that runs.", " Because."],
        "rejected": [" No idea", " A long thing, I think", " Why not?"],
    }
)
TEXTS = Dataset.from_dict({"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"]})
VARIANTS = ["sigmoid", "robust", "ipo", "sppo_hard", "apo_zero", "sigmoid_norm", ["sigmoid", "sft"]]


@pytest.fixture
def settings(tmp_path):
    """Arguments of every trainer: one step on all prompts, on the CPU, in float32."""
    return {
        "output_dir": str(tmp_path / "trainer"),
        "max_steps": 1,
        "per_device_train_batch_size": len(PROMPTS),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Folder of a policy with the vocabulary of the mixtures, and its tokenizer beside it."""
    tokenizer = team_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    folder = save_tiny(tmp_path_factory.mktemp("student"), "llama", 50, **sizes)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def mixed_logps(components, weights, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Normalized log-probabilities of a mixture, from its components one by one, in float64."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    logits = [component(**inputs).logits.double().log_softmax(-1) for component in components]
    return sum(weight * logps for weight, logps in zip(weights, logits)).log_softmax(-1)


def completion_logp(components, weights, prompt: list[int], completion: list[int]) -> float:
    logps = mixed_logps(components, weights, torch.tensor([prompt + completion]))[0]
    return sum(logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion))


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- as the reference ----


@pytest.mark.parametrize("precompute", [False, True])
def test_mixture_is_the_reference_of_dpo(saved, student, settings, precompute):
    args = DPOConfig(beta=0.3, precompute_ref_log_probs=precompute, **settings)
    model = MixturePolicyModel.from_pretrained(saved.folder)
    trainer = DPOTrainer(student, ref_model=model, args=args, train_dataset=PAIRS, processing_class=saved.tokenizer)
    policy = [AutoModelForCausalLM.from_pretrained(student)]
    expected = []
    for row in trainer.train_dataset:
        margin = 0.0
        for name, sign in [("chosen_ids", 1), ("rejected_ids", -1)]:
            own = completion_logp(policy, [1.0], row["prompt_ids"], row[name])
            margin += sign * (own - completion_logp(saved.components, saved.weights, row["prompt_ids"], row[name]))
        expected.append(math.log1p(math.exp(-0.3 * margin)))
    assert losses_of(trainer) == close([sum(expected) / len(expected)])


def test_grpo_takes_no_reference_but_the_policy_that_it_starts_from(saved, student, settings):
    args = GRPOConfig(beta=0.1, num_generations=3, max_completion_length=4, **settings)
    kwargs = {"reward_funcs": code_points, "train_dataset": TEXTS, "processing_class": saved.tokenizer}
    with pytest.raises(TypeError, match="ref_model"):
        GRPOTrainer(student, args=args, ref_model=saved.model, **kwargs)
    trainer = GRPOTrainer(student, args=args, **kwargs)
    start = AutoModelForCausalLM.from_pretrained(student).state_dict()
    assert all(torch.equal(start[name], value) for name, value in trainer.ref_model.state_dict().items())


# ---- as the teacher ----


class KeptInputs:
    """Keeps the batches that a trainer computes its loss on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.kept = inputs
        return super().compute_loss(model, inputs, *args, **kwargs)


class SpiedDistillation(KeptInputs, DistillationTrainer):
    pass


class SpiedGKD(KeptInputs, GKDTrainer):
    pass


def divergence(student_logps: torch.Tensor, teacher_logps: torch.Tensor, beta: float) -> torch.Tensor:
    """Forward KL for 0, reverse KL for 1, the generalized Jensen-Shannon divergence between: of every position."""

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)

    if beta in (0.0, 1.0):
        return kl(student_logps, teacher_logps) if beta else kl(teacher_logps, student_logps)
    middle = ((1 - beta) * student_logps.exp() + beta * teacher_logps.exp()).log()
    return beta * kl(teacher_logps, middle) + (1 - beta) * kl(student_logps, middle)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_mixture_is_the_teacher_of_the_distillation_trainer(saved, student, settings, beta):
    args = DistillationConfig(beta=beta, max_completion_length=6, **settings)
    trainer = SpiedDistillation(
        student, teacher_model=saved.model, args=args, train_dataset=TEXTS, processing_class=saved.tokenizer
    )
    loss = losses_of(trainer)
    kept = trainer.kept
    ids = torch.cat([kept["prompt_ids"], kept["completion_ids"]], 1)
    mask = torch.cat([kept["prompt_mask"], kept["completion_mask"]], 1)
    teacher = mixed_logps(saved.components, saved.weights, ids, mask)
    own = mixed_logps([AutoModelForCausalLM.from_pretrained(student)], [1.0], ids, mask)
    start = kept["prompt_ids"].shape[1] - 1
    expected = divergence(own, teacher, beta)[:, start:-1][kept["completion_mask"].bool()].mean().item()
    assert loss == close([expected])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_mixture_is_the_teacher_of_gkd(saved, student, settings, beta):
    messages = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(PAIRS["prompt"], PAIRS["chosen"])
    ]
    args = GKDConfig(beta=beta, lmbda=0.0, max_length=100, **settings)
    trainer = SpiedGKD(
        student,
        teacher_model=saved.model,
        args=args,
        train_dataset=Dataset.from_dict({"messages": messages}),
        processing_class=saved.tokenizer,
    )
    loss = losses_of(trainer)
    ids, labels = trainer.kept["input_ids"], trainer.kept["labels"]
    expected = []
    for row, seen, label in zip(ids, trainer.kept["attention_mask"].bool(), labels):
        teacher = mixed_logps(saved.components, saved.weights, row[None, seen])[0]
        own = mixed_logps([AutoModelForCausalLM.from_pretrained(student)], [1.0], row[None, seen])[0]
        expected.append(divergence(own, teacher, beta)[:-1][label[seen][1:] != -100])
    assert loss == close([torch.cat(expected).mean().item()])


def test_student_comes_closer_and_is_an_ordinary_checkpoint(saved, student, settings, tmp_path):
    settings |= {"max_steps": 30, "learning_rate": 1e-2}
    trainer = DistillationTrainer(
        student,
        teacher_model=saved.model,
        args=DistillationConfig(max_completion_length=8, **settings),
        train_dataset=TEXTS,
        processing_class=saved.tokenizer,
    )
    losses = losses_of(trainer)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    trainer.save_model(str(tmp_path / "distilled"))
    distilled = AutoModelForCausalLM.from_pretrained(tmp_path / "distilled")
    assert type(distilled).__name__ == "LlamaForCausalLM"
    assert all(torch.equal(v, trainer.model.state_dict()[k]) for k, v in distilled.state_dict().items())


# ---- as the generator ----


def code_points(completions, **kwargs) -> list[float]:
    """A reward that hardly ever gives the same to two completions."""
    return [float(sum(map(ord, c if isinstance(c, str) else c[0]["content"]))) for c in completions]


def test_completions_of_a_mixture_make_pairs_that_dpo_takes(saved, student, settings):
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    generator = pipeline("text-generation", model=saved.model, tokenizer=saved.tokenizer)
    sampled = generator(prompts, num_return_sequences=4, max_new_tokens=12, do_sample=True, return_full_text=False)
    pairs = []
    for prompt, outputs in zip(prompts, sampled):
        completions = [[{"role": "assistant", "content": output["generated_text"]}] for output in outputs]
        ranked = sorted(completions, key=lambda completion: code_points([completion])[0])
        pairs.append({"prompt": prompt, "chosen": ranked[0], "rejected": ranked[-1]})
    dataset = Dataset.from_list(pairs)
    assert all(code_points([row["chosen"]]) < code_points([row["rejected"]]) for row in dataset)
    trainer = DPOTrainer(student, args=DPOConfig(**settings), train_dataset=dataset, processing_class=saved.tokenizer)
    assert losses_of(trainer) == close([math.log(2)])  # the policy is its own reference


# ---- trained ----


def sft(model, settings, saved):
    return SFTTrainer(model, args=SFTConfig(**settings), train_dataset=TEXTS, processing_class=saved.tokenizer)


def dpo(model, settings, saved):
    reference = AutoModelForCausalLM.from_pretrained(saved.model.config.components[0].name_or_path)
    return DPOTrainer(
        model, reference, args=DPOConfig(**settings), train_dataset=PAIRS, processing_class=saved.tokenizer
    )


def grpo(model, settings, saved):
    args = GRPOConfig(num_generations=3, max_completion_length=4, **settings)
    return GRPOTrainer(model, code_points, args=args, train_dataset=TEXTS, processing_class=saved.tokenizer)


def distillation(model, settings, saved):
    return DistillationTrainer(
        model, saved.model, DistillationConfig(**settings), TEXTS, processing_class=saved.tokenizer
    )


@pytest.mark.parametrize("make_trainer", [sft, dpo, grpo, distillation])
def test_mixture_of_saved_policies_is_not_trained(saved, settings, make_trainer):
    model = MixturePolicyModel.from_pretrained(saved.folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be trained in it.*MPOTrainer.*teacher"):
        make_trainer(model, settings, saved).train()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_adapter_over_a_mixture_of_saved_models_is_trained(student, settings, tmp_path):
    def mix():
        return MixturePolicyModel.from_policies([student, student], [0.4, 0.6])

    trainer = SFTTrainer(
        mix(),
        args=SFTConfig(**{**settings, "max_steps": 2, "learning_rate": 1e-2}),
        train_dataset=TEXTS,
        processing_class=team_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    first, second = losses_of(trainer)
    assert second < first
    trainer.save_model(str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7]])
    opened = PeftModel.from_pretrained(mix(), tmp_path / "adapter")
    assert torch.equal(opened(ids).logits, trainer.model.eval()(ids).logits)
    assert not torch.equal(opened(ids).logits, mix()(ids).logits)


def test_trainer_that_opens_a_mixture_by_name_is_told_what_to_do(saved, settings):
    with pytest.raises(AttributeError, match="AutoModelForCausalLM.from_pretrained"):
        sft(saved.folder, settings, saved)


def test_mixture_in_memory_is_trained_and_saved_as_a_whole(saved, settings, tmp_path):
    sizes = {"vocab_size": len(saved.tokenizer), "max_position_embeddings": 128}
    names = [("llama", 60), ("mistral", 61)]
    model = MixturePolicyModel.from_policies([tiny(*name, **sizes) for name in names], [0.4, 0.6])
    trainer = sft(model, {**settings, "learning_rate": 1e-2}, saved)
    parts, losses = [tiny(*name, **sizes) for name in names], []
    for row in trainer.train_dataset:
        logps = mixed_logps(parts, [0.4, 0.6], torch.tensor([row["input_ids"]]))[0]
        losses += [-logps[t - 1, label].item() for t, label in enumerate(row["labels"]) if label != -100]
    assert losses_of(trainer) == close([sum(losses) / len(losses)])
    trained = [name for name, value in model.state_dict().items() if not torch.equal(value, twin(parts, name))]
    assert {name.split(".")[0] for name in trained} == {"backbone_0", "backbone_1"}
    trainer.save_model(str(tmp_path / "whole"))
    ids = torch.tensor([[5, 6, 7]])
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(opened(ids).logits, model.eval()(ids).logits)


def twin(parts, name: str) -> torch.Tensor:
    """The weight `name` of a mixture in the model that its component was made from."""
    backbone, _, rest = name.partition(".")
    return parts[int(backbone.removeprefix("backbone_"))].state_dict()[rest]


# ---- heads that are not linear ----


def test_head_that_is_not_linear_is_refused_by_name(saved, student, settings):
    sizes = {"vocab_size": len(saved.tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 1.0}
    capped = Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=5.0, **sizes, **heads)).eval()
    model = MixturePolicyModel.from_policies([capped, AutoModelForCausalLM.from_pretrained(student)])
    args = DistillationConfig(max_completion_length=4, **settings)
    trainer = DistillationTrainer(student, model, args, TEXTS, processing_class=saved.tokenizer)
    with pytest.raises(
        ValueError, match=r"component 'policy_0' \(gemma2\) applies more than a linear layer.*GKDTrainer"
    ):
        trainer.train()


def test_adapter_on_the_head_is_refused_by_name(saved, student, settings, tmp_path):
    adapter = save_lora(tmp_path / "head", student, 70, target_modules=["lm_head"])
    trainer = DPOTrainer(
        student,
        MixturePolicyModel.from_policies([adapter, student]),
        args=DPOConfig(**settings),
        train_dataset=PAIRS,
        processing_class=saved.tokenizer,
    )
    with pytest.raises(ValueError, match=r"component 'policy_0' \(llama\) has a peft.*Linear as output embeddings"):
        trainer.train()


def test_plausibility_is_refused(saved, student, settings):
    model = MixturePolicyModel.from_contrast(student, saved.components[0], plausibility=0.1)
    with pytest.raises(ValueError, match="plausibility"):
        model.base_model(torch.tensor([[5, 6]]))


# ---- what DPO's variants train ----


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", VARIANTS, ids=str)
def test_policies_of_every_dpo_variant_are_mixed(student, settings, tmp_path, loss_type, adapters):
    swapped = PAIRS.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if adapters else None
    folders = [str(tmp_path / name) for name in ("helpful", "harmless")]
    for folder, pairs in zip(folders, [PAIRS, swapped]):
        args = DPOConfig(loss_type=loss_type, label_smoothing=0.1, learning_rate=3e-2, **{**settings, "max_steps": 2})
        trainer = DPOTrainer(student, args=args, train_dataset=pairs, peft_config=peft_config)
        trainer.train()
        trainer.save_model(folder)
    model = MixturePolicyModel.from_policies(folders, [0.3, 0.7], reference=student)
    load = (lambda folder: load_lora(folder, student)) if adapters else AutoModelForCausalLM.from_pretrained
    components, ids = [load(folder) for folder in folders], torch.tensor([[70, 71, 72, 73], [80, 81, 82, 83]])
    with torch.no_grad():
        logits = [component(ids).logits.log_softmax(-1) for component in components]
        torch.testing.assert_close(model(ids).logits, 0.3 * logits[0] + 0.7 * logits[1], **CLOSE)
        reference = AutoModelForCausalLM.from_pretrained(student)(ids).logits.log_softmax(-1)
    assert all((own - reference).abs().max() > 0.01 for own in [*logits, logits[0] - logits[1] + reference])
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=True).shape == (2, 8)
