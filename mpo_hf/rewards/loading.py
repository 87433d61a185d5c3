"""Reward models: which output of which classifier, and how it is loaded with its adapter and its tokenizer."""

import dataclasses
import functools
import math
import os
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import find_adapter_config_file

from ..mixture.adapter_loading import unmatched_keys
from ..mixture.hub_files import Location, require_safetensors
from ..mixture.tokenizer_loading import load_tokenizer


Text = str | list[dict[str, Any]]  # plain, or a conversation

ACTIVATIONS = {
    None: lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "softmax": functools.partial(torch.softmax, dim=-1),
    "log_softmax": functools.partial(torch.log_softmax, dim=-1),
}


@dataclass
class RewardModelSpec:
    r"""
    Describes which output of which sequence classifier is the reward of an objective. With `model` alone, it is the same
    reward as in TRL's GRPOTrainer.

    $$ r = \mathrm{sign} \cdot \mathrm{scale} \cdot \mathrm{activation}(\mathrm{logits})_{\mathrm{logit}} + \mathrm{offset} $$

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): repo id, folder or loaded model. A PEFT adapter is loaded
            over the base that its config names.
        adapter (`str`, *optional*): PEFT adapter over `model`.
        revision, subfolder (`str`, *optional*): location in the repo of `model`.
        adapter_revision, adapter_subfolder (`str`, *optional*): location in the repo of `adapter`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*): tokenizer. Defaults to the one
            beside the adapter, where TRL's RewardTrainer saves it, or else to the one in the repo of the model.
        gguf_file (`str`, *optional*): GGUF file with the weights and the tokenizer of the base.
        template (`str`, pair of `str`, or `Callable[[prompt, completion], str]`, *optional*): text that is scored. A string
            has the field `{completion}` and optionally `{prompt}`: a plain text, or the content of a single message; literal
            braces are doubled. A pair, `("{prompt}", "{completion}")`, is for a model that was trained on pairs of texts.
            Defaults, as in TRL, to the chat template applied to both, or to both plain texts joined. A text without any token
            gets the reward of the special tokens that the tokenizer adds to it, or else of its EOS token.
        chat_template_kwargs (`dict`, *optional*): for the tokenizer's chat template, if it is used.
        add_special_tokens (`bool`, *optional*): whether the tokenizer adds its special tokens. By default, it adds them for
            models that read a text in both directions, such as BERT or T5, and, as in TRL, not for others, nor to what a chat
            template writes. It must be set for another model with a `template` whose tokenizer has special tokens to add; what
            the template has written already is not added again.
        logit (`int` or `str`, *optional*): index or label name of the output. Required if the model has several.
        sign (`int`, defaults to 1): 1 or -1.
        scale (`float`, defaults to 1.0): above 0.
        offset (`float`, defaults to 0.0): added last.
        activation (`str`, *optional*): `"sigmoid"` of the one logit, `"softmax"` or `"log_softmax"` over all.
        max_length (`int`, *optional*): maximum number of tokens of an input. Defaults to the lower of the model's
            `max_position_embeddings` and the tokenizer's `model_max_length`. A longer input is a `ValueError`, since a part
            of a text has another reward.
        truncation_side (`str`, *optional*): `"left"` or `"right"`, the end of a longer input that is cut off instead.
        batch_size (`int`, defaults to 8): inputs per forward pass.
        label (`str`, *optional*): name of the objective. Defaults to the last part of the adapter's or model's path.
        model_kwargs (`dict`, *optional*): for the model's `from_pretrained`, the only way to enable
            `trust_remote_code`.

    Raises:
        `ValueError`: an argument is out of range, or would have no effect.

    Example:

    ```python
    >>> from mpo_hf.rewards import RewardModelSpec

    >>> RewardModelSpec("org/toxicity", logit="toxic", sign=-1, template="{completion}", label="harmless").label
    'harmless'
    ```
    """

    model: str | PreTrainedModel
    adapter: str | None = None
    revision: str | None = None
    adapter_revision: str | None = None
    subfolder: str | None = None
    adapter_subfolder: str | None = None
    processing_class: PreTrainedTokenizerBase | str | None = None
    gguf_file: str | None = None
    template: str | Sequence[str] | Callable[[Text, Text], str] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    add_special_tokens: bool | None = None
    logit: int | str | None = None
    sign: int = 1
    scale: float = 1.0
    offset: float = 0.0
    activation: Literal["sigmoid", "softmax", "log_softmax"] | None = None
    max_length: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    batch_size: int = 8
    label: str | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("model", "adapter"):
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))
        loaded = is_model(self.model)
        for name in ("revision", "subfolder", "gguf_file", "model_kwargs"):
            self._check(name, not (loaded and getattr(self, name)), "left out for a model that is already loaded")
        for name in ("adapter_revision", "adapter_subfolder"):
            self._check(name, self.adapter is not None or not getattr(self, name), "left out without `adapter`")
        named = isinstance(self.model, str) and self.model != ""
        self._check("model", loaded or named, "a repo id, a folder or a loaded model")
        usable = self.template is None or callable(self.template)
        if not usable and _is_template(self.template):
            usable = {"completion"} <= template_fields(self.template) <= {"prompt", "completion"}
        self._check(
            "template",
            usable,
            "a callable, a str with {completion} and perhaps {prompt} as only fields, or a pair of str",
        )
        self._check("add_special_tokens", self.add_special_tokens in (None, True, False), "True, False or None")
        indexed = self.logit is None or isinstance(self.logit, (int, str)) and not isinstance(self.logit, bool)
        self._check("logit", indexed, "an index or a label name")
        self._check("sign", self.sign in (1, -1), "1 or -1 (use `scale` for a factor)")
        self._check("scale", 0 < self.scale < math.inf, "finite and above 0 (use `sign=-1` to reverse a reward)")
        self._check("offset", math.isfinite(self.offset), "finite")
        self._check("activation", self.activation in ACTIVATIONS, f"one of {list(ACTIVATIONS)}")
        self._check("batch_size", _is_count(self.batch_size), "an integer above 0")
        self._check("truncation_side", self.truncation_side in (None, "left", "right"), "'left' or 'right'")
        self._check("max_length", self.max_length is None or _is_count(self.max_length), "an integer above 0")

    def _check(self, name: str, valid: bool, must_be: str):
        if not valid:
            raise ValueError(f"RewardModelSpec: `{name}` must be {must_be}, but is {getattr(self, name)!r}.")


def _is_template(value: Any) -> bool:
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)
    return isinstance(value, str) or pair


def template_fields(template: str | Sequence[str]) -> set[str]:
    parts = [template] if isinstance(template, str) else template
    return {name for part in parts for _, name, _, _ in string.Formatter().parse(part) if name is not None}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def is_model(value: Any) -> bool:
    # PeftModels and compiled models are not PreTrainedModels, but have their config
    return isinstance(value, nn.Module) and hasattr(value, "config")


def model_name(spec: RewardModelSpec) -> str:
    if spec.adapter is not None:
        parts = (spec.adapter, spec.adapter_subfolder)
    elif isinstance(spec.model, str):
        parts = (spec.model, spec.subfolder)
    else:
        parts = (getattr(spec.model.config, "_name_or_path", None) or type(spec.model).__name__,)
    return os.path.basename(os.path.normpath(os.path.join(*filter(None, parts))))


def _hub_kwargs(spec: RewardModelSpec, *more: str) -> dict[str, Any]:
    names = ("token", "cache_dir", "local_files_only", "force_download", *more)
    return {name: spec.model_kwargs[name] for name in names if name in spec.model_kwargs}


def _locate(spec: RewardModelSpec) -> tuple[Location | None, Location | None]:
    """The locations of the base and of the adapter; `None` for a base that is loaded already, and without an adapter."""
    adapter = None
    if spec.adapter is not None:
        adapter = Location(spec.adapter, spec.adapter_revision, spec.adapter_subfolder)
    if not isinstance(spec.model, str):
        return None, adapter
    model = Location(spec.model, spec.revision, spec.subfolder)
    if find_adapter_config_file(spec.model, **model.kwargs, **_hub_kwargs(spec)) is None:
        return dataclasses.replace(model, gguf_file=spec.gguf_file), adapter
    if adapter is not None:
        raise ValueError(f"`model` {spec.model!r} is itself an adapter: it cannot carry `adapter` {spec.adapter!r}.")
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(spec.model, **model.kwargs, **_hub_kwargs(spec))
    if not config.base_model_name_or_path:
        raise ValueError(f"The adapter {spec.model!r} records no base. Give the base as `model`, this as `adapter`.")
    return Location(config.base_model_name_or_path, config.revision, gguf_file=spec.gguf_file), model


def load_model(spec: RewardModelSpec) -> tuple[nn.Module, list[Location]]:
    """The model in evaluation mode, and the locations where its tokenizer may be, the most specific first."""
    base, adapter = _locate(spec)
    if adapter is None:
        model = _load_base(spec, base, {}) if base else spec.model
    else:
        model = _load_adapter(spec, base, adapter)
    if base is None:  # the user has loaded it, and its config may name where from
        name = getattr(spec.model.config, "_name_or_path", None)
        base = Location(name) if name else None
    return model.eval(), [location for location in (adapter, base) if location is not None]


def _load_adapter(spec: RewardModelSpec, base: Location | None, adapter: Location) -> nn.Module:
    from peft import PeftConfig, PeftModel, load_peft_weights
    from peft.tuners.tuners_utils import BaseTunerLayer

    path, kwargs = adapter.name_or_path, adapter.kwargs | _hub_kwargs(spec)
    task_type = PeftConfig.from_pretrained(path, **kwargs).task_type
    if task_type not in (None, "SEQ_CLS"):
        raise ValueError(f"The adapter {path!r} is for the task {task_type}, but a reward needs SEQ_CLS.")
    if spec.model_kwargs.get("use_safetensors", True):
        require_safetensors(adapter, _hub_kwargs(spec))
    weights = load_peft_weights(path, device="cpu", **kwargs)
    model = _load_base(spec, base, weights) if base else spec.model
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"The model under the adapter {path!r} already carries one, and both would act. Give every reward a model "
            "of its own, for instance as a str."
        )
    model = PeftModel.from_pretrained(model, path, **kwargs)
    # its weights are read again, as only this says which of them PEFT did not find
    unmatched = unmatched_keys(model, model.active_adapter, model.load_adapter(path, model.active_adapter, **kwargs))
    for problem, keys in (
        ("lacks", unmatched["missing_keys"]),
        ("has weights without a place:", unmatched["unexpected_keys"]),
    ):
        if keys:
            raise ValueError(
                f"The adapter {path!r} does not fit the reward model {base.name_or_path if base else type(spec.model).__name__!r}: "
                f"it {problem} {sorted(keys)[0]!r} (of {len(keys)}). Give it the base that it was trained over."
            )
    return model


def _load_base(spec: RewardModelSpec, base: Location, adapter_weights: dict[str, torch.Tensor]) -> nn.Module:
    # PEFT's own prefixes, the second that of prompt learning
    saved = {key.removeprefix("base_model.").removeprefix("model."): w for key, w in adapter_weights.items()}
    saved |= {key.removeprefix("base_model."): w for key, w in adapter_weights.items()}
    # the config of a language model does not know the head that the adapter brings
    heads = [saved[key] for key in ("score.weight", "classifier.weight", "classifier.out_proj.weight") if key in saved]
    kwargs: dict[str, Any] = {"use_safetensors": None if base.gguf_file else True}
    if heads:
        kwargs["num_labels"] = heads[0].shape[0]
    model, info = AutoModelForSequenceClassification.from_pretrained(
        base.name_or_path, **base.kwargs, output_loading_info=True, **(kwargs | spec.model_kwargs)
    )
    random = sorted(str(key) for key in info["missing_keys"] | info["mismatched_keys"] if key not in saved)
    if random:
        raise ValueError(
            f"{base.name_or_path!r} is not a reward model: its checkpoint lacks {random}, which would be random. Give a "
            "sequence classifier, or an adapter that carries these weights (PEFT's `modules_to_save`)."
        )
    return model


def load_reward_tokenizer(spec: RewardModelSpec, name: str, locations: list[Location]) -> PreTrainedTokenizerBase:
    """The tokenizer of a reward model, with a pad token."""
    tokenizer = spec.processing_class
    if tokenizer is None or isinstance(tokenizer, str):
        if isinstance(tokenizer, str):
            locations = [Location(tokenizer)]
        kwargs = _hub_kwargs(spec, "trust_remote_code", "code_revision")
        tokenizer = load_tokenizer(locations, f"The reward {name!r}", "Give `processing_class`.", **kwargs)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"The tokenizer of reward {name!r} has no pad and no EOS token. Set its `pad_token`.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def choose_logit(spec: RewardModelSpec, name: str, config: Any) -> int:
    labels = dict(config.id2label)
    if len(labels) == 1 and spec.activation in ("softmax", "log_softmax"):
        raise ValueError(f"{spec.activation} over the one output of reward {name!r} is constant. Use 'sigmoid'.")
    if list(labels.values()).count(spec.logit) > 1:
        raise ValueError(
            f"Several outputs of reward {name!r} are called {spec.logit!r}: give the index. Its id2label: {labels}."
        )
    choices = {0: 0, None: 0} if len(labels) == 1 else {}
    choices |= {label: index for index, label in labels.items()} | {index: index for index in labels}
    if spec.logit not in choices:
        raise ValueError(
            f"The model of reward {name!r} has {len(labels)} outputs, and `logit` must say which is the reward, but is "
            f"{spec.logit!r}. Its id2label: {labels}."
        )
    return choices[spec.logit]


def length_limit(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    for name, module in model.named_modules():
        # a RoBERTa counts positions from behind its padding index, and has that many fewer than its config says
        if name.endswith(".position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    # the limit of a tokenizer without one is 10^30
    return min((limit for limit in limits if limit is not None and 0 < limit < 10**20), default=None)


def reads_both_ways(config: Any, tokenizer: PreTrainedTokenizerBase, added: Sequence[int]) -> bool:
    """Whether a classifier reads texts in both directions, and so needs the special tokens that it was trained with."""
    # the classification and separator tokens are those of encoders
    ends = {tokenizer.cls_token_id, tokenizer.sep_token_id} & set(added)
    config = config.get_text_config()
    return bool(ends) or config.is_encoder_decoder or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
