"""
A reader of this package's sources, for test_public_names.py: it knows what many of the names in them stand for.

What is imported is the thing itself. Everything else is known by samples, small real objects that are made once: a parameter
is any of those that fit its annotation, a field is what the samples have there, a call gives what its function is annotated
with, and so on. What comes in another way is not known.
"""

import ast
import builtins
import functools
import importlib
import inspect
import tempfile
import types
import typing
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from pkgutil import resolve_name

import torch
from datasets import Dataset
from helpers import VOCAB, tiny, tiny_tokenizer
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.utils import ModelOutput
from trl import ScriptArguments

import mpo_hf
from mpo_hf import MixturePolicyConfig, MixturePolicyModel, MPOConfig, MPOTrainer
from mpo_hf.mixture.compat import CACHE_NAME
from mpo_hf.mixture.mixture_cache import ComponentCacheView, StepCache


SOURCES = Path(mpo_hf.__file__).parent
LIBRARIES = {"transformers", "peft", "trl", "accelerate", "datasets", "huggingface_hub"}


# ---- samples ----


@functools.cache
def samples() -> list:
    """Objects of the classes that the package has to do with."""
    llama = tiny("llama", 0)
    found = [llama, llama.config, GenerationConfig(), HfApi(), ScriptArguments("unused")]
    for model in (llama, tiny("mistral", 1)):
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=8)):
            found += [model(torch.tensor([[1, 4, 5]]), **{CACHE_NAME: cache}), cache, *cache.layers]
    cache.mixture_components = (0,)
    found += [ComponentCacheView(cache, 0, 1), StepCache(cache, {})]

    lora = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it reads a field that Transformers has deprecated
        adapted = get_peft_model(tiny("llama", 1), lora)
    found += [lora, adapted, *(module for module in adapted.modules() if package_of(module) == "peft")]

    tokenizer = tiny_tokenizer([f"t{i}" for i in range(VOCAB)])
    tokenizer.eos_token = tokenizer.pad_token = "t0"
    card = ModelCard("---\nlicense: mit\n---\n")
    data = Dataset.from_dict({"prompt": ["t1 t2"]})
    found += [tokenizer, card, card.data, data, data.to_iterable_dataset()]

    mixture = MixturePolicyModel(MixturePolicyConfig(component_configs=[llama.config] * 2), [llama, adapted])
    args = MPOConfig(tempfile.mkdtemp(), objective="implicit", num_generations=2, max_completion_length=2)
    trainer = MPOTrainer(model=mixture, args=args, train_dataset=data, processing_class=tokenizer)
    return [*found, mixture, mixture.config, args, trainer, trainer.state, trainer.control, trainer.accelerator]


def samples_of(annotation: object) -> list:
    """What something that is annotated so may be: samples, or lists of them; nothing for what is not known."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        # a model returns a tuple only if it is asked to
        options = [samples_of(argument) for argument in arguments if argument not in (types.NoneType, tuple)]
        return sum(options, []) if all(options) else []
    if isinstance(origin, type) and issubclass(origin, Iterable) and arguments[1:] in ((), (...,)):
        return [samples_of(argument) for argument in arguments[:1]]
    if isinstance(annotation, type) and is_theirs(annotation) and not getattr(annotation, "_is_protocol", False):
        return [sample for sample in samples() if isinstance(sample, annotation)]
    return []


def package_of(thing: object) -> str:
    name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None)
    return str(name).partition(".")[0]


def is_theirs(thing: object) -> bool:
    """Whether something is part of one of the libraries, or of a class that derives from one of theirs."""
    if isinstance(thing, types.ModuleType) or inspect.isroutine(thing):
        return package_of(thing) in LIBRARIES
    cls = thing if isinstance(thing, type) else type(thing)
    return isinstance(thing, super) or any(package_of(base) in LIBRARIES for base in cls.__mro__)


def has(owner: object, name: str) -> bool:
    """Whether an object has an attribute, and not for old code only."""
    if isinstance(owner, ModelOutput) and name not in owner.__dataclass_fields__:
        return callable(getattr(type(owner), name, None))  # old names of fields are properties
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            getattr(owner, name)
    except (AttributeError, FutureWarning):
        return False
    return True


# ---- the reader ----


class Reader(ast.NodeVisitor):
    """
    Goes through a file, and keeps what names stand for: a list of what each may be, empty where that is not known.

    Args:
        path (`Path`): the file.
        listed (`dict[str, str]`): names of fields by their class, for objects that are not known.

    Attributes:
        problems (`list[str]`): what is imported in vain, and calls that do not fit.
        absent (`dict[str, str]`): fields that the objects they are read of have not, and where they are read.
        swallowed (`dict[str, str]`): keywords for what takes any.
        unknown (`dict[str, str]`): fields that are read of objects that are not known.
        guarded (`dict[str, str]`): the same by `getattr` and its like, and keys of arguments.
    """

    def __init__(self, path: Path, listed: dict[str, str]):
        self.path, self.listed = path.relative_to(SOURCES), listed
        parts = [part for part in self.path.with_suffix("").parts if part != "__init__"]
        self.module = importlib.import_module(".".join(["mpo_hf", *parts]))
        self.problems: list[str] = []
        self.absent: dict[str, str] = {}
        self.swallowed: dict[str, str] = {}
        self.unknown: dict[str, str] = {}
        self.guarded: dict[str, str] = {}
        self.cls: type | None = None
        self.scopes = [{name: [value] for name, value in vars(outer).items()} for outer in (builtins, self.module)]
        self.visit(ast.parse(path.read_text()))

    def visit_all(self, nodes: Iterable[ast.AST | None]) -> None:
        for node in filter(None, nodes):
            self.visit(node)

    def find(self, node: ast.AST | None) -> list:
        """What an expression may be."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), [])
        if isinstance(node, ast.Attribute):
            classes = [resolve_name(path) for path, names in self.listed.items() if node.attr in names.split()]
            owners = self.find(node.value) or [sample for cls in classes for sample in samples_of(cls)]
            found = [getattr(owner, node.attr) for owner in owners if has(owner, node.attr)]
            return [value for value in found if value is not None]
        if isinstance(node, ast.Subscript):
            found = self.find(node.value)
            return found if isinstance(node.slice, ast.Slice) else parts_of(found)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super":
            return [super(self.cls, owner) for owner in next(iter(self.scopes[-1].values()))]
        if isinstance(node, ast.Call):
            functions = [f.forward if isinstance(f, nn.Module) else f for f in self.find(node.func)]
            results = [
                f if isinstance(f, type) else getattr(f, "__annotations__", {}).get("return") for f in functions
            ]
            return sum(map(samples_of, results), [])
        return []

    # ---- statements that give names a meaning ----

    def bind(self, target: ast.AST, value: ast.AST | None, is_loop: bool = False) -> None:
        """Notes what a target of an assignment or a loop stands for from here on."""
        if isinstance(target, ast.Tuple):
            values = getattr(value, "elts", [])
            if is_loop and isinstance(value, ast.Call):
                values = {"zip": value.args, "enumerate": [None, *value.args]}.get(ast.unparse(value.func), [])
            for part, of_part in zip(target.elts, [*values, *[None] * len(target.elts)]):
                self.bind(part, of_part, is_loop)
        elif not isinstance(target, ast.Name):
            self.visit(target)
        elif len(self.scopes) > 2:  # names of the module are known
            found = parts_of(self.find(value)) if is_loop else self.find(value)
            # in a branch, it may still be what it was
            self.scopes[-1][target.id] = found and found + self.scopes[-1].get(target.id, [])

    def visit_Assign(self, node):
        self.visit(node.value)
        for target in node.targets:
            self.bind(target, node.value)

    def visit_For(self, node):
        self.visit(node.iter)
        self.bind(node.target, node.iter, is_loop=True)
        self.visit_all([*node.body, *node.orelse])

    def visit_any_comprehension(self, node):
        self.scopes.append({})
        for loop in node.generators:
            self.visit(loop.iter)
            self.bind(loop.target, loop.iter, is_loop=True)
            self.visit_all(loop.ifs)
        self.visit_all(getattr(node, part, None) for part in ("key", "value", "elt"))
        self.scopes.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_any_comprehension

    def visit_ImportFrom(self, node):
        module = importlib.import_module("." * node.level + (node.module or ""), self.module.__package__)
        for alias in node.names:
            if not hasattr(module, alias.name):
                self.problems.append(f"{self.path}:{node.lineno} {module.__name__} has no {alias.name}")
            self.scopes[-1][alias.asname or alias.name] = [getattr(module, alias.name, None)]

    def visit_ClassDef(self, node):
        outer, self.cls = self.cls, getattr(self.module, node.name, None)
        self.generic_visit(node)
        self.cls = outer

    def visit_FunctionDef(self, node):
        given = node.args
        self.visit_all([*node.decorator_list, *given.defaults, *given.kw_defaults])
        scope = {a.arg: self.find_annotated(a.annotation) for a in [*given.args, *given.kwonlyargs]}
        scope |= {star.arg: [] for star in (given.vararg, given.kwarg) if star}
        if self.cls is not None and "self" in scope:
            scope["self"] = [sample for sample in samples() if isinstance(sample, self.cls)]
        elif self.cls is not None and "cls" in scope:
            scope["cls"] = [self.cls]
        self.scopes.append(scope)
        self.visit_all(node.body)
        self.scopes.pop()

    def find_annotated(self, annotation: ast.AST | None) -> list:
        text = annotation.value if isinstance(annotation, ast.Constant) else annotation and ast.unparse(annotation)
        known = {name: found[0] for scope in self.scopes for name, found in scope.items() if found}
        return samples_of(eval(str(text), known))

    # ---- what is noted ----

    def visit_Attribute(self, node):
        self.visit(node.value)
        self.note_field(node.value, node.attr, self.unknown)

    def note_field(self, owner: ast.AST, name: str, unknown: dict[str, str]) -> None:
        owners, place = self.find(owner), f"{self.path}:{owner.lineno}"
        if not owners:
            unknown[name] = place
        elif all(map(is_theirs, owners)) and not any(has(owner, name) for owner in owners):
            is_ours = name in defined_names(own_code()) and any(package_of(owner) == "mpo_hf" for owner in owners)
            # what begins so are notes of ours on objects of others
            if not is_ours and not name.startswith("mixture_"):
                self.absent[name] = f"{place}, of {', '.join(sorted({type(owner).__name__ for owner in owners}))}"

    def visit_Subscript(self, node):
        self.generic_visit(node)
        self.note_key(node.value, node.slice)

    def note_key(self, owner: ast.AST, key: ast.AST) -> None:
        if isinstance(key, ast.Constant) and ast.unparse(owner).endswith(("kwargs", "inputs")):
            self.guarded[key.value] = f"{self.path}:{owner.lineno}"

    def visit_Call(self, node):
        self.generic_visit(node)
        name = ast.unparse(node.func)
        if name in ("getattr", "hasattr", "setattr") and isinstance(node.args[1], ast.Constant):
            self.note_field(node.args[0], node.args[1].value, self.guarded)
        elif name == "isinstance" and isinstance(node.args[0], ast.Name) and (found := self.find(node.args[0])):
            # it may be what it is asked for
            asked = [sample for cls in self.find(node.args[1]) for sample in samples_of(cls)]
            self.scopes[-1][node.args[0].id] = found + asked
        elif name.endswith((".get", ".pop", ".setdefault")) and node.args:
            self.note_key(node.func.value, node.args[0])
        self.check_call(node, [found for found in self.find(node.func) if callable(found) and is_theirs(found)])

    def check_call(self, node: ast.Call, functions: list[Callable]) -> None:
        """One of the functions that may be meant must take the arguments."""
        splats = [keyword.value for keyword in node.keywords if keyword.arg is None]
        names = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
        for key in [key for splat in splats if isinstance(splat, ast.Dict) for key in splat.keys]:
            names += [key.value] if isinstance(key, ast.Constant) else self.find(key)
        positional = [None for argument in node.args if not isinstance(argument, ast.Starred)]
        is_whole = not splats and len(positional) == len(node.args)
        reasons, place = {}, f"{self.path}:{node.lineno}"
        for function in functions:
            signature = signature_of(function)
            try:
                (signature.bind if is_whole else signature.bind_partial)(*positional, **dict.fromkeys(names))
            except TypeError as reason:
                reasons[f"{place} {ast.unparse(node.func)}: {reason}"] = None
            else:
                self.swallowed |= {name: place for name in names if name not in signature.parameters}
                return
        self.problems += reasons


def parts_of(found: list) -> list:
    """What lists and dictionaries hold."""
    held = [list(value.values()) if isinstance(value, dict) else value for value in found]
    return [part for value in held if isinstance(value, list | tuple | nn.ModuleList) for part in value]


def signature_of(function: Callable) -> inspect.Signature:
    if isinstance(function, nn.Module):
        function = function.forward
    inner = inspect.unwrap(function.__func__) if inspect.ismethod(function) else function
    # the Auto classes are made of copies of methods, of which `inspect` takes away `cls` twice
    return inspect.signature(inner if inspect.ismethod(inner) else function)


# ---- code ----


@functools.cache
def own_code() -> list[ast.AST]:
    """All there is in the files of this package."""
    return [node for path in SOURCES.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]


def defined_names(nodes: list[ast.AST]) -> set[str]:
    """Functions and classes in code, fields that are annotated, and those that are set on `self`."""
    stored = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    annotated = [node.target for node in nodes if isinstance(node, ast.AnnAssign)]
    return {
        *(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)),
        *(target.id for target in annotated if isinstance(target, ast.Name)),
        *(node.attr for node in stored if ast.unparse(node.value) == "self"),
    }
