"""The page of the documentation that says what works with which architecture."""

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path


# Names of the modes in the page's table, and what was compared.
COLUMNS = {
    "greedy": ("greedy", "greedy decoding of one prompt, in a mixture with a Llama"),
    "padding": ("left padding", "two prompts of different lengths in one batch"),
    "beams": ("beams", "beam search with two beams: tokens and scores"),
    "static": ("static cache", '`cache_implementation="static"`, with left padding where that works'),
    "resumed": ("resumed cache", "a second `generate` call with the cache of the first, and a text read in two parts"),
    "processor": ("processor", "`MixtureLogitsProcessor`, with the model as one of the others, and as the caller"),
    "stacked": ("two models", "a mixture of two models of the family, with `stack_models`"),
    "adapters": ("adapters", "two LoRA adapters on all linear layers of one base, against PEFT"),
}
WORDS = {"right": "✓", "refused": "refused", "alone": "alone", "wrong": "WRONG", "fails": "FAILS"}
INTRODUCTION = """# Architectures

What a mixture does with each decoder of Transformers. A tiny random model stands for every family, and its scores at every
step are compared with those of a loop that runs the whole text anew for every token, one prompt at a time, without a cache
and without mpo_hf. The table was made on {date} by `tests/sweep/sweep.py`, with {versions}.

| column | what was tried |
|---|---|
{columns}

- ✓: the scores and tokens are those of the loop.
- refused: an error says what does not go together, before the first token or in its place; see [below](#refusals).
- alone: the model is not right in this mode by itself either, without a mixture: it fails, or Transformers gives it other
  scores than its own forward pass over the whole text. See [below](#alone).

"""


def write_page(path: Path, results: Mapping[str, Mapping[str, Sequence[str]]], versions: Mapping[str, str]) -> None:
    """Writes results by architecture and mode."""
    tried = {name: modes for name, modes in sorted(results.items()) if "none" not in modes}
    left_out = [f"- `{name}`: {_reason(modes['none'])}" for name, modes in sorted(results.items()) if "none" in modes]
    head = INTRODUCTION.format(
        date=f"{datetime.date.today():%d %B %Y}".lstrip("0"),
        versions=", ".join(f"{package} {version}" for package, version in versions.items()),
        columns="\n".join(f"| {column} | {meaning} |" for column, meaning in COLUMNS.values()),
    )
    table = [
        "| family | " + " | ".join(column for column, _ in COLUMNS.values()) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    for name, modes in tried.items():
        table.append(f"| `{name}` | " + " | ".join(WORDS[modes[mode][0]] for mode in COLUMNS) + " |")
    parts = [head + "\n".join(table)]
    for title, kind in (("## Refusals", "refused"), ("## Alone", "alone")):
        parts.append("\n".join([title, "", *_reasons(tried, kind)]))
    parts.append("\n".join(["## Not tried", "", *left_out]))
    path.write_text("\n\n".join(parts) + "\n")


def _reasons(results: Mapping[str, Mapping[str, Sequence[str]]], kind: str) -> list[str]:
    """A line for every family and reason, with the modes that it is about."""
    lines = []
    for name, modes in results.items():
        by_reason: dict[str, list[str]] = {}
        for mode, (word, _) in COLUMNS.items():
            if modes[mode][0] == kind:
                by_reason.setdefault(_reason(modes[mode]), []).append(word)
        for reason, words in by_reason.items():
            where = "all modes" if len(words) == len(COLUMNS) else ", ".join(words)
            lines.append(f"- `{name}` ({where}): {reason}")
    return lines


def _reason(found: Sequence[str]) -> str:
    """The first sentence of an error, without what Markdown would take for markup."""
    text = re.sub(r"^(fails: |wrong: |refused: )*([A-Za-z]*Error: )?", "", found[1].strip())
    text = re.split(r"(?<=[a-z`)]\.)\s|\n", " ".join(text.split("\n", 2)[:2]).strip())[0]
    text = re.sub(r"[\d.e-]+ apart.*", "differ", text)
    text = text if len(text) < 240 else text[:236] + " ..."
    for character in "{}<>|*_[]":
        text = text.replace(character, f"&#{ord(character)};")
    return text.replace("`", "")


def read_page(path: Path) -> dict[str, dict[str, str]]:
    """Results by architecture and mode, as far as the table tells."""
    kinds = {word: kind for kind, word in WORDS.items()}
    rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", path.read_text(), re.MULTILINE)
    return {
        name: {mode: kinds[word] for mode, word in zip(COLUMNS, cells.split(" | "))}
        for name, cells in rows
        if all(word in kinds for word in cells.split(" | "))
    }


def worse(
    before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, Sequence[str]]]
) -> list[tuple[str, str]]:
    """Architectures and modes that were right and are not any more."""
    return [
        (name, mode)
        for name, modes in before.items()
        if name in now
        for mode, kind in modes.items()
        if kind == "right" and now[name].get(mode, ("none",))[0] != "right"
    ]
