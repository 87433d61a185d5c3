"""Options of a fit: defaults that follow others, and options that would have no effect."""

import dataclasses

import pytest
from accelerate.state import AcceleratorState
from datasets import Dataset
from fits import count_b, count_c, make_trainer
from toy import PROMPTS, toy_tokenizer
from transformers import HfArgumentParser

from mpo_hf import MixturePolicyModel, MPOConfig, MPOTrainer


# ---- batch sizes ----


@pytest.mark.parametrize("num_generations, expected", [(2, 32), (12, 36), (16, 32), (24, 48), (33, 33), (64, 64)])
def test_batch_sizes_follow_the_number_of_completions(tmp_path, num_generations, expected):
    options = {"output_dir": str(tmp_path), "num_generations": num_generations}
    words = ["--output_dir", str(tmp_path), "--num_generations", str(num_generations)]
    for args in (MPOConfig(**options), *HfArgumentParser(MPOConfig).parse_args_into_dataclasses(words)):
        assert args.per_device_train_batch_size == args.per_device_eval_batch_size == expected
        assert args.train_prompts_per_device == args.eval_prompts_per_device == expected // num_generations
        assert dataclasses.replace(args).per_device_train_batch_size == expected


def test_a_batch_size_that_does_not_fit_is_refused_where_it_is_used(mixture, tmp_path):
    for size in (30, 0, 2):
        with pytest.raises(ValueError, match=f"`per_device_train_batch_size` .*got {size} with num_generations=4"):
            MPOConfig(str(tmp_path), num_generations=4, per_device_train_batch_size=size)
    evaluated = {"num_generations": 4, "per_device_eval_batch_size": 6}
    with pytest.raises(ValueError, match="`per_device_eval_batch_size` .*got 6 with num_generations=4"):
        MPOConfig(str(tmp_path), eval_strategy="steps", eval_steps=1, **evaluated)
    trainer = make_trainer(mixture, tmp_path, max_steps=1, **evaluated)
    trainer.train()
    with pytest.raises(ValueError, match="`per_device_eval_batch_size` .*got 6 with num_generations=4"):
        trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS}))


# ---- options without effect ----


@pytest.mark.parametrize(
    "options, refused, other",
    [
        *(
            ({name: value}, name, {"estimator": "bsmd"})
            for name, value in [("learning_rate", 0.1), ("step_scale", 1.0)]
        ),
        ({"average_iterates": False}, "average_iterates", {"estimator": "bsmd"}),
        ({"estimator": "bsmd", "confidence": 0.9}, "confidence", {"estimator": "mis"}),
        ({"estimator": "bsmd", "num_resamples": 20}, "num_resamples", {"estimator": "mis"}),
        ({"estimator": "bsmd", "score_policies": 0.5}, "score_policies", {"estimator": "mis"}),
        ({"estimator": "bsmd", "refresh_below": 0.3}, "refresh_below", {"estimator": "mis", "proposal": "mixture"}),
        (
            {"objective": "reward", "proposal": "reference", "refresh_below": 0.3},
            "refresh_below",
            {"proposal": "mixture"},
        ),
        ({"normalization_prompts": 4}, "normalization_prompts", {"estimator": "bsmd", "proposal": "mixture"}),
        (
            {"estimator": "bsmd", "proposal": "mixture", "normalize_rewards": "none", "normalization_prompts": 4},
            "normalization_prompts",
            {"normalize_rewards": "optimal"},
        ),
        ({"objective": "achieved", "score_policies": 0.5}, "score_policies", {"objective": "reward"}),
        ({"welfare": "weighted_sum", "tolerance": 0.1}, "tolerance", {"objective": "achieved"}),
        ({"welfare": "nash", "fairness_alpha": 3.0}, "fairness_alpha", {"welfare": "alpha_fair"}),
        ({"cvar_level": 0.25}, "cvar_level", {"welfare": "cvar"}),
        ({"constraint_price": 3.0}, "constraint_price", {"constraints": {"a": 0.5}}),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor", None),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha", None),
    ],
)
def test_an_option_that_would_do_nothing_is_refused_and_taken_where_it_does_something(
    tmp_path, options, refused, other
):
    options = {"objective": "reward", **options}
    with pytest.raises(ValueError, match=rf"`{refused}={options[refused]}` has no effect: .*[Ll]eave it out"):
        MPOConfig(str(tmp_path), **options)
    if other is not None:
        args = MPOConfig(str(tmp_path), **{**options, **other})
        assert getattr(args, refused) == options[refused]


@pytest.mark.parametrize("welfare", ["max_min", "weighted_sum", "nash", "alpha_fair", "cvar"])
@pytest.mark.parametrize("estimator", ["mis", "bsmd"])
@pytest.mark.parametrize("objective", ["reward", "achieved", "implicit"])
@pytest.mark.parametrize("proposal", [None, "reference", "mixture"])
def test_defaults_are_never_refused_and_a_copy_of_options_is_as_good(
    tmp_path, welfare, estimator, objective, proposal
):
    options = {"welfare": welfare, "estimator": estimator, "objective": objective, "proposal": proposal}
    try:
        args = MPOConfig(str(tmp_path), **options)
    except ValueError as error:  # the combination itself
        assert "no effect" not in str(error)
        return
    assert dataclasses.replace(args) == args
    (parsed,) = HfArgumentParser(MPOConfig).parse_dict({**options, "output_dir": str(tmp_path)})
    assert parsed.to_dict() == args.to_dict()


def warnings_of(caplog) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    caplog.clear()
    return messages


def test_options_of_other_trainers_are_warned_about_in_one_sentence_each(mixture, tmp_path, caplog):
    checkpointing = {field.name for field in dataclasses.fields(MPOConfig)} & {
        "gradient_checkpointing",
        "activation_checkpointing",
    }
    shared = {
        "optim": "sgd",
        "weight_decay": 0.1,
        max(checkpointing): True,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "num_train_epochs": 1,
        "dataloader_num_workers": 2,
    }
    make_trainer(mixture, tmp_path, estimator="mis", **shared)
    found = warnings_of(caplog)
    for name in shared:
        assert sum(f"`{name}=" in message for message in found) == 1, name
    assert len(found) == 5 and all(message.count(". ") == 0 for message in found)
    make_trainer(mixture, tmp_path, lr_scheduler_type="cosine", warmup_steps=5, max_steps=-1, num_train_epochs=1)
    make_trainer(mixture, tmp_path, optim="adamw_torch_fused", weight_decay=0.0, estimator="mis")
    assert not warnings_of(caplog)
    make_trainer(
        mixture, tmp_path, rewards=None, objective="implicit", normalize_rewards="regret", estimator="mis", beta=0.5
    )
    assert [message.split("`")[1] for message in warnings_of(caplog)] == ["beta=0.5", "normalize_rewards='regret'"]


def test_scores_are_not_a_matter_of_choice_where_drawing_computes_them(toy_folder, mixture, tmp_path):
    options = {"estimator": "mis", "objective": "reward", "proposal": "mixture", "score_policies": 0.5}
    with pytest.raises(ValueError, match="`score_policies=0.5` has no effect: drawing from the mixture"):
        make_trainer(mixture, tmp_path, **options)
    at_corner = MixturePolicyModel.from_policies(
        [toy_folder / "a", toy_folder / "b"], [1.0, 0.0], reference=toy_folder / "ref", labels=["a", "b"]
    )
    assert make_trainer(at_corner, tmp_path, **options).args.score_policies == 0.5


def test_options_of_drawing_have_no_effect_on_given_completions(mixture, toy_folder, tmp_path, caplog):
    rows = Dataset.from_dict({"prompt": PROMPTS, "completion": ["a b c"] * 4})
    given = {
        "model": mixture,
        "reward_funcs": [count_c, count_b],
        "processing_class": toy_tokenizer(),
        "rollouts": rows,
    }
    options = {
        "estimator": "mis",
        "num_generations": 4,
        "max_completion_length": 5,
        "proposal": "mixture",
        "max_steps": 7,
    }

    def found(trainer_options, **config):
        MPOTrainer(args=MPOConfig(str(tmp_path), objective="reward", **config), **given, **trainer_options)
        return warnings_of(caplog)

    (warning,) = found({}, refresh_below=0.3, tolerance=0.5, num_train_epochs=2, **options)
    names = {*options, "refresh_below", "tolerance", "num_train_epochs"} - {"estimator"}
    assert {part.split("=")[0] for part in warning.split("`")[1::2]} == names | {"rollouts"}
    (warning,) = found({"eval_dataset": Dataset.from_dict({"prompt": PROMPTS})}, **options)
    assert "`max_steps=7` has no effect" in warning  # an evaluation draws
    assert not found({})


def test_mixed_precision_changes_nothing_and_says_so(toy_folder, tmp_path, caplog, monkeypatch):
    """It would apply to the policies while they draw together, and not while each of them scores."""
    found = {}
    for name in ("plain", "bf16", "launcher"):
        if name == "launcher":
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        AcceleratorState._reset_state(True)
        model = MixturePolicyModel.from_policies([toy_folder / "a", toy_folder / "b"], reference=toy_folder / "ref")
        options = {"bf16": True} if name == "bf16" else {}
        trainer = make_trainer(model, tmp_path / name, proposal="mixture", max_steps=2, use_cpu=True, **options)
        trainer.train()
        found[name] = trainer.weights.tolist()
        warnings = warnings_of(caplog)
        assert len(warnings) == (name != "plain")
        assert all('`model_init_kwargs={"dtype": "bfloat16"}`' in message for message in warnings)
    AcceleratorState._reset_state(True)
    assert found["plain"] == found["bf16"] == found["launcher"]


def test_arguments_for_loading_a_model_that_is_loaded_are_warned_about(mixture, tmp_path, caplog):
    make_trainer(mixture, tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    assert warnings_of(caplog) == ["`model_init_kwargs` has no effect: the model is loaded already."]
