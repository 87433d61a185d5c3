"""
Stand-ins for the parts of Transformers' tests that a source distribution lacks.

Its test files import from sub-folders that only a checkout has. Where one is missing, a module of that name takes its
place: empty mixins for the export and generation tests, which are then not run.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any
from unittest import TestCase

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextGenerationPipeline
from transformers.exporters import base as exporters


class GenerationTesterMixin:
    """No generation tests without a checkout."""


class ExportTesterMixin:
    """No export tests without a checkout."""


class TextGenerationPipelineTests(TestCase):
    """What the pipeline mixin asks of the pipeline; the mixin itself goes on to feed it in batches."""

    def get_test_pipeline(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32", **processors
    ) -> tuple[TextGenerationPipeline, list[str]]:
        pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer, dtype=dtype, max_new_tokens=5)
        return pipeline, ["the quick brown fox", "jumps"]

    def run_pipeline_test(self, pipeline: TextGenerationPipeline, examples: list[str]) -> None:
        for example in examples:
            (output,) = pipeline(example)
            self.assertTrue(output["generated_text"].startswith(example))


# Arguments that every configuration takes, none of them its default.
CONFIG_ARGUMENTS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 3,
    "architectures": ["MixturePolicyModel"],
    "id2label": {0: "only"},
    "label2id": {"only": "0"},
    "problem_type": "regression",
}

STAND_INS: dict[str, dict[str, Any]] = {
    "tests.generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "tests.exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "tests.utils.test_configuration_utils": {"config_common_kwargs": CONFIG_ARGUMENTS},
    "tests.pipelines.test_pipelines_text_generation": {"TextGenerationPipelineTests": TextGenerationPipelineTests},
}


def install_stand_ins() -> list[str]:
    """Puts a stand-in wherever a module is missing; returns the names of those modules."""
    missing = [name for name in STAND_INS if _is_missing(name)]
    for name in missing:
        module = ModuleType(name)
        vars(module).update(STAND_INS[name])
        sys.modules[name] = module
        sys.modules.setdefault(name.rpartition(".")[0], ModuleType(name.rpartition(".")[0]))
    return missing


def adapt_exported_models() -> None:
    """
    Lets older export tests run: they ask what an exporter returns for its `module()`, which an `ExportedModel` of today
    has at its program.
    """
    exported_model = getattr(exporters, "ExportedModel", None)
    if exported_model is not None and not hasattr(exported_model, "module"):
        exported_model.module = lambda self: self.program.module()


def _is_missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True
