"""Train a neural reward model for positive sentiment on VADER-labeled pairs (run `make_pairs.py` first).

```bash
python examples/policies/train_reward_model.py
```
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import RewardConfig, RewardTrainer


sys.path.append(str(Path(__file__).resolve().parents[1]))
from make_pairs import CACHE, EOS, load_pairs
from smollm2 import load_base, load_tokenizer, lora_config, save_adapter


REWARD_MODEL = Path(__file__).parent / "reward_positive"


@dataclass
class RewardModelArguments:
    num_pairs: int = field(default=320, metadata={"help": "How many pairs to fine-tune on: those that differ most."})
    learning_rate: float = field(default=2e-4)
    batch_size: int = field(default=8, metadata={"help": "Pairs a step."})
    lora_r: int = field(default=8)
    seed: int = field(default=0)


def load_closed_pairs(split: str) -> Dataset:
    """Pairs without their own EOS: the usual chat template ends every answer with one, as at inference."""

    def strip_eos(pair: dict) -> dict:
        return {key: [pair[key][0] | {"content": pair[key][0]["content"].removesuffix(EOS)}] for key in answers}

    answers = ("chosen", "rejected")
    return load_pairs("positive", split).map(strip_eos).sort("gap", reverse=True)


def load_reward_model() -> PeftModel:
    """Put the saved adapter and score head on a freshly loaded base."""
    base = load_base(AutoModelForSequenceClassification, num_labels=1)
    return PeftModel.from_pretrained(base, REWARD_MODEL).eval()


@torch.inference_mode()
def neural_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], batch_size: int = 32
) -> list[float]:
    """Score whole conversations (prompt and answer) with the reward model, formatted by the chat template."""
    scores = []
    for start in range(0, len(conversations), batch_size):
        inputs = tokenizer.apply_chat_template(
            conversations[start : start + batch_size], padding=True, return_tensors="pt", return_dict=True
        )
        scores += model(**inputs).logits.squeeze(-1).tolist()
    return scores


def score_differences(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset) -> torch.Tensor:
    """Score of the chosen answer minus that of the rejected one."""
    chosen, rejected = (
        torch.tensor(neural_scores(model, tokenizer, [pair["prompt"] + pair[answer] for pair in pairs]))
        for answer in ("chosen", "rejected")
    )
    return chosen - rejected


def fit_head(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, penalty: float = 0.05
) -> None:
    """Initialize the score head by logistic regression on the frozen base's features.

    With a random head, the first epochs of fine-tuning learn from noise.
    """
    head, model.score = model.score, torch.nn.Identity()
    features = score_differences(model, tokenizer, pairs)
    model.score = head
    scale = features.std(dim=0)
    weight = torch.zeros(features.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = penalty * weight.square().sum() - torch.nn.functional.logsigmoid(features / scale @ weight).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    head.weight.data = (weight / scale).detach().unsqueeze(0)


def pair_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset) -> float:
    """The share of pairs in which the chosen answer has the higher score."""
    return (score_differences(model, tokenizer, pairs) > 0).float().mean().item()


def main(args: RewardModelArguments) -> None:
    set_seed(args.seed)
    tokenizer = load_tokenizer()
    model = load_base(AutoModelForSequenceClassification, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    pairs, held_out = load_closed_pairs("train"), load_closed_pairs("test")
    fit_head(model, tokenizer, pairs)
    print(f"accuracy with the head alone: {pair_accuracy(model, tokenizer, held_out):.3f}")
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(CACHE / "reward_positive"),
            learning_rate=args.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=5,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=1,
            center_rewards_coefficient=0.01,
            gradient_checkpointing=False,
            bf16=False,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=pairs.select(range(args.num_pairs)),
        processing_class=tokenizer,
        peft_config=lora_config(r=args.lora_r, task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    trainer.train()
    save_adapter(trainer.model, REWARD_MODEL)

    saved = trainer.model.float().eval()
    reloaded = load_reward_model()
    conversations = [pair["prompt"] + pair["chosen"] for pair in held_out.select(range(32))]
    before, after = (torch.tensor(neural_scores(model, tokenizer, conversations)) for model in (saved, reloaded))
    print(f"largest difference of a score after reloading: {(before - after).abs().max().item():.2e}")
    print(f"accuracy on {len(held_out)} held-out pairs: {pair_accuracy(reloaded, tokenizer, held_out):.3f}")


if __name__ == "__main__":
    main(HfArgumentParser(RewardModelArguments).parse_args_into_dataclasses()[0])
