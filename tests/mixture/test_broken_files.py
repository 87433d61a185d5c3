"""Files that are truncated, garbled or of something else: the error names the part of the mixture, and the field."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import SIZES, save_lora, save_tiny, tiny
from toy import toy_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from mpo_hf import MixturePolicyConfig, MixturePolicyModel
from mpo_hf.mixture.tokenizer_loading import load_mixture_tokenizer


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:200])


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def edit(name: str, **fields) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **fields}))


def drop_a_shard(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny("llama", 1).save_pretrained(folder, max_shard_size="8KB")
    sorted(folder.glob("*.safetensors"))[0].unlink()


# what is done to a model, the error and what it says beside the component
MODELS = {
    "truncated weights": (truncate("model.safetensors"), OSError, "SafetensorError"),
    "empty weights": (write("model.safetensors", ""), OSError, "SafetensorError"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), OSError, "model.safetensors"),
    "shard missing": (drop_a_shard, OSError, "model-00001-of"),
    "weights of another size": (edit("config.json", hidden_size=32), ValueError, "mismatched"),
    "garbled config": (write("config.json", "{"), OSError, "config.json"),
    "config without type": (write("config.json", "{}"), ValueError, "model_type"),
    "dtype that is none": (edit("config.json", dtype="rubbish"), ValueError, "`dtype` is 'rubbish'"),
    "size of text": (edit("config.json", hidden_size="x"), ValueError, "`hidden_size` is 'x'"),
    "no heads": (edit("config.json", num_attention_heads=0), ValueError, "`num_attention_heads` is 0"),
    "activation that is none": (edit("config.json", hidden_act="rubbish"), ValueError, "rubbish"),
    "too many layers": (edit("config.json", num_hidden_layers=10**5), ValueError, "`num_hidden_layers` .* 100000"),
}
ADAPTERS = {
    "truncated weights": (truncate("adapter_model.safetensors"), OSError, "SafetensorError"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), OSError, "adapter_model"),
    "garbled config": (write("adapter_config.json", "{"), OSError, "adapter_config.json"),
    "config of another shape": (write("adapter_config.json", "[1]"), ValueError, r"adapter_config.json.*\[1\]"),
    "config without type": (write("adapter_config.json", "{}"), ValueError, "peft_type"),
    "kind that is none": (edit("adapter_config.json", peft_type="RUBBISH"), ValueError, "RUBBISH"),
    "base that is no name": (
        edit("adapter_config.json", base_model_name_or_path=5),
        ValueError,
        "base_model_name_or_path.*5",
    ),
    "another rank": (edit("adapter_config.json", r=8), ValueError, "size mismatch"),
    "layers that are none": (edit("adapter_config.json", target_modules=["rubbish"]), ValueError, "rubbish"),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("intact")
    base = save_tiny(root / "base", "llama", 0)
    save_tiny(root / "kind", "llama", 1)
    save_lora(root / "lora", base, 2)
    return root


def mixture_in(folder: Path, *components: dict, **fields) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mpo_mixture", "components": components, **fields}))
    return folder


@pytest.mark.parametrize("damage, error, message", MODELS.values(), ids=MODELS.keys())
def test_broken_model_is_named(intact, tmp_path, damage, error, message):
    shutil.copytree(intact / "kind", tmp_path / "kind")
    damage(tmp_path / "kind")
    broken = {"name_or_path": str(tmp_path / "kind"), "label": "harmless"}
    mixture = mixture_in(tmp_path / "mixture", {"name_or_path": str(intact / "base")}, broken)
    with pytest.raises(error, match=f"(?s)component .*kind' .harmless. cannot be .*{message}"):
        AutoModelForCausalLM.from_pretrained(mixture)


@pytest.mark.parametrize("damage, error, message", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_broken_adapter_is_named(intact, tmp_path, damage, error, message):
    shutil.copytree(intact / "lora", tmp_path / "lora")
    damage(tmp_path / "lora")
    base = {"name_or_path": str(intact / "base")}
    broken = {**base, "adapter": str(tmp_path / "lora"), "label": "harmless"}
    with pytest.raises(error, match=f"(?s){message}") as refusal:
        AutoModelForCausalLM.from_pretrained(mixture_in(tmp_path / "mixture", base, broken))
    assert str(tmp_path / "lora") in str(refusal.value)


def test_broken_checkpoint_of_a_whole_mixture_is_named(tmp_path):
    MixturePolicyModel.from_policies([tiny("llama", 0), tiny("llama", 1)]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["component_configs"][1]["num_key_value_heads"] = 0
    good = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"component_configs\[1\].*`num_key_value_heads` is 0"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(good)
    truncate("model.safetensors")(tmp_path)
    with pytest.raises(OSError, match=f"The mixture '{tmp_path}' cannot be loaded. SafetensorError"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_broken_generation_config_is_not_passed_over(intact, tmp_path):
    mixture = mixture_in(tmp_path / "mixture", {"name_or_path": str(intact / "base")})
    assert AutoModelForCausalLM.from_pretrained(mixture).generation_config.eos_token_id == SIZES["eos_token_id"]
    (mixture / "generation_config.json").write_text("{")
    with pytest.raises(OSError, match="generation config of the mixture .*mixture' cannot be read"):
        AutoModelForCausalLM.from_pretrained(mixture)


def test_broken_tokenizer_of_a_mixture_is_not_replaced_by_that_of_a_component(intact, tmp_path):
    shutil.copytree(intact / "base", tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    mixture = mixture_in(tmp_path / "mixture", {"name_or_path": str(tmp_path / "base")})
    model = AutoModelForCausalLM.from_pretrained(mixture)
    assert load_mixture_tokenizer(model, advice="").get_vocab() == toy_tokenizer().get_vocab()
    (mixture / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"The mixture '{mixture}' has no tokenizer that can be read"):
        load_mixture_tokenizer(model, advice="")


def test_lack_of_memory_stays_what_it_is(intact, tmp_path, monkeypatch):
    mixture = mixture_in(tmp_path / "mixture", {"name_or_path": str(intact / "base")})

    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("mpo_hf.mixture.component_loading.AutoModelForCausalLM.from_pretrained", run_out)
    with pytest.raises(torch.OutOfMemoryError, match="^no room$"):
        MixturePolicyModel.from_pretrained(mixture)


def test_config_of_code_that_comes_with_a_component_is_left_to_the_component(tmp_path):
    class TheirConfig(PreTrainedConfig):
        model_type = "theirs"
        vocab_size: int = 32
        num_hidden_layers: int = 2

    parts = [TheirConfig(), tiny("llama", 0).config]
    config = MixturePolicyConfig(
        components=[{"name_or_path": "org/a"}, {"name_or_path": "org/b"}], component_configs=parts
    )
    config.save_pretrained(tmp_path)
    opened = AutoConfig.from_pretrained(tmp_path)
    assert opened.components == config.components and opened.vocab_size == 32 and opened.component_configs == []
