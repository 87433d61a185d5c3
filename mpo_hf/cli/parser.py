"""TRL's parser, with a short page of help and explanations of unknown options."""

import argparse
import difflib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from trl import TrlParser


WIDTH, COLUMN = 110, 38


class CommandParser(TrlParser):
    """
    Parses the options of one command from the command line, and from the YAML file that `--config` names.

    Args:
        command (`str`): name of the command.
        dataclass_types (`Sequence[type]`): the options, as `TrlParser` takes them.
        usage (`str`): the required arguments.
        description (`str`): the description of the command.
        sections (`Mapping[str, Sequence[str]]`):
            Names of the options on the page of help, by section. Others are listed by `--help_all`.
        examples (`str`): examples for the page of help.
        texts (`Mapping[str, str]`, *optional*): shorter descriptions of options for the page of help.
    """

    def __init__(
        self,
        command: str,
        dataclass_types: Sequence[type],
        usage: str,
        description: str,
        sections: Mapping[str, Sequence[str]],
        examples: str,
        texts: Mapping[str, str] | None = None,
    ):
        self.sections = sections
        self.texts = texts or {}
        self.examples = textwrap.dedent(examples).strip("\n")
        super().__init__(
            dataclass_types,
            prog=f"mpo-hf {command}",
            usage=f"mpo-hf {command} {usage}",
            description=" ".join(description.split()),
            allow_abbrev=False,
        )
        # read by `parse_args_and_config` before the other options are
        self.add_argument(
            "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with any of these options"
        )

    def parse(self, argv: Sequence[str]) -> list[Any]:
        """
        Parses options. Exits with a message if they cannot be parsed.

        Args:
            argv (`Sequence[str]`): the arguments after the command.

        Returns:
            `list`: an instance of every dataclass, and a namespace if there are other arguments.
        """
        args = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        if args and args[-1] == "--config":
            self.error("--config needs a file")
        *options, in_config, in_argv = self.parse_args_and_config(
            args, return_remaining_strings=True, separate_remaining_strings=True
        )
        if unknown := in_config[::2] + in_argv:
            self.error(self._explain_unknown(unknown))
        return options

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        # a file may use any name of an option, like the command line
        names = {
            option.lstrip("-"): action.dest
            for action in self._actions
            for option in action.option_strings
            if not isinstance(action, argparse._StoreFalseAction)
        }
        return super().set_defaults_with_config(**{names.get(key, key): value for key, value in kwargs.items()})

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help explains the options)\n")

    def _explain_unknown(self, unknown: Sequence[str]) -> str:
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        options = [name for name in unknown if name.startswith("--")]
        if not options:
            return f"unexpected {' '.join(unknown)!r}"
        close = difflib.get_close_matches(options[0], known, n=1)
        return f"unknown option {options[0]}" + (f"; did you mean {close[0]}?" if close else "")

    # ---- help ----

    def format_help(self) -> str:
        """The page of help."""
        lines = [f"usage: {self.usage}", "", *textwrap.wrap(self.description, WIDTH)]
        for title, names in self.sections.items():
            lines += ["", f"{title}:"]
            for name in names:
                lines += self._describe(name)
        lines += ["", "help:", *self._describe("config"), *_columns("-h, --help", "show this page")]
        if self._has_more():
            lines += _columns("--help_all", "show all options, those of transformers.TrainingArguments too")
        return "\n".join([*lines, "", "examples:", textwrap.indent(self.examples, "  "), ""])

    def format_full_help(self) -> str:
        """All options, as argparse lists them."""
        return super().format_help()

    def _has_more(self) -> bool:
        return any(isinstance(action, _FullHelp) for action in self._actions)

    def add_full_help(self) -> None:
        """Adds `--help_all`."""
        self.add_argument("--help_all", action=_FullHelp, nargs=0, default=argparse.SUPPRESS, help="show all options")

    def _describe(self, name: str) -> list[str]:
        action = next(
            a for a in self._actions if f"--{name}" in a.option_strings or (name, []) == (a.dest, a.option_strings)
        )
        text, default = self.texts.get(name) or action.help or "", action.default
        switched_on = default is True
        if switched_on:
            text = f"{text.rstrip('.')} (default: yes)"
        elif default not in (None, False, argparse.SUPPRESS) and default != []:
            text = f"{text.rstrip('.')} (default: {default})"
        if not action.option_strings:
            return _columns(name.upper(), text)
        return _columns(f"--{'[no_]' if switched_on else ''}{name} {_metavar(action)}", text)


class _FullHelp(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_full_help())
        parser.exit()


def _metavar(action: argparse.Action) -> str:
    if action.nargs == 0 or action.const is True:  # a switch
        return ""
    if action.choices is not None:
        return "|".join(map(str, action.choices))
    metavar = action.metavar or {"int": "N", "float": "X"}.get(getattr(action.type, "__name__", None), "TEXT")
    return f"{metavar} ..." if action.nargs == "+" else metavar


def _columns(left: str, text: str) -> list[str]:
    indent = " " * COLUMN
    lines = textwrap.wrap(text, WIDTH - COLUMN) or [""]
    first = [f"  {left:<{COLUMN - 2}}{lines[0]}"] if len(left) < COLUMN - 2 else [f"  {left}", indent + lines[0]]
    return [line.rstrip() for line in first + [indent + line for line in lines[1:]]]
