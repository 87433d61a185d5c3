"""`mpo-hf generate`: completions of prompts."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase, TextStreamer, set_seed

from ..mixture.modeling_mixture import MixturePolicyModel
from .loading import MODEL_SECTION, ModelArguments, load_mixture, load_tokenizer_of
from .parser import CommandParser


@dataclass
class SamplingArguments:
    """How to decode. The mixture's generation config has the defaults."""

    max_new_tokens: int = field(default=256, metadata={"help": "Maximum length of a completion, in tokens."})
    temperature: float | None = field(default=None, metadata={"help": "Sampling temperature; 0 for greedy decoding."})
    top_p: float | None = field(
        default=None, metadata={"help": "Sample from the most likely tokens with this total probability."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Sample from this many of the most likely tokens."})
    seed: int | None = field(default=None, metadata={"help": "Seed of the sampling."})


SAMPLING_SECTION = ["max_new_tokens", "temperature", "top_p", "top_k", "seed"]


@dataclass
class GenerateArguments:
    """The prompts, and the format of the completions."""

    prompt: list[str] = field(default_factory=list, metadata={"help": "The prompts, each in quotation marks."})
    prompts_file: str | None = field(
        default=None, metadata={"help": "File with one prompt per line; - for standard input.", "metavar": "FILE"}
    )
    system: str | None = field(default=None, metadata={"help": "System message."})
    raw: bool = field(
        default=False, metadata={"help": "Continue the prompts as plain texts, without the tokenizer's chat template."}
    )
    batch_size: int = field(default=8, metadata={"help": "Prompts at a time."})
    json: bool = field(default=False, metadata={"help": 'Write lines of JSON: {"prompt": ..., "completion": ...}.'})


EXAMPLES = """
mpo-hf generate --model mix --prompt "What is a cloud?" --weights 0.2 0.8
mpo-hf generate --model user/mix --json --temperature 0.7 < prompts.txt > completions.jsonl
"""


def make_parser() -> CommandParser:
    """The parser of the command."""
    return CommandParser(
        "generate",
        [ModelArguments, GenerateArguments, SamplingArguments],
        usage='--model MIX [--prompt "..."] [options]',
        description="Completes prompts with a mixture. Prompts come from --prompt, from --prompts_file or from standard input, "
        "one per line. They become user messages if the tokenizer has a chat template.",
        sections={
            "mixture": MODEL_SECTION,
            "prompts": ["prompt", "prompts_file", "system", "raw", "batch_size", "json"],
            "decoding": SAMPLING_SECTION,
        },
        examples=EXAMPLES,
    )


def run(argv: Sequence[str]) -> None:
    """Runs `mpo-hf generate`."""
    model_args, args, sampling = make_parser().parse(argv)
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {args.batch_size}.")
    kwargs = sampling_kwargs(sampling)
    prompts = read_prompts(args)
    model = load_mixture(model_args)
    tokenizer = load_tokenizer_of(model, model_args.model, model_args.revision)
    if sampling.seed is not None:
        set_seed(sampling.seed)
    if len(prompts) == 1 and not args.json:
        generate(model, encode(tokenizer, args, prompts), tokenizer, streamer=make_streamer(tokenizer), **kwargs)
        return
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        for prompt, text in zip(batch, generate(model, encode(tokenizer, args, batch), tokenizer, **kwargs)):
            line = json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False)
            print(line if args.json else f"> {prompt}\n{text}\n", flush=True)


def sampling_kwargs(args: SamplingArguments) -> dict[str, Any]:
    """
    The arguments of `generate()`.

    Args:
        args ([`SamplingArguments`]): the options.

    Raises:
        `ValueError`: for values out of range.
    """
    if args.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, got {args.max_new_tokens}.")
    if args.temperature is not None and args.temperature < 0:
        raise ValueError(f"--temperature must be at least 0, got {args.temperature}.")
    kwargs: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    if args.temperature == 0:
        return kwargs | {"do_sample": False}
    given = {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(args, name)) is not None}
    return kwargs | given | ({"do_sample": True} if given else {})


def read_prompts(args: GenerateArguments) -> list[str]:
    """
    The prompts, in their order.

    Args:
        args ([`GenerateArguments`]): the options.

    Raises:
        `ValueError`: when there is none.
    """
    prompts = [args.prompt] if isinstance(args.prompt, str) else list(args.prompt)
    if args.prompts_file not in (None, "-"):
        with open(args.prompts_file, encoding="utf-8") as file:
            prompts += _lines(file)
    elif args.prompts_file == "-" or (not prompts and not sys.stdin.isatty()):
        prompts += _lines(sys.stdin)
    if not prompts:
        raise ValueError(
            'There is no prompt. Give one by --prompt "...", or several by --prompts_file FILE, one per line.'
        )
    return prompts


def _lines(file) -> Iterator[str]:
    return (line.rstrip("\r\n") for line in file if line.strip())


def encode(tokenizer: PreTrainedTokenizerBase, args: GenerateArguments, prompts: Sequence[str]) -> BatchEncoding:
    """
    Token ids of prompts, padded on the left.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer.
        args ([`GenerateArguments`]): whether and how to apply its chat template.
        prompts (`Sequence[str]`): the prompts.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None or args.raw:
        if args.system is not None:
            raise ValueError("--system needs a tokenizer with a chat template, and no --raw.")
        return tokenizer(list(prompts), padding=len(prompts) > 1, padding_side="left", return_tensors="pt")
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    texts = [
        tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    # the template has added the special tokens
    return tokenizer(texts, padding=len(texts) > 1, padding_side="left", add_special_tokens=False, return_tensors="pt")


def generate(
    model: MixturePolicyModel, inputs: BatchEncoding, tokenizer: PreTrainedTokenizerBase, **kwargs: Any
) -> list[str]:
    """
    Texts of completions.

    Args:
        model ([`MixturePolicyModel`]): the mixture.
        inputs ([`~transformers.BatchEncoding`]): the prompts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer.
        kwargs: arguments of `model.generate()`.
    """
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("The prompt has no tokens.")
    with torch.no_grad():
        output = model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **kwargs)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def make_streamer(tokenizer: PreTrainedTokenizerBase) -> TextStreamer:
    """Writes completions to standard output, token by token."""
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
