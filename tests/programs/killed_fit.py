"""
Fits that are killed at random moments, and go on from what they left, until each has ended.

Every fit runs in a fork of this process, which has imported everything and computed nothing.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from fits import make_trainer

from mpo_hf import MixturePolicyModel


torch.set_num_threads(1)
values = json.loads(sys.argv[1])
policies, folder, wanted = values["policies"], Path(values["out"]), values["kills"]
OPTIONS = {"estimator": "mis", "num_resamples": 5, "proposal": "mixture", "refresh_below": 0.98, "max_steps": 8}
# what a kill waits for: a file that appears, or nothing
MOMENTS = {
    "a checkpoint": "checkpoint-*",
    "its optimizer": "checkpoint-*/optimizer.pt",
    "its random numbers": "checkpoint-*/rng_state.pth",
    "its state": "checkpoint-*/trainer_state.json",
    "a part of a shard": "_rollouts/.*.tmp",
    "a shard": "_rollouts/rollouts-*",
    "the result": "config.json",
    "nothing": None,
}


def fit(out: Path) -> None:
    mixture = MixturePolicyModel.from_policies(
        [f"{policies}/a", f"{policies}/b"], reference=f"{policies}/ref", labels=["a", "b"]
    )
    trainer = make_trainer(mixture, out, **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    columns = trainer.rollout_fit.columns
    found = [trainer.model.config.mixture_weights, len(columns), len(set(columns["id"].tolist()))]
    (out / "found").write_text(json.dumps(found))


def start(out: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(f"{out}.log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                fit(out)
                status = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


def end(child: int, out: Path, moment: str | None, chance: random.Random) -> bool:
    """Waits for a moment, and kills; whether the fit had ended before. A fit that has failed ends everything."""
    pattern = MOMENTS[moment] if moment else None
    seen = set(out.glob(pattern)) if pattern else set()
    pause, begin = chance.expovariate(1 / 0.002), time.monotonic()
    limit = chance.uniform(0, 1.0) if moment == "nothing" else 600
    while time.monotonic() - begin < limit and not (pattern and set(out.glob(pattern)) - seen):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, Path(f"{out}.log").read_text()
            return True
        time.sleep(0.0005)
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WIFSIGNALED(status), Path(f"{out}.log").read_text()
    return status == 0


def finish(out: Path, kills: int, chance: random.Random) -> tuple[list, list[str]]:
    """The result of a fit that is killed at most so many times, and the moments of the kills."""
    moments: list[str] = []
    while True:
        moment = chance.choice(list(MOMENTS)) if len(moments) < kills else None
        if end(start(out), out, moment, chance):
            return json.loads((out / "found").read_text()), moments
        moments.append(moment)


chance, moments = random.Random(values["seed"]), []
expected, _ = finish(folder / "whole", 0, chance)
for chain in range(1000):
    found, killed = finish(folder / f"killed-{chain}", min(10, wanted - len(moments)), chance)
    assert found == expected, (found, expected, killed)
    assert not list((folder / f"killed-{chain}").glob("_rollouts/.*.tmp"))
    moments += killed
    if len(moments) >= wanted:
        break
print(json.dumps({"kills": len(moments), "moments": sorted(set(moments)), "rows": expected[1:]}), flush=True)
