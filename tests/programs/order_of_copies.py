"""What happens until the second of two models runs, on a device of its own: copies to it, the first model; as JSON."""

import json

import torch
from second_device import place
from torch.utils._python_dispatch import TorchDispatchMode
from toy import toy_policy

from mpo_hf import MixturePolicyModel


class Log(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if torch.device((kwargs or {}).get("device") or "cpu").type == "second":
            events.append("copied")
        return operator(*args, **(kwargs or {}))


events: list[str] = []
models = [toy_policy(1, 0.1), toy_policy(2, 0.1)]
place(models[1])
mixture = MixturePolicyModel.from_policies(models)
for model, event in zip(models, ("first runs", "second runs")):
    model.set_attn_implementation("eager")
    model.register_forward_pre_hook(lambda *_, event=event: events.append(event))
ids = torch.tensor([[1, 2, 3]])
with torch.no_grad(), Log():
    mixture(input_ids=ids, attention_mask=torch.ones_like(ids))
print(json.dumps(events[: events.index("second runs")]))
