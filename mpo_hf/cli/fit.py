"""`mpo-hf fit`: fits mixture weights to policies and their rewards."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.utils import logging
from trl import ScriptArguments

from ..mixture.hub_files import Location
from ..mixture.modeling_mixture import MixturePolicyModel
from ..mixture.tokenizer_loading import load_tokenizer
from ..text_table import format_table
from ..trainer import MPOConfig, MPOTrainer
from ..trainer.fit_card import PLOT_NAME
from ..trainer.progress import close_bars
from .auto_dtype import settle_dtype
from .data_files import check_data, file_type, load_table, with_prompts
from .early_checks import check_dtype, check_folder, check_reporters
from .parser import CommandParser, UsageError
from .reward_arguments import parse_reward


logger = logging.get_logger(__name__)


@dataclass
class FitArguments(ScriptArguments):
    """The policies, rewards and prompts of a fit, and TRL's script arguments."""

    policies: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The policies: repo ids or folders of models, PEFT adapters or mixtures. In YAML also dictionaries, "
            "with name_or_path, adapter, revision, label ...",
            "metavar": "POLICY",
        },
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "The policy that all others were aligned from. Not needed for adapters over one base.",
            "metavar": "POLICY",
            "aliases": ["--ref_model"],
        },
    )
    rewards: list[str] = field(
        default_factory=list,
        metadata={
            "help": "One reward per policy, in the same order: repo id or folder of a classifier, file.py:function or "
            "module:function. In YAML also dictionaries, with the arguments of RewardModelSpec, or an ensemble of rewards. "
            "Not needed for the implicit objective.",
            "metavar": "REWARD",
            "aliases": ["--reward_funcs"],
        },
    )
    labels: list[str] = field(
        default_factory=list, metadata={"help": "Names of the objectives, one per policy.", "metavar": "NAME"}
    )
    weights: list[float] | None = field(default=None, metadata={"help": "Initial weights. Default: equal ones."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Repo id or folder of the tokenizer. Default: that of the first policy."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the policies in memory, such as bfloat16. auto: that of the checkpoints, or float32 on a CPU that is "
            "slow in it."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code in the repos of the policies and of the tokenizer."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "The prompts: a dataset's repo id or folder, or a .jsonl, .json, .parquet, .csv or .txt file, with a column "
            "'prompt' of texts or of conversations. Other columns are passed to the rewards.",
            "metavar": "DATASET",
            "aliases": ["--dataset"],
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts for --eval_strategy. Default: the test split of the dataset.",
            "metavar": "DATASET",
            "aliases": ["--eval_dataset"],
        },
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "The column of prompts, if it is not 'prompt'.", "metavar": "NAME"}
    )
    rollouts: str | None = field(
        default=None,
        metadata={
            "help": "Completions to fit to instead of prompts, with --estimator mis: the folder _rollouts of an earlier fit, "
            "or a dataset or file with the columns 'prompt' and 'completion'.",
            "metavar": "FOLDER",
        },
    )

    def __post_init__(self):
        # in YAML, a single value needs no list
        for name in ("policies", "rewards", "labels"):
            value = getattr(self, name)
            setattr(self, name, list(value) if isinstance(value, list | tuple) else [value])
        if not self.policies:
            raise ValueError(
                "--policies is needed: the policies to mix, for instance --policies org/helpful org/harmless"
            )
        if self.rollouts:
            if self.dataset_name:
                raise ValueError(
                    f"--rollouts {self.rollouts} come with their own prompts. Leave out --dataset {self.dataset_name}; use "
                    "--eval_dataset for prompts to evaluate on."
                )
        elif not self.dataset_name:
            raise ValueError(
                "--dataset is needed: prompts to fit on, for instance --dataset prompts.jsonl (or --rollouts, completions "
                "to fit to)"
            )
        if self.rewards and len(self.rewards) < len(self.policies):
            raise ValueError(
                f"Got {len(self.rewards)} rewards for {len(self.policies)} policies; every policy needs the reward of its "
                "objective."
            )


SECTIONS = {
    "policies and rewards": [
        "policies",
        "rewards",
        "reference",
        "labels",
        "weights",
        "tokenizer",
        "dtype",
        "trust_remote_code",
    ],
    "prompts": [
        "dataset",
        "prompt_column",
        "dataset_config",
        "dataset_train_split",
        "dataset_streaming",
        "eval_dataset",
        "dataset_test_split",
        "rollouts",
    ],
    "the fit": [
        "objective",
        "mixing",
        "free_sum",
        "beta",
        "proposal",
        "welfare",
        "welfare_weights",
        "fairness_alpha",
        "cvar_level",
        "constraints",
        "normalize_rewards",
        "estimator",
        "tolerance",
        "num_generations",
        "max_completion_length",
        "temperature",
        "max_steps",
        "per_device_train_batch_size",
        "eval_strategy",
        "seed",
    ],
    "results": [
        "output_dir",
        "resume_from_checkpoint",
        "report_to",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "hub_upload_adapters",
        "hub_with_code",
        "hub_pin_revisions",
    ],
}

# Shorter than the help texts of TRL and Transformers.
TEXTS = {
    "dtype": "Such as bfloat16; auto: as stored, or float32 if faster",
    "dataset_config": "Configuration of a dataset that has several.",
    "dataset_train_split": "The split to fit on, such as 'train[:500]'.",
    "dataset_streaming": "Stream the dataset instead of downloading it first.",
    "dataset_test_split": "The split for --eval_strategy.",
    "eval_strategy": "When to evaluate the mixture: no, steps or epoch; see also --eval_steps.",
    "objective": "'achieved' (default): best for what this mixture reaches as generate() decodes it; 'reward': the paper's "
    "theorem, for policies that are optimal for their rewards; 'implicit': the same without rewards.",
    "mixing": "With 'achieved': mixed token by token ('token') or as whole completions ('sequence').",
    "free_sum": "With 'achieved': leave the sum of the weights free.",
    "proposal": "Draw completions from the 'reference' or from the 'mixture'.",
    "normalize_rewards": "The scale on which rewards are compared: 'optimal', 'regret', 'reference', 'gain', 'z_score', 'win_rate' "
    "or 'none'. The default depends on the welfare.",
    "cvar_level": "Share of the objectives that CVaR is the mean of.",
    "per_device_train_batch_size": "Completions per device and step (default: about 32)",
    "temperature": "Sampling temperature, of the fit and of what it is for.",
    "seed": "Seed of the sampling.",
    "output_dir": "Folder for the mixture and its checkpoints. Default: trainer_output.",
    "resume_from_checkpoint": "Folder of a checkpoint to resume from; 'true' for the last one in --output_dir.",
    "report_to": "Where to log: tensorboard, wandb, trackio, all.",
    "push_to_hub": "Push the mixture to the Hub.",
    "hub_model_id": "Repo to push to. Default: the name of the folder.",
    "hub_private_repo": "Whether to create that repo as private: true or false.",
}

EXAMPLES = """
mpo-hf fit --policies org/helpful-lora org/harmless-lora --rewards org/helpful-rm rewards.py:harmless \\
    --dataset prompts.jsonl --output_dir mix --beta 0.5 --max_steps 50

mpo-hf fit --config fit.yaml --output_dir mix        # where fit.yaml holds, for instance:
    policies:
      - {adapter: org/helpful-lora, adapter_revision: v1.0, label: helpful}
      - {name_or_path: org/harmless, label: harmless}
    reference: org/sft
    rewards:
      - org/helpful-rm
      - {model: org/toxicity, logit: toxic, sign: -1, template: "{completion}"}
    dataset: trl-lib/ultrafeedback-prompt
    num_generations: 16
"""


def make_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(
        "fit",
        [FitArguments, MPOConfig],
        usage="--policies POLICY ... --rewards REWARD ... --dataset DATASET --output_dir FOLDER [options]",
        description="Finds the mixture weights that maximize the reward of the worst-off objective. Nothing is trained: the "
        "weights are fitted to sampled completions and their rewards. Saves the mixture (a config that refers to the "
        "policies, a tokenizer and a model card) and a plot of the fit. On several processes: accelerate launch "
        "-m mpo_hf.cli.main fit ...",
        sections=SECTIONS,
        examples=EXAMPLES,
        texts=TEXTS,
        mappings=("policies", "reference", "rewards"),
        rivals={"rollouts": ["dataset_name"], "dataset_name": ["rollouts"]},
    )
    parser.add_full_help()
    return parser


def run(argv: Sequence[str]) -> None:
    """Runs `mpo-hf fit`."""
    args, training_args = make_parser().parse(argv)
    check_early(args, training_args)
    trainer = make_trainer(args, training_args)
    try:
        trainer.train(resume_from_checkpoint=_checkpoint(training_args.resume_from_checkpoint))
    except BaseException:
        close_bars(trainer)  # the message is on a line of its own
        raise
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"\n{summarize(trainer)}\n")
        print(f"The mixture is in {training_args.output_dir}.")
        path = os.path.join(training_args.output_dir, PLOT_NAME)
        if os.path.isfile(path):
            print(f"A plot of the fit is in {path}.")
    if training_args.push_to_hub:
        trainer.push_to_hub()
        trainer.accelerator.print(f"It is shared as {trainer.hub_model_id}.")
    trainer.end()


def check_early(args: FitArguments, training_args: MPOConfig) -> None:
    """Refuses what can be known to fail, before anything is opened."""
    for option, name in (("--dataset", args.dataset_name), ("--eval_dataset", args.eval_dataset_name)):
        if name is not None:
            check_data(option, name)
    if args.rollouts is not None:
        check_data("--rollouts", args.rollouts)
    check_dtype("--dtype", args.dtype)
    check_reporters(training_args)
    check_folder(training_args, _checkpoint(training_args.resume_from_checkpoint))


def make_trainer(args: FitArguments, training_args: MPOConfig) -> MPOTrainer:
    """A trainer for the arguments. What is quick to check is loaded first, and policies last."""
    rewards = [parse_reward(reward) for reward in args.rewards]
    train_dataset = rollouts = eval_dataset = None
    if args.rollouts:
        rollouts = load_rollouts(args, training_args)
    else:
        train_dataset = load_prompts(args, args.dataset_name, args.dataset_train_split)
    if training_args.eval_strategy != "no":
        if args.eval_dataset_name is None and (rollouts is not None or file_type(args.dataset_name)):
            raise UsageError(
                "--eval_strategy needs --eval_dataset, as files of prompts and rollouts have no test split."
            )
        eval_dataset = load_prompts(args, args.eval_dataset_name or args.dataset_name, args.dataset_test_split)
    elif args.eval_dataset_name:
        raise UsageError(
            f"--eval_dataset {args.eval_dataset_name} has no effect without --eval_strategy: add --eval_strategy steps, or "
            "leave it out."
        )
    tokenizer = None
    if args.tokenizer:
        kwargs = {"trust_remote_code": True} if args.trust_remote_code else {}
        tokenizer = load_tokenizer([Location(args.tokenizer)], f"--tokenizer {args.tokenizer}", **kwargs)
    return MPOTrainer(
        model=mix_policies(args, training_args),
        reward_funcs=rewards or None,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        rollouts=rollouts,
    )


def mix_policies(args: FitArguments, training_args: MPOConfig) -> MixturePolicyModel:
    """Mixes the policies."""
    kwargs: dict[str, Any] = {"dtype": args.dtype, **(training_args.model_init_kwargs or {})}
    training_args.model_init_kwargs = None  # in use here; the trainer gets a mixture
    starts_elsewhere = args.rollouts is not None or training_args.proposal == "reference"
    if (
        args.weights
        and training_args.estimator == "mis"
        and training_args.objective != "achieved"
        and starts_elsewhere
    ):
        logger.warning(
            "--weights has no effect: the fit goes to the optimum of its estimate wherever it starts, and no completions are "
            "drawn from the mixture. Leave it out, or use --proposal mixture."
        )
    if args.trust_remote_code:
        kwargs["trust_remote_code"] = True
    if args.labels:
        kwargs["labels"] = args.labels
    model = MixturePolicyModel.from_policies(args.policies, args.weights, reference=args.reference, **kwargs)
    if kwargs["dtype"] == "auto" and training_args.device.type == "cpu":
        sentence = settle_dtype(model, with_reference=True)
        if sentence and training_args.process_index == 0:
            print(sentence, file=sys.stderr)
    return model


def load_prompts(args: FitArguments, name: str, split: str) -> Dataset | IterableDataset:
    """
    Loads prompts from a file, a folder or the Hub.

    Args:
        args ([`FitArguments`]): which configuration, and whether to stream.
        name (`str`): file, folder or repo id.
        split (`str`): the split of a dataset that has some.
    """
    table = load_table(name, args.dataset_config, split, args.dataset_streaming)
    return with_prompts(table, name, args.prompt_column)


def load_rollouts(args: FitArguments, training_args: MPOConfig) -> str | Dataset:
    """Completions to fit to: the folder of a store, or a dataset."""
    if training_args.estimator != "mis":
        raise UsageError(
            f"--rollouts {args.rollouts} need --estimator mis: mirror descent (--estimator {training_args.estimator}) draws "
            "its own completions."
        )
    if args.dataset_streaming:
        raise UsageError("--rollouts are fitted all at once, and cannot be streamed. Leave out --dataset_streaming.")
    if os.path.isdir(args.rollouts) and not os.path.isfile(os.path.join(args.rollouts, "state.json")):
        return args.rollouts
    return load_prompts(args, args.rollouts, args.dataset_train_split)


def summarize(trainer: MPOTrainer) -> str:
    """The fitted weights and their rewards, by policy, as a table; the trainer has printed what they mean."""
    config = trainer.model.config
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    certificate, rows = trainer.certificate, []
    names = [*trainer.objective_names, "reference"]
    for k, (name, component, weight) in enumerate(zip(names, config.components, config.mixture_weights)):
        rewards = [entry[f"rewards/{name}"] for entry in steps if f"rewards/{name}" in entry]
        rows.append([name, component.source, weight, sum(rewards) / len(rewards) if rewards else None])
        if certificate is not None:
            known = (certificate.standard_errors, certificate.mixture_rewards)
            rows[k] += [values[k].item() if values is not None and k < len(values) else None for values in known]
    drew = {"both": "all samples", "given": "the given completions"}.get(
        trainer.origin, f"the {trainer.origin}'s samples"
    )
    header = ["objective", "policy", "weight", f"mean reward of {drew}"]
    header += ["standard error of the weight", "reward of the mixture"] if certificate is not None else []
    return format_table(header, rows)


def _checkpoint(value: str | bool | None) -> str | bool | None:
    """The folder of a checkpoint, or whether to resume from the last one, which the command line gives as a text."""
    return {"true": True, "false": None}.get(str(value).lower(), value)
