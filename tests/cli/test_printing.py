"""What others have written, printed: nothing moves the cursor, colors, hides or turns around."""

import io
import json
import sys

import pytest
import torch
from transformers import TrainerState

from mpo_hf.cli import generate, main
from mpo_hf.cli.inspect_mixture import format_facts
from mpo_hf.text_table import format_table, printable, to_json
from mpo_hf.trainer.progress import log_line


HOSTILE = "a\x1b[31m\x9b2J\x07\r\n\u202eb\u200bc\u2028\ufeff\U000e0041"
SHOWN = r"a\x1b[31m\x9b2J\x07\r\n\u202eb\u200bc\u2028\ufeff\U000e0041"


def test_name_is_shown_with_escapes():
    assert printable(HOSTILE) == SHOWN and printable(SHOWN) == SHOWN
    assert printable("größer ✓ 日本 a_b") == "größer ✓ 日本 a_b"


def test_answer_keeps_its_lines_and_scripts():
    answer = "one\n\ttwo \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u200fx"
    assert printable(answer, is_name=False) == answer
    assert printable("a\x1b[2Jb\x9dc\r", is_name=False) == r"a\x1b[2Jb\x9dc\r"


def test_json_loses_nothing():
    value = {HOSTILE: [HOSTILE, 1, None, "größer"]}
    for indent in (None, 2):
        text = to_json(value, indent)
        assert json.loads(text) == value and "größer" in text
        assert printable(text.replace("\n", " ")) == text.replace("\n", " ")


def test_tables_show_names():
    assert format_table(["n", HOSTILE], [[HOSTILE, 1.0]]).splitlines()[2].split() == [*SHOWN.split(), "1.0000"]


def test_inspect_shows_names():
    component = {"label": HOSTILE, "weight": 1.0, "name_or_path": HOSTILE, "revision": HOSTILE, "license": HOSTILE}
    facts = {"components": [component], "reference": None, "models_in_memory": 1, "base_shared": False}
    facts |= {"parameters": 1, "vocab_size": 6, "num_hidden_layers": 2, "max_position_embeddings": None}
    text = format_facts(facts)
    assert text.count(SHOWN) == 4 and printable(text.replace("\n", " ")) == text.replace("\n", " ")


def test_log_line_shows_names():
    line = log_line({"loss": 0.0, f"weights/{HOSTILE}": 0.5}, TrainerState(global_step=1, max_steps=2))
    assert line == f"step 1/2 · weights {SHOWN} 0.50"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_answers_cannot_control_a_terminal_and_stay_as_they_are_in_a_file(monkeypatch, is_terminal):
    class Stream(io.StringIO):
        def isatty(self):
            return is_terminal

    class Tokenizer:
        def decode(self, ids, **kwargs):
            return "a\x1b[2J\nb"

    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)

    streamer = generate.make_streamer(Tokenizer())
    for ids in ([1], [2]):  # the prompt, which is skipped
        streamer.put(torch.tensor(ids))
    streamer.end()
    assert stream.getvalue() == ("a\\x1b[2J\nb\n" if is_terminal else "a\x1b[2J\nb\n")


class Module:
    """A command that raises."""

    def __init__(self, err):
        self.err = err

    def run(self, argv):
        raise self.err


@pytest.mark.parametrize(
    "err, status, line",
    [
        (ValueError(f"no {HOSTILE.strip()}"), 1, "mpo-hf chat: error: no a"),
        (ImportError("needs a package"), 1, "mpo-hf chat: error: needs a package"),
        (OSError(2, "No such file", "x"), 1, "mpo-hf chat: error: [Errno 2] No such file: 'x'"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_are_a_line_and_a_status(monkeypatch, capsys, err, status, line):
    monkeypatch.setattr(main.importlib, "import_module", lambda *names: Module(err))
    assert main.main(["chat"]) == status
    printed = capsys.readouterr().err.rstrip("\n")
    assert printed.startswith(line) and printable(printed) == printed


def test_error_of_ours_is_shown_whole(monkeypatch):
    monkeypatch.setattr(main.importlib, "import_module", lambda *names: Module(KeyError("ours")))
    with pytest.raises(KeyError):
        main.main(["chat"])
