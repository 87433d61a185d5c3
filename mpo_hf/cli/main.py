"""`mpo-hf`: runs a command, and reports errors of a user in one line."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..text_table import printable


# For each command, its module, which is imported when it runs, and its description.
COMMANDS = {
    "fit": ("fit", "find the mixture weights for policies and their rewards"),
    "generate": ("generate", "complete prompts with a mixture"),
    "chat": ("chat", "talk to a mixture"),
    "inspect": ("inspect_mixture", "show components, weights, sizes and licenses of a mixture"),
    "serve": ("serve", "answer OpenAI clients with a mixture; `transformers serve` that knows mixtures"),
    "push": ("push", "share a mixture on the Hub"),
    "extract-adapter": ("extract", "turn a full fine-tune into an adapter of its base"),
}

DESCRIPTION = """\
Mix aligned language models log-linearly, and find the weights that maximize the reward of the worst-off objective.

commands:
{commands}

`mpo-hf COMMAND --help` explains the options of a command. All of them can also be set in a YAML file, by --config FILE.
Several processes: accelerate launch -m mpo_hf.cli.main fit ..."""

EXAMPLES = """\
examples:
  mpo-hf fit --policies org/helpful org/harmless --reference org/sft --rewards org/helpful-rm org/harmless-rm \\
      --dataset prompts.jsonl --output_dir mix
  mpo-hf generate --model mix --prompt "What is a cloud?"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the command line.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments. Defaults to those of the process.

    Returns:
        `int`: the exit status: 0, 1 for an error, 2 for options that make no sense, 130 when interrupted.
    """
    parser = _make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is no reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    debug = args.debug or os.environ.get("MPO_HF_DEBUG", "") not in ("", "0")
    module = None
    try:
        module = importlib.import_module(f".{COMMANDS[args.command][0]}", __package__)
        status = module.run(args.arguments) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # here rather than at the exit, where nobody catches that its reader has gone
        return status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has ended, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        return 1
    except Exception as err:
        if debug or not _is_user_error(err):
            raise
        message = " ".join(str(err).split()) or type(err).__name__
        if hasattr(module, "make_parser"):
            message = module.make_parser().in_shell_words(message)
        print(f"mpo-hf {args.command}: error: {printable(message)} (mpo-hf --debug shows where)", file=sys.stderr)
        return 2 if _is_kind(err, "UsageError") else 1


def _make_parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<17}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="mpo-hf",
        usage="mpo-hf [--debug] COMMAND [options]",
        description=DESCRIPTION.format(commands=commands),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mpo_hf {__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from; also MPO_HF_DEBUG=1")
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _is_user_error(err: Exception) -> bool:
    """Whether it is a wrong value, a missing file, repository or package, or an error in a reward function of the user."""
    return isinstance(err, ValueError | OSError | ImportError) or _is_kind(err, "RewardError")


def _is_kind(err: Exception, name: str) -> bool:
    """Whether an error is of a class, by name, as its module may not have been imported."""
    return name in {cls.__name__ for cls in type(err).__mro__}


if __name__ == "__main__":
    sys.exit(main())
