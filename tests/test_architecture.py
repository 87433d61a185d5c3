"""The rooms of the package, and which of them may import from which: no circle, and what travels to the Hub stands alone."""

import ast
import importlib
from pathlib import Path

import pytest

import mpo_hf


PACKAGE = Path(mpo_hf.__file__).parent
# The rooms that each room imports from. `mixture` is what travels to the Hub, flat, with nothing else of mpo_hf.
ROOMS = {
    "mixture": set(),
    "estimation": set(),
    "extraction": {"mixture"},
    "rewards": {"mixture", "estimation"},
    "rollouts": {"mixture", "estimation"},
    "decoding": {"mixture", "estimation", "rewards", "rollouts"},
    "trainer": {"mixture", "estimation", "rewards", "rollouts"},
    "cli": {"mixture", "decoding", "extraction", "rewards", "rollouts", "trainer"},
}
# Files beside the rooms, for all of them.
COMMON = {"cpu_dtype", "lazy", "text_table", ""}


def imports_of(path: Path) -> set[tuple[str, ...]]:
    """Modules that a file imports, as absolute paths, wherever in it: those for type checkers too."""
    package = ("mpo_hf", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*start, *(node.module or "").split("."))
            found |= {tuple(filter(None, (*module, alias.name))) for alias in node.names}
    return found


def files_of(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def test_every_folder_is_a_room():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == ROOMS.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_from_where_they_may(room):
    used = {
        module[1] if len(module) > 2 or (PACKAGE / module[1]).is_dir() else ""
        for path in files_of(room)
        for module in imports_of(path)
        if module[0] == "mpo_hf"
    }
    assert used - {room} - COMMON <= ROOMS[room]
    if room == "mixture":
        assert not used - {room}


def test_rooms_are_in_no_circle():
    seen: set[str] = set()
    for room, below in ROOMS.items():  # a room comes behind those that it imports from
        assert below <= seen
        seen.add(room)


def test_mathematics_knows_no_models():
    top = {module[0] for path in files_of("estimation") for module in imports_of(path)}
    assert not top & {"transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub"}


@pytest.mark.parametrize(
    "module, name",
    [
        ("adapter_extraction", "extract_adapter"),
        ("configuration_mixture", "prune_mixture_weights"),
        ("model_card", "create_model_card"),
        ("rewards", "make_reward_functions"),
        ("rollouts", "sample_completions"),
        ("estimation", "minimize_dual"),
    ],
)
def test_imports_that_0_1_0_documented_still_work(module, name):
    assert callable(getattr(importlib.import_module(f"mpo_hf.{module}"), name))
