"""Transformers' test suites, pointed at mixtures. `run.py` runs them, with Transformers' tests on the path."""

import unittest
import unittest.mock
from collections.abc import Callable
from functools import partial

import torch
from mixtures import (
    HIDDEN_SIZE,
    NUM_HEADS,
    SHAPE,
    AdapterMixture,
    adapters_config,
    families_config,
    llama_config,
)
from skips import ADAPTERS, ALL, OURS
from stand_ins import adapt_exported_models, install_stand_ins
from tiny_models import write_tiny_models
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.testing_utils import torch_device

from mpo_hf import MixturePolicyConfig, MixturePolicyModel


MISSING = install_stand_ins()
adapt_exported_models()
write_tiny_models(
    (MixturePolicyModel, families_config), (AdapterMixture, adapters_config), (LlamaForCausalLM, llama_config)
)
# the suites know from here which models are language models with a loss
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MixturePolicyConfig.model_type] = ("MixturePolicyModel", "AdapterMixture")

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402
from tests.test_pipeline_mixin import PipelineTesterMixin  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

from tests import test_modeling_common  # noqa: E402


def skipping(skips: dict[str, str]) -> Callable[[type], type]:
    """Class decorator that skips the tests named; a name that no test of a full set of tests has is an error."""

    def decorate(cls: type) -> type:
        for name, reason in skips.items():
            if hasattr(cls, name) or not MISSING:
                setattr(cls, name, unittest.skip(OURS + reason)(getattr(cls, name)))
        return cls

    return decorate


def _own_tied_keys(model: PreTrainedModel) -> list[str]:
    return list(model.all_tied_weights_keys)


class ModelTester:
    """What the suites ask about the model under test."""

    batch_size, seq_length = 13, 7
    vocab_size, hidden_size, num_attention_heads = SHAPE["vocab_size"], HIDDEN_SIZE, NUM_HEADS
    is_training = True

    def __init__(self, get_config: Callable[..., PreTrainedConfig]):
        self.get_config = get_config
        config = get_config()
        self.num_hidden_layers = config.num_hidden_layers
        # every component adds the state of its embeddings
        self.expected_num_hidden_layers = config.num_hidden_layers + len(getattr(config, "components", "1"))

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.tril(torch.ones_like(input_ids)).to(torch_device)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}


class Suites(ModelTesterMixin, GenerationTesterMixin, PipelineTesterMixin, TrainingTesterMixin):
    """All suites, for one class of model."""

    model_class: type[PreTrainedModel]
    make_config: Callable[..., PreTrainedConfig]
    model_tester = None

    def setUp(self):
        self.all_model_classes = (self.model_class,)
        self.pipeline_model_mapping = {"text-generation": self.model_class}
        self.model_tester = ModelTester(self.make_config)


class MixtureSuites(Suites):
    """All suites, for mixtures."""

    _is_composite = True

    def test_config(self):
        parts = [{"label": "a", "name_or_path": "org/a"}, {"label": "b", "name_or_path": "org/a", "adapter": "org/b"}]
        tester = ConfigTester(self, MixturePolicyConfig, components=parts, mixture_weights=[0.25, 0.75])
        tester.run_common_tests()

    def test_config_of_loaded_components(self):
        tester = self._loaded_config_tester()
        tester.create_and_test_config_from_and_save_pretrained_composite = lambda: None  # the test below
        tester.run_common_tests()

    def test_config_parts_by_name(self):
        self._loaded_config_tester().create_and_test_config_from_and_save_pretrained_composite()

    def _loaded_config_tester(self) -> ConfigTester:
        parts = self.make_config().to_dict()["component_configs"]
        return ConfigTester(self, MixturePolicyConfig, component_configs=parts)

    def test_tied_weights_keys(self):
        # the test ties embeddings by the config of the whole model; those of components decide for themselves
        self.model_tester.get_config = partial(self.make_config, tie_word_embeddings=True)
        super().test_tied_weights_keys()


@skipping(ALL)
class TestFamilies(MixtureSuites, unittest.TestCase):
    """A Llama and a GPT-2."""

    model_class = MixturePolicyModel
    make_config = staticmethod(families_config)


@skipping(ALL | ADAPTERS)
class TestAdapters(MixtureSuites, unittest.TestCase):
    """Two adapters over one Llama."""

    model_class = AdapterMixture
    make_config = staticmethod(adapters_config)
    training_overfit_learning_rate = 3e-3  # adapters learn more slowly than the whole of a model

    def test_tied_weights_keys(self):
        # The test asks every module, and PEFT's wrappers answer for what they wrap, without their own prefix. What
        # counts when a mixture is saved and loaded is its own list.
        with unittest.mock.patch.object(test_modeling_common, "_get_tied_weight_keys", _own_tied_keys):
            super().test_tied_weights_keys()


class TestPlainLlama(Suites, unittest.TestCase):
    """No mixture: tells tests that fail for mixtures from tests that fail for any model."""

    model_class = LlamaForCausalLM
    make_config = staticmethod(llama_config)
