"""
What users of a Hub do, each in a process of its own: `python hub_client.py {author|reader|offline} plan.json`.

huggingface_hub reads its environment once, when it is imported; so these steps cannot run inside the tests' own process.
What every step came to, its result or its error, is written back into the plan.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from toy import PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo_hf import MixturePolicyModel, MPOConfig, MPOTrainer
from mpo_hf.mixture.hub import pin_revisions


IDS = torch.tensor([[1, 4, 2, 5, 3]])
KIND = {"name_or_path": "org/kind", "label": "kind"}
TERSE = {"name_or_path": "org/base", "adapter": "org/terse-lora", "label": "terse"}


def logits(model) -> list:
    with torch.no_grad():
        return model(IDS).logits.tolist()


def opened(repo_id: str, **kwargs) -> list:
    return logits(AutoModelForCausalLM.from_pretrained(repo_id, **kwargs))


def count_c(completions, **kwargs):
    return [float(c.split().count("c")) for c in completions]


def count_b(completions, **kwargs):
    return [float(c.split().count("b")) for c in completions]


def make_trainer(policies: list, output_dir: str, **kwargs) -> MPOTrainer:
    defaults = {"max_steps": 2, "num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 3}
    return MPOTrainer(
        model=MixturePolicyModel.from_policies(policies, reference="org/base"),
        reward_funcs=[count_c, count_b],
        args=MPOConfig(output_dir=output_dir, report_to=[], disable_tqdm=True, **{**defaults, **kwargs}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )


class Author:
    """Mixes policies and pushes them."""

    def __init__(self, plan: dict):
        self.plan = plan
        self.work = Path(plan["work"])
        self.mixture = MixturePolicyModel.from_policies([KIND, TERSE], [0.3, 0.7], reference="org/base")

    def push(self):
        self.mixture.push_to_hub("mix", tags=["mine"])
        HfApi().create_tag("author/mix", tag="v1")
        return {"logits": logits(self.mixture), "revisions": [c.revision for c in self.mixture.config.components]}

    def push_to_a_branch_and_a_pull_request(self):
        self.mixture.push_to_hub("mix", revision="trial", commit_message="On trial")
        return self.mixture.push_to_hub("mix", create_pr=True).pr_url

    def push_again_with_other_weights(self):
        card = ModelCard.load("author/mix")
        card.text += "\nThanks to all.\n"
        HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="author/mix")
        self.mixture.mixture_weights = [0.9, 0.1]
        self.mixture.push_to_hub("author/mix", private=False)
        self.mixture.mixture_weights = [0.3, 0.7]

    def push_unpinned(self):
        self.mixture.push_to_hub("author/unpinned", pin_revisions=False)

    def save_and_push(self):
        self.mixture.save_pretrained(self.work / "by-saving", push_to_hub=True, private=True, token="author-token")
        return sorted(os.listdir(self.work / "by-saving"))

    def push_config_of_what_was_loaded(self):
        """The component moves on between loading and pushing."""
        api = HfApi()
        policies = [{"name_or_path": "org/restless"}, {"name_or_path": "org/base", "adapter": "org/restless-lora"}]
        mixture = MixturePolicyModel.from_policies(policies)
        for repo_id in ("org/restless", "org/restless-lora"):
            api.upload_file(path_or_fileobj=b"news", path_in_repo="NEWS", repo_id=repo_id)
        mixture.push_to_hub("author/restless-mix")
        asked = pin_revisions(mixture.config).components
        return {"asked": [asked[0].revision, asked[1].adapter_revision]}

    def push_private_and_gated(self):
        for name in ("private", "gated", "gone", "rewritten"):
            MixturePolicyModel.from_policies([{"name_or_path": f"org/{name}", "label": name}]).push_to_hub(
                f"{name}-mix"
            )
        policy = {"name_or_path": "org/base", "adapter": "org/gated-lora"}
        MixturePolicyModel.from_policies([policy]).push_to_hub("gated-adapter-mix")
        policy = {"name_or_path": "org/base", "adapter": "org/gone-lora", "label": "lost"}
        MixturePolicyModel.from_policies([policy]).push_to_hub("gone-adapter-mix")

    def push_whole(self):
        models = [AutoModelForCausalLM.from_pretrained(name) for name in ("org/kind", "org/base")]
        mixture = MixturePolicyModel.from_policies(models)
        mixture.push_to_hub("whole")
        return logits(mixture)

    def push_local_model(self):
        policies = [{**KIND, "label": "far"}, {"name_or_path": self.plan["folders"]["kind"], "label": "near"}]
        MixturePolicyModel.from_policies(policies).push_to_hub("local-model", upload_adapters=True)

    def _with_local_adapter(self) -> MixturePolicyModel:
        local = {"name_or_path": "org/base", "adapter": self.plan["folders"]["terse-lora"], "label": "terse & dry"}
        return MixturePolicyModel.from_policies([TERSE, local], [0.6, 0.4])

    def push_local_adapter(self):
        self._with_local_adapter().push_to_hub("local-adapter")

    def push_with_adapters(self):
        mixture = self._with_local_adapter()
        mixture.push_to_hub("with-adapters", upload_adapters=True)
        return {"logits": logits(mixture), "adapter": mixture.config.components[1].adapter}

    def pin_deleted(self):
        api = HfApi()
        api.create_repo("fleeting")
        api.upload_folder(repo_id="author/fleeting", folder_path=self.plan["folders"]["kind"])
        mixture = MixturePolicyModel.from_policies(["author/fleeting"])
        api.delete_repo("author/fleeting")
        pin_revisions(mixture.config)

    def push_from_trainer(self):
        trainer = make_trainer([KIND, TERSE], str(self.work / "fitted"), hub_model_id="author/fitted", estimator="mis")
        trainer.train()
        trainer.push_to_hub()
        return {"weights": trainer.model.config.mixture_weights, "logits": logits(trainer.model)}

    def push_a_fit_from_its_folder(self):
        folder = self.work / "fit"
        trainer = make_trainer([KIND, TERSE], str(folder), proposal="mixture")
        trainer.train()
        trainer.save_model()
        card = folder / "README.md"
        card.write_text(card.read_text().replace("# fit", "# A fit for the team"))
        (folder / "weights.png").write_bytes(b"another picture")
        MixturePolicyModel.from_pretrained(folder).push_to_hub("author/fit")
        return card.read_text()

    def push_a_broken_card(self):
        folder = self.work / "broken"
        self.mixture.save_pretrained(folder)
        (folder / "README.md").write_text("---\nlicense: [mit\n---\n# Mine\n")
        MixturePolicyModel.from_pretrained(folder).push_to_hub("author/broken")

    def push_a_card_that_the_hub_refuses(self):
        folder = self.work / "refused-card"
        self.mixture.save_pretrained(folder)
        (folder / "README.md").write_text("---\nlicense: the one of my house\n---\n# Mine\n")
        MixturePolicyModel.from_pretrained(folder).push_to_hub("author/refused-card")

    def validate_cards(self):
        pushed = [model.id for model in map(HfApi().model_info, ("author/mix", "author/fit", "author/fitted"))]
        for repo_id in [*pushed, "author/private-mix", "author/with-adapters", "author/whole"]:
            ModelCard.load(repo_id).validate()
        return len(pushed)

    def push_from_trainer_with_local_model(self):
        policies = [KIND, {"name_or_path": self.plan["folders"]["kind"], "label": "near"}]
        make_trainer(policies, str(self.work / "refused")).push_to_hub()

    def push_during_training_with_local_model(self):
        policies = [KIND, {"name_or_path": self.plan["folders"]["kind"], "label": "near"}]
        make_trainer(policies, str(self.work / "refused"), push_to_hub=True)

    def push_during_training(self):
        local = {"name_or_path": "org/base", "adapter": self.plan["folders"]["terse-lora"], "label": "dry"}
        options = {"push_to_hub": True, "hub_upload_adapters": True, "hub_with_code": True, "hub_always_push": True}
        trainer = make_trainer([KIND, local], str(self.work / "pushed-often"), hub_token="author-token", **options)
        trainer.train()
        trainer.save_model()  # with `push_to_hub` among the arguments, this pushes too
        return logits(trainer.model)


class Reader:
    """Opens what was pushed, in an empty cache, with a token that may read little."""

    def __init__(self, plan: dict):
        pass

    def open(self):
        return {name: opened("author/mix", **kw) for name, kw in {"main": {}, "v1": {"revision": "v1"}}.items()}

    def open_branch(self):
        return opened("author/mix", revision="trial")

    def open_unpinned(self):
        return opened("author/unpinned")

    def open_whole(self):
        return opened("author/whole")

    def open_with_adapters(self):
        model = AutoModelForCausalLM.from_pretrained("author/with-adapters")
        found = model.config.components[1]
        return {
            "logits": logits(model),
            "adapter": [found.adapter, found.adapter_subfolder],
            "k": model._num_backbones,
        }

    def open_fitted(self):
        tokenizer = AutoTokenizer.from_pretrained("author/fitted")
        return {"logits": opened("author/fitted"), "ids": tokenizer("b c f")["input_ids"]}

    def open_pushed_often(self):
        return opened("author/pushed-often")

    def open_private(self):
        opened("author/private-mix")

    def open_private_with_token(self):
        return opened("author/private-mix", token="author-token")

    def open_gated(self):
        opened("author/gated-mix")

    def open_gated_adapter(self):
        opened("author/gated-adapter-mix")

    def mix_gated(self):
        MixturePolicyModel.from_policies(["org/gated"])

    def open_with_component_deleted(self):
        opened("author/gone-mix")

    def open_with_adapter_deleted(self):
        opened("author/gone-adapter-mix")

    def open_with_revision_gone(self):
        opened("author/rewritten-mix")

    def open_nothing(self):
        opened("author/never-was")

    def push_without_permission(self):
        MixturePolicyModel.from_policies([KIND]).push_to_hub("author/mix")


class Offline:
    """Opens what the reader has opened, without a network."""

    def __init__(self, plan: dict):
        pass

    open = Reader.open
    open_with_adapters = Reader.open_with_adapters
    open_fitted = Reader.open_fitted

    def open_something_new(self):
        opened("author/by-saving")

    def mix_something_new(self):
        MixturePolicyModel.from_policies([{"name_or_path": "org/base", "adapter": "org/gated-lora"}])

    def push(self):
        MixturePolicyModel.from_policies([KIND]).push_to_hub("reader/mine")


def attempt(step: Callable) -> dict:
    start = time.perf_counter()
    try:
        outcome = {"result": step()}
    except Exception as err:  # what an error says is what is tested
        outcome = {"error": f"{type(err).__name__}: {err}"}
    return {**outcome, "seconds": round(time.perf_counter() - start, 2)}


def main(role: str, path: str) -> None:
    torch.set_num_threads(1)
    plan = json.loads(Path(path).read_text())
    user = {"author": Author, "reader": Reader, "offline": Offline}[role](plan)
    steps = [name for name in vars(type(user)) if not name.startswith("_")]
    plan["outcomes"] = {name: attempt(getattr(user, name)) for name in steps}
    Path(path).write_text(json.dumps(plan))


if __name__ == "__main__":
    main(*sys.argv[1:])
