"""TRL's parser, with a short page of help and explanations of unknown options."""

import argparse
import difflib
import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from trl import TrlParser

from ..text_table import printable
from .yaml_options import convert, read_yaml


WIDTH, COLUMN = 110, 38

# Options that have another name in Python.
PYTHON_NAMES = {
    "reward_funcs": "rewards",
    "ref_model": "reference",
    "train_dataset": "dataset",
    "processing_class": "tokenizer",
}


class UsageError(ValueError):
    """Options that make no sense, which exit with status 2, as options that cannot be parsed do."""


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
        mappings (`Sequence[str]`, *optional*): options whose values may be mappings in YAML.
        rivals (`Mapping[str, Sequence[str]]`, *optional*):
            For an option that is given on the command line, those that it takes the place of in a YAML file.
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
        mappings: Sequence[str] = (),
        rivals: Mapping[str, Sequence[str]] | None = None,
    ):
        self.sections, self.mappings, self.rivals = sections, mappings, rivals or {}
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

        Raises:
            `UsageError`: for options that do not fit together.
            `ValueError`, `OSError`: for a YAML file that cannot be read.
        """
        args, path = self._take_config(argv)
        self._check_repeated(args)
        unknown = self._set_defaults(path, args) if path is not None else []
        self._take_json()
        try:
            *options, in_argv = self.parse_args_into_dataclasses(args, return_remaining_strings=True)
        except (ValueError, ImportError) as err:  # by a dataclass that looks at its fields
            raise UsageError(self.in_shell_words(str(err))) from err
        if unknown := unknown + in_argv:
            self.error(self._explain_unknown(unknown))
        return options

    def _take_config(self, argv: Sequence[str]) -> tuple[list[str], str | None]:
        """The arguments without `--config`, and its value."""
        args = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        if args.count("--config") > 1:
            self.error("--config is given twice: put all options into one file")
        if "--config" not in args:
            return args, None
        place = args.index("--config")
        if not args[place + 1 :]:
            self.error("--config needs a file")
        return args[:place] + args[place + 2 :], args[place + 1]

    def _check_repeated(self, args: Sequence[str]) -> None:
        """Refuses `--prompt a --prompt b`, of which argparse would take the last one only."""
        for action in self._actions:
            places = [i for i, arg in enumerate(args) if arg.split("=", 1)[0] in action.option_strings]
            counts = [sum(1 for _ in _values_behind(args, place)) for place in places]
            if action.nargs == "+" and len(places) > 1 and set(counts) == {1}:
                self.error(f"{args[places[0]]} is given {len(places)} times: put all of its values behind one")

    def _set_defaults(self, path: str, args: Sequence[str]) -> list[str]:
        """Takes a YAML file as defaults, and returns names in it that are no options."""
        values, texts = read_yaml(path)
        env = values.pop("env", None) or {}
        if not isinstance(env, dict):
            raise ValueError(f"`env` in {path} must be a mapping of names and values, got {env!r}.")
        os.environ.update({str(name): str(value) for name, value in texts.get("env", {}).items()} if env else {})
        actions = {
            option.lstrip("-"): action
            for action in self._actions
            for option in action.option_strings
            if not isinstance(action, argparse._StoreFalseAction)
        }
        given = {
            action.dest for action in actions.values() if set(action.option_strings) & {a.split("=")[0] for a in args}
        }
        replaced = {rival for name in given for rival in self.rivals.get(name, ())}
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        seen: dict[str, str] = {}
        for name in [name for name in values if str(name) in actions]:
            action = actions[name]
            if action.dest in seen:
                raise UsageError(f"{path} has `{seen[action.dest]}` and `{name}`, which are one option.")
            seen[action.dest] = name
            try:
                value = convert(
                    values[name],
                    texts.get(name, values[name]),
                    hints.get(action.dest, Any),
                    action.dest in self.mappings,
                )
            except ValueError as err:
                raise UsageError(f"`{name}` in {path} {err}.") from err
            if action.dest not in replaced:
                self.set_defaults_with_config(**{action.dest: value})
        return [f"--{name}" for name in values if str(name) not in actions]

    def _take_json(self) -> None:
        """Lets options that are mappings be written in JSON, as `--model_init_kwargs '{"dtype": "bfloat16"}'`."""
        for action in self._actions:
            if getattr(action.type, "__name__", None) == "dict":
                action.type = _json_mapping

    def in_shell_words(self, message: str) -> str:
        """A message with options as one writes them in a shell: `--max_steps 50` in place of `max_steps=50`."""
        known = {option.lstrip("-"): option for action in self._actions for option in action.option_strings}
        known |= {name: f"--{option}" for name, option in PYTHON_NAMES.items() if option in known}

        def translated(found: re.Match) -> str:
            name, value = found["name"], (found["value"] or "").strip("\"'")
            if name not in known:
                return found[0]
            value = {"True": "true", "False": "false"}.get(value, value)
            return f"{known[name]} {value}".strip() if value != "..." else known[name]

        return re.sub(r"`(?P<name>\w+)(=(?P<value>[^`]*))?`", translated, message)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)} ({self.prog} --help explains the options)\n")

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


def _values_behind(args: Sequence[str], place: int) -> Sequence[str]:
    """The values of the option at a place."""
    if "=" in args[place]:
        return args[place : place + 1]
    end = next((i for i in range(place + 1, len(args)) if args[i].startswith("--")), len(args))
    return args[place + 1 : end]


def _json_mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a mapping in JSON, such as '{{\"name\": 1}}', got {text!r}")
    return value


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
