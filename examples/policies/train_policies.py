"""Train one LoRA adapter with DPO on the pairs of one objective (run `make_pairs.py` first).

```bash
python examples/policies/train_policies.py --objective positive
```
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer


sys.path.append(str(Path(__file__).resolve().parents[1]))
from make_pairs import CACHE, load_pairs
from rewards import REWARD_FUNCS
from smollm2 import load_base, load_tokenizer, lora_config, save_adapter


@dataclass
class PolicyArguments:
    objective: str = field(metadata={"help": "Which reward the policy is aligned to.", "choices": list(REWARD_FUNCS)})
    num_pairs: int = field(default=192, metadata={"help": "How many pairs to train on: those that differ most."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the pull towards the base model."})
    sft_weight: float = field(default=1.0, metadata={"help": "Weight of the likelihood of the chosen completions."})
    learning_rate: float = field(default=6e-4)
    batch_size: int = field(default=8, metadata={"help": "Pairs a step."})
    lora_r: int = field(default=8)
    seed: int = field(default=0)


def verbatim_answers(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Make the chat template leave answers unchanged.

    The usual template ends every answer with EOS, so a truncated completion would be trained on as a complete one.
    Complete answers in the cache already have their own EOS.
    """
    closing = "'<|im_end|>' + '\n'}}"
    if closing not in tokenizer.chat_template:
        raise ValueError("This is not the chat template of SmolLM2-Instruct.")
    verbatim = "('' if message['role'] == 'assistant' else '<|im_end|>\n')}}"
    tokenizer.chat_template = tokenizer.chat_template.replace(closing, verbatim)
    return tokenizer


def main(args: PolicyArguments) -> None:
    pairs = load_pairs(args.objective).sort("gap", reverse=True)
    pairs = pairs.select(range(min(args.num_pairs, len(pairs))))
    training_args = DPOConfig(
        output_dir=str(CACHE / args.objective),
        beta=args.beta,
        loss_type=["sigmoid", "sft"],  # DPO alone also makes the chosen completions, and good English, less likely
        loss_weights=[1.0, args.sft_weight],
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=5,
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=1,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    trainer = DPOTrainer(
        model=load_base(),
        args=training_args,
        train_dataset=pairs,
        processing_class=verbatim_answers(load_tokenizer()),
        peft_config=lora_config(r=args.lora_r, task_type="CAUSAL_LM"),
    )
    trainer.train()
    save_adapter(trainer.model, Path(__file__).parent / args.objective)


if __name__ == "__main__":
    main(HfArgumentParser(PolicyArguments).parse_args_into_dataclasses()[0])
