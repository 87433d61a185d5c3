"""
What users of mixtures that carry their code do, each in a process of its own: `python code_client.py ROLE plan.json`.

Authors have mpo_hf, readers do not. What every step came to, its result or its error, is written back into the plan.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline


IDS = torch.tensor([[1, 4, 2, 5, 3]])
NAMES = ("full", "adapters", "uploaded", "whole")


def attempt(step: Callable) -> dict:
    try:
        return {"result": step()}
    except Exception as err:  # what an error says is what is tested
        return {"error": f"{type(err).__name__}: {err}"}


def tokens(model) -> list:
    """What the model writes: greedily, and sampled."""
    sampled = []
    for options in ({"do_sample": False}, {"do_sample": True, "num_return_sequences": 3}):
        torch.manual_seed(0)
        sampled += model.generate(IDS, max_new_tokens=12, **options).tolist()
    return sampled


def opened(repo_id: str, **kwargs):
    return AutoModelForCausalLM.from_pretrained(repo_id, **kwargs)


def trusted(repo_id: str, **kwargs):
    return opened(repo_id, trust_remote_code=True, **kwargs)


def text_of(repo_id: str, **kwargs) -> str:
    generate = pipeline("text-generation", model=repo_id, **kwargs)
    return generate("b c", max_new_tokens=6, do_sample=False)[0]["generated_text"]


class Author:
    """Mixes policies, pushes them with their code, and saves them in folders."""

    def __init__(self, plan: dict):
        from mpo_hf import MixturePolicyModel

        self.plan, self.work, self.mix = plan, Path(plan["work"]), MixturePolicyModel.from_policies
        self.mixtures = {
            "full": self.mix(["org/kind", "org/base"], [0.3, 0.7]),
            "adapters": self.mix(["org/terse-lora", "org/loud-lora"], [0.4, 0.6]),
            "uploaded": self.mix([{"name_or_path": "org/base", "adapter": plan["folders"]["terse-lora"]}, "org/kind"]),
            "whole": self.mix([opened("org/kind"), opened("org/base")], [0.2, 0.8]),
        }

    def push(self):
        for name in NAMES:
            self.mixtures[name].push_to_hub(f"author/{name}", with_code=True, upload_adapters=name == "uploaded")
        return {name: tokens(self.mixtures[name]) for name in NAMES}

    def push_without_code(self):
        self.mixtures["full"].push_to_hub("author/plain")

    def tag_and_change(self):
        AutoTokenizer.from_pretrained("org/kind").push_to_hub("author/full")
        HfApi().create_tag("author/full", tag="v1")
        self.mixtures["full"].mixture_weights = [0.9, 0.1]
        self.mixtures["full"].push_to_hub("author/full", with_code=True)
        return tokens(self.mixtures["full"])

    def nest(self):
        nested = self.mix(["author/adapters", "author/whole", self.mixtures["uploaded"]])
        return [nested.config.mixture_weights, tokens(nested)]

    def write(self):
        return text_of("author/full", revision="v1")

    def save(self):
        folders = self.plan["folders"]
        saved = {"local-full": ["kind", "base"], "local-adapters": ["terse-lora", "loud-lora"]}
        results = {}
        for name, policies in saved.items():
            mixture = self.mix([folders[policy] for policy in policies], [0.4, 0.6])
            mixture.save_pretrained(self.work / name, with_code=True)
            results[name] = tokens(mixture)
        return results

    def push_code_of_a_component(self):
        """A component whose repository has code too, which nobody has been asked to trust."""
        self.mix(["org/scripted", "org/base"]).push_to_hub("author/with-scripted", with_code=True)

    def push_broken_code(self):
        self.mixtures["full"].save_pretrained(self.work / "broken", with_code=True)
        for path in (self.work / "broken").glob("*.py"):
            path.write_text("raise RuntimeError('broken code ran')")
        HfApi().create_repo("broken")
        HfApi().upload_folder(repo_id="author/broken", folder_path=self.work / "broken")

    def open_what_carries_code(self):
        from mpo_hf import MixturePolicyConfig, MixturePolicyModel

        results = []
        for repo_id in ("author/full", "author/broken"):
            for trust in (True, False, None):
                model = opened(repo_id, trust_remote_code=trust)
                assert type(model) is MixturePolicyModel and type(model.config) is MixturePolicyConfig
                results.append(tokens(model))
        return results


class ReaderWithoutPeft:
    """Has torch and transformers, and trusts the mixtures' code."""

    def __init__(self, plan: dict):
        self.work = Path(plan["work"])

    def missing(self):
        return [n for n in ("mpo_hf", "peft", "accelerate", "datasets", "trl") if importlib.util.find_spec(n) is None]

    def open_full(self):
        config = AutoConfig.from_pretrained("author/full", trust_remote_code=True)
        model = trusted("author/full", revision="v1")
        return {"v1": tokens(model), "main": tokens(trusted("author/full")), "weights": config.mixture_weights}

    def open_whole(self):
        return tokens(trusted("author/whole"))

    def open_folder(self):
        return tokens(trusted(str(self.work / "local-full")))

    def write(self):
        return text_of("author/full", revision="v1", trust_remote_code=True)

    def open_adapters(self):
        trusted("author/adapters")

    def open_adapters_in_folders(self):
        trusted(str(self.work / "local-adapters"))

    def distrust(self):
        opened("author/full", trust_remote_code=False)

    def open_without_code(self):
        trusted("author/plain")

    def open_broken(self):
        trusted("author/broken")


class Reader:
    """Has PEFT as well."""

    missing = ReaderWithoutPeft.missing
    open_whole = ReaderWithoutPeft.open_whole

    def __init__(self, plan: dict):
        self.work = Path(plan["work"])

    def open_adapters(self):
        return {name: tokens(trusted(f"author/{name}")) for name in ("adapters", "uploaded")}

    def open_adapters_in_folders(self):
        model = trusted(str(self.work / "local-adapters"))
        return [tokens(model), len(model.backbones)]

    def nest(self):
        """The classes of the three mixtures are three copies of one."""
        model, other = trusted("author/whole"), trusted("author/uploaded")
        assert type(model) is not type(other)
        nested = type(model).from_policies(["author/adapters", model, other])
        return [nested.config.mixture_weights, tokens(nested)]

    def save_again(self):
        trusted("author/adapters").save_pretrained(self.work / "again")
        again = trusted(str(self.work / "again"))
        return [sorted(os.listdir(self.work / "again")), tokens(again)]

    def save_what_was_built(self):
        model = type(trusted("author/whole")).from_policies(["org/kind", "org/base"], [0.3, 0.7])
        model.save_pretrained(self.work / "built")
        return tokens(trusted(str(self.work / "built")))

    def save_without_code(self):
        trusted("author/adapters").save_pretrained(self.work / "bare", with_code=False)
        return sorted(os.listdir(self.work / "bare"))

    def push_again(self):
        model = trusted("author/adapters")
        model.mixture_weights = [0.1, 0.9]
        model.push_to_hub("reader/mine")
        AutoTokenizer.from_pretrained("org/kind").push_to_hub("reader/mine")
        return [tokens(model), tokens(trusted("reader/mine"))]

    def open_with_code_of_a_component(self):
        return tokens(trusted("author/with-scripted"))


def main(role: str, path: str) -> None:
    torch.set_num_threads(1)
    plan = json.loads(Path(path).read_text())
    user = {c.__name__: c for c in (Author, ReaderWithoutPeft, Reader)}[role](plan)
    steps = [name for name in vars(type(user)) if not name.startswith("_")]
    plan["outcomes"] = {name: attempt(getattr(user, name)) for name in steps}
    Path(path).write_text(json.dumps(plan))


if __name__ == "__main__":
    main(*sys.argv[1:])
