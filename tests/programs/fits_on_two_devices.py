"""The weights of fits with all policies on the CPU, and of the same fits with some on a second device; printed as JSON."""

import json
import os
import sys

import torch
from fits import make_trainer
from second_device import place
from toy import toy_policy

from mpo_hf import MixturePolicyModel


OUT = json.loads(sys.argv[1])["out"]
# which models are on the second device, of the two policies and the reference
PLACES = {
    ("reward", "bsmd", "mixture"): [0, 2],
    ("reward", "bsmd", "reference"): [1, 2],
    ("reward", "mis", "mixture"): [1],
    ("reward", "mis", "reference"): [0],
    ("achieved", "mis", "mixture"): [1],
    ("achieved", "mis", "reference"): [0],
}


def fit(objective: str, estimator: str, proposal: str, second: list[int]) -> list[float]:
    reference = toy_policy(100, 0.5)
    models = [toy_policy(1, 0.1, reference), toy_policy(2, 0.1, reference), reference]
    devices = ["second" if i in second else "cpu" for i in range(3)]
    for model, device in zip(models, devices):
        model.set_attn_implementation("eager")
        if device == "second":
            place(model)
    mixture = MixturePolicyModel.from_policies(models[:2], reference=models[2])
    mixture.hf_device_map = {f"backbone_{i}": device for i, device in enumerate(devices[:2])}
    assert [next(model.parameters()).device.type for model in models] == devices
    trainer = make_trainer(
        mixture,
        os.path.join(OUT, f"{objective}-{estimator}-{proposal}-{second}"),
        objective=objective,
        estimator=estimator,
        proposal=proposal,
        save_strategy="no",
        **({"num_resamples": 10} if estimator == "mis" else {}),
        **({"refresh_below": 1.0} if estimator == "mis" and proposal == "mixture" else {}),
        max_steps=3,
        use_cpu=True,
    )
    trainer.train()
    return trainer.weights.tolist()


torch.set_num_threads(1)
fits = {"-".join(kind): [fit(*kind, second) for second in ([], there)] for kind, there in PLACES.items()}
try:
    torch.cat([torch.ones(1), torch.ones(1, device="second")])
except RuntimeError:  # the device refuses to meet tensors of the CPU, in fits as here
    print(json.dumps(fits))
