"""The code that comes with a checkpoint. Makes the file that `MARK` names, when it runs."""

import os
import pathlib

from transformers import LlamaConfig, LlamaForCausalLM


pathlib.Path(os.environ["MARK"]).touch()


class TheirConfig(LlamaConfig):
    model_type = "theirs"


class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig
