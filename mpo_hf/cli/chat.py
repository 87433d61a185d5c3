"""`mpo-hf chat`: a conversation with a mixture."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase, set_seed

from ..mixture.modeling_mixture import MixturePolicyModel
from ..text_table import printable
from .generate import SAMPLING_SECTION, SamplingArguments, generate, make_streamer, sampling_kwargs
from .loading import MODEL_SECTION, ModelArguments, load_mixture, load_tokenizer_of
from .parser import CommandParser


COMMANDS = "/weights shows the mixture weights, /weights 0.2 0.8 changes them, /reset starts over, /quit leaves."


@dataclass
class ChatArguments:
    """The conversation."""

    system: str | None = field(default=None, metadata={"help": "System message."})


EXAMPLES = """
mpo-hf chat --model mix
mpo-hf chat --model user/mix --weights 0.2 0.8 --temperature 0.7 --system "Answer in one sentence."
"""


def make_parser() -> CommandParser:
    """The parser of the command."""
    return CommandParser(
        "chat",
        [ModelArguments, ChatArguments, SamplingArguments],
        usage="--model MIX [options]",
        description=f"Chats with a mixture whose tokenizer has a chat template. In the conversation, {COMMANDS}",
        sections={"mixture": MODEL_SECTION, "conversation": ["system"], "decoding": SAMPLING_SECTION},
        examples=EXAMPLES,
    )


def run(argv: Sequence[str]) -> None:
    """Runs `mpo-hf chat`."""
    model_args, args, sampling = make_parser().parse(argv)
    kwargs = sampling_kwargs(sampling)
    model = load_mixture(model_args)
    tokenizer = load_tokenizer_of(model, model_args.model, model_args.revision)
    if tokenizer.chat_template is None:
        raise ValueError("The mixture's tokenizer has no chat template. `mpo-hf generate` continues plain texts.")
    if sampling.seed is not None:
        set_seed(sampling.seed)
    print(f"{_describe_weights(model)}\n{COMMANDS}")
    Conversation(model, tokenizer, args.system, kwargs).run()


class Conversation:
    """
    The messages so far, and the handling of the next line.

    Args:
        model ([`MixturePolicyModel`]): the mixture.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer, with a chat template.
        system (`str`, *optional*): the system message.
        kwargs (`dict`): arguments of `model.generate()`.
    """

    def __init__(
        self, model: MixturePolicyModel, tokenizer: PreTrainedTokenizerBase, system: str | None, kwargs: dict[str, Any]
    ):
        self.model, self.tokenizer, self.kwargs = model, tokenizer, kwargs
        self.opening = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self.opening)

    def run(self) -> None:
        """Reads lines until the input ends or one is `/quit`."""
        while (line := _read_line()) is not None:
            command, *arguments = line.split() or [""]
            if command == "/quit":
                return
            elif command == "/reset":
                self.messages = list(self.opening)
                print("Forgotten.")
            elif command == "/weights":
                self.set_weights(arguments)
            elif command.startswith("/"):
                print(COMMANDS)
            elif command:
                self.answer(line)

    def set_weights(self, arguments: Sequence[str]) -> None:
        """Changes the mixture weights if there are arguments, and prints them."""
        try:
            if arguments:
                self.model.mixture_weights = [float(argument.strip(",")) for argument in arguments]
            print(_describe_weights(self.model))
        except ValueError as err:
            print(f"error: {printable(str(err))}")

    def answer(self, line: str) -> None:
        """Answers a message. It is dropped if its answer is interrupted."""
        messages = [*self.messages, {"role": "user", "content": line}]
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        try:
            streamer = make_streamer(self.tokenizer)
            (text,) = generate(self.model, inputs, self.tokenizer, streamer=streamer, **self.kwargs)
        except KeyboardInterrupt:
            print("\n(interrupted)")
            return
        self.messages = [*messages, {"role": "assistant", "content": text}]


def _read_line() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None


def _describe_weights(model: MixturePolicyModel) -> str:
    pairs = zip(model.config.labels, model.config.mixture_weights)
    return ", ".join(f"{printable(label)} {weight:.4g}" for label, weight in pairs)
