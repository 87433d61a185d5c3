"""Where components of a saved mixture may lie: for a mixture from the Hub, in repositories and in its own folder only."""

import json
import os

import pytest
from helpers import save_lora, save_tiny
from transformers import AutoModelForCausalLM

from mpo_hf import MixtureComponent, MixturePolicyModel
from mpo_hf.mixture import component_loading
from mpo_hf.mixture.component_paths import resolve_relative


OUTSIDE = {
    "absolute": "/etc",
    "home": "~/models/base",
    "URL of a file": "file:///etc",
    "URL": "https://example.org/model",
    "drive": "C:\\models\\base",
    "share": "\\\\host\\models",
    "beside": "../base",
    "beside, in other words": "./inside/../../base",
    "beside, on Windows": "..\\base",
    "parent": "..",
    "deeper than a repo": "a/b/c",
    "no repo": "my model",
    "folder of this directory": "org/here",
}


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """The folder of the Hub's cache that holds a mixture, in a directory with other folders."""
    folder = tmp_path / "hub/models--org--mix/snapshots/0123456789abcdef0123456789abcdef01234567"
    (folder / "inside/deep").mkdir(parents=True)
    (folder / "inside/config.json").write_text("{}")
    for name in ("org/here", "base", "hub/models--org--mix/snapshots/base"):
        (tmp_path / name).mkdir(parents=True)
    os.symlink(tmp_path / "base", folder / "link")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("field", ["name_or_path", "adapter"])
@pytest.mark.parametrize("path", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_mixture_from_the_hub_opens_nothing_else_of_this_machine(snapshot, field, path):
    component = MixtureComponent(**{"name_or_path": "org/base", field: path})
    for mixture in ("org/mix", str(snapshot)):
        with pytest.raises((ValueError, OSError)) as refusal:
            resolve_relative(component, mixture)
        assert repr(path) in str(refusal.value) and mixture in str(refusal.value)


def test_mixture_from_the_hub_opens_repositories_and_what_it_brings(snapshot):
    for path in ("org/base", "gpt2"):
        component = MixtureComponent(path, revision="v1", subfolder="deep")
        assert resolve_relative(component, "org/mix", "v2") == component == resolve_relative(component, str(snapshot))
    component = MixtureComponent("org/base", adapter="./inside", adapter_subfolder="deep")
    remote = MixtureComponent("org/base", adapter="org/mix", adapter_revision="v2", adapter_subfolder="inside/deep")
    assert resolve_relative(component, "org/mix", "v2") == remote
    local = MixtureComponent("org/base", adapter=str(snapshot / "inside"), adapter_subfolder="deep")
    assert resolve_relative(component, str(snapshot)) == local


def test_link_out_of_a_mixture_from_the_hub_is_not_followed(snapshot):
    with pytest.raises(OSError, match="'./link', which lies outside"):
        resolve_relative(MixtureComponent("./link"), str(snapshot))


def test_mixture_of_your_own_opens_folders_of_yours(snapshot, tmp_path):
    (tmp_path / "mine/inside").mkdir(parents=True)
    own = str(tmp_path / "mine")
    for path, resolved in (("../base", "base"), ("./inside", "mine/inside"), ("inside", "mine/inside")):
        assert resolve_relative(MixtureComponent(path), own).name_or_path == str(tmp_path / resolved)
    for path in (str(tmp_path / "base"), "org/here"):
        assert resolve_relative(MixtureComponent(path), own).name_or_path == path


INSIDE = ("revision", "subfolder", "variant", "gguf_file", "adapter_revision", "adapter_subfolder")


@pytest.mark.parametrize("field", INSIDE)
@pytest.mark.parametrize(
    "value", ["../up", "a/../../up", "/etc", "~/x", "C:\\x", "..\\up", "\\\\host\\x", "file:///etc"]
)
def test_places_inside_of_a_repository_do_not_lead_out(field, value):
    with pytest.raises(ValueError, match=f"`{field}` of a component must lead to something inside"):
        MixtureComponent("org/base", adapter="org/lora", **{field: value})
    for fine in ("refs/pr/1", "a/b", "..a/b..", "v1.0"):
        assert getattr(MixtureComponent("org/base", adapter="org/lora", **{field: fine}), field) == fine


def test_folders_of_this_machine_are_opened_for_your_own_mixture_only(tmp_path):
    base = save_tiny(tmp_path / "base", "llama", 0)
    fields = {"model_type": "mpo_mixture", "components": [{"name_or_path": base}]}
    theirs = tmp_path / "models--org--mix/snapshots/0123456789abcdef0123456789abcdef01234567"
    for folder in (tmp_path / "mine", theirs):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(fields))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "mine").config.components[0].name_or_path == base
    for open_it in (
        AutoModelForCausalLM.from_pretrained,
        lambda folder: MixturePolicyModel.from_policies([str(folder)]),
    ):
        with pytest.raises(ValueError, match="`name_or_path` .*base.* is a folder of this machine"):
            open_it(theirs)
    fields = {
        "model_type": "mpo_mixture",
        "components": [{"name_or_path": "org/a"}],
        "reference": {"name_or_path": base},
    }
    (theirs / "config.json").write_text(json.dumps(fields))
    with pytest.raises((ValueError, OSError)):
        AutoModelForCausalLM.from_pretrained(theirs, local_files_only=True)


def test_adapter_from_the_hub_does_not_choose_a_folder_of_this_machine(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base", "llama", 0)
    config = os.path.join(save_lora(tmp_path / "lora", base, 1), "adapter_config.json")
    monkeypatch.setattr(component_loading, "cached_file", lambda *args, **kwargs: config)
    with pytest.raises(ValueError, match="'org/lora' was trained over .*base.*, a folder of whoever trained it"):
        component_loading.as_component({"adapter": "org/lora"})
    with pytest.raises(ValueError, match="'org/lora' was trained over"):
        component_loading.as_component("org/lora")
    assert component_loading.as_component({"adapter": "org/lora", "name_or_path": base}).name_or_path == base
