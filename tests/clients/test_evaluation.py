"""`Trainer.evaluate` and `Trainer.predict` of a mixture: the loss is the cross-entropy of the normalized mixture."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import CLOSE, close
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)


pytestmark = pytest.mark.integration
TEXTS = [
    "Rain is water that falls.",
    "Rivers run.",
    "The sky is blue, or black, or grey.",
    "Clouds cool as they rise.",
]
PROMPT_LENGTHS = [5, 7, 4, 7]


@pytest.fixture
def dataset(saved):
    """Texts, with labels for what comes after a prompt."""
    ids = saved.tokenizer(TEXTS).input_ids
    labels = [[-100] * length + row[length:] for row, length in zip(ids, PROMPT_LENGTHS)]
    mask = [[1] * len(row) for row in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": mask, "labels": labels})


@pytest.fixture
def make_trainer(saved, tmp_path):
    """A stock trainer of the mixture, which puts two texts into a batch."""

    def make(data_collator=None, settings=None, **kwargs):
        settings = {"per_device_eval_batch_size": 2, "report_to": "none", "use_cpu": True, **(settings or {})}
        collator = data_collator or DataCollatorForSeq2Seq(saved.tokenizer)
        args = TrainingArguments(str(tmp_path), **settings)
        return Trainer(saved.model, args, data_collator=collator, processing_class=saved.tokenizer, **kwargs)

    return make


@torch.no_grad()
def token_logps(saved, weights, row: list[int]) -> torch.Tensor:
    """Normalized log-probabilities of the token-level mixture at every position of one row, in float64: `(T, V)`."""
    pooled = 0
    for weight, component in zip(weights, saved.components):
        pooled = pooled + weight * component(torch.tensor([row]), use_cache=False).logits[0].double().log_softmax(-1)
    return pooled.log_softmax(-1)


def token_losses(saved, row: list[int], labels: list[int], weights=None) -> list[float]:
    """Cross-entropies of the tokens of one row that have a label."""
    logps = token_logps(saved, weights or saved.weights, row)
    return [-logps[t - 1, label].item() for t, label in enumerate(labels) if t > 0 and label != -100]


def expected_loss(saved, dataset, weights=None) -> float:
    """The trainer's loss: the mean over the tokens of a batch, and then over the batches."""
    rows = [token_losses(saved, row["input_ids"], row["labels"], weights) for row in dataset]
    return np.mean([np.mean(rows[i] + rows[i + 1]) for i in range(0, len(rows), 2)])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("loss_only", [True, False])
def test_loss_is_the_cross_entropy_of_the_normalized_mixture(saved, dataset, make_trainer, side, loss_only):
    saved.tokenizer.padding_side = side
    trainer = make_trainer(settings={"prediction_loss_only": loss_only})
    loss = trainer.evaluate(dataset)["eval_loss"]
    assert loss == close(expected_loss(saved, dataset))
    assert trainer.predict(dataset).metrics["test_loss"] == close(loss)


def test_probabilities_under_the_loss_sum_to_one(saved, make_trainer):
    # every continuation of a prompt in turn: exp(-loss) of a proper cross-entropy is a distribution
    prompt = saved.tokenizer("A cloud").input_ids
    count = saved.model.config.vocab_size
    rows = {"input_ids": [[*prompt, v] for v in range(count)]}
    rows |= {"labels": [[-100] * len(prompt) + [v] for v in range(count)]}
    trainer = make_trainer(settings={"per_device_eval_batch_size": 1})
    batches = trainer.get_eval_dataloader(Dataset.from_dict(rows))
    losses = [trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)[0] for batch in batches]
    assert torch.stack(losses).neg().double().exp().sum().item() == close(1)


def test_language_modelling_collator_makes_the_labels(saved, dataset, make_trainer):
    texts = dataset.remove_columns("labels")
    collator = DataCollatorForLanguageModeling(saved.tokenizer, mlm=False)
    with_labels = texts.add_column("labels", texts["input_ids"][:])
    loss = make_trainer(collator).evaluate(texts)["eval_loss"]
    assert loss == close(expected_loss(saved, with_labels))


def test_predictions_are_the_pooled_log_probabilities(saved, dataset, make_trainer):
    saved.tokenizer.padding_side = "right"
    output = make_trainer().predict(dataset)
    longest = max(map(len, dataset["input_ids"]))
    assert output.predictions.shape == (len(dataset), longest, saved.model.config.vocab_size)
    for logits, labels, row in zip(output.predictions, output.label_ids, dataset):
        length = len(row["input_ids"])
        assert labels[:length].tolist() == row["labels"]
        assert (labels[length:] == -100).all()
        expected = token_logps(saved, saved.weights, row["input_ids"])
        found = torch.tensor(logits[:length]).double()
        torch.testing.assert_close(found.log_softmax(-1), expected, **CLOSE)
        # not renormalized: log Z is what is missing to 1
        assert found.logsumexp(-1).max() < -1e-3


def relabel(saved, dataset):
    """The same texts, where every second label is what the mixture thinks most likely."""

    def change(row):
        best = token_logps(saved, saved.weights, row["input_ids"]).argmax(-1).tolist()
        labels = [row["labels"][0]] + [
            best[t - 1] if t % 2 and label != -100 else label for t, label in enumerate(row["labels"]) if t > 0
        ]
        return {"labels": labels}

    return dataset.map(change)


def test_metrics_are_computed_from_what_is_kept_of_the_logits(saved, dataset, make_trainer):
    saved.tokenizer.padding_side = "right"
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        kept = prediction.label_ids[:, 1:] != -100
        hits = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": hits[kept].mean()}

    trainer = make_trainer(
        compute_metrics=metrics, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1)
    )
    dataset = relabel(saved, dataset)
    result = trainer.evaluate(dataset)
    hits = [
        token_logps(saved, saved.weights, row["input_ids"])[t - 1].argmax() == label
        for row in dataset
        for t, label in enumerate(row["labels"])
        if t > 0 and label != -100
    ]
    assert 0 < np.mean(hits) < 1
    assert result["eval_accuracy"] == pytest.approx(np.mean(hits))
    assert seen == [(len(dataset), max(map(len, dataset["input_ids"])))]


def test_perplexity_follows_the_weights(saved, dataset, make_trainer):
    trainer = make_trainer()
    own = saved.model.mixture_weights
    losses = []
    try:
        for weights in ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5]):
            saved.model.mixture_weights = weights
            losses.append(trainer.evaluate(dataset)["eval_loss"])
            assert losses[-1] == close(expected_loss(saved, dataset, weights))
    finally:
        saved.model.mixture_weights = own
    assert len(set(losses)) == 3


def test_weights_may_be_a_column_of_the_dataset(saved, dataset, make_trainer):
    weights = [[0.9, 0.1], [0.2, 0.8], [1.0, 0.0], [0.5, 0.5]]
    rows = [token_losses(saved, row["input_ids"], row["labels"], own) for row, own in zip(dataset, weights)]
    loss = make_trainer().evaluate(dataset.add_column("mixture_weights", weights))["eval_loss"]
    assert loss == close(np.mean([np.mean(rows[i] + rows[i + 1]) for i in (0, 2)]))
