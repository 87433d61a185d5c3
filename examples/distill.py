"""
Distills a mixture into one ordinary checkpoint: a LoRA student learns the next-token distribution of the fitted mixture.

The student writes completions itself, and TRL's `DistillationTrainer` moves its distribution toward the mixture's at
every token. Then the reference, the uniform mixture, the fitted mixture and the student answer the same held-out prompts.

    python examples/quickstart.py --output_dir quickstart-output
    python examples/distill.py --mixture quickstart-output --output_dir distill-output

When started again, training resumes from its last checkpoint.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from prompts import load_prompts
from quickstart import OBJECTIVES, evaluate, print_table
from smollm2 import base_spec, load_base, load_tokenizer, lora_config, save_adapter
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from trl import DistillationConfig, DistillationTrainer

from mpo_hf import MixturePolicyModel


@dataclass
class DistillArguments:
    mixture: str = field(default="quickstart-output", metadata={"help": "The mixture that quickstart.py has saved."})
    output_dir: str = field(default="distill-output", metadata={"help": "Where checkpoints and the student go."})
    max_steps: int = field(default=30, metadata={"help": "Steps of training; 0 only evaluates."})
    batch_size: int = field(default=16, metadata={"help": "Completions a step, one for each prompt."})
    max_completion_length: int = field(default=32, metadata={"help": "Tokens a completion."})
    learning_rate: float = field(default=1e-3)
    lora_r: int = field(default=16)
    num_eval_prompts: int = field(default=96, metadata={"help": "Held-out prompts behind each row of the table."})
    num_eval_completions: int = field(default=1, metadata={"help": "Completions of each of them."})
    seed: int = field(default=0)


def train(
    args: DistillArguments, teacher: MixturePolicyModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    training_args = DistillationConfig(
        output_dir=args.output_dir,
        beta=1.0,  # reverse KL, from the student to the teacher
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=5,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        max_completion_length=args.max_completion_length,
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=5,
        save_steps=5,
        save_total_limit=1,
        report_to="none",
        seed=args.seed,
    )
    trainer = DistillationTrainer(
        model=load_base(),
        teacher_model=teacher,
        args=training_args,
        train_dataset=load_prompts("train"),
        processing_class=tokenizer,
        peft_config=lora_config(r=args.lora_r, task_type="CAUSAL_LM"),
    )
    checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    save_adapter(trainer.model, folder)


def mean_rewards(
    policy: MixturePolicyModel, tokenizer: PreTrainedTokenizerBase, args: DistillArguments
) -> torch.Tensor:
    """Rewards of every prompt, averaged over its completions: `(prompts, objectives)`."""
    prompts = load_prompts("test").shuffle(seed=0)["prompt"][: args.num_eval_prompts]
    seeds = range(1, args.num_eval_completions + 1)
    rewards = [evaluate(policy, tokenizer, prompts, args.max_completion_length, seed) for seed in seeds]
    return torch.stack(rewards).mean(0)


def print_difference(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """What the student loses against its teacher, paired by prompt."""
    difference = student - teacher
    errors = difference.std(0) / len(difference) ** 0.5
    for name, mean, error in zip(OBJECTIVES, difference.mean(0), errors):
        print(f"student - fitted mixture, {name}: {mean:+.3f} ± {error:.3f}")


def main(args: DistillArguments) -> None:
    tokenizer, student = load_tokenizer(), Path(args.output_dir) / "student"
    mixture = AutoModelForCausalLM.from_pretrained(args.mixture)
    fitted = mixture.mixture_weights
    print(f"Mixture weights: {dict(zip(mixture.config.labels, fitted.tolist()))}", flush=True)
    if args.max_steps:
        train(args, mixture, tokenizer, student)

    rows = {"reference": mean_rewards(mixture.reference_policy, tokenizer, args)}
    mixture.mixture_weights = [1 / len(fitted)] * len(fitted)
    rows["uniform mixture"] = mean_rewards(mixture, tokenizer, args)
    mixture.mixture_weights = fitted
    rows["fitted mixture"] = mean_rewards(mixture, tokenizer, args)
    # a mixture of one, so that it is sampled like the others, in the dtype that the quickstart has chosen for them
    spec = {**base_spec(), "dtype": mixture.config.components[0].dtype}
    alone = MixturePolicyModel.from_policies([{**spec, "adapter": str(student)}])
    rows["student"] = mean_rewards(alone, tokenizer, args)
    print_table(rows)
    print_difference(rows["student"], rows["fitted mixture"])


if __name__ == "__main__":
    main(HfArgumentParser(DistillArguments).parse_args_into_dataclasses()[0])
