"""Mixtures that carry the code of their class open without mpo_hf: in environments of their own, where it cannot be imported."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from environments import bare_environment, empty_environment, install
from helpers import BOS, PROGRAMS, TESTS, completions_of, save_lora
from hub_server import Hub
from toy import toy_policy, toy_tokenizer
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_imports

from mpo_hf import MixturePolicyConfig, MixturePolicyModel


pytestmark = pytest.mark.integration
AUTO_MAP = {
    "AutoConfig": "configuration_mixture.MixturePolicyConfig",
    "AutoModelForCausalLM": "modeling_mixture.MixturePolicyModel",
}


def run_client(python: str | Path, role: str, hub: Hub, root: Path, token: str, **plan) -> dict:
    """Runs one user of the Hub, and returns what came of every step."""
    path = root / f"{role}.json"
    path.write_text(json.dumps({"work": str(root), **plan}))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    if str(python) != sys.executable:
        kept.pop("PYTHONPATH", None)  # it may lead to mpo_hf
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(root / role), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    command = [str(python), str(TESTS / "code_client.py"), role, str(path)]
    done = subprocess.run(
        command,
        env={**kept, **own, "MARK": str(root / "ran")},
        cwd=root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())["outcomes"]


def fill(hub: Hub, root: Path) -> dict[str, str]:
    """Policies on the Hub, and in folders."""
    base = toy_policy(1, 0.5)
    folders = {}
    for name, policy in {"base": base, "kind": toy_policy(2, 0.3, base)}.items():
        folders[name] = str(root / name)
        policy.save_pretrained(folders[name])
        toy_tokenizer().save_pretrained(folders[name])
        hub.upload(f"org/{name}", folders[name])
    for seed, name in enumerate(["terse-lora", "loud-lora"]):
        folders[name] = save_lora(root / name, folders["base"], seed)
        shutil.copytree(folders[name], root / f"hub-{name}")
        config = root / f"hub-{name}" / "adapter_config.json"
        config.write_text(config.read_text().replace(folders["base"], "org/base"))
        hub.upload(f"org/{name}", root / f"hub-{name}")
    shutil.copytree(folders["kind"], root / "scripted")
    config = json.loads((root / "scripted" / "config.json").read_text())
    auto_map = dict.fromkeys(AUTO_MAP, "marking.Marking")
    (root / "scripted" / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    shutil.copy(PROGRAMS / "marking.py", root / "scripted")
    hub.upload("org/scripted", root / "scripted")
    return folders


def tell(root: Path, readers: Iterable[tuple[str, Path]]) -> dict:
    """An author pushes mixtures with their code; readers open them, each with a Python of their own."""
    with Hub({"author-token": "author", "reader-token": "reader"}, members=set()) as hub:
        folders = fill(hub, root)
        seen = {"Author": run_client(sys.executable, "Author", hub, root, "author-token", folders=folders)}
        for role, python in readers:
            seen[role] = run_client(python, role, hub, root, "reader-token")
    return {**seen, "hub": hub, "root": root}


def code_of(files) -> set[str]:
    return {name for name in files if name.endswith(".py")}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    root = tmp_path_factory.mktemp("carried")
    bare = bare_environment(root / "bare", "torch", "transformers")
    with_peft = bare_environment(root / "with-peft", "torch", "transformers", "peft")
    return tell(root, [("ReaderWithoutPeft", bare), ("Reader", with_peft)])


def result(outcome: dict):
    assert "error" not in outcome, outcome["error"]
    return outcome["result"]


# ---- what is carried ----


def test_carried_code_is_complete_and_asks_for_little():
    package = Path(sys.modules["mpo_hf.mixture"].__file__).parent
    folder = package / "configuration_mixture.py", package / "modeling_mixture.py"
    waiting, carried = list(folder), set()
    while waiting:
        path = waiting.pop()
        if path not in carried:
            carried.add(path)
            relative = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level]
            assert all(node.level == 1 and node.module for node in relative), path
            waiting += [package / f"{node.module}.py" for node in relative]
    needed = {name for path in carried for name in get_imports(path)} - set(sys.stdlib_module_names)
    assert needed == {"torch", "transformers", "huggingface_hub"}
    assert carried == {path for path in package.iterdir() if path.suffix == ".py" and path.stem != "__init__"}


def test_pushed_files_are_the_ones_of_the_package(story):
    result(story["Author"]["push"])
    package = Path(sys.modules["mpo_hf.mixture"].__file__).parent
    files = story["hub"].files("author/full", "v1")
    assert {"configuration_mixture.py", "modeling_mixture.py"} < code_of(files)
    for name in code_of(files):
        assert files[name] == (package / name).read_bytes()
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    assert "trust_remote_code=True" in files["README.md"].decode()
    # without being asked for, none is pushed, though this mixture has been pushed with code before
    result(story["Author"]["push_without_code"])
    plain = story["hub"].files("author/plain")
    assert not code_of(plain) and "auto_map" not in json.loads(plain["config.json"])
    assert "trust_remote_code" not in plain["README.md"].decode()


# ---- where mpo_hf is not installed ----


def test_the_environments_lack_what_they_should(story):
    assert result(story["ReaderWithoutPeft"]["missing"]) == ["mpo_hf", "peft", "accelerate", "datasets", "trl"]
    assert result(story["Reader"]["missing"]) == ["mpo_hf", "datasets", "trl"]


def test_mixture_writes_the_same_tokens_as_with_mpo_hf(story):
    expected = result(story["Author"]["push"])
    assert len({tuple(row) for rows in expected.values() for row in rows}) > len(expected)  # they do differ
    assert (
        result(story["ReaderWithoutPeft"]["open_whole"]) == result(story["Reader"]["open_whole"]) == expected["whole"]
    )
    assert result(story["Reader"]["open_adapters"]) == {name: expected[name] for name in ("adapters", "uploaded")}


def test_revisions_are_kept_to(story):
    seen = result(story["ReaderWithoutPeft"]["open_full"])
    assert seen["v1"] == result(story["Author"]["push"])["full"] != seen["main"]
    assert seen["main"] == result(story["Author"]["tag_and_change"])
    assert seen["weights"] == [0.9, 0.1]


def test_pipeline_writes_the_same_text(story):
    assert result(story["ReaderWithoutPeft"]["write"]) == result(story["Author"]["write"])


def test_mixtures_in_folders_open_too(story):
    expected = result(story["Author"]["save"])
    assert result(story["ReaderWithoutPeft"]["open_folder"]) == expected["local-full"]
    assert result(story["Reader"]["open_adapters_in_folders"]) == [expected["local-adapters"], 1]


def test_adapters_without_peft_say_what_is_missing(story):
    for step in ("open_adapters", "open_adapters_in_folders"):
        error = story["ReaderWithoutPeft"][step]["error"]
        assert error.startswith("ImportError") and "is an adapter; `pip install peft`" in error, error


def test_mixtures_by_three_copies_of_the_class_are_flattened(story):
    assert result(story["Reader"]["nest"]) == result(story["Author"]["nest"])
    assert len(result(story["Reader"]["nest"])[0]) == 6


def test_code_goes_on_with_what_is_saved_and_pushed_again(story):
    expected = result(story["Author"]["push"])
    files, again = result(story["Reader"]["save_again"])
    assert code_of(files) == code_of(story["hub"].files("author/full")) and again == expected["adapters"]
    assert result(story["Reader"]["save_what_was_built"]) == expected["full"]
    assert not code_of(result(story["Reader"]["save_without_code"]))
    changed, pushed = result(story["Reader"]["push_again"])
    assert changed == pushed != expected["adapters"]


# ---- trust ----


def test_nothing_runs_without_trust(story):
    assert "trust_remote_code=True" in story["ReaderWithoutPeft"]["distrust"]["error"]
    assert "mpo_mixture" in story["ReaderWithoutPeft"]["open_without_code"]["error"]


def test_trust_in_a_mixture_is_not_trust_in_its_components(story):
    assert "AutoModelForCausalLM" in json.loads(story["hub"].files("org/scripted")["config.json"])["auto_map"]
    result(story["Author"]["push_code_of_a_component"])
    result(story["Reader"]["open_with_code_of_a_component"])
    assert not (story["root"] / "ran").exists()


def test_installed_classes_come_before_carried_code(story):
    expected = result(story["Author"]["tag_and_change"])
    assert result(story["Author"]["open_what_carries_code"]) == [expected] * 6
    # code that cannot run shows whether it was tried
    result(story["Author"]["push_broken_code"])
    assert "broken code ran" in story["ReaderWithoutPeft"]["open_broken"]["error"]


# ---- within one process ----


@pytest.fixture
def copies(folders, tmp_path):
    """A mixture, and the same opened by a copy of its class."""
    mixture = MixturePolicyModel.from_policies([folders.kind, folders.terse], [0.3, 0.7])
    mixture.save_pretrained(tmp_path, with_code=True)
    copied_class = get_class_from_dynamic_module(AUTO_MAP["AutoModelForCausalLM"], tmp_path)
    assert copied_class is not MixturePolicyModel
    return mixture, copied_class.from_pretrained(tmp_path)


def test_installed_class_flattens_a_copy(copies, folders):
    mixture, copy = copies
    expected = MixturePolicyModel.from_policies([mixture, folders.base], [0.5, 0.5])
    flattened = MixturePolicyModel.from_policies([copy, folders.base], [0.5, 0.5])
    assert type(flattened.config) is MixturePolicyConfig
    assert flattened.config.to_dict() == expected.config.to_dict()
    inputs = {"input_ids": torch.tensor([[BOS, 4, 9]])}
    written = [completions_of(m.generate(**inputs, max_new_tokens=6), inputs) for m in (flattened, expected)]
    assert written[0] == written[1]
    assert MixturePolicyConfig(components=copy.config.components).labels == mixture.config.labels


def test_auto_map_survives_a_round_trip(copies, tmp_path):
    mixture, copy = copies
    assert not hasattr(mixture.config, "auto_map") and MixturePolicyModel._auto_class is None
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is MixturePolicyModel and opened.config.auto_map == AUTO_MAP
    assert MixturePolicyConfig.from_dict(opened.config.to_dict()).auto_map == AUTO_MAP
    opened.save_pretrained(tmp_path / "again")
    assert code_of(os.listdir(tmp_path / "again")) == code_of(os.listdir(tmp_path))
    opened.save_pretrained(tmp_path / "without", with_code=False)
    assert not code_of(os.listdir(tmp_path / "without"))
    assert not hasattr(MixturePolicyConfig.from_pretrained(tmp_path / "without"), "auto_map")


def test_registration_as_transformers_users_do_it(copies, tmp_path, monkeypatch):
    monkeypatch.setattr(MixturePolicyConfig, "_auto_class", None)
    monkeypatch.setattr(MixturePolicyModel, "_auto_class", None)
    MixturePolicyConfig.register_for_auto_class()
    MixturePolicyModel.register_for_auto_class("AutoModelForCausalLM")
    mixture, _ = copies
    mixture.save_pretrained(tmp_path / "stock")
    assert {name: (tmp_path / "stock" / name).read_bytes() for name in os.listdir(tmp_path / "stock")} == {
        name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path) if (tmp_path / name).is_file()
    }


# ---- an environment that pip has made ----


@pytest.mark.slow
def test_freshly_installed_environment(tmp_path):
    """Downloads torch: an environment as `pip install` makes it, first without and then with PEFT."""

    def readers():
        python = empty_environment(tmp_path / "fresh")
        install(python, "torch", "transformers")
        yield "ReaderWithoutPeft", python
        install(python, "peft")
        yield "Reader", python

    story = tell(tmp_path, readers())
    test_the_environments_lack_what_they_should(story)
    test_mixture_writes_the_same_tokens_as_with_mpo_hf(story)
    test_revisions_are_kept_to(story)
    test_pipeline_writes_the_same_text(story)
    test_mixtures_in_folders_open_too(story)
    test_adapters_without_peft_say_what_is_missing(story)
    test_mixtures_by_three_copies_of_the_class_are_flattened(story)
    test_trust_in_a_mixture_is_not_trust_in_its_components(story)
