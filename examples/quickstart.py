"""
The main workflow from end to end: mix three policies, fit the weights, save, reload, generate.

Three LoRA adapters over SmolLM2-135M-Instruct, each trained for one objective (`examples/policies/`), are mixed so that
the worst-off objective is as well off as it can be. On two CPU cores it takes a few minutes:

    python examples/quickstart.py --output_dir quickstart-output
"""

import argparse
import time
from pathlib import Path

import torch
from prompts import load_prompts
from rewards import REWARD_FUNCS
from smollm2 import base_spec, choose_dtype, load_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging

import mpo_hf
from mpo_hf import MixturePolicyModel, MPOConfig, MPOTrainer, RewardModelSpec
from mpo_hf.rollouts import sample_completions, tokenize_prompts
from mpo_hf.trainer.plots import plot_fit


HERE = Path(__file__).resolve().parent
OBJECTIVES = ["positive", "concise", "readable"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="quickstart-output", help="where the mixture and the picture go")
    parser.add_argument("--max_steps", type=int, default=6, help="steps of the fit")
    parser.add_argument("--max_completion_length", type=int, default=32, help="tokens a completion")
    parser.add_argument(
        "--num_eval_prompts", type=int, default=24, help="held-out prompts behind each row of the table"
    )
    parser.add_argument(
        "--neural", action="store_true", help="judge sentiment by the trained reward model instead of VADER (slower)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",  # the same table on every processor, to rounding
        help="of the policies; auto: bfloat16 where this processor is fast in it, which rounds what the fit weighs completions by",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def reward_functions(neural: bool) -> list:
    rewards = [REWARD_FUNCS[name] for name in OBJECTIVES]
    if neural:
        rewards[0] = RewardModelSpec(
            model=base_spec()["name_or_path"],
            gguf_file=base_spec().get("gguf_file"),
            adapter=str(HERE / "policies" / "reward_positive"),
            activation="sigmoid",
            label="positive",
        )
    return rewards


def open_policies(dtype: str = "float32", base: dict[str, str] | None = None) -> MixturePolicyModel:
    """All three adapters and the reference share one copy of the base model, which is found where `base` says, if it does."""
    spec = {**(base or base_spec()), "dtype": choose_dtype(dtype)}
    components = [{**spec, "adapter": str(HERE / "policies" / name), "label": name} for name in OBJECTIVES]
    return MixturePolicyModel.from_policies(components)


def evaluate(
    policy: MixturePolicyModel, tokenizer, prompts: list, max_completion_length: int, seed: int = 1
) -> torch.Tensor:
    """Rewards of one completion for each prompt, shape (prompts, objectives)."""
    set_seed(seed)
    completions = sample_completions(
        policy,
        tokenize_prompts(prompts, tokenizer),
        num_generations=1,
        max_completion_length=max_completion_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(completions.id_lists(), skip_special_tokens=True)
    return torch.tensor([REWARD_FUNCS[name](prompts, texts) for name in OBJECTIVES]).T


def print_table(rows: dict[str, torch.Tensor]) -> None:
    header = [f"{name:>17}" for name in [*OBJECTIVES, "minimum"]]
    print(f"\n{'mean reward ± standard error':<30}" + "".join(header))
    for name, rewards in rows.items():
        means, errors = rewards.mean(0), rewards.std(0) / len(rewards) ** 0.5
        cells = [f"{mean:>9.3f} ± {error:.3f}" for mean, error in zip(means, errors)]
        print(f"{name:<30}" + "".join(cells) + f"{means.min():>17.3f}")


def side_by_side(model: MixturePolicyModel, tokenizer, prompts: list) -> None:
    policies = {"reference": model.reference_policy, "fitted mixture": model}
    policies |= {f"policy: {label}": model.policy(k) for k, label in enumerate(model.config.labels)}
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True, padding_side="left"
    )
    answers = {}
    for name, policy in policies.items():
        set_seed(2)
        ids = policy.generate(**inputs, do_sample=True, top_p=0.9, max_new_tokens=40)
        answers[name] = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for i, prompt in enumerate(prompts):
        print(f"\n> {prompt[-1]['content']}")
        for name, texts in answers.items():
            print(f"  [{name}] {' '.join(texts[i].split())}")


def main() -> None:
    args = parse_args()
    start = time.time()
    logging.set_verbosity_error()
    output_dir = Path(args.output_dir)
    print(f"mpo_hf {mpo_hf.__version__}: opening three policies over one base ...", flush=True)
    tokenizer, model = load_tokenizer(), open_policies(args.dtype)

    trainer = MPOTrainer(
        model=model,
        reward_funcs=reward_functions(args.neural),
        args=MPOConfig(
            output_dir=args.output_dir,
            estimator="bsmd",  # with the mixture as proposal it uses this mixture's own rewards,
            proposal="mixture",  # as these policies are not exact optima of their rewards
            normalize_rewards=False,  # these rewards share one scale and are compared as they are
            beta=0.2,
            num_generations=4,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            max_steps=args.max_steps,
            max_completion_length=args.max_completion_length,
            seed=args.seed,
        ),
        train_dataset=load_prompts("train"),
        processing_class=tokenizer,
    )
    print("Fitting the mixture weights ...", flush=True)
    trainer.train()
    trainer.save_model()
    plot_fit(trainer.state.log_history, output_dir / "weights.png")
    weights = dict(zip(model.config.labels, (round(w, 3) for w in model.config.mixture_weights)))
    print(f"Mixture weights: {weights}", flush=True)

    opened = AutoModelForCausalLM.from_pretrained(args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    assert torch.equal(opened.mixture_weights, model.mixture_weights)

    prompts = load_prompts("test").shuffle(seed=args.seed)["prompt"][: args.num_eval_prompts]
    policies = {"reference": opened.reference_policy}
    policies |= {f"policy: {label}": opened.policy(k) for k, label in enumerate(opened.config.labels)}
    rows = {
        name: evaluate(policy, tokenizer, prompts, args.max_completion_length) for name, policy in policies.items()
    }
    opened.mixture_weights = [1 / 3] * 3
    rows["uniform mixture"] = evaluate(opened, tokenizer, prompts, args.max_completion_length)
    opened.mixture_weights = model.mixture_weights
    rows["fitted mixture"] = evaluate(opened, tokenizer, prompts, args.max_completion_length)
    print_table(rows)
    side_by_side(opened, tokenizer, prompts[:2])
    print(f"\nSaved to {output_dir} (a config, no weights), picture in {output_dir / 'weights.png'}.")
    print(f"{time.time() - start:.0f} s in all.")


if __name__ == "__main__":
    main()
