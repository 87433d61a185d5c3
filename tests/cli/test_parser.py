"""Options in YAML files and on the command line: every value has the type of its option, or is refused."""

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
from transformers.trainer_utils import IntervalStrategy

from mpo_hf.cli.parser import CommandParser, UsageError
from mpo_hf.cli.yaml_options import read_yaml


@dataclass
class Options:
    names: list[str] = field(default_factory=list)
    numbers: list[float] | None = None
    count: int = 1
    limit: int | None = 2
    rate: float = 0.5
    flag: bool = False
    word: str | None = None
    table: dict[str, Any] | str | None = None
    mapping: dict[str, Any] | None = None
    choice: IntervalStrategy | str = "no"
    several: None | str | list[str] = None
    other: str | None = field(default=None, metadata={"aliases": ["--another"]})

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f'`count={self.count}` must be 1 or more; see `word="x"`, `flag=True` and `unknown=3`.')


@pytest.fixture
def parse(tmp_path):
    def parse(text, *argv):
        (tmp_path / "options.yaml").write_text(text, encoding="utf-8")
        parser = CommandParser("try", [Options], "", "", {}, "", rivals={"word": ["other"]}, mappings=["names"])
        return parser.parse(["--config", str(tmp_path / "options.yaml"), *argv])[0]

    return parse


@pytest.mark.parametrize(
    "line, name, value",
    [
        ("names: [on, off, 2026-01-01, 0123, 1e3]", "names", ["on", "off", "2026-01-01", "0123", "1e3"]),
        ("names: yes", "names", ["yes"]),
        ("names: [{label: a}]", "names", [{"label": "a"}]),
        ("numbers: [1e-1, '2', 3]", "numbers", [0.1, 2.0, 3.0]),
        ("numbers: 1e-1", "numbers", [0.1]),
        ("count: 16.0", "count", 16),
        ("count: '3'", "count", 3),
        ("limit: null", "limit", None),
        ("limit:", "limit", None),
        ("rate: 1e-1", "rate", 0.1),
        ("rate: 2", "rate", 2.0),
        ("flag: on", "flag", True),
        ("flag: 'no'", "flag", False),
        ("flag: 1", "flag", True),
        ("word: 0123456", "word", "0123456"),
        ("word: no", "word", "no"),
        ("word: 1:30", "word", "1:30"),
        ("table: {x: 1e-1, y: 2, z: no, w: 2026-01-01}", "table", {"x": 0.1, "y": 2, "z": False, "w": "2026-01-01"}),
        ("mapping: {x: .5}", "mapping", {"x": 0.5}),
        ("choice: no", "choice", "no"),
        ("several: [a, 1]", "several", ["a", "1"]),
        ("another: x", "other", "x"),
    ],
)
def test_value_in_yaml_has_the_type_of_its_option(parse, line, name, value):
    found = getattr(parse(line), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("count: 1.5", "`count` in .*options.yaml must be a whole number, got '1.5'"),
        ("count: [1, 2]", "`count` in .* must be a whole number"),
        ("count: yes", "`count` in .* must be a whole number, got 'yes'"),
        ("count: .inf", "`count` in .* must be a whole number"),
        ("count:", "`count` in .* needs a whole number, and has no value"),
        ("numbers: [a]", "`numbers` in .* must be a number, got 'a'"),
        ("flag: maybe", "`flag` in .* must be true or false"),
        ("word: [a, b]", "`word` in .* must be a text"),
        ("word: {a: b}", "`word` in .* must be a text"),
        ("mapping: [1]", "`mapping` in .* must be a mapping"),
        ("other: x\nanother: y", "`other` and `another`, which are one option"),
    ],
)
def test_value_of_another_type_is_refused(parse, line, message):
    with pytest.raises(UsageError, match=message):
        parse(line)


@pytest.mark.parametrize("text", ["count: 1\ncount: 2", "names: [", "- a list", "word", ""])
def test_file_that_holds_no_options(parse, text):
    with pytest.raises(ValueError, match=r"options\.yaml"):
        parse(text)


def test_file_in_another_encoding(tmp_path):
    (tmp_path / "options.yaml").write_bytes(b"word: caf\xe9")
    with pytest.raises(ValueError, match="options.yaml is not a file in YAML"):
        read_yaml(str(tmp_path / "options.yaml"))


def test_command_line_takes_the_place_of_the_file(parse):
    assert parse("count: 2\nother: x", "--count", "3").count == 3
    found = parse("other: x", "--word", "y")
    assert (found.word, found.other) == ("y", None)  # options that exclude one another
    assert parse("mapping: {a: 1}", "--mapping", '{"b": 2}').mapping == {"b": 2}


def test_environment_of_the_file(parse, monkeypatch):
    monkeypatch.setenv("SOME_NAME", "before")
    assert parse("env: {SOME_NAME: on}\ncount: 2").count == 2
    assert os.environ["SOME_NAME"] == "on"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--names", "a", "--names", "b"], "--names is given 2 times"),
        (["--nmaes", "a"], "did you mean --names"),
        (["--mapping", "[1]"], "must be a mapping in JSON"),
        (["--count", "many"], "--count"),
        (["--config", "x", "--config"], "--config is given twice"),
    ],
)
def test_mistakes_on_the_command_line(capsys, argv, message):
    with pytest.raises(SystemExit) as raised:
        CommandParser("try", [Options], "", "", {}, "").parse(argv)
    assert raised.value.code == 2 and message in capsys.readouterr().err


def test_a_later_list_replaces_an_earlier_one(parse):
    assert parse("count: 1", "--names", "a", "b", "--names", "c").names == ["c"]


def test_errors_are_in_the_words_of_the_shell(parse):
    with pytest.raises(
        UsageError, match=r"^--count 0 must be 1 or more; see --word x, --flag true and `unknown=3`\.$"
    ):
        parse("count: 0")
