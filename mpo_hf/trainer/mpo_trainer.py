"""Fits the weights of a mixture of policies to their rewards."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..estimation import Certificate
from ..estimation.objectives import dual_objective, implicit_dual_objective, on_policy_objective
from ..estimation.optim import MirrorDescent, TableFit
from ..mixture.component_loading import Policy
from ..mixture.hub import check_pushable
from ..mixture.modeling_mixture import MixturePolicyModel
from ..rewards import RewardModelSpec, make_reward_functions, normalize_rewards
from ..rollouts import eos_token_ids
from ..rollouts.store import GivenRows, RolloutStore, given_rollouts
from .fit_logging import FitLogging
from .goal import Goal
from .mpo_config import MPOConfig
from .opening import check_prompts, objective_names, open_policies, open_tokenizer
from .progress import show_plain_numbers
from .rollout_fit import RolloutFit
from .sampling import CompletionSampling, columns_of
from .saving import MixtureSaving


# A bootstrap over fewer prompts is not believed
MIN_PROMPTS = 10

RewardFunc = Callable | str | PreTrainedModel | RewardModelSpec


class MPOTrainer(CompletionSampling, FitLogging, MixtureSaving, Trainer):
    r"""
    Fits the weights of a mixture of policies, so that the worst-off objective is as well off as it can be, or another
    welfare of the objectives: [Mixing Preference Optimization](https://huggingface.co/papers/2502.18699).

    No policy is trained. Every step draws completions, measures every objective on them, and moves the mixture weights λ
    towards the minimum of the dual objective

    $$ F(\lambda) = E_x \log E_{y \sim \pi_{ref}} \exp\Big(\sum_k \lambda_k P(r_k)(x, y)/\beta\Big) $$

    by the estimate from all completions so far (`estimator="mis"`) or by the paper's batch stochastic mirror descent
    (`"bsmd"`). Nash's welfare, α-fairness and constraints leave the simplex: `trainer.model` is then a mixture with the
    reference as its last component. After every step `trainer.model.mixture_weights` is the result so far. Saving writes
    a config, a tokenizer and a model card.

    Args:
        model ([`MixturePolicyModel`], `str` or `list`):
            The mixture, the repo id or folder of one, or a list of policies as [`MixturePolicyModel.from_policies`] takes
            them, one an objective.
        ref_model (`str`, `dict` or [`~transformers.PreTrainedModel`], *optional*):
            The reference policy that the policies were aligned from. Defaults to the mixture's own.
        reward_funcs (*optional*):
            One reward an objective, in the order of the policies: callables, repo ids or models as TRL's `GRPOTrainer`
            takes them, or [`RewardModelSpec`]. Not needed for `objective="implicit"`, where they are only logged.
        args ([`MPOConfig`], *optional*):
            The options.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Prompts in TRL's prompt-only format, plain or conversational. Further columns go to the rewards.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Prompts to evaluate the mixture on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer that all policies share. Defaults to that of the mixture or of its first component.
        reward_processing_classes (*optional*):
            Tokenizers of reward models, as in `GRPOTrainer`.
        callbacks (`list[TrainerCallback]`, *optional*):
            Further callbacks.
        rollouts (`str`, `os.PathLike` or [`~datasets.Dataset`], *optional*):
            Completions to fit to, instead of prompts, with `estimator="mis"`: the folder `_rollouts` of an earlier fit, or
            a table with columns `prompt` and `completion` (better: `completion_ids`) that was sampled elsewhere. What is
            missing is computed: `policy_logps`, `reference_logps`, and `rewards` when `reward_funcs` are given. Without
            `proposal_logps` the completions are taken to be from the reference policy.

    Raises:
        `ValueError`: for arguments that do not fit together, before anything is sampled.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from mpo_hf import MPOConfig, MPOTrainer

    >>> def brevity(completions, **kwargs):
    ...     return [-float(len(c[0]["content"].split())) for c in completions]

    >>> trainer = MPOTrainer(
    ...     model=["org/helpful", "org/harmless"],
    ...     ref_model="org/sft",
    ...     reward_funcs=["org/helpful-reward", brevity],
    ...     args=MPOConfig(output_dir="mix", beta=1.0),
    ...     train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "What is a cloud?"}]}]),
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    >>> trainer.model.mixture_weights  # doctest: +SKIP
    ```
    """

    _tag_names = ["mpo", "mpo_hf"]
    args: MPOConfig
    model: MixturePolicyModel

    def __init__(
        self,
        model: MixturePolicyModel | str | Sequence[Policy],
        ref_model: Policy | None = None,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        args: MPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        rollouts: str | os.PathLike | Dataset | None = None,
    ):
        args = args if args is not None else MPOConfig("mpo_output")
        if not isinstance(args, MPOConfig):
            raise ValueError(f"`args` must be an MPOConfig, got {type(args).__name__}.")
        if rollouts is None:
            check_prompts("train_dataset", train_dataset)
        elif train_dataset is not None or args.estimator != "mis":
            raise ValueError('`rollouts` takes the place of `train_dataset`, and needs `estimator="mis"`.')
        for name, dataset in eval_dataset.items() if isinstance(eval_dataset, dict) else [("", eval_dataset)]:
            check_prompts(f"eval_dataset {name}".strip(), dataset, required=False)
        if reward_funcs is not None and not isinstance(reward_funcs, list | tuple):
            reward_funcs = [reward_funcs]
        if not reward_funcs and args.objective != "implicit" and rollouts is None:
            raise ValueError(
                f"`objective={args.objective!r}` needs `reward_funcs`, one an objective. Without, try 'implicit'."
            )
        if isinstance(model, list | tuple) and reward_funcs and len(reward_funcs) != len(model):
            raise ValueError(
                f"Got {len(reward_funcs)} `reward_funcs` for {len(model)} policies; MPO needs one for each."
            )

        model, reference = open_policies(model, ref_model, args)
        labels = model.config.labels
        if model.config.allow_off_simplex:
            raise ValueError(
                "A fit starts from weights on the simplex, but this mixture allows others (`allow_off_simplex`). Pass the "
                "list of its policies and the reference instead."
            )
        if args.estimator == "bsmd" and min(model.config.mixture_weights) == 0:
            raise ValueError(
                f"The fit starts from the weights of the mixture, {model.config.mixture_weights}, and a weight of zero would "
                "stay zero for ever. Start from uniform weights, or leave that policy out."
            )
        if reference is None and (args.objective != "implicit" or args.proposal == "reference"):
            raise ValueError(
                "This mixture has no reference policy. Pass `ref_model=`, the policy that all others were aligned from."
            )
        if reward_funcs and len(reward_funcs) != len(labels):
            raise ValueError(
                f"Got {len(reward_funcs)} `reward_funcs` for {len(labels)} policies; MPO needs one for each."
            )
        if args.push_to_hub:  # better now than after the fit
            check_pushable(model.config, args.hub_upload_adapters)
        self.reference_policy = reference
        self.reward_functions = (
            make_reward_functions(reward_funcs, processing_classes=reward_processing_classes) if reward_funcs else []
        )
        self.objective_names = objective_names(model.config, [reward.name for reward in self.reward_functions])
        self.goal = Goal(args, self.objective_names)
        processing_class = processing_class if processing_class is not None else open_tokenizer(model, args)
        start = model.config.mixture_weights
        model = self.goal.extend(model, reference)
        self.policies = [model.policy(k) for k in range(len(model.config.labels))]
        self._fits_given, self._given_store = rollouts is not None, None
        if self._fits_given:
            train_dataset, self._given_store = given_rollouts(rollouts, self.objective_names)
        # λ lives outside the model: nothing in the model is trained, and float64 makes resuming exact
        self.weights = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        model.mixture_weights = self.goal.mixture_weights(self.weights.detach())

        if processing_class.pad_token_id is None:
            processing_class.pad_token = processing_class.eos_token
        super().__init__(
            model=model,
            args=args,
            data_collator=list,  # batches stay lists of examples: rewards see every column as it is
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        # nothing in the model is trained, and DDP refuses to wrap such a model
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.model_accepts_loss_kwargs = False
        model.requires_grad_(False)
        model._fits_weights_only = True
        model.add_model_tags(self._tag_names)
        set_seed(args.seed, device_specific=True)
        self._eos_token_ids = eos_token_ids(model, processing_class)
        if self._fits_given:
            batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
            args.max_steps = math.ceil(len(train_dataset) / (batch * self.accelerator.num_processes))
        else:
            self._check_prompt_lengths(train_dataset)
        for reward in self.reward_functions:
            reward.to(self.accelerator.device)
        self._config_is_shared = False
        self.rollouts = None
        if args.estimator == "mis":
            self.rollouts = RolloutFit(self, self._rollout_store(), self._given_store)
        show_plain_numbers(self)
        self.add_callback(_FitState)
        self.add_callback(_MirrorDescentCallback(self))

    def _rollout_store(self) -> RolloutStore:
        config, reference = self.model.config, self.model.config.reference
        info = {  # what completions belong to
            "objectives": self.objective_names,
            "policies": [component.to_dict() for component in config.components],
            "reference": reference.to_dict() if reference is not None else None,
            "temperature": self.args.temperature,
            "max_completion_length": self.args.max_completion_length,
        }
        if self._given_store is not None:
            self._given_store.warn_of_other_policies(info)
        if config.plausibility:
            raise ValueError(
                'A plausibility constraint depends on more than completions tell. Use `estimator="bsmd"` with it.'
            )
        # Trainer pushes nothing that begins with an underscore: prompts and completions are not for everyone
        return RolloutStore(os.path.join(self.args.output_dir, "_rollouts"), info)

    @property
    def certificate(self) -> Certificate | None:
        """How good the weights are, with `estimator="mis"`: a bound of the duality gap, standard errors, rewards."""
        return self.rollouts.certificate if self.rollouts is not None else None

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        if self._fits_given:
            return self._prompt_dataloader(
                self.train_dataset, self.args.per_device_train_batch_size, shuffle=False, collate_fn=GivenRows
            )
        return self._prompt_dataloader(
            self.train_dataset, self.args.train_prompts_per_device, self.args.shuffle_dataset, whole_batches=True
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ValueError("Evaluation needs an `eval_dataset`.")
        return self._prompt_dataloader(dataset, self.args.eval_prompts_per_device, shuffle=False)

    def _prompt_dataloader(
        self,
        dataset: Dataset | IterableDataset,
        batch_size: int,
        shuffle: bool,
        whole_batches: bool = False,
        collate_fn: Callable | None = None,
    ) -> DataLoader:
        streamed = isinstance(dataset, IterableDataset)
        shuffle = shuffle and not streamed
        # a step on the few prompts that an epoch leaves over would be a noisier one
        drop_last = whole_batches and (streamed or len(dataset) >= batch_size * self.accelerator.num_processes)
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            collate_fn=collate_fn or self.data_collator,
            drop_last=drop_last,
        )
        return self.accelerator.prepare(loader)

    # ---- one step ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: list[dict[str, Any]],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The dual objective at the current weights, estimated from completions of the prompts in `inputs`."""
        if self.rollouts is not None:
            loss = self._loss_of_all(inputs)
        else:
            loss = self._dual_objective(inputs, self.weights, "train")
        # the trainer adds losses up on its own device, in float32
        return loss.float().to(self.args.device)

    def _dual_objective(self, inputs: list[dict[str, Any]], weights: torch.Tensor, mode: str) -> torch.Tensor:
        args = self.args
        self.model.eval()  # Trainer puts the model into training mode; dropout has no place in a policy
        completions = self.sample(inputs, weights.detach())
        rewards = self.score_rewards(inputs, completions) if self.reward_functions else None
        shape = (len(inputs), args.num_generations)
        pooled_logps, proposal_logps = completions.pooled_logps.view(shape), completions.proposal_logps.view(shape)
        if args.objective == "implicit":
            policy_logps = self.policy_logps(completions).view(*shape, -1)
            loss, log_weights = implicit_dual_objective(weights, policy_logps, proposal_logps)
        elif args.proposal == "mixture":
            advantages = (rewards.view(*shape, -1) - self.reward_offsets) / args.beta
            reference_logps = self.reference_logps(completions).view(shape)
            loss, log_weights = on_policy_objective(weights, advantages, pooled_logps, proposal_logps, reference_logps)
        else:
            log_ratio = pooled_logps - proposal_logps  # zero unless there is a temperature
            scaled = rewards.view(*shape, -1)
            if args.normalize_rewards == "optimal":
                scaled = normalize_rewards(scaled, args.beta, log_ratio)
            loss, log_weights = dual_objective(weights, scaled / args.beta, log_ratio)
        self._record_step(mode, loss, log_weights, rewards, completions)
        return loss

    def _loss_of_all(self, inputs: list[dict[str, Any]]) -> torch.Tensor:
        """The estimate from all completions so far, after drawing those of another step."""
        self.model.eval()
        known = None
        if self._fits_given:
            completions, known = self._given_completions(inputs), columns_of(inputs)
        else:
            completions = self.sample(inputs, torch.tensor(self.rollouts.proposal, dtype=torch.float64))
        rewards = self._known_rewards(known)
        if self.reward_functions:
            rewards = self.score_rewards(inputs, completions)
        self.rollouts.collect(self._repeated(inputs, completions), completions, rewards, known)
        self.rollouts.prepare_estimate()
        self._record_completions("train", completions, rewards)
        return self.rollouts.loss(self.weights)

    def _evaluate_on_estimate(self, inputs: list[dict[str, Any]]) -> torch.Tensor:
        """The loss on completions of the prompts in `inputs` alone, by the estimate that the fit uses."""
        args = self.args
        completions = self.sample(inputs, torch.tensor(self.model.config.mixture_weights, dtype=torch.float64))
        known = {}
        if args.objective != "implicit":
            known["reference_logps"] = self.reference_logps(completions)
        if args.objective != "reward":
            known["policy_logps"] = self.policy_logps(completions)
        if self.reward_functions:
            known["rewards"] = self.score_rewards(inputs, completions)
        prompt = torch.arange(len(inputs)).repeat_interleave(args.num_generations)
        estimate = self.goal.estimate(prompt, completions.proposal_logps, **known, sets_scale=False)
        weights = self.goal.objective_weights(self.model.config.mixture_weights)
        loss = estimate.loss(weights)
        self._record_loss("eval", loss)
        self.record("eval", "effective_sample_size", torch.tensor([estimate.effective_sample_size(weights)]))
        self._record_completions("eval", completions, known.get("rewards"))
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: list[dict[str, Any]],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad():
            if self.rollouts is not None:
                loss = self._evaluate_on_estimate(inputs)
            else:
                weights = torch.tensor(self.model.config.mixture_weights, dtype=torch.float64)
                loss = self._dual_objective(inputs, weights, "eval")
        return loss.float().to(self.args.device), None, None

    # ---- normalisation, with the mixture as proposal ----

    @property
    def reward_offsets(self) -> torch.Tensor:
        r"""
        What the normalisation P subtracts from every reward when the mixture is the proposal, shape `(K,)`: the value

        $$ E_x \big( E_{y \sim \pi_k} [r_k] - \beta\, \mathrm{KL}(\pi_k \| \pi_{ref}) \big)
           \le E_x\, \beta \log E_{y \sim \pi_{ref}} \exp(r_k/\beta) $$

        that each policy reaches on its own objective (Gibbs' inequality; equal when the policy is optimal). It needs no
        exponentials of sequence log-ratios, so it does not collapse with length. Estimated once, before the first step.
        Zeros where rewards are not normalised.
        """
        offsets = self._fit_state().offsets
        return torch.tensor(offsets or [0.0] * len(self.objective_names), dtype=torch.float64)

    def _fit_state(self) -> "_FitState":
        # looked up, not kept: Trainer may put a restored callback into its place
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, _FitState))

    def _saved_state(self) -> dict[str, Any]:
        """What the checkpoint that is resumed says of the fit."""
        return self.state.stateful_callbacks.get(_FitState.__name__, {}).get("attributes", {})

    def prepare_reward_offsets(self) -> None:
        """Estimates the reward offsets, or takes them from the checkpoint that is resumed. Called as training begins."""
        args, callback = self.args, self._fit_state()
        needed = args.objective == "reward" and args.proposal == "mixture" and args.normalize_rewards == "optimal"
        needed = needed and self.rollouts is None
        if not needed or callback.offsets is not None:
            return
        callback.offsets = self._saved_state().get("offsets") or self._estimate_reward_offsets()

    def _estimate_reward_offsets(self) -> list[float]:
        args, size = self.args, self.args.train_prompts_per_device
        prompts = [e for e, _ in zip(self.train_dataset.shuffle(seed=args.seed), range(args.normalization_prompts))]
        values: list[list[torch.Tensor]] = [[] for _ in self.policies]
        batches = [(k, start) for k in range(len(self.policies)) for start in range(0, len(prompts), size)]
        hidden = args.disable_tqdm or not self.is_world_process_zero()
        for k, start in tqdm(batches, desc="Value of each policy", disable=hidden):
            inputs = prompts[start : start + size]
            completions = self._sample_from(self.policies[k], inputs, None)
            reward = self.score_rewards(inputs, completions, [k])[:, 0]
            kl = completions.proposal_logps - self.reference_logps(completions)
            values[k].append(reward - args.beta * kl)
        means = torch.stack([torch.cat(v).mean() for v in values]).to(self.accelerator.device)
        return self.accelerator.reduce(means, reduction="mean").tolist()

    def begin_rollouts(self) -> None:
        """Reads the completions of earlier steps. Called as training begins."""
        self.rollouts.begin(self.state.global_step, self._saved_state().get("rollouts"))
        self._fit_state().rollouts = self.rollouts
        with torch.no_grad():
            self.weights.copy_(self.goal.objective_weights(self.model.config.mixture_weights))

    # ---- the optimiser ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.rollouts is not None:
            self.optimizer = TableFit([self.weights], self.rollouts.best)
        elif self.optimizer is None:
            self.optimizer = MirrorDescent([self.weights], lr=self.args.step_size(self.state.max_steps))
        return self.optimizer

    def fitted_weights(self) -> torch.Tensor:
        """The result so far, shape `(K,)`, float64: the average of the iterates, or the last one."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(optimizer, MirrorDescent) or not self.args.average_iterates:
            return self.weights.detach().clone()
        return optimizer.average(self.weights)

    def is_sure_enough(self) -> bool:
        """Whether the duality gap is known to be below `args.tolerance`. Never when there is nothing to save by ending."""
        # there are no weights to find then
        known = self.args.welfare == "weighted_sum" and self.args.objective != "achieved"
        if self.certificate is None or self._fits_given or known:
            return False
        enough = self.rollouts.estimate.table.num_prompts >= MIN_PROMPTS
        return enough and self.certificate.duality_gap_bound <= self.args.tolerance

    def floating_point_ops(self, inputs: list[dict[str, Any]]) -> int:
        return 0  # what is spent depends on the completions, not on the prompts that Trainer would count


class _MirrorDescentCallback(TrainerCallback):
    """Gradients of all processes before a mirror step, and the result of it in the model afterwards."""

    def __init__(self, trainer: MPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.prepare_reward_offsets()
        if self.trainer.rollouts is not None:
            self.trainer.begin_rollouts()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        weights = self.trainer.weights
        grad = self.trainer.accelerator.reduce(weights.grad.to(self.trainer.accelerator.device), reduction="mean")
        weights.grad.copy_(grad)
        # Trainer measures the gradient of the model, which has none
        self.trainer.record("train", "grad_norm", weights.grad.norm().reshape(1))

    def on_optimizer_step(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.weights.grad = None  # Trainer clears the gradients of the model, where the weights are not
        trainer.model.mixture_weights = trainer.goal.mixture_weights(trainer.fitted_weights())
        if trainer.rollouts is not None and trainer.rollouts.certify(trainer.fitted_weights()):
            trainer._record_certificate()
            if trainer.is_sure_enough():
                control.should_training_stop = True


class _FitState(TrainerCallback, ExportableState):
    """Carries what is neither in the model nor in the optimizer through checkpoints."""

    def __init__(self):
        self.offsets: list[float] | None = None
        self.rollouts: RolloutFit | None = None

    def state(self) -> dict:
        rollouts = self.rollouts.state() if self.rollouts is not None else None
        return {"args": {}, "attributes": {"offsets": self.offsets, "rollouts": rollouts}}
