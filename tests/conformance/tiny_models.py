"""A folder of tiny models with tokenizers, in place of the Hub repositories that the pipeline tests load."""

import atexit
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


WORDS = "the quick brown fox jumps over a lazy dog This is test Another great Something else".split()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_tiny_models(*models_and_configs: tuple[type[PreTrainedModel], Callable[[], PreTrainedConfig]]) -> None:
    """Writes a model of every class, and says so where the pipeline tests look; the folder lives with the process."""
    folder = tempfile.TemporaryDirectory(prefix="tiny-models-")
    atexit.register(folder.cleanup)
    root = Path(folder.name)
    summary = {}
    for model_class, make_config in models_and_configs:
        target = root / model_class.config_class.model_type / model_class.__name__
        model_class(make_config()).save_pretrained(target)
        tiny_tokenizer().save_pretrained(target)
        summary[model_class.__name__] = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
    (root / "reports").mkdir()
    (root / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(root)
