"""The metrics that a fit logs: of its completions, of its objective, and of its weights."""

from collections import defaultdict

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..estimation.objectives import effective_sample_size
from ..mixture.modeling_mixture import MixturePolicyModel
from ..rollouts import Completions
from .mpo_config import MPOConfig


logger = logging.get_logger(__name__)

# With fewer effective completions of a prompt, the bias of the estimates, of order 1/m, is no longer small.
MIN_EFFECTIVE_COMPLETIONS = 4


class FitLogging:
    """The part of [`MPOTrainer`] that collects metrics and logs their means."""

    args: MPOConfig
    model: MixturePolicyModel

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._warned_of: set[bool] = set()

    def record(self, mode: str, name: str, values: torch.Tensor) -> None:
        """Adds the mean of `values` over all processes to the metrics that are logged next; `mode` is "train" or "eval"."""
        gathered = self.accelerator.gather(values.detach().float().to(self.accelerator.device))
        self._metrics[mode][name].append(gathered.mean().item())

    def _record_step(
        self,
        mode: str,
        loss: torch.Tensor,
        log_weights: torch.Tensor,
        rewards: torch.Tensor | None,
        completions: Completions,
    ) -> None:
        count = effective_sample_size(log_weights.detach()).mean().item()
        self.record(mode, "dual_objective", loss.reshape(1))
        self._record_effect(mode, count / log_weights.shape[-1], count)
        self._record_completions(mode, completions, rewards)

    def _record_loss(self, mode: str, loss: torch.Tensor) -> None:
        name, value = ("welfare", -loss) if self.args.objective == "achieved" else ("dual_objective", loss)
        self.record(mode, name, value.reshape(1))

    def _record_completions(self, mode: str, completions: Completions, rewards: torch.Tensor | None) -> None:
        self.record(mode, "completions/mean_length", completions.completion_mask.sum(-1))
        if rewards is not None:
            for name, values in zip(self.objective_names, rewards.reshape(-1, rewards.shape[-1]).unbind(-1)):
                self.record(mode, f"rewards/{name}", values)
        for name, reward in zip(self.objective_names, self.reward_functions):
            for metric, values in reward.metrics.items():
                self.record(mode, f"ensembles/{name}/{metric}", values)
        self._record_users_metrics(mode)

    def _record_certificate(self) -> None:
        """Records the quality of the weights after they have been fitted to a new estimate."""
        certificate, fraction = self.certificate, self.rollout_fit.effective_sample_fraction
        self._record_loss("train", self.rollout_fit.loss(self.weights.detach()))
        self._record_effect("train", fraction, self.rollout_fit.effective_completions)
        if certificate is not None:
            self.record("train", "duality_gap_bound", torch.tensor([certificate.duality_gap_bound]))
            for name, error in zip(self.objective_names, certificate.standard_errors):
                self.record("train", f"standard_errors/{name}", error.reshape(1))
            if certificate.mixture_rewards is not None:
                for name, reward in zip(self.objective_names, certificate.mixture_rewards):
                    self.record("train", f"mixture_rewards/{name}", reward.reshape(1))
            if certificate.mixture_duality_gap is not None:
                self.record("train", "mixture_duality_gap", torch.tensor([certificate.mixture_duality_gap]))

    def _record_effect(self, mode: str, fraction: float, count: float) -> None:
        """Records the effective sample size, as a fraction and as a number of completions per prompt."""
        self.record(mode, "effective_sample_size", torch.tensor([fraction]))
        self.record(mode, "effective_completions", torch.tensor([count]))
        if mode == "train":
            self._warn_of_collapse(
                *(self._metrics[mode][f"effective_{name}"][-1] for name in ("sample_size", "completions"))
            )

    def _warn_of_collapse(self, fraction: float, count: float) -> None:
        """Warns when too few completions count: once of their share, and once of their number."""
        collapsed = fraction < self.args.min_effective_sample_size
        if not (collapsed or count < MIN_EFFECTIVE_COMPLETIONS) or collapsed in self._warned_of:
            return
        self._warned_of.add(collapsed)
        if collapsed:
            reason = (
                f"Only {fraction:.1%} of the completions count, {count:.1f} of each prompt: the effective sample size has "
                "collapsed, and the weights may run away from the optimum"
            )
        else:
            reason = (
                f"Only {count:.1f} completions of each prompt count, {fraction:.0%} of them: estimates from so few are biased, "
                "by an amount that does not shrink with more prompts"
            )
        logger.warning(f"{reason}. {self._advice(collapsed)}.")

    def _advice(self, collapsed: bool) -> str:
        if collapsed and self.origin != "mixture":
            known = {"reference": "the reference policy", "both": "the reference policy and from mixtures"}
            advice = (
                f"They come from {known.get(self.origin, 'other policies')}: draw from the mixture itself, with "
                f'`proposal="mixture"`{" and without `rollouts`" if self._is_given else ""}'
            )
        elif self._is_given:
            advice = "Give more completions of each prompt"
        elif collapsed:
            advice = "Draw more completions (`num_generations`), or shorter ones (`max_completion_length`)"
        else:
            advice = "Draw more completions of each prompt (`num_generations`)"
        return advice if self.args.objective == "implicit" else f"{advice}, or raise `beta`"

    @property
    def origin(self) -> str:
        """What drew the completions: `"reference"`, `"mixture"`, `"both"`, or `"given"` if that is not known."""
        return self.rollout_fit.origin if self.rollout_fit is not None else self.args.proposal

    # ---- metrics that leave the trainer ----

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        Runs an evaluation or a prediction. Its metrics include what was recorded of the completions, so that `evaluate`
        returns the rewards, callbacks get them, and `metric_for_best_model` may name them.
        """
        self._metrics["eval"].clear()  # what an evaluation that was interrupted has left
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in self._take_means("eval").items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:  # the entry of a step, or the last one
            names = [*self.objective_names, "reference"]
            weights = {f"weights/{name}": weight for name, weight in zip(names, self.model.config.mixture_weights)}
            logs.update(self._take_means("train") | weights)
            if "loss" in logs and self.rollout_fit is not None:
                columns = self.rollout_fit.columns
                logs.update({"num_prompts": len(columns.prompts), "num_completions": len(columns)})
        super().log(logs, start_time)

    def _take_means(self, mode: str) -> dict[str, float]:
        """The means of the metrics that have been recorded since the last call."""
        means = {name: sum(values) / len(values) for name, values in self._metrics[mode].items() if values}
        self._metrics[mode].clear()
        return means
