"""`mpo-hf`: runs a command, and reports errors of a user in one line."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__


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
        `int`: the exit status: 0, 1 for an error, 130 when interrupted. Options that cannot be parsed exit with 2.
    """
    parser = _make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    debug = args.debug or os.environ.get("MPO_HF_DEBUG", "") not in ("", "0")
    try:
        return importlib.import_module(f".{COMMANDS[args.command][0]}", __package__).run(args.arguments) or 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has ended, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as err:
        if debug or not _is_user_error(err):
            raise
        message = " ".join(str(err).split()) or type(err).__name__
        print(f"mpo-hf {args.command}: error: {message} (mpo-hf --debug shows where)", file=sys.stderr)
        return 1


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
    """Whether it is a wrong value, a missing file or repository, or an error in a reward function of the user."""
    names = {cls.__name__ for cls in type(err).__mro__}
    # by name, as their modules may not have been imported
    return isinstance(err, ValueError | OSError) or bool(names & {"RewardError", "YAMLError"})


if __name__ == "__main__":
    sys.exit(main())
