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
from transformers.trainer_utils import SaveStrategy

from ..estimation import Certificate
from ..estimation.comparison import Comparison
from ..estimation.objectives import dual_objective, implicit_dual_objective, on_policy_objective
from ..estimation.optim import ExactMinimizer, MirrorDescent
from ..mixture.component_loading import Policy
from ..mixture.modeling_mixture import MixturePolicyModel
from ..mixture.tokenizer_loading import load_mixture_tokenizer
from ..rewards import RewardModelSpec, make_reward_functions, normalize_rewards
from ..rollouts import Completions, eos_token_ids
from ..rollouts.store import GivenRows, RolloutStore, given_rollouts
from ..text_table import printable
from .checkpoints import FIT_STATE, CheckpointResuming, adopt_layouts, layouts_state
from .checks import check_arguments, check_mixture, drawn_temperature, set_decoding, use_dtype_of_policies
from .decoded_estimator import DecodedEstimator
from .fit_identity import checkpoint_identity, completions_identity
from .fit_logging import FitLogging
from .fit_problem import DecodedRows, FitProblem
from .fit_summary import FitSummary
from .loading import load_policies, objective_names
from .mpo_config import MPOConfig
from .progress import show_short_lines
from .rollout_fit import COMPARE_EVERY, MIN_PROMPTS, FitContext, RolloutFit
from .sampling import CompletionSampling, columns_of
from .saving import MixtureSaving, unless_it_fails


RewardFunc = Callable | str | PreTrainedModel | RewardModelSpec


class MPOTrainer(CompletionSampling, FitLogging, MixtureSaving, CheckpointResuming, Trainer):
    r"""
    Fits the weights of a mixture of policies to maximize the reward of the worst-off objective, or another welfare function of
    the objectives: [Mixing Preference Optimization](https://huggingface.co/papers/2502.18699).

    No policy is trained. Every step draws completions, measures their rewards, and moves the mixture weights λ towards the
    minimum of the dual objective

    $$ F(\lambda) = E_x \log E_{y \sim \pi_{ref}} \exp\Big(\sum_k \lambda_k P(r_k)(x, y)/\beta\Big) $$

    estimated from all completions so far (`estimator="mis"`), or by the paper's batch stochastic mirror descent (`"bsmd"`).
    Nash welfare, α-fairness and constraints may lead to weights off the simplex: `trainer.model` is then a mixture with the
    reference as its last component. After every step, `trainer.model.mixture_weights` is the result so far. Saving writes a
    config, a tokenizer and a model card.

    Args:
        model ([`MixturePolicyModel`], `str` or `list`):
            The mixture, its repo id or folder, or a list of policies as for [`MixturePolicyModel.from_policies`], one an
            objective.
        ref_model (`str`, `dict` or [`~transformers.PreTrainedModel`], *optional*):
            The reference policy that the policies were aligned from. Defaults to the mixture's own.
        reward_funcs (*optional*):
            One reward an objective, in the order of the policies: callables, repo ids or models as for TRL's `GRPOTrainer`,
            or [`RewardModelSpec`]. Optional with `objective="implicit"`, where they are only logged.
        args ([`MPOConfig`], *optional*):
            The options.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Prompts in TRL's prompt-only format, plain or conversational. Further columns are passed to the rewards.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Prompts to evaluate the mixture on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer that all policies share. Defaults to that of the mixture or of its first component.
        reward_processing_classes (*optional*):
            Tokenizers of reward models, as in `GRPOTrainer`.
        callbacks (`list[TrainerCallback]`, *optional*):
            Further callbacks.
        rollouts (`str`, `os.PathLike` or [`~datasets.Dataset`], *optional*):
            Completions to fit to instead of prompts, with `estimator="mis"`: the folder `_rollouts` of an earlier fit, or a
            table with the columns `prompt` and `completion` (or better, `completion_ids`). Missing columns are computed:
            `policy_logps`, `reference_logps`, and `rewards` if `reward_funcs` are given. A completion without
            `proposal_logps` is assumed to be drawn from the reference policy, at `args.temperature`. Equal prompts, with equal
            further columns, count as one, unless their `prompt_key` ends in different numbers, `#1`, `#2`, ..., as in a store.

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
    _expansion_error: float | None = None

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
        if not isinstance(reward_funcs, list | tuple):
            reward_funcs = [] if reward_funcs is None else [reward_funcs]
        check_arguments(args, model, reward_funcs, train_dataset, eval_dataset, rollouts)
        model, self.reference_policy = load_policies(model, ref_model, args)
        check_mixture(args, model, self.reference_policy, reward_funcs, rollouts is not None)
        self.reward_functions = (
            make_reward_functions(reward_funcs, processing_classes=reward_processing_classes) if reward_funcs else []
        )
        self.objective_names = objective_names(model.config, [reward.name for reward in self.reward_functions])
        if processing_class is None:
            processing_class = load_mixture_tokenizer(model, advice="Pass it as `processing_class`.")
        if processing_class.pad_token_id is None:
            processing_class.pad_token = processing_class.eos_token
        self._is_given, given_store = rollouts is not None, None
        if self._is_given:
            train_dataset, given_store = given_rollouts(rollouts, self.objective_names)
        set_decoding(args, model.generation_config, given_store)

        # λ is kept outside the model: nothing in the model is trained, and float64 makes resuming exact
        self.weights = nn.Parameter(torch.tensor(model.config.mixture_weights, dtype=torch.float64))
        self.problem = FitProblem(args, self.objective_names)
        model = self.problem.extend(model, self.reference_policy)
        model.mixture_weights = self.problem.mixture_weights(self.weights.detach())
        self.policy_models = [model.policy(k) for k in range(len(model.config.labels))]

        super().__init__(
            model=model,
            args=args,
            data_collator=list,  # batches stay lists of examples, as rewards need every column unchanged
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self._freeze_model()
        set_seed(args.seed, device_specific=True)
        self._eos_token_ids = eos_token_ids(model, processing_class)
        if self._is_given:
            batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
            args.max_steps = math.ceil(len(train_dataset) / (batch * self.accelerator.num_processes))
        self._check_data(given_store)
        for reward in self.reward_functions:
            reward.to(self.accelerator.device)
        self._config_is_shared = self.takes_best_step = False
        self._info = completions_identity(
            args,
            model.config,
            self.objective_names,
            self.policy_models,
            self.reference_policy,
            self.processing_class,
            self.reward_functions,
            drawn_temperature(args, given_store),
        )
        self.rollout_fit = self._make_rollout_fit(given_store) if args.estimator == "mis" else None
        show_short_lines(self)
        self.add_callback(_FitState)
        self.add_callback(_MirrorDescentCallback(self))

    def _freeze_model(self) -> None:
        """Nothing in the model is trained, and DDP refuses to wrap such a model."""
        use_dtype_of_policies(self.accelerator)
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.model_accepts_loss_kwargs = False
        self.model.requires_grad_(False)
        self.model._fits_weights_only = True
        self.model.add_model_tags(self._tag_names)

    def identity(self) -> dict[str, Any]:
        """What checkpoints belong to; see [`~mpo_hf.trainer.fit_identity.checkpoint_identity`]."""
        given = self.rollout_fit.given if self.rollout_fit is not None else None
        return checkpoint_identity(self.args, self._info, given if given is not None else self.train_dataset)

    def _make_rollout_fit(self, given_store: RolloutStore | None) -> RolloutFit:
        temperature = self._info["temperature"]
        if given_store is not None:
            given_store.check_policies(self._info)
        context = FitContext(
            args=self.args,
            problem=self.problem,
            model=self.model,
            processing_class=self.processing_class,
            accelerator=self.accelerator,
            policy_logps=self.policy_logps,
            mixture_logps=self.mixture_logps,
            normalizers=self.normalizers,
            reference_logps=self.reference_logps if self.reference_policy is not None else None,
            reference_proposal_logps=self.reference_proposal_logps if self.reference_policy is not None else None,
            temperature=temperature,
            is_given=self._is_given,
        )
        # Trainer does not push folders that begin with an underscore: prompts and completions may be private
        return RolloutFit(
            context, RolloutStore(os.path.join(self.args.output_dir, "_rollouts"), self._info), given_store
        )

    @property
    def certificate(self) -> Certificate | None:
        """The quality of the weights, with `estimator="mis"`: a bound of the duality gap, standard errors, rewards."""
        return self.rollout_fit.certificate if self.rollout_fit is not None else None

    @property
    def comparisons(self) -> dict[str, Comparison] | None:
        """
        What the fitted weights reach, against uniform weights, each policy and the reference: estimates from the completions of
        the fit. For fits to what is decoded.
        """
        estimator = self.rollout_fit.estimator if self.rollout_fit is not None else None
        if not isinstance(estimator, DecodedEstimator):
            return None
        return estimator.compare(self.fitted_weights(), self.args.beta)

    def summary(self) -> FitSummary:
        """The end of the fit: why it ended, what it rests on, what it reaches, and what to do next."""
        fit = self.rollout_fit
        return FitSummary(
            args=self.args,
            objectives=self.objective_names,
            weights=self.fitted_weights(),
            step=self.state.global_step,
            max_steps=self.state.max_steps,
            has_converged=self.has_converged(),
            is_given=self._is_given,
            num_prompts=len(fit.columns.prompts) if fit is not None else 0,
            num_completions=len(fit.columns) if fit is not None else 0,
            effective_completions=fit.effective_completions if fit is not None else None,
            certificate=self.certificate,
            comparisons=self.comparisons,
            expansion_error=self._expansion_error,
        )

    @torch.no_grad()
    def check_expansion(self) -> None:
        """Scores some completions under the fitted weights, to check what the fit has assumed of them."""
        self.model.eval()
        if self.rollout_fit is not None:
            self._expansion_error = self.rollout_fit.expansion_error(self.fitted_weights())

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        if self._is_given:
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
        self.args.check_batch_size("per_device_eval_batch_size")
        return self._prompt_dataloader(dataset, self.args.eval_prompts_per_device, shuffle=False)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

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
        # a step on the few prompts that remain at the end of an epoch would be noisier
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
        if self.rollout_fit is not None:
            loss = self._rollout_loss(inputs)
        else:
            loss = self._dual_objective(inputs, self.weights, "train")
        # Trainer sums losses on its own device, in float32
        return loss.float().to(self.args.device)

    def _dual_objective(self, inputs: list[dict[str, Any]], weights: torch.Tensor, mode: str) -> torch.Tensor:
        args = self.args
        self.model.eval()  # Trainer puts the model into training mode, and policies must not use dropout
        completions = self.sample(inputs, weights.detach())
        rewards = self.score_rewards(inputs, completions) if self.reward_functions else None
        if mode == "train" and args.objective == "reward":
            self.problem.exclude_from_flat(rewards, args.num_generations)
            if self.state.global_step + 1 == self.state.max_steps:
                self.problem.warn_of_flat_objectives()
        shape = (len(inputs), args.num_generations)
        pooled_logps, proposal_logps = completions.pooled_logps.view(shape), completions.proposal_logps.view(shape)
        if args.objective == "implicit":
            policy_logps = self.policy_logps(completions).view(*shape, -1)
            loss, log_weights = implicit_dual_objective(weights, policy_logps, proposal_logps, self.objective_names)
        elif args.proposal == "mixture":
            advantages = (rewards.view(*shape, -1) - self.reward_offsets) / args.beta
            reference_logps = self.reference_logps(completions).view(shape)
            loss, log_weights = on_policy_objective(weights, advantages, pooled_logps, proposal_logps, reference_logps)
        else:
            log_ratio = pooled_logps - proposal_logps  # zero at temperature 1
            scaled = rewards.view(*shape, -1)
            if args.normalize_rewards == "optimal":
                scaled = normalize_rewards(scaled, args.beta, log_ratio)
            loss, log_weights = dual_objective(weights, scaled / args.beta, log_ratio)
        self._record_step(mode, loss, log_weights, rewards, completions)
        return loss

    def _rollout_loss(self, inputs: list[dict[str, Any]]) -> torch.Tensor:
        """The loss on all completions so far, after those of the prompts in `inputs` have been added."""
        self.model.eval()
        step, known, proposals = self.state.global_step + 1, None, None
        if self._is_given:
            completions, known = self._given_completions(inputs), columns_of(inputs)
        else:
            proposals = self.rollout_fit.row_proposals(len(inputs) * self.args.num_generations)
            completions = self.sample(inputs, torch.tensor(proposals, dtype=torch.float64))
        rewards = self._known_rewards(known)
        if self.reward_functions:
            rewards = self.score_rewards(inputs, completions)
        self._record_completions("train", completions, rewards)  # before those of the reference are scored
        self.rollout_fit.collect(step, self._repeated(inputs, completions), completions, rewards, known, proposals)
        if not self._is_given and self.rollout_fit.draws_reference(step):
            self._collect_reference(step, inputs)
        self.rollout_fit.prepare_estimator(is_last=step == self.state.max_steps and self.accelerator.sync_gradients)
        return self.rollout_fit.loss(self.weights)

    def _collect_reference(self, step: int, inputs: list[dict[str, Any]]) -> None:
        """Completions of the reference for the prompts in `inputs`, to compare the mixture with."""
        count = max(1, self.args.num_generations // COMPARE_EVERY)
        completions = self.sample_reference(inputs, count)
        rewards, examples = self.score_rewards(inputs, completions), self._repeated(inputs, completions)
        keys = [key for key in self.rollout_fit.keys[:: self.args.num_generations] for _ in range(count)]
        self.rollout_fit.collect(step, examples, completions, rewards, proposals=[()] * len(completions), keys=keys)

    def _evaluation_loss(self, inputs: list[dict[str, Any]]) -> torch.Tensor:
        """The loss on completions of the prompts in `inputs` alone, by the estimator of the fit."""
        args = self.args
        own = self.model.config.mixture_weights
        completions = self.sample(inputs, torch.tensor(own, dtype=torch.float64))
        known: dict[str, Any] = {}
        if self.problem.is_decoded:
            known["decoded"] = self._decoded_rows_of(completions)
        if args.objective != "implicit":
            known["reference_logps"] = self.reference_logps(completions)
        if args.objective != "reward":
            known["policy_logps"] = self.policy_logps(completions)
        if self.reward_functions:
            known["rewards"] = self.score_rewards(inputs, completions)
        prompt = torch.arange(len(inputs)).repeat_interleave(args.num_generations)
        estimator = self.problem.make_estimator(prompt, completions.proposal_logps, **known, sets_scale=False)
        weights = self.problem.objective_weights(self.model.config.mixture_weights)
        loss = estimator.loss(weights)
        self._record_loss("eval", loss)
        self._record_effect(
            "eval", estimator.effective_sample_fraction(weights), estimator.effective_completions(weights)
        )
        self._record_completions("eval", completions, known.get("rewards"))
        return loss

    def _decoded_rows_of(self, completions: Completions) -> DecodedRows:
        """Completions that the mixture, or the reference, has just drawn."""
        own = tuple(self.model.config.mixture_weights)
        if completions.normalizers is None or completions.normalizers.isnan().any():
            completions.policy_logps, completions.normalizers = self.normalizers(completions, own)
        is_mixture = self.args.proposal == "mixture"
        return DecodedRows(
            proposal=torch.zeros(len(completions), dtype=torch.long),
            proposals=[own if is_mixture else ()],
            own_logps=completions.proposal_logps,
            normalizers=completions.normalizers,
            current=own if is_mixture else (),
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: list[dict[str, Any]],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad():
            if self.rollout_fit is not None:
                loss = self._evaluation_loss(inputs)
            else:
                weights = torch.tensor(self.model.config.mixture_weights, dtype=torch.float64)
                loss = self._dual_objective(inputs, weights, "eval")
        return loss.float().to(self.args.device), None, None

    # ---- normalization, with the mixture as proposal ----

    @property
    def reward_offsets(self) -> torch.Tensor:
        r"""
        The offsets that the normalization P subtracts from the rewards if the mixture is the proposal, shape `(K,)`: the value

        $$ E_x \big( E_{y \sim \pi_k} [r_k] - \beta\, \mathrm{KL}(\pi_k \| \pi_{ref}) \big)
           \le E_x\, \beta \log E_{y \sim \pi_{ref}} \exp(r_k/\beta) $$

        of each policy on its own objective (Gibbs' inequality, with equality for an optimal policy). It has no exponentials of
        sequence log-ratios, so it does not collapse with length. It is estimated once, before the first step. Zeros if
        rewards are not normalized.
        """
        offsets = self._fit_state().offsets
        return torch.tensor(offsets or [0.0] * len(self.objective_names), dtype=torch.float64)

    def _fit_state(self) -> "_FitState":
        # looked up at every use, as Trainer may replace it by a restored callback
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, _FitState))

    def _saved_state(self) -> dict[str, Any]:
        """The state of the fit in the checkpoint that is resumed."""
        return self.state.stateful_callbacks.get(FIT_STATE, {}).get("attributes", {})

    def prepare_reward_offsets(self) -> None:
        """Estimates the reward offsets, or reads them from the checkpoint that is resumed. Called when training begins."""
        args, callback = self.args, self._fit_state()
        needed = args.objective == "reward" and args.proposal == "mixture" and args.normalize_rewards == "optimal"
        needed = needed and self.rollout_fit is None
        if not needed or callback.offsets is not None:
            return
        callback.offsets = self._saved_state().get("offsets") or self._estimate_reward_offsets()

    def _estimate_reward_offsets(self) -> list[float]:
        args, size = self.args, self.args.train_prompts_per_device
        prompts = [e for e, _ in zip(self.train_dataset.shuffle(seed=args.seed), range(args.normalization_prompts))]
        values: list[list[torch.Tensor]] = [[] for _ in self.policy_models]
        batches = [(k, start) for k in range(len(self.policy_models)) for start in range(0, len(prompts), size)]
        hidden = args.disable_tqdm or not self.is_world_process_zero()
        for k, start in tqdm(batches, desc="Value of each policy", disable=hidden):
            inputs = prompts[start : start + size]
            completions = self._sample_from(self.policy_models[k], inputs, None)
            reward = self.score_rewards(inputs, completions, [k])[:, 0]
            kl = completions.proposal_logps - self.reference_logps(completions)
            values[k].append(reward - args.beta * kl)
        means = torch.stack([torch.cat(v).mean() for v in values]).to(self.accelerator.device)
        return self.accelerator.reduce(means, reduction="mean").tolist()

    def begin_rollouts(self) -> None:
        """Reads the completions of earlier steps. Called when training begins."""
        self.rollout_fit.begin(self.state.global_step, self._saved_state().get("rollouts"))
        self._fit_state().rollouts = self.rollout_fit
        with torch.no_grad():
            self.weights.copy_(self.problem.objective_weights(self.model.config.mixture_weights))

    def take_weights_of_model(self) -> None:
        """Makes the weights of the model, those of an earlier step, the result of the fit, and certifies them."""
        with torch.no_grad():
            self.weights.copy_(self.problem.objective_weights(self.model.config.mixture_weights))
        self.takes_best_step = True
        if self.rollout_fit is not None:
            self.rollout_fit.certify_anew(self.weights.detach())

    # ---- the optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.rollout_fit is not None:
            self.optimizer = ExactMinimizer([self.weights], self.rollout_fit.best)
        elif self.optimizer is None:
            self.optimizer = MirrorDescent([self.weights], lr=self.args.step_size(self.state.max_steps))
        return self.optimizer

    def fitted_weights(self) -> torch.Tensor:
        """The result so far, shape `(K,)`, float64: the average of the iterates, the last one, or that of the best step."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(optimizer, MirrorDescent) or not self.args.average_iterates or self.takes_best_step:
            return self.weights.detach().clone()
        return optimizer.average(self.weights)

    def has_converged(self) -> bool:
        """Whether the bound of the duality gap is below `args.tolerance`. Never true if all completions are given."""
        # the weights of a weighted sum are given, and the fit only measures what they reach
        known = self.args.welfare == "weighted_sum" and self.args.objective != "achieved"
        if self.certificate is None or self._is_given or known or not self.args.tolerance:
            return False
        bound = self.certificate.duality_gap_bound
        if self.problem.is_decoded:
            bound = self.certificate.optimality_gap_bound
        enough = self.rollout_fit.num_prompts >= MIN_PROMPTS
        return enough and bound is not None and bound <= self.args.tolerance

    def floating_point_ops(self, inputs: list[dict[str, Any]]) -> int:
        return 0  # the cost depends on the completions, and Trainer would count the prompts


class _MirrorDescentCallback(TrainerCallback):
    """Averages gradients over processes before a step, and sets the mixture weights of the model after it."""

    def __init__(self, trainer: MPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.takes_best_step = False
        if state.global_step:
            adopt_layouts(self.trainer._saved_state().get("product_layouts"))
        self.trainer._fit_state().processes = args.world_size
        self.trainer._fit_state().identity = self.trainer.identity()
        self.trainer.prepare_reward_offsets()
        if self.trainer.rollout_fit is not None:
            self.trainer.begin_rollouts()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.rollout_fit is not None:
            self.trainer.rollout_fit.begin_epoch(state.global_step + 1, state.epoch or 0)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step:
            unless_it_fails("The completions are not checked", self.trainer.check_expansion)
            lines = unless_it_fails("There is no summary", lambda: self.trainer.summary().lines())
            print("\n".join(["", *map(printable, lines or []), ""]), flush=True)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        weights = self.trainer.weights
        grad = self.trainer.accelerator.reduce(weights.grad.to(self.trainer.accelerator.device), reduction="mean")
        weights.grad.copy_(grad)
        # Trainer would log the gradient norm of the model, which has no gradients
        self.trainer.record("train", "grad_norm", weights.grad.norm().reshape(1))

    def on_optimizer_step(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.weights.grad = None  # Trainer clears the gradients of the model only
        trainer.model.mixture_weights = trainer.problem.mixture_weights(trainer.fitted_weights())
        if trainer.rollout_fit is not None and trainer.rollout_fit.certify(trainer.fitted_weights()):
            trainer._record_certificate()
            if trainer.has_converged():
                control.should_training_stop = True
                control.should_save |= args.save_strategy == SaveStrategy.STEPS  # as at the last step of all


class _FitState(TrainerCallback, ExportableState):
    """The state in checkpoints that is neither in the model nor in the optimizer."""

    def __init__(self):
        self.offsets: list[float] | None = None
        self.rollouts: RolloutFit | None = None
        self.processes: int | None = None
        self.identity: dict[str, Any] = {}

    def state(self) -> dict:
        rollouts = self.rollouts.state() if self.rollouts is not None else None
        return {
            "args": {},
            "attributes": {
                "offsets": self.offsets,
                "rollouts": rollouts,
                "processes": self.processes,
                "identity": self.identity,
                "product_layouts": layouts_state(),
            },
        }
