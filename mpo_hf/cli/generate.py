"""`mpo-hf generate`: completions of prompts."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase, TextStreamer, set_seed

from ..mixture.modeling_mixture import MixturePolicyModel
from ..text_table import printable, to_json
from .data_files import Prompt, read_prompts_file, read_prompts_stream
from .loading import MODEL_SECTION, ModelArguments, load_mixture, load_tokenizer_of
from .parser import CommandParser, UsageError


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
        default=None,
        metadata={
            "help": "File with one prompt per line, or .jsonl, .json, .csv or .parquet with a column 'prompt' or 'messages'; - "
            "for standard input.",
            "metavar": "FILE",
        },
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "The column of prompts in that file.", "metavar": "NAME"}
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
            "prompts": ["prompt", "prompts_file", "prompt_column", "system", "raw", "batch_size", "json"],
            "decoding": SAMPLING_SECTION,
        },
        examples=EXAMPLES,
    )


def run(argv: Sequence[str]) -> None:
    """Runs `mpo-hf generate`."""
    model_args, args, sampling = make_parser().parse(argv)
    if args.batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, got {args.batch_size}.")
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
            if args.json:
                print(to_json({"prompt": prompt, "completion": text}), flush=True)
            else:
                print(f"> {_shown(prompt)}\n{_for_terminal(text)}\n", flush=True)


def sampling_kwargs(args: SamplingArguments) -> dict[str, Any]:
    """
    The arguments of `generate()`.

    Args:
        args ([`SamplingArguments`]): the options.

    Raises:
        `ValueError`: for values out of range.
    """
    limits = {  # name: the condition, in code and in words
        "max_new_tokens": (args.max_new_tokens >= 1, "at least 1"),
        "temperature": (args.temperature is None or 0 <= args.temperature < math.inf, "at least 0"),
        "top_p": (args.top_p is None or 0 < args.top_p <= 1, "above 0 and at most 1"),
        "top_k": (args.top_k is None or args.top_k >= 0, "at least 0"),
        "seed": (args.seed is None or 0 <= args.seed < 2**32, "from 0 to 2**32 - 1"),
    }
    for name, (holds, words) in limits.items():
        if not holds:
            raise UsageError(f"--{name} must be {words}, got {getattr(args, name)}.")
    kwargs: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    if args.temperature == 0:
        return kwargs | {"do_sample": False}
    given = {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(args, name)) is not None}
    return kwargs | given | ({"do_sample": True} if given else {})


def read_prompts(args: GenerateArguments) -> list[Prompt]:
    """
    The prompts, in their order.

    Args:
        args ([`GenerateArguments`]): the options.

    Raises:
        `ValueError`: when there is none, or one that is no prompt.
    """
    prompts: list[Prompt] = list(args.prompt)
    if blank := [prompt for prompt in args.prompt if not prompt.strip()]:
        raise UsageError(f"--prompt needs a text, got {blank[0]!r}.")
    reads_file = args.prompts_file not in (None, "-")
    reads_stream = args.prompts_file == "-" or (not prompts and not reads_file and not sys.stdin.isatty())
    if reads_file:
        prompts += read_prompts_file(args.prompts_file, args.prompt_column)
    elif reads_stream:
        prompts += read_prompts_stream(sys.stdin, args.prompt_column)
    elif args.prompt_column is not None:
        raise UsageError(f"--prompt_column {args.prompt_column} is for --prompts_file.")
    if not prompts:
        raise UsageError(
            'There is no prompt. Give one by --prompt "...", or several by --prompts_file FILE, one per line.'
        )
    return prompts


def encode(tokenizer: PreTrainedTokenizerBase, args: GenerateArguments, prompts: Sequence[Prompt]) -> BatchEncoding:
    """
    Token ids of prompts, padded on the left.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer.
        args ([`GenerateArguments`]): whether and how to apply its chat template.
        prompts (`Sequence[str]` or `Sequence[list]`): the prompts, texts or conversations.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None or args.raw:
        if args.system is not None:
            raise UsageError("--system needs a tokenizer with a chat template, and no --raw.")
        if any(not isinstance(prompt, str) for prompt in prompts):
            raise UsageError("Prompts that are conversations need a tokenizer with a chat template, and no --raw.")
        return tokenizer(list(prompts), padding=len(prompts) > 1, padding_side="left", return_tensors="pt")
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    texts = [
        tokenizer.apply_chat_template(
            [*system, *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)],
            add_generation_prompt=True,
            tokenize=False,
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


class _Streamer(TextStreamer):
    """Writes completions to standard output, token by token."""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        super().on_finalized_text(_for_terminal(text), stream_end)


def make_streamer(tokenizer: PreTrainedTokenizerBase) -> TextStreamer:
    """Writes completions to standard output, token by token."""
    return _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _for_terminal(text: str) -> str:
    """The answer of a model, which must not control a terminal. In a file or a pipe it stays as it is."""
    return printable(text, is_name=False) if sys.stdout.isatty() else text


def _shown(prompt: Prompt) -> str:
    return _for_terminal(prompt if isinstance(prompt, str) else str(prompt[-1]["content"]))
