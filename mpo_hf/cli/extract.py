"""`mpo-hf extract-adapter`: a low-rank adapter from a full fine-tune."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..extraction.adapter_extraction import extract_adapter
from .data_files import lines_of
from .early_checks import check_device, check_dtype
from .parser import CommandParser


@dataclass
class ExtractArguments:
    """The models, how much of their difference is kept, and the output."""

    base: str = field(metadata={"help": "The model that was fine-tuned: a folder or a repo id.", "metavar": "BASE"})
    output_dir: str = field(metadata={"help": "Folder for the adapter.", "metavar": "DIR"})
    rank: int | None = field(
        default=None, metadata={"help": "Rank of the adapter, 32 by default. With --energy, the highest rank."}
    )
    energy: float | None = field(
        default=None,
        metadata={"help": "Choose the lowest ranks that keep this share of each difference's squared norm."},
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to factor. Default: all linear layers.", "metavar": "NAME"}
    )
    embeddings: bool = field(default=False, metadata={"help": "Factor embeddings, and a head tied to them, too."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are saved without factoring, such as norm.", "metavar": "NAME"}
    )
    text_file: str | None = field(
        default=None,
        metadata={"help": "File of texts, one per line, to measure the KL divergence on.", "metavar": "FILE"},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the fine-tune."})
    base_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base."})
    dtype: str | None = field(
        default=None, metadata={"help": "Type of the adapter's weights. Default: that of the fine-tune."}
    )
    device: str | None = field(
        default=None, metadata={"help": "Device for the computation, such as cuda. Default: the CPU."}
    )


EXAMPLES = """
mpo-hf extract-adapter org/helpful --base org/sft --output_dir helpful-lora --text_file texts.txt
mpo-hf extract-adapter org/helpful --base org/sft --output_dir helpful-lora --energy 0.99 --rank 128
"""


def make_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(
        "extract-adapter",
        [ExtractArguments],
        usage="MODEL --base BASE --output_dir DIR [options]",
        description="Turns a full fine-tune into a LoRA adapter of its base, and reports the error. Checkpoints of one base then "
        "share it in memory, and run in one forward pass.",
        sections={
            "models": ["model", "base", "revision", "base_revision"],
            "what is kept": ["rank", "energy", "target_modules", "embeddings", "modules_to_save"],
            "measuring": ["text_file"],
            "output": ["output_dir", "dtype", "device"],
        },
        examples=EXAMPLES,
    )
    parser.add_argument("model", help="The fine-tune: a folder or a repo id.")
    return parser


def run(argv: Sequence[str]) -> None:
    """Runs `mpo-hf extract-adapter`."""
    args, namespace = make_parser().parse(argv)
    check_dtype("--dtype", args.dtype)
    check_device(args.device)
    adapter = extract_adapter(
        _located(namespace.model, args.revision),
        _located(args.base, args.base_revision),
        rank=args.rank,
        energy=args.energy,
        target_modules=args.target_modules,
        embeddings=args.embeddings,
        modules_to_save=args.modules_to_save,
        dtype=None if args.dtype in (None, "auto") else getattr(torch, args.dtype),
        device=args.device,
        texts=None if args.text_file is None else _read_lines(args.text_file),
    )
    adapter.save_pretrained(args.output_dir)
    print(adapter.report)
    print(f"\nThe adapter is in {args.output_dir}.")


def _located(source: str, revision: str | None) -> Any:
    return source if revision is None else {"name_or_path": source, "revision": revision}


def _read_lines(path: str) -> list[str]:
    try:
        lines = lines_of(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as err:
        raise ValueError(f"{path!r} is not text in UTF-8: {err}") from err
    if not lines:
        raise ValueError(f"There are no texts in {path!r}.")
    return lines
