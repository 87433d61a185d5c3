"""
The time of a fit, relative to generating its completions with the bare reference model.

    python examples/benchmarks/fit_time.py --threads 2

The three adapters of `examples/policies/` over SmolLM2-135M, with the rewards of `examples/rewards.py`. Every repetition
runs `AutoModelForCausalLM.generate` of the base for the same prompts in the same batches, and then one fit of every kind, so
that all of them see the same load of the machine. Printed are the ratio of the time of `trainer.train()` to the former, as
median and quartiles over the repetitions, and the parts of the time of the fit, in the same unit:

- generation; scoring: the passes for log-probabilities of the policies and of the reference that sampling has not recorded
- rewards; weights: the table, its minimum, the certificate; writing: shards and a checkpoint at every step

Rewards are not normalized: with the mixture as proposal, `normalize_rewards=True` and `estimator="bsmd"`, completions of every
policy are sampled once before the first step, which no other kind of fit needs.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from common import describe_machine, quartiles, show, table
from datasets import Dataset
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from mpo_hf import MixturePolicyModel, MPOConfig, MPOTrainer, set_product_layouts
from mpo_hf.rollouts import pad_ids, tokenize_prompts
from mpo_hf.trainer.rollout_fit import prompt_key
from mpo_hf.trainer.row_scoring import in_share


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from prompts import load_prompts  # noqa: E402
from quickstart import OBJECTIVES, open_policies  # noqa: E402
from rewards import REWARD_FUNCS  # noqa: E402
from smollm2 import base_spec, load_tokenizer  # noqa: E402


SHARE = 0.25
# by objective, proposal, estimator, and the share of the prompts whose completions are scored under policies that the estimate
# does not need
Kind = tuple[str, str, str, float]
KINDS: list[Kind] = [
    ("achieved", "mixture", "mis", 1.0),
    ("reward", "reference", "bsmd", 1.0),
    ("reward", "reference", "mis", 0.0),
    ("reward", "reference", "mis", SHARE),
    ("reward", "reference", "mis", 1.0),
    ("reward", "mixture", "bsmd", 1.0),
    ("reward", "mixture", "mis", 1.0),
]
PARTS = ["generation", "policies' scoring", "reference's scoring", "rewards", "weights", "writing"]

Clock = Callable[[], float]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a fit")
    parser.add_argument("--num_generations", type=int, default=8, help="completions a prompt")
    parser.add_argument("--batch_size", type=int, default=32, help="completions a step")
    parser.add_argument("--max_completion_length", type=int, default=32, help="tokens a completion")
    parser.add_argument("--logps_batch_size", type=int, default=8, help="completions a pass when scoring")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--layouts",
        default="measured",
        choices=["measured", "plain"],
        help="how the products of the mixture are computed",
    )
    parser.add_argument("--kinds", type=int, nargs="+", help="which fits, by their rows in the table, from 0 on")
    parser.add_argument("--folder", help="a folder that the base was saved to, which is loaded faster")
    parser.add_argument(
        "--cpu_time", action="store_true", help="count the CPU time of the process, for machines that have other work"
    )
    return parser.parse_args()


def choose_prompts(count: int) -> Dataset:
    """Prompts of which the fraction `SHARE` is scored; in a small random sample it could be none."""
    prompts = load_prompts("train").shuffle(seed=0)
    rows: dict[bool, list[int]] = {True: [], False: []}
    for row, example in enumerate(prompts):
        rows[in_share(prompt_key(example), SHARE)].append(row)
    num_scored = round(SHARE * count)
    return prompts.select(sorted(rows[True][:num_scored] + rows[False][: count - num_scored]))


def generate(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list, args: argparse.Namespace
) -> None:
    """The generation that a user would run without a mixture."""
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=args.max_completion_length,
        num_return_sequences=args.num_generations,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    size = args.batch_size // args.num_generations
    for start in range(0, len(prompts), size):
        ids = tokenize_prompts(prompts[start : start + size], tokenizer)
        ids, mask = pad_ids(ids, tokenizer.pad_token_id, left=True)
        base.generate(ids, attention_mask=mask, generation_config=config)


def make_trainer(
    model: MixturePolicyModel, tokenizer: PreTrainedTokenizerBase, kind: Kind, folder: str, args
) -> MPOTrainer:
    model.mixture_weights = [1 / len(OBJECTIVES)] * len(OBJECTIVES)
    return MPOTrainer(
        model=model,
        reward_funcs=[REWARD_FUNCS[name] for name in OBJECTIVES],
        args=MPOConfig(
            output_dir=folder,
            objective=kind[0],
            proposal=kind[1],
            estimator=kind[2],
            score_policies=kind[3],
            tolerance=0,
            beta=0.2,
            normalize_rewards=False,
            num_generations=args.num_generations,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            logps_batch_size=args.logps_batch_size,
            max_completion_length=args.max_completion_length,
            num_train_epochs=1,
            max_steps=-1,
            logging_strategy="no",
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=choose_prompts(args.prompts),
        processing_class=tokenizer,
    )


def time_parts(trainer: MPOTrainer, clock: Clock) -> dict[str, float]:
    """A dictionary that collects the seconds that the parts of a running fit take."""
    seconds: dict[str, float] = defaultdict(float)

    def watch(part: str, owner: object, name: str) -> None:
        method = getattr(owner, name)

        def timed(*args, **kwargs):
            start = clock()
            try:
                return method(*args, **kwargs)
            finally:
                seconds[part] += clock() - start

        setattr(owner, name, timed)

    watch("generation", trainer, "sample")
    watch("policies' scoring", trainer.policy_scorer, "mixture_logps")
    watch("reference's scoring", trainer.reference_scorer, "mixture_logps")
    watch("rewards", trainer, "score_rewards")
    watch("writing", trainer, "_save_checkpoint")
    if trainer.rollout_fit is not None:
        watch("weights", trainer.rollout_fit, "prepare_estimator")
        watch("weights", trainer.rollout_fit, "certify")
        watch("writing", trainer.rollout_fit.store, "write")
    create_optimizer = trainer.create_optimizer

    def create_watched(*args, **kwargs):
        optimizer = create_optimizer(*args, **kwargs)
        watch("weights", optimizer, "step")
        return optimizer

    trainer.create_optimizer = create_watched
    return seconds


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    clock = time.process_time if args.cpu_time else time.perf_counter
    set_product_layouts(args.layouts)
    spec = {"name_or_path": args.folder} if args.folder else base_spec()
    tokenizer, model = load_tokenizer(), open_policies(args.dtype, spec)
    base = AutoModelForCausalLM.from_pretrained(spec.pop("name_or_path"), **spec, dtype=args.dtype).eval()
    kinds = KINDS if args.kinds is None else [KINDS[row] for row in args.kinds]
    prompts = choose_prompts(args.prompts)["prompt"]
    bare: list[float] = []
    fits: dict[Kind, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for repetition in range(args.repetitions + 1):  # the first repetition is not counted
        set_seed(repetition)
        start = clock()
        generate(base, tokenizer, prompts, args)
        bare.append(clock() - start)
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                trainer = make_trainer(model, tokenizer, kind, folder, args)
                seconds = time_parts(trainer, clock)
                start = clock()
                trainer.train()
                seconds["all"] = clock() - start
            fits[kind].append({part: seconds[part] / bare[-1] for part in ("all", *PARTS)})
    print_table(args, bare[1:], {kind: ratios[1:] for kind, ratios in fits.items()})


def print_table(args: argparse.Namespace, bare: list[float], fits: dict[Kind, list[dict]]) -> None:
    print(
        f"{args.prompts} prompts x {args.num_generations} completions of up to {args.max_completion_length} tokens, "
        f"{args.batch_size} at a time, {args.dtype}, layouts {args.layouts}; {describe_machine()}. Bare generation takes {statistics.median(bare):.1f} s; all else in "
        "multiples of it:\n"
    )
    rows = []
    for (objective, proposal, estimator, share), ratios in fits.items():
        parts = [statistics.median(ratio[part] for ratio in ratios) for part in PARTS]
        rest = statistics.median(ratio["all"] - sum(ratio[part] for part in PARTS) for ratio in ratios)
        fit = show(quartiles([ratio["all"] for ratio in ratios]))
        estimator += "" if share == 1 else f", score_policies={share:g}"
        rows.append([objective, proposal, estimator, fit, *(f"{part:.2f}" for part in [*parts, rest])])
    print(table(["objective", "proposal", "estimator", "fit", *PARTS, "rest"], rows))


if __name__ == "__main__":
    main()
