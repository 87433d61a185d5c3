"""A fit by one of several processes, which writes the weights that it found to a file of its own."""

import json
import sys
from pathlib import Path

import torch
from fits import make_trainer

from mpo_hf import MixturePolicyModel


torch.set_num_threads(1)
values = json.loads(sys.argv[1])
policies = values["policies"]
mixture = MixturePolicyModel.from_policies(
    [f"{policies}/a", f"{policies}/b"], reference=f"{policies}/ref", labels=["a", "b"]
)
options = {"estimator": "mis", "num_resamples": 20, "proposal": "mixture", "refresh_below": 0.98, "max_steps": 4}
trainer = make_trainer(mixture, values["out"], gradient_accumulation_steps=2, use_cpu=True, **options)
trainer.train()
# a file for each: what ranks print may be mixed up in the pipe that they share
path = Path(values["weights"]) / f"rank-{trainer.accelerator.process_index}.json"
path.write_text(json.dumps(trainer.model.config.mixture_weights))
# a process group that is left open can abort a process at its exit
trainer.accelerator.end_training()
