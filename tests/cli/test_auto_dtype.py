"""`--dtype auto`: the dtype of the checkpoints, or float32 on a CPU that is slow in it."""

import pytest
import torch
from helpers import save_lora
from toy import toy_policy, toy_tokenizer

from mpo_hf import MixturePolicyModel
from mpo_hf.cli import auto_dtype
from mpo_hf.cli.auto_dtype import OpenedMixture, settle_dtype
from mpo_hf.cli.main import main
from mpo_hf.cpu_dtype import MARGIN, cpu_speed


FAST, SLOW = 2.0, 0.4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two policies in bfloat16 and one in float32, an adapter over the first, and mixtures of them."""
    root = tmp_path_factory.mktemp("dtypes")
    for seed, name in enumerate(("a", "b", "wide"), 1):
        policy = toy_policy(seed, 0.5)
        policy.to(torch.float32 if name == "wide" else torch.bfloat16).save_pretrained(root / name)
        toy_tokenizer().save_pretrained(root / name)
    save_lora(root / "lora", str(root / "a"), seed=3)
    MixturePolicyModel.from_policies([root / "a", root / "b"]).save_pretrained(root / "half")
    return root


@pytest.fixture
def processor(monkeypatch):
    """Sets how fast the processor is in half precision, as that of float32."""

    def set_speed(speed: float) -> None:
        monkeypatch.setattr(auto_dtype, "cpu_speed", lambda dtype: 1.0 if dtype == torch.float32 else speed)

    return set_speed


def dtypes(model) -> list[torch.dtype]:
    return [backbone.dtype for backbone in model.backbones]


def test_a_slow_dtype_becomes_float32_with_the_same_weights(world, processor):
    processor(SLOW)
    model = MixturePolicyModel.from_policies([world / "a", world / "b"], dtype="auto")
    sentence = settle_dtype(model)
    assert "float32 in place of bfloat16" in sentence and "2.5 times as fast" in sentence
    assert dtypes(model) == [torch.float32] * 2 and model.config.dtype == torch.float32
    ids = torch.arange(1, 6)[None]
    expected = MixturePolicyModel.from_policies([world / "a", world / "b"], dtype="float32")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_adapters_over_a_slow_base_become_float32_with_it(world, processor):
    processor(SLOW)
    model = MixturePolicyModel.from_policies([world / "lora", world / "a"], dtype="auto")
    settle_dtype(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = torch.arange(1, 6)[None]
    expected = MixturePolicyModel.from_policies([world / "lora", world / "a"], dtype="float32")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    "speed, names, expected, said",
    [
        (FAST, ["a", "b"], [torch.bfloat16] * 2, "bfloat16, as the policies are stored"),
        (FAST, ["wide"], [torch.float32], "--dtype bfloat16 rounds them"),  # nothing is rounded unless asked for
        (SLOW, ["wide", "a"], [torch.float32] * 2, "float32 in place of bfloat16"),
        (SLOW, ["wide"], [torch.float32], None),
        (1.0, ["a"], [torch.bfloat16], None),  # as fast: as it is stored
    ],
)
def test_other_policies_stay_as_they_are_stored(world, processor, speed, names, expected, said):
    processor(speed)
    model = MixturePolicyModel.from_policies([world / name for name in names], dtype="auto")
    sentence = settle_dtype(model)
    assert dtypes(model) == expected
    assert sentence is None if said is None else said in sentence


def test_dtypes_that_a_description_names_stay(world, processor):
    processor(SLOW)
    chosen = {"name_or_path": world / "a", "dtype": "bfloat16"}
    model = MixturePolicyModel.from_policies([chosen, world / "b"], dtype="auto")
    settle_dtype(model)
    assert dtypes(model) == [torch.bfloat16, torch.float32]


def test_policies_elsewhere_than_on_the_cpu_stay(world, processor):
    processor(SLOW)
    model = MixturePolicyModel.from_policies([world / "a"], dtype="auto").to("meta")
    assert settle_dtype(model) is None and model.dtype == torch.bfloat16


def test_the_reference_is_settled_where_it_runs(world, processor):
    processor(SLOW)
    model = MixturePolicyModel.from_policies([world / "wide"], reference=world / "b", dtype="auto")
    assert "float32 in place" in settle_dtype(model, with_reference=True)
    assert model.reference_policy.dtype == torch.float32


def test_commands_say_what_they_chose_unless_it_was_chosen_for_them(world, processor, capsys):
    processor(SLOW)
    options = ["generate", "--model", str(world / "half"), "--prompt", "a b", "--raw", "--max_new_tokens", "3"]
    assert main(options) == 0
    printed = capsys.readouterr()
    assert printed.err.count("float32 in place of bfloat16") == 1 and "float32" not in printed.out
    assert main([*options, "--dtype", "bfloat16"]) == 0
    assert "dtype:" not in capsys.readouterr().err


def test_the_server_opens_mixtures_like_other_commands(world, processor, capsys):
    processor(SLOW)
    assert OpenedMixture.from_pretrained(world / "half", dtype="auto").dtype == torch.float32
    assert "float32 in place of bfloat16" in capsys.readouterr().err
    assert OpenedMixture.from_pretrained(world / "half", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert "dtype:" not in capsys.readouterr().err


def test_speed_is_measured():
    assert cpu_speed(torch.float32) == 1
    assert 0 < cpu_speed(torch.bfloat16) < 100
    assert cpu_speed(torch.float64) < MARGIN  # twice the bytes are not faster on any processor
