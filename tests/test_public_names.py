"""
Keywords and fields of other libraries that this package passes or reads, looked up in the installed versions.

What is private is in test_private_names.py. Here the reader of source_reader.py follows the sources. So it finds by itself,
wherever it knows what an object is,

- calls of functions, classes and methods of other libraries, whose arguments must fit the signature. What a decorator
  accepts under an old name is not in the signature; what `**kwargs` would swallow must be listed in `MENTIONED`;
- fields and methods that are read or set, which one of the samples must have, or `MENTIONED`;
- methods of ours in place of others', whose arguments must be the same.

Where it does not know what an object is, a name that some sample has, and neither this package nor torch or Python, must be
listed in `READ`, or in `MENTIONED` if no sample has it. So must every name that is given to `getattr` or `hasattr`, which
would hide that it is gone, and every key of a dictionary called `...kwargs` or `inputs`. What is listed must be in use.

It does not see values, what a name means, names that are put together while the code runs, dictionaries of arguments that
are passed on, nor an old name that goes on working without a warning.
"""

import argparse
import ast
import functools
import inspect
import re
import sys
from collections import defaultdict
from pkgutil import resolve_name

import pyarrow
import pytest
import torch
from helpers import tiny
from source_reader import (
    LIBRARIES,
    SOURCES,
    Reader,
    defined_names,
    has,
    is_theirs,
    own_code,
    package_of,
    samples,
    samples_of,
)
from torch import nn
from transformers.utils import ModelOutput

from mpo_hf.mixture.compat import CACHE_NAME
from mpo_hf.mixture.hub_files import HUB_KWARGS
from mpo_hf.mixture.mixture_generation import REFUSED_OPTIONS


HUB = " ".join({*HUB_KWARGS, "revision", "subfolder"} - {"trust_remote_code"})


# ---- the lists ----

# What classes of ours have in place of what their bases in other libraries have, or ask for by name; also fields that are set
# on `self` for these.
OVERRIDDEN = {
    "ComponentCacheView": "update",
    "FitArguments": "dataset_name",
    "FitPrinter": "on_log",
    "FitProgress": "on_log",
    "JoinedStaticLayer": "cumulative_length device is_initialized keys max_cache_len update values",
    "JoinedView": "update",
    "MPOConfig": "learning_rate logging_steps lr_scheduler_type max_grad_norm max_steps per_device_eval_batch_size "
    "per_device_train_batch_size remove_unused_columns save_steps save_total_limit",
    "MPOTrainer": "accelerator args compute_loss create_model_card create_optimizer evaluation_loop floating_point_ops "
    "get_eval_dataloader get_test_dataloader get_train_dataloader init_hf_repo log model model_accepts_loss_kwargs "
    "optimizer prediction_step push_to_hub save_model train",
    "MixtureGenerationMixin": "create_masks_for_generate get_compiled_call init_continuous_batching "
    "prepare_inputs_for_generation",
    "MixtureLogitsProcessor": "supports_continuous_batching",
    "MixturePolicyConfig": "from_dict hidden_size layer_types max_position_embeddings model_type num_attention_heads "
    "num_hidden_layers per_layer_config save_pretrained sub_configs to_dict",
    "MixturePolicyModel": "_is_stateful all_tied_weights_keys base_model base_model_prefix config config_class "
    "create_masks_for_generate device forward from_pretrained get_compiled_call get_expanded_tied_weights_keys get_input_embeddings "
    "get_output_embeddings hf_device_map init_continuous_batching init_parallel_plans init_weights loss_type "
    "main_input_name prepare_inputs_for_generation push_to_hub resize_token_embeddings save_pretrained "
    "set_input_embeddings supports_gradient_checkpointing to train",
    "StackedCacheView": "update",
    "_FitState": "state",
    "_Streamer": "on_finalized_text",
    "_MirrorDescentCallback": "on_epoch_begin on_optimizer_step on_pre_optimizer_step on_train_begin on_train_end",
}
# Functions that methods of ours take the place of, where no base class has a method of the name.
BASES = {
    "create_masks_for_generate": "transformers.masking_utils.create_masks_for_generate",
    "forward": "transformers.LlamaForCausalLM.forward",
}
# Arguments of such methods that the base has not. Transformers has `private` from 5.23 on; the cache goes by its new and its
# old name; `output_...` and `return_dict` are in the `**kwargs` of a Llama.
OWN_ARGUMENTS = {
    "MixtureGenerationMixin._expand_inputs_for_generation": "mixture_weights",
    "MixturePolicyModel.forward": "cache mixture_weights output_attentions output_hidden_states past_key_values return_dict",
    "MixturePolicyModel.save_pretrained": "with_code",
    "MixtureSaving.create_model_card": "output_dir",
    "MixtureSaving.push_to_hub": "pin_revisions private upload_adapters",
    "MixtureSharingMixin.push_to_hub": "pin_revisions upload_adapters with_code",
}

# Names that are read of objects which the reader cannot follow, by their class.
READ = {
    "accelerate.Accelerator": "is_main_process num_processes process_index sync_gradients wait_for_everyone",
    "datasets.Dataset": "add_column iter remove_columns rename_column to_iterable_dataset with_format",
    "peft.PeftConfig": "base_model_name_or_path peft_type task_type trainable_token_indices",
    "peft.PeftModel": "active_adapter active_adapters disable_adapter get_base_model load_adapter peft_config set_adapter "
    "unload",
    "peft.tuners.tuners_utils.BaseTuner": "disable_adapter_layers enable_adapter_layers",
    "peft.tuners.tuners_utils.BaseTunerLayer": "adapter_layer_names base_layer disable_adapters lora_A lora_B "
    "lora_embedding_A lora_embedding_B lora_variant merged merged_adapters r scaling",
    "peft.utils.other.AuxiliaryTrainingWrapper": "modules_to_save original_module",
    "transformers.GenerationConfig": "do_sample output_attentions output_hidden_states output_logits output_scores "
    + " ".join(REFUSED_OPTIONS),
    "transformers.PreTrainedConfig": "_name_or_path get_text_config id2label is_encoder_decoder model_type",
    "transformers.PreTrainedModel": "base_model_prefix can_generate generation_config set_attn_implementation",
    "transformers.PreTrainedTokenizerBase": "apply_chat_template chat_template convert_ids_to_tokens pad",
    "transformers.Trainer": "accelerator",
    "transformers.TrainerControl": "should_save should_training_stop",
    "transformers.TrainerState": "epoch global_step is_local_process_zero is_world_process_zero",
    "transformers.TrainingArguments": "gradient_accumulation_steps resume_from_checkpoint save_strategy world_size",
    "transformers.cache_utils.Cache": "batch_select_indices crop get_seq_length has_previous_state offloading reorder_cache",
    "transformers.cache_utils.CacheLayerMixin": "cumulative_length cumulative_length_int keys lazy_initialization values",
    "transformers.utils.ModelOutput": "attentions hidden_states logits",
    "trl.ScriptArguments": "dataset_config dataset_streaming dataset_test_split dataset_train_split",
}
# Names that no sample and no signature has, by the code that knows them: arguments that are handed on, keys, and fields that
# are there at times only.
MENTIONED = {
    "accelerate.hooks.AlignDevicesHook": "execution_device",
    "accelerate.hooks.add_hook_to_module": "_hf_hook",
    "click.Command.main": "prog_name",
    "huggingface_hub.CommitInfo": "pr_revision",
    "huggingface_hub.ModelInfo": "card_data sha tags",
    "huggingface_hub.hf_hub_download": "cache_dir force_download local_files_only revision subfolder token",
    "huggingface_hub.utils.SafetensorsFileMetadata": "parameter_count",
    "tqdm.std.tqdm": "desc",
    "transformers.GenerationConfig": "do_sample eos_token_id max_new_tokens pad_token_id temperature top_k",
    "transformers.GenerationConfig.from_pretrained": HUB,
    "transformers.GenerationMixin": "_eos_token_tensor _is_user_defined _mask_length _pad_token_tensor assistant_model "
    "assistant_tokenizer attention_mask hf_quantizer inputs_embeds is_assistant is_compileable next_sequence_length "
    "output_modalities",
    "transformers.PreTrainedConfig": f"_attn_implementation _commit_hash attn_implementation num_labels {HUB}",
    "transformers.PreTrainedModel": "hf_device_map is_quantized quantization_config tie_word_embeddings",
    "transformers.PreTrainedModel.from_pretrained": "adapter_kwargs attn_implementation config device_map dtype "
    f"generation_config gguf_file output_loading_info trust_remote_code use_safetensors variant {HUB}",
    "transformers.PreTrainedModel.save_pretrained": "is_main_process max_shard_size push_to_hub state_dict token",
    "transformers.PreTrainedTokenizerBase.decode": "skip_special_tokens",
    # `PreTrainedConfig` has it in the first of the supported versions only
    "transformers.Trainer": "keys_to_ignore_at_inference",
    "transformers.dynamic_module_utils.custom_object_save": "auto_map",
    "transformers.integrations.peft.PeftAdapterMixin": "_hf_peft_config_loaded peft_config",
    "transformers.masking_utils.create_causal_mask": "is_causal",
    "transformers.modeling_layers.GradientCheckpointingLayer": "gradient_checkpointing",
    "transformers.models.bert.modeling_bert.BertLayer": "is_decoder",
    "transformers.models.gemma3.modeling_gemma3.Gemma3Attention": "use_bidirectional_attention",
    "transformers.models.llama.modeling_llama.LlamaRotaryEmbedding": "rope_parameters rope_type",
    "transformers.models.mamba.modeling_mamba.MambaMixer": "A_log x_proj",
    "transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRecurrentBlock": "_setup_cache",
    "transformers.models.roberta.modeling_roberta.RobertaEmbeddings": "padding_idx",
    "transformers.utils.hub.cached_files": f"_raise_exceptions_for_missing_entries {HUB}",
}
# Names that are not theirs, nor defined in code: arguments, options, variables of a template, metadata that the Hub reads.
OURS = (
    "base_model_relation citation component_kwargs component_peaks count debug fit loading name policies prune_below "
    "reconfigure"
)

# Inputs that components are run with, and which of them some have not. Those of `IN_KWARGS` decorators of Transformers know.
FORWARD = f"attention_mask input_ids logits_to_keep position_ids use_cache {CACHE_NAME}"
IN_KWARGS = "output_attentions output_hidden_states return_dict"
MODELS = {
    **dict.fromkeys(
        "Gemma3ForCausalLM GPT2LMHeadModel LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM".split(), ""
    ),
    # before its cache was called `cache`, it was not one that can be mixed
    "MambaForCausalLM": "position_ids" if CACHE_NAME == "cache" else f"position_ids {CACHE_NAME}",
}


def names_of(*texts: str) -> set[str]:
    return set(" ".join(texts).split())


# ---- what code says ----


@functools.cache
def file_of(module: str) -> ast.AST:
    return ast.parse(inspect.getsource(sys.modules[module]))


def code_of(place: object) -> list[ast.AST]:
    """All there is in a class or function."""
    node = file_of(place.__module__)
    for part in place.__qualname__.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return list(ast.walk(node))


def words_of(nodes: list[ast.AST]) -> set[str]:
    """Names in code, and strings that may be names; not those of decorators, by which old names go on working."""
    old = {id(part) for node in nodes for top in getattr(node, "decorator_list", ()) for part in ast.walk(top)}
    return {word for node in nodes if id(node) not in old for word in vars(node).values() if isinstance(word, str)}


def arguments_of(method: object) -> set[str]:
    """Names of arguments, and the stars of those that take the rest; none for what is no function."""
    function = getattr(method, "__func__", method)
    parameters = inspect.signature(function).parameters.values() if inspect.isfunction(function) else ()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return {stars.get(parameter.kind, parameter.name) for parameter in parameters}


# ---- tests ----


@functools.cache
def readers() -> list[Reader]:
    return [Reader(path, READ) for path in sorted(SOURCES.rglob("*.py"))]


def test_arguments_fit():
    problems = [problem for reader in readers() for problem in reader.problems]
    assert not problems, "\n".join(problems)


def test_fields_exist():
    absent = {name: place for reader in readers() for name, place in reader.absent.items()}
    assert not {name: place for name, place in absent.items() if name not in names_of(*MENTIONED.values())}


def test_swallowed_keywords_are_listed():
    swallowed = {name: place for reader in readers() for name, place in reader.swallowed.items()}
    assert not {n: place for n, place in swallowed.items() if n not in names_of(*MENTIONED.values(), OURS)}


def test_what_cannot_be_followed_is_listed():
    theirs = set().union(*map(dir, samples()))
    others = (
        torch.ones(1),
        nn.Linear(1, 1),
        nn.Embedding(1, 1),
        pyarrow.Table,
        argparse.ArgumentParser(),
        re.compile(""),
        "",
        {},
        [],
    )
    known = names_of(*READ.values(), *MENTIONED.values(), OURS, FORWARD, IN_KWARGS) | defined_names(own_code())
    known = known.union(*map(dir, others))
    found: dict[str, str] = {}
    for reader in readers():
        found |= {name: place for name, place in reader.unknown.items() if name in theirs and name[0] != "_"}
        found |= {name: place for name, place in reader.guarded.items() if name[:2] != "__"}
    assert not {name: place for name, place in found.items() if name not in known}


def test_what_is_listed_is_in_use():
    unused = names_of(*READ.values(), *MENTIONED.values(), OURS, FORWARD, IN_KWARGS) - words_of(own_code())
    assert not unused


@pytest.mark.parametrize("path", READ)
def test_listed_fields_exist(path):
    of_class = samples_of(resolve_name(path))
    assert not {name for name in READ[path].split() if not any(has(sample, name) for sample in of_class)}


@pytest.mark.parametrize("path", MENTIONED)
def test_listed_names_are_known_to_the_code_that_reads_them(path):
    missing = names_of(MENTIONED[path]) - words_of(code_of(resolve_name(path)))
    assert not missing


def own_classes() -> dict[str, tuple[list[type], list[type]]]:
    """Classes of ours that derive from others', by name: which classes of ours and of others they consist of."""
    every = {cls for reader in readers() for cls in vars(reader.module).values() if isinstance(cls, type)}
    bases = {cls.__name__: cls.__mro__ for cls in every if package_of(cls) == "mpo_hf" and is_theirs(cls)}

    def part(name: str, packages: set[str]) -> list[type]:
        return [base for base in bases[name] if package_of(base) in packages]

    return {name: (part(name, {"mpo_hf"}), part(name, LIBRARIES)) for name in bases}


@functools.cache
def asked_names(cls: type) -> list[str]:
    """What the code of a class reads of `self`, be it there or not."""
    return re.findall(r"(?:self\.|attr\(self, ')(\w+)", ast.unparse(code_of(cls)[0]))


def test_what_overrides_is_listed():
    found = {}
    for name, (ours, theirs) in own_classes().items():
        own = {n for c in ours for n in vars(c).keys() | defined_names(code_of(c)) if n[0] != "_" or n not in vars(c)}
        found[name] = own & set().union(*map(vars, theirs), *map(asked_names, theirs))
    for name in found.keys() | OVERRIDDEN.keys():
        listed, names = names_of(OVERRIDDEN.get(name, "")), found.get(name, set())
        assert not listed - names, name
        assert not names - listed - names_of(*MENTIONED.values()), name


def test_what_overrides_has_the_arguments_of_the_base():
    own: dict[str, set[str]] = defaultdict(set)
    for ours, theirs in own_classes().values():
        for cls, name in [(one, name) for one in ours for name in vars(one) if name != "__init__"]:
            default = resolve_name(BASES.get(name, "builtins.object"))
            wanted = arguments_of(next((vars(base)[name] for base in theirs if name in vars(base)), default))
            given, label = arguments_of(vars(cls)[name]), f"{cls.__name__}.{name}"
            lost = set() if "**" in given else wanted - given
            if wanted:
                own[label] |= (given & names_of(OWN_ARGUMENTS.get(label, "")) | given - wanted | lost) - {"*", "**"}
    assert {name: names for name, names in own.items() if names} == {n: names_of(t) for n, t in OWN_ARGUMENTS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_components_take_their_inputs(name):
    given = arguments_of(resolve_name(f"transformers.{name}").forward)
    assert names_of(FORWARD) - given == names_of(MODELS[name])
    assert "**" in given


def test_generate_hands_over_what_is_read():
    seen, model = [], tiny("llama", 0)
    model.register_forward_pre_hook(lambda model, args, kwargs: seen.append(kwargs), with_kwargs=True)
    mask = torch.tensor([[0, 1, 1]])
    model.generate(torch.tensor([[1, 4, 5]]), attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert names_of(FORWARD) - {"logits_to_keep"} <= set.intersection(*map(set, seen))
    for path in (BASES["create_masks_for_generate"], "transformers.GenerationMixin.prepare_inputs_for_generation"):
        assert {CACHE_NAME, "attention_mask"} <= arguments_of(resolve_name(path))
    output = model(torch.tensor([[1]]), **dict.fromkeys(IN_KWARGS.split(), True))
    assert output.hidden_states and isinstance(output, ModelOutput)
