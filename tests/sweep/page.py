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
WORDS = {"right": "✓", "refused": "refused", "wrong": "WRONG", "fails": "FAILS"}
ALONE = {"wrong": "wrong alone", "fails": "fails alone", "refused": "refused alone"}
INTRODUCTION = """# Architectures

What a mixture does with each decoder of Transformers. A tiny random model stands for every family, and its scores at every
step are compared with those of a loop that runs the whole text anew for every token, one prompt at a time, without a cache
and without mpo_hf. The table was made on {date} by `tests/sweep/sweep.py`, with
{versions}.

| column | what was tried |
|---|---|
{columns}

- ✓: the scores and tokens are those of the loop.
- refused: an error says why; the [sentences](#refusals) are below the table.
- wrong alone, fails alone, refused alone: so it is without a mixture, and in one. Wrong means that `generate` gives the model
  other scores than its own forward pass over the whole text, as with learned positions that padding moves.

A family of models with images or sound is tried with texts.

"""
NOT_TRIED = """## Not tried

The logits of some models at a position depend on later tokens, so that there is no loop to compare with:
{bidirectional}.

Of others no small model could be made from their configuration alone, or they are no text decoders by themselves:
{others}.
"""


def write_page(path: Path, results: Mapping[str, Mapping[str, Sequence[str]]], versions: Mapping[str, str]) -> None:
    """Writes results by architecture and mode."""
    tried = {name: modes for name, modes in sorted(results.items()) if "none" not in modes}
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
        table.append(f"| `{name}` | " + " | ".join(_cell(modes[mode]) for mode in COLUMNS) + " |")
    left_out = {name: modes["none"][0] for name, modes in sorted(results.items()) if "none" in modes}
    names = {
        "bidirectional": ", ".join(f"`{name}`" for name, kind in left_out.items() if kind == "wrong"),
        "others": ", ".join(f"`{name}`" for name, kind in left_out.items() if kind != "wrong"),
    }
    refusals = ["## Refusals", "", *_refusals(tried)]
    path.write_text("\n".join([head + "\n".join(table), "", *refusals, "", NOT_TRIED.format(**names)]))


def _cell(found: Sequence[str]) -> str:
    return ALONE[found[1].partition(":")[0]] if found[0] == "alone" else WORDS[found[0]]


def _refusals(results: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    """A line for every reason, with the families and modes that it is about."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for name, modes in results.items():
        for mode, (column, _) in COLUMNS.items():
            if modes[mode][0] == "refused":
                reasons.setdefault(_sentence(modes[mode][1]), {}).setdefault(name, []).append(column)
    lines = []
    for sentence, families in reasons.items():
        where = [
            f"`{name}`" + (f" ({', '.join(columns)})" if len(columns) < len(COLUMNS) else "")
            for name, columns in families.items()
        ]
        lines.append(f"- {', '.join(where)}: {sentence}")
    return lines


def _sentence(error: str) -> str:
    """The first sentence of an error, without names that differ between families, nor what would be markup."""
    text = re.sub(r"^[A-Za-z]*Error: ", "", error.partition("\n")[0])
    text = re.sub(r"The component \S+ \(\w+\)", "The component", text)
    text = re.sub(r"'/\S*/(\w+)'", r"'\1'", text)  # folders by their names
    text = re.sub(r"'(\w+\.+){3,}\w+'", "'...'", text)  # weights
    text = re.sub(r" ?<class .*?>| ?\(model_type=.*?\)|^\[.*?\] ", "", text)
    text = re.split(r"(?<=[a-z0-9`)]\.)\s", text)[0]
    return re.sub(r"[{}<>|*_\[\]]", lambda match: f"&#{ord(match[0])};", text).replace("`", "")


def read_page(path: Path) -> dict[str, dict[str, str]]:
    """Results by architecture and mode, as far as the table tells."""
    kinds = {word: kind for kind, word in WORDS.items()} | dict.fromkeys(ALONE.values(), "alone")
    rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", path.read_text(), re.MULTILINE)
    return {
        name: {mode: kinds[word] for mode, word in zip(COLUMNS, cells.split(" | "))}
        for name, cells in rows
        if all(word in kinds for word in cells.split(" | "))
    }


def worse(
    before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, Sequence[str]]]
) -> list[tuple[str, str]]:
    """Architectures and modes that were right and are not any more, for another reason than the model alone."""
    return [
        (name, mode)
        for name, modes in before.items()
        if name in now
        for mode, kind in modes.items()
        if kind == "right" and now[name].get(mode, ("none",))[0] not in ("right", "alone")
    ]
