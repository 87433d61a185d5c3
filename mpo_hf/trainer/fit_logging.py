"""The metrics that a fit logs: of its completions, of its objective, and of its weights."""

from collections import defaultdict

import torch
from transformers.utils import logging

from ..estimation.objectives import effective_sample_size
from ..mixture.modeling_mixture import MixturePolicyModel
from ..rollouts import Completions
from .mpo_config import MPOConfig


logger = logging.get_logger(__name__)


class FitLogging:
    """The part of [`MPOTrainer`] that collects metrics and logs their means."""

    args: MPOConfig
    model: MixturePolicyModel

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._warned_collapse = False

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
        fraction = effective_sample_size(log_weights.detach()) / log_weights.shape[-1]
        self.record(mode, "dual_objective", loss.reshape(1))
        self.record(mode, "effective_sample_size", fraction)
        self._record_completions(mode, completions, rewards)
        if mode == "train":
            self._warn_of_collapse(self._metrics[mode]["effective_sample_size"][-1])

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

    def _record_certificate(self) -> None:
        """Records the quality of the weights after they have been fitted to a new estimate."""
        certificate, fraction = self.certificate, self.rollout_fit.effective_sample_fraction
        self._record_loss("train", self.rollout_fit.loss(self.weights.detach()))
        self.record("train", "effective_sample_size", torch.tensor([fraction]))
        self._warn_of_collapse(fraction)
        if certificate is not None:
            self.record("train", "duality_gap_bound", torch.tensor([certificate.duality_gap_bound]))
            for name, error in zip(self.objective_names, certificate.standard_errors):
                self.record("train", f"standard_errors/{name}", error.reshape(1))
            if certificate.mixture_rewards is not None:
                for name, reward in zip(self.objective_names, certificate.mixture_rewards):
                    self.record("train", f"mixture_rewards/{name}", reward.reshape(1))
            if certificate.mixture_duality_gap is not None:
                self.record("train", "mixture_duality_gap", torch.tensor([certificate.mixture_duality_gap]))

    def _warn_of_collapse(self, fraction: float) -> None:
        if fraction >= self.args.min_effective_sample_size or self._warned_collapse:
            return
        self._warned_collapse = True
        if self.args.proposal == "reference":
            advice = 'Draw from the mixture itself with `proposal="mixture"`'
        else:
            advice = "Draw more completions (`num_generations`), or shorter ones (`max_completion_length`)"
        if self.args.objective != "implicit":
            advice += ", or raise `beta`"
        logger.warning(
            f"Only {fraction:.1%} of the completions count: the effective sample size has collapsed, and the weights may "
            f'run away from the optimum (proposal "{self.args.proposal}"). {advice}.'
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        metrics = {name: sum(values) / len(values) for name, values in self._metrics[mode].items() if values}
        if mode == "eval":
            metrics = {f"eval_{name}": value for name, value in metrics.items()}
        else:
            names = [*self.objective_names, "reference"]
            metrics |= {f"weights/{name}": weight for name, weight in zip(names, self.model.config.mixture_weights)}
        self._metrics[mode].clear()
        super().log({**logs, **metrics}, start_time)
