"""Sharing mixtures: pushed to, and opened from, a real HTTP server that speaks the endpoints of the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CLOSE, TESTS, save_lora
from hub_server import Hub
from huggingface_hub import ModelCard
from toy import toy_policy, toy_tokenizer
from transformers import AutoModelForCausalLM


pytestmark = pytest.mark.integration
TOKENS = {"author-token": "author", "reader-token": "reader"}


def run_client(role: str, hub: Hub, root: Path, token: str | None, home: str, offline: bool = False, **plan) -> dict:
    """Runs one user of the Hub, and returns what came of every step."""
    path = root / f"{role}.json"
    path.write_text(json.dumps({"work": str(root), **plan}))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(root / home), "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    own |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, str(TESTS / "hub_client.py"), role, str(path)]
    done = subprocess.run(command, env={**kept, **own}, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())["outcomes"]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """
    Policies are on the Hub, an author mixes and pushes them, the policies' repos change, and a reader opens the mixtures,
    first online, then offline. What everyone saw is kept for the tests below.
    """
    root = tmp_path_factory.mktemp("hub")
    folders = {}
    base = toy_policy(1, 0.5)
    for name, policy in {"base": base, "kind": toy_policy(2, 0.1, base), "newer": toy_policy(3, 0.9)}.items():
        folders[name] = str(root / name)
        policy.save_pretrained(folders[name])
        toy_tokenizer().save_pretrained(folders[name])
        (root / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for seed, name in enumerate(["terse-lora", "newer-lora"]):
        folders[name] = save_lora(root / name, folders["base"], seed)
    with Hub(TOKENS, members={"author"}) as hub:
        models = {"base": {}, "kind": {}, "restless": {}, "gone": {}, "rewritten": {}}
        models |= {"private": {"private": True}, "gated": {"gated": True}}
        pushed = {
            name: hub.upload(f"org/{name}", folders["kind" if name != "base" else name], **options)
            for name, options in models.items()
        }
        for name, options in {"terse": {}, "restless": {}, "gone": {}, "gated": {"gated": True}}.items():
            pushed[f"{name}-lora"] = hub.upload(f"org/{name}-lora", with_base(root, folders["terse-lora"]), **options)
        seen = {"author": run_client("author", hub, root, "author-token", "author_home", folders=folders)}
        for name in ("kind", "restless"):
            hub.upload(f"org/{name}", folders["newer"])
        hub.upload("org/terse-lora", with_base(root, folders["newer-lora"]))
        del hub.repos["org/gone"], hub.repos["org/gone-lora"]
        del hub.repos["org/rewritten"]
        hub.upload("org/rewritten", folders["kind"])
        seen["reader"] = run_client("reader", hub, root, "reader-token", "reader_home")
        count = len(hub.requests)
        seen["offline"] = run_client("offline", hub, root, None, "reader_home", offline=True)
        seen |= {
            "hub": hub,
            "root": root,
            "commits": pushed,
            "folders": folders,
            "offline requests": len(hub.requests) - count,
        }
        yield seen


def with_base(root: Path, folder: str) -> Path:
    """The adapter as its author would have pushed it: it names its base by repo id."""
    copy = root / f"{Path(folder).name}-as-pushed"
    copy.mkdir(exist_ok=True)
    for path in Path(folder).glob("adapter_*"):
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    return copy


def result(outcome: dict):
    assert "error" not in outcome, outcome["error"]
    return outcome["result"]


def config_of(hub: Hub, repo_id: str, revision: str = "main") -> dict:
    return json.loads(hub.files(repo_id, revision)["config.json"])


def assert_equal(actual: list, expected: list) -> None:
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), **CLOSE)


# ---- pushing a model ----


def test_pushed_config_pins_every_component_and_the_reference(story):
    pushed = result(story["author"]["push"])
    commits = story["commits"]
    config = config_of(story["hub"], "author/mix", "v1")
    assert config["components"] == [
        {"name_or_path": "org/kind", "revision": commits["kind"], "label": "kind"},
        {
            "name_or_path": "org/base",
            "revision": commits["base"],
            "adapter": "org/terse-lora",
            "adapter_revision": commits["terse-lora"],
            "label": "terse",
        },
    ]
    assert config["reference"] == {"name_or_path": "org/base", "revision": commits["base"]}
    assert config["mixture_weights"] == [0.3, 0.7]
    # the mixture in memory is as it was
    assert pushed["revisions"] == [None, None]


def test_push_is_one_commit_of_config_generation_config_and_card(story):
    hub = story["hub"]
    assert hub.repos["author/mix"].messages[:2] == ["initial commit", "Upload mixture"]
    assert set(hub.files("author/mix", "v1")) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "generation_config.json",
    }
    card = hub.files("author/mix", "v1")["README.md"].decode()
    assert "# author/mix" in card and story["commits"]["kind"] in card
    assert "- mine" in card and "- org/terse-lora" in card


def card_of(hub: Hub, repo_id: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.files(repo_id, revision)["README.md"].decode())


def test_card_of_the_repo_is_kept_and_brought_up_to_date(story):
    result(story["author"]["push_again_with_other_weights"])
    hub = story["hub"]
    before, after = card_of(hub, "author/mix", "v1"), card_of(hub, "author/mix")
    assert "| kind | 0.3000 |" in before.text and "| terse | 0.7000 |" in before.text
    weights = {"| kind | 0.3000 |": "| kind | 0.9000 |", "| terse | 0.7000 |": "| terse | 0.1000 |"}
    expected = before.text
    for old, new in weights.items():
        expected = expected.replace(old, new)
    assert after.text == expected + "\nThanks to all.\n"
    assert after.data.to_dict() == before.data.to_dict()
    assert config_of(hub, "author/mix")["mixture_weights"] == [0.9, 0.1]


def test_card_gives_the_licenses_of_the_components(story):
    card = card_of(story["hub"], "author/mix")
    assert "| apache-2.0 |" in card.text and "| unknown over apache-2.0 |" in card.text
    assert card.data.license is None  # the adapter's is not known
    assert card_of(story["hub"], "author/private-mix").data.license == "apache-2.0"


def test_cards_are_valid_to_the_hub(story):
    assert result(story["author"]["validate_cards"]) == 3
    error = story["author"]["push_a_card_that_the_hub_refuses"]["error"]
    assert error.startswith("ValueError: Invalid metadata in README.md") and '"license" must be one of' in error
    assert "config.json" not in story["hub"].files("author/refused-card")


def test_card_that_lies_in_the_folder_goes_along(story):
    saved = ModelCard(result(story["author"]["push_a_fit_from_its_folder"]))
    files, pushed = story["hub"].files("author/fit"), card_of(story["hub"], "author/fit")
    rest = saved.text[saved.text.index("## Rewards") :]
    assert "| this mixture |" in rest and "| uniform weights |" in rest and pushed.text.endswith(rest)
    assert "# A fit for the team" in pushed.text and 'from_pretrained("author/fit")' in pushed.text
    assert files["weights.png"] == b"another picture" and "(weights.png)" in pushed.text
    # what is pushed is pinned, what was saved is not
    assert story["commits"]["kind"] in pushed.text and story["commits"]["kind"] not in saved.text


def test_broken_card_is_named_before_anything_is_uploaded(story):
    error = story["author"]["push_a_broken_card"]["error"]
    assert (
        error.startswith("ValueError: The metadata of the model card") and "broken/README.md' cannot be read" in error
    )
    assert "author/broken" not in story["hub"].repos


def test_push_to_a_branch_and_as_a_pull_request(story):
    assert result(story["author"]["push_to_a_branch_and_a_pull_request"]).endswith("/author/mix/discussions/1")
    repo = story["hub"].repos["author/mix"]
    assert len({repo.refs[name] for name in ("main", "v1", "trial", "refs/pr/1")}) == 4
    assert "On trial" in repo.messages


def test_what_was_loaded_is_pinned_not_what_is_newest(story):
    asked = result(story["author"]["push_config_of_what_was_loaded"])["asked"]
    model, adapter = config_of(story["hub"], "author/restless-mix")["components"]
    assert model["revision"] == story["commits"]["restless"]
    assert adapter["adapter_revision"] == story["commits"]["restless-lora"]
    # without a model in memory, the Hub says what is newest
    assert asked[0] not in (None, model["revision"]) and asked[1] not in (None, adapter["adapter_revision"])


def test_pinning_is_optional(story):
    result(story["author"]["push_unpinned"])
    config = config_of(story["hub"], "author/unpinned")
    assert [set(component) & {"revision", "adapter_revision"} for component in config["components"]] == [set(), set()]


def test_save_pretrained_pushes_too(story):
    assert result(story["author"]["save_and_push"]) == ["config.json", "generation_config.json"]
    assert story["hub"].repos["author/by-saving"].private
    components = config_of(story["hub"], "author/by-saving")["components"]
    assert components == config_of(story["hub"], "author/mix", "v1")["components"]


def test_component_that_is_gone_cannot_be_pinned(story):
    error = story["author"]["pin_deleted"]["error"]
    assert "'author/fleeting' cannot be pinned to a commit" in error and "deleted" in error
    assert "pin_revisions=False" in error


# ---- opening ----


def test_mixture_opens_by_repo_id_and_at_a_tag_as_it_was_pushed(story):
    seen = result(story["reader"]["open"])
    # the components' repos hold other weights by now
    assert_equal(seen["v1"], result(story["author"]["push"])["logits"])
    assert not torch.allclose(torch.tensor(seen["main"]), torch.tensor(seen["v1"]))
    assert_equal(result(story["reader"]["open_branch"]), seen["v1"])


def test_unpinned_mixture_moves_with_its_components(story):
    then = torch.tensor(result(story["author"]["push"])["logits"])
    now = torch.tensor(result(story["reader"]["open_unpinned"]))
    newer = AutoModelForCausalLM.from_pretrained(story["folders"]["newer"])
    assert not torch.allclose(now, then, atol=1e-3)
    assert newer.config.vocab_size == now.shape[-1]


def test_mixture_of_models_in_memory_travels_whole(story):
    assert_equal(result(story["reader"]["open_whole"]), result(story["author"]["push_whole"]))
    files = story["hub"].files("author/whole")
    assert "model.safetensors" in files and b"holds the weights of all components" in files["README.md"]


def test_private_component_opens_with_a_token_only(story):
    result(story["author"]["push_private_and_gated"])
    result(story["reader"]["open_private_with_token"])
    error = story["reader"]["open_private"]["error"]
    assert error.startswith("OSError") and "'org/private' (private) cannot be opened" in error and "token" in error


def test_gated_component_says_so(story):
    for step, name in {"open_gated": "gated", "open_gated_adapter": "gated-lora", "mix_gated": "gated"}.items():
        error = story["reader"][step]["error"]
        assert error.startswith("OSError") and f"'org/{name}'" in error, step
        assert "The repository is gated: ask for access" in error, step


def test_deleted_component_is_named(story):
    error = story["reader"]["open_with_component_deleted"]["error"]
    assert error.startswith("OSError: The component 'org/gone' (gone) cannot be opened.") and "deleted" in error
    error = story["reader"]["open_with_adapter_deleted"]["error"]
    assert error.startswith("OSError: 'org/gone-lora' (lost) cannot be opened.") and "deleted" in error


def test_lost_revision_is_named(story):
    error = story["reader"]["open_with_revision_gone"]["error"]
    assert error.startswith("OSError: The component 'org/rewritten' (rewritten) cannot be opened.")
    assert f"its revision '{story['commits']['rewritten']}' is gone" in error


def test_missing_mixture_and_missing_permission(story):
    assert "author/never-was" in story["reader"]["open_nothing"]["error"]
    assert "403" in story["reader"]["push_without_permission"]["error"]


# ---- offline ----


def test_what_was_opened_once_opens_offline(story):
    for step in ("open", "open_with_adapters", "open_fitted"):
        assert result(story["offline"][step]) == result(story["reader"][step])
    assert story["offline requests"] == 0


def test_what_was_never_opened_fails_offline(story):
    for step in ("open_something_new", "mix_something_new", "push"):
        assert "error" in story["offline"][step], step
    assert "gated-lora" in story["offline"]["mix_something_new"]["error"]
    assert "offline" in story["offline"]["mix_something_new"]["error"]


# ---- components in folders ----


def test_local_components_are_refused_before_anything_is_uploaded(story):
    error = story["author"]["push_local_model"]["error"]
    assert error.startswith("ValueError") and "'near'" in error and story["folders"]["kind"] in error
    assert "repositories of their own" in error and "'far'" not in error
    error = story["author"]["push_local_adapter"]["error"]
    assert error.startswith("ValueError") and "'terse & dry'" in error and "upload_adapters=True" in error
    assert not {"author/local-model", "author/local-adapter", "author/refused"} & set(story["hub"].repos)


def test_adapters_can_be_uploaded_with_the_mixture(story):
    pushed = result(story["author"]["push_with_adapters"])
    files = story["hub"].files("author/with-adapters")
    component = config_of(story["hub"], "author/with-adapters")["components"][1]
    folder = component["adapter"].removeprefix("./")
    assert folder == "adapters/terse-dry" and "adapter_revision" not in component
    assert component["revision"] == story["commits"]["base"]
    inside = {path for path in files if path.startswith("adapters/")}
    assert inside == {f"{folder}/adapter_config.json", f"{folder}/adapter_model.safetensors"}
    # whatever it was trained over, the base is now the one that others can open
    assert json.loads(files[f"{folder}/adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert pushed["adapter"] == story["folders"]["terse-lora"]


def test_uploaded_adapters_open_elsewhere(story):
    seen = result(story["reader"]["open_with_adapters"])
    assert_equal(seen["logits"], result(story["author"]["push_with_adapters"])["logits"])
    assert seen["adapter"] == ["author/with-adapters", "adapters/terse-dry"]
    assert seen["k"] == 1


# ---- the trainer ----


def test_trainer_pushes_mixture_tokenizer_and_card(story):
    pushed = result(story["author"]["push_from_trainer"])
    files = story["hub"].files("author/fitted")
    assert {"config.json", "tokenizer.json", "README.md", "training_args.bin"} <= set(files)
    assert not [path for path in files if path.startswith("checkpoint")]
    # prompts and completions of the fit stay at home
    assert list((story["root"] / "fitted" / "_rollouts").glob("*.parquet"))
    assert not [path for path in files if "rollouts" in path]
    config = config_of(story["hub"], "author/fitted")
    assert config["components"][0]["revision"] == story["commits"]["kind"]
    assert config["mixture_weights"] == pushed["weights"] != [0.5, 0.5]
    card = files["README.md"].decode()
    assert story["commits"]["kind"] in card and "(weights.png)" in card and "| the reference |" in card
    assert files["weights.png"].startswith(b"\x89PNG")
    seen = result(story["reader"]["open_fitted"])
    assert_equal(seen["logits"], pushed["logits"])
    assert seen["ids"] == [1, 2, 5]


def test_trainer_refuses_local_components(story):
    for step in ("push_from_trainer_with_local_model", "push_during_training_with_local_model"):
        error = story["author"][step]["error"]
        assert error.startswith("ValueError") and "'near'" in error, step


def test_trainer_pushes_during_the_fit(story):
    pushed = result(story["author"]["push_during_training"])
    hub = story["hub"]
    repo = hub.repos["author/pushed-often"]
    assert {"Training in progress, step 1", "Training in progress, step 2", "Model save"} <= set(repo.messages)
    for files in list(repo.commits.values())[1:]:
        components = json.loads(files["config.json"])["components"]
        assert components[0]["revision"] == story["commits"]["kind"]
        assert f"{components[1]['adapter'].removeprefix('./')}/adapter_model.safetensors" in files
        assert {"configuration_mixture.py", "modeling_mixture.py"} <= set(files)
    assert_equal(result(story["reader"]["open_pushed_often"]), pushed)
