"""Sequence classifiers as rewards."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .functions import RewardFunction
from .inputs import RewardInputs
from .loading import (
    ACTIVATIONS,
    RewardModelSpec,
    Text,
    choose_logit,
    length_limit,
    load_model,
    load_reward_tokenizer,
    model_name,
)
from .values import validate_rewards


logger = logging.get_logger(__name__)


class ModelReward(RewardFunction):
    """
    A sequence classifier as reward, by the conventions of TRL's GRPOTrainer: padding on the right whatever the tokenizer's
    side, EOS for a missing pad token. A model whose rewards depend on padding, such as an XLNet, gets inputs of one length at
    a time.

    Raises:
        `ValueError`: the model has several outputs and `logit` chooses none; its head is not in the checkpoint and
            would be random; there is no tokenizer; see also [`~mpo_hf.rewards.inputs.RewardInputs`].
    """

    def __init__(self, spec: RewardModelSpec | str | PreTrainedModel, name: str | None = None):
        self.spec = spec if isinstance(spec, RewardModelSpec) else RewardModelSpec(spec)
        self.name = name or self.spec.label or model_name(self.spec)
        self.model, locations = load_model(self.spec)
        self.processing_class = load_reward_tokenizer(self.spec, self.name, locations)
        # read now, as a trainer may wrap the model later, which hides its config
        config = self.model.config
        self.logit = choose_logit(self.spec, self.name, config)
        self._num_labels = len(config.id2label)
        self.max_length = self.spec.max_length or length_limit(self.model, self.processing_class)
        self.inputs = RewardInputs(self.spec, self.name, self.processing_class, config, self.max_length)
        # the classifier reads its logits at the last token that is not this one
        config.get_text_config().pad_token_id = self.processing_class.pad_token_id
        self._ignores_padding: bool | None = None

    @torch.no_grad()
    def __call__(self, prompts: list[Text], completions: list[Text], **columns) -> torch.Tensor:
        rewards = torch.empty(len(completions), dtype=torch.float64)
        if len(completions) == 0:
            return rewards
        inputs = self.inputs(prompts, completions)
        self.model.eval()
        for rows in self._batches([len(ids) for ids in inputs["input_ids"]]):
            rewards[rows] = self._score({key: [values[row] for row in rows] for key, values in inputs.items()})
        return validate_rewards(self.name, rewards, completions)

    def check(self, prompts: Sequence[Text], columns: Iterable[str]) -> None:
        self.inputs.check(prompts)

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """The rows of each batch, the longest first; of one length only, once padding has been found to change rewards."""
        rows = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        while rows:
            batch = rows[: self.spec.batch_size]
            if self._ignores_padding is False:
                batch = [row for row in batch if lengths[row] == lengths[batch[0]]]
            yield batch
            rows = rows[len(batch) :]

    def _score(self, inputs: dict[str, list]) -> torch.Tensor:
        logits = self._logits(inputs)
        lengths = [len(ids) for ids in inputs["input_ids"]]
        if self._ignores_padding is None and lengths[-1] < lengths[0]:
            alone = self._logits({key: values[-1:] for key, values in inputs.items()})
            tolerance = torch.finfo(getattr(self.model, "dtype", torch.float32)).eps ** 0.5
            self._ignores_padding = torch.allclose(alone[0], logits[-1], tolerance, tolerance, equal_nan=True)
            if not self._ignores_padding:
                logger.warning(
                    f"The model of reward {self.name!r} gives a text another reward if it is padded. It scores texts of one "
                    "length at a time, which takes longer."
                )
        if self._ignores_padding is False and lengths[-1] < lengths[0]:
            rows = range(len(lengths))
            logits = torch.cat([self._logits({key: [v[row]] for key, v in inputs.items()}) for row in rows])
        values = ACTIVATIONS[self.spec.activation](logits)[:, self.logit]
        return self.spec.sign * self.spec.scale * values + self.spec.offset

    def _logits(self, inputs: dict[str, list]) -> torch.Tensor:
        batch = self.processing_class.pad(inputs, padding_side="right", return_tensors="pt")
        device = next(self.model.parameters()).device
        if device.type != "meta":  # an offloaded model moves its inputs itself
            batch = batch.to(device)
        logits = self.model(**batch).logits
        if logits.ndim != 2 or logits.shape[-1] != self._num_labels:
            raise ValueError(
                f"The reward {self.name!r} needs a sequence classifier, with logits of shape (batch, {self._num_labels}), one "
                f"for each label of its config, but those of {type(self.model).__name__} have {tuple(logits.shape)}."
            )
        return logits.cpu().double()
