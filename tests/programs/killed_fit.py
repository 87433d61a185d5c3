"""A fit that goes on from its last checkpoint, if there is one. Says when it is ready to be killed, and what it found."""

import json
import os
import sys

import torch
from fits import make_trainer

from mpo_hf import MixturePolicyModel


torch.set_num_threads(1)
values = json.loads(sys.argv[1])
policies, out = values["policies"], values["out"]
mixture = MixturePolicyModel.from_policies(
    [f"{policies}/a", f"{policies}/b"], reference=f"{policies}/ref", labels=["a", "b"]
)
options = {"estimator": "mis", "num_resamples": 20, "proposal": "mixture", "refresh_below": 0.98, "max_steps": 12}
trainer = make_trainer(mixture, out, **options)
resume = os.path.isdir(out) and any(name.startswith("checkpoint-") for name in os.listdir(out))
print("ready", flush=True)
trainer.train(resume_from_checkpoint=resume or None)
columns = trainer.rollout_fit.columns
print("done", trainer.model.config.mixture_weights, len(columns), len(set(columns["id"])), flush=True)
