"""Trainers of toy policies: fits as short as a test can be, and fits whose optimum is known."""

from datasets import Dataset
from optima import exact_optima
from toy import LENGTH, PROMPTS, TabularPolicy, reward_functions, toy_tokenizer
from transformers import TrainerCallback

from mpo_hf import MixturePolicyModel, MPOConfig, MPOTrainer


# β of policies that are close together, and of policies far apart
NEAR, FAR = 1 / 5, 1 / 20


def count_c(completions, **kwargs):
    return [float(c.split().count("c")) for c in completions]


def count_b(completions, **kwargs):
    return [float(c.split().count("b")) for c in completions]


def make_args(output_dir, **kwargs):
    defaults = {
        "objective": "reward",
        "estimator": "bsmd",
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_steps": 6,
        "max_completion_length": LENGTH,
        "beta": 0.5,
        "disable_tqdm": True,
    }
    return MPOConfig(output_dir=str(output_dir), **{**defaults, **kwargs})


def make_trainer(
    mixture, output_dir, rewards=(count_c, count_b), dataset=None, callbacks=None, eval_dataset=None, **kwargs
):
    return MPOTrainer(
        model=mixture,
        reward_funcs=list(rewards) if rewards else None,
        args=make_args(output_dir, **kwargs),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}) if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=toy_tokenizer(),
        callbacks=callbacks,
    )


def renewal(estimator, proposal, below) -> dict:
    """The option of when to renew the proposal, where there is one to renew."""
    return {"refresh_below": below} if (estimator, proposal) == ("mis", "mixture") else {}


class Interrupt(TrainerCallback):
    """Stops the run in the middle of a step, as a person or a power cut would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def fit(tmp_path, objective, proposal, beta, seed=2, **kwargs):
    """The duality gaps of the fitted and of uniform weights, and the trainer."""
    trainer = run_fit(tmp_path, objective, proposal, beta, seed, **{"estimator": "bsmd", **kwargs})
    enumeration, _ = exact_optima(seed, beta)
    _, minimum = enumeration.minimum()
    gap = enumeration.dual(trainer.model.mixture_weights) - minimum
    return gap, enumeration.dual([1 / 3] * 3) - minimum, trainer


def run_fit(tmp_path, objective, proposal, beta, seed=2, num_generations=64, steps=150, **kwargs) -> MPOTrainer:
    enumeration, rewards = exact_optima(seed, beta)
    model = MixturePolicyModel.from_policies(
        [TabularPolicy(logps) for logps in enumeration.policies.unbind(-1)],
        reference=TabularPolicy(enumeration.reference),
    )
    args = MPOConfig(
        output_dir=str(tmp_path),
        objective=objective,
        proposal=proposal,
        beta=beta,
        num_generations=num_generations,
        per_device_train_batch_size=3 * num_generations,
        per_device_eval_batch_size=num_generations,
        max_steps=steps,
        max_completion_length=LENGTH,
        logps_batch_size=1024,
        save_strategy="no",
        disable_tqdm=True,
        **kwargs,
    )
    trainer = MPOTrainer(
        model=model,
        reward_funcs=reward_functions(rewards, enumeration.completions) if objective == "reward" else None,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=toy_tokenizer(),
    )
    trainer.train()
    return trainer
