"""
Runs every code block of Markdown pages, from top to bottom: `python run_pages.py PAGE...`.

A page is run in a process and a working directory of its own. Python blocks share one namespace; those with prompts
(`>>>`) have their output compared; blocks of bash stop at the first command that fails; blocks of another language that
have a title are written to the file of that name; those marked `elsewhere` are what CI itself does. What a page leaves
running in the background ends with it.
"""

import doctest
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>\w*)(?P<options>[^\n]*)\n(?P<code>.*?)^(?P=fence)\s*$", re.M | re.S)
TITLE = re.compile(r"title=\"(?P<name>[^\"]+)\"")
SHOWN_ONLY = ("text", "bibtex")


@dataclass
class Block:
    """A block of code, where it begins, and the file that it is meant for."""

    language: str
    title: str | None
    code: str
    line: int


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in FENCE.finditer(text):
        title = TITLE.search(match["options"])
        line = text.count("\n", 0, match.start("code")) + 1
        if match["language"] in SHOWN_ONLY or "elsewhere" in match["options"]:
            continue
        yield Block(match["language"], title and title["name"], match["code"], line)


def run_block(page: Path, block: Block, namespace: dict) -> None:
    where = f"{page}:{block.line}"
    if block.title is not None:
        Path(block.title).write_text(block.code)
    elif block.language == "bash":
        subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
    elif block.language == "python" and block.code.lstrip().startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block.code, namespace, where, str(page), block.line)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        if runner.run(test, clear_globs=False).failed:
            raise AssertionError("the output differs from what the page says")
        namespace.update(test.globs)
    elif block.language == "python":
        # the lines before it stand for the rest of the page, so that tracebacks have its line numbers
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
    else:
        raise AssertionError(f"no way to run a block of {block.language!r}; give it a title, or mark it as text")


def run_page(page: Path) -> None:
    """Runs a page in this process; it ends the process."""
    os.setsid()
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        namespace = {"__name__": "__main__"}
        for block in blocks_of(page):
            try:
                run_block(page, block, namespace)
            except BaseException:
                traceback.print_exc()
                print(f"FAILED {page}:{block.line}", file=sys.stderr)
                status = 1
                break
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def main(pages: list[str]) -> int:
    # imported once, for all pages
    import datasets  # noqa: F401
    import trl  # noqa: F401

    import mpo_hf  # noqa: F401

    failures = 0
    for page in map(Path, pages):
        start = time.monotonic()
        print(f"== {page}", flush=True)
        child = os.fork()
        if child == 0:
            run_page(page.resolve())
        _, status = os.waitpid(child, 0)
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        failures += status != 0
        print(f"== {page}: {'failed' if status else 'passed'} after {time.monotonic() - start:.0f} s", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
