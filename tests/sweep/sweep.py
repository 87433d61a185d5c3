"""
Tries mixtures of every decoder of Transformers in every mode, and writes what came of it as a page of the documentation.

    python tests/sweep/sweep.py [--write docs/how-to/architectures.md] [--processes 2] [NAME ...]

A NAME is a model type, such as `gemma3_text`; without one, all decoders are tried. Results are kept in a file of JSON
lines, so that an interrupted sweep goes on where it was; `--fresh` starts anew. A tiny random model stands for each
architecture, and a loop that recomputes every step is what all results are compared with. The exit code is 1 if a
mixture is wrong or fails without a sentence, or is not right where the page says so.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
os.environ["HF_HUB_OFFLINE"] = "1"

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from decoders import decoders  # noqa: E402
from modes import MODES, try_decoder  # noqa: E402
from page import read_page, worse, write_page  # noqa: E402


VERSIONS = {package.__name__: package.__version__ for package in (transformers, peft, torch)}
PAGE = HERE.parents[1] / "docs" / "how-to" / "architectures.md"
SECONDS = 120  # for one architecture; most need one or two


def sweep(names: Sequence[str], processes: int = 1, modes: Sequence[str] = MODES) -> Iterator[dict[str, Any]]:
    """Yields the result of every architecture, from a process of its own, in the order in which they end."""
    torch.set_num_threads(1)
    context, waiting, running = multiprocessing.get_context("fork"), list(names), {}
    while waiting or running:
        while waiting and len(running) < processes:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_try, args=(waiting[0], modes, sender))
            process.start()
            sender.close()
            running[receiver] = waiting.pop(0), process, time.monotonic()
        for receiver in wait(list(running), timeout=1) or list(running):
            name, process, start = running[receiver]
            if receiver.poll():
                found = _received(receiver, process)
            elif time.monotonic() - start > SECONDS:
                process.kill()
                found = dict.fromkeys(modes, ("fails", f"not done after {SECONDS} s"))
            else:
                continue
            del running[receiver]
            process.join()
            yield {"name": name, "versions": VERSIONS, "seconds": round(time.monotonic() - start, 1), "modes": found}


def _try(name: str, modes: Sequence[str], sender) -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    with open(os.devnull, "w") as silence, tempfile.TemporaryDirectory() as folder:
        sys.stdout = sys.stderr = silence
        tempfile.tempdir = folder
        sender.send(try_decoder(name, modes))


def _received(receiver, process) -> dict[str, Sequence[str]]:
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return dict.fromkeys(MODES, ("fails", f"the process ended with {process.exitcode}"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types to try; all decoders without")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the page of the documentation to write")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "mpo_hf_sweep.jsonl")
    parser.add_argument("--fresh", action="store_true", help="try again what the file of results holds")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    if args.write and args.names:
        parser.error("a page is written of all decoders: leave out the names")
    before = read_page(PAGE) if PAGE.exists() else {}
    known = {} if args.fresh else read_results(args.results)
    names = args.names or decoders()
    with args.results.open("w" if args.fresh else "a") as file:
        for result in sweep([name for name in names if name not in known], args.processes):
            known[result["name"]] = result
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(line_of(result), flush=True)
    results = {name: known[name]["modes"] for name in names}
    if args.write:
        write_page(args.write, results, VERSIONS)
    faults = [f"{name}, {mode}: {': '.join(found)}" for name, mode, found in faults_of(results)]
    faults += [f"{name}, {mode}: was right, see {PAGE.name}" for name, mode in worse(before, results)]
    print("\n".join(faults))
    return int(bool(faults))


def faults_of(results: dict[str, Any]) -> Iterator[tuple[str, str, Sequence[str]]]:
    """What a mixture gets wrong, or cannot do without saying so."""
    for name, modes in results.items():
        for mode, found in modes.items():
            if mode != "none" and found[0] in ("wrong", "fails"):
                yield name, mode, found


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Results by architecture that were found with the installed versions."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = (json.loads(line) for line in lines)
    return {result["name"]: result for result in results if result["versions"] == VERSIONS}


def line_of(result: dict[str, Any]) -> str:
    other = {mode: ": ".join(found) for mode, found in result["modes"].items() if found[0] != "right"}
    return f"{result['name']} ({result['seconds']} s): {other or 'right in every mode'}"


if __name__ == "__main__":
    sys.exit(main())
