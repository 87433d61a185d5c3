"""The model card of a mixture."""

import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import LocalEntryNotFoundError

from .configuration_mixture import MixtureComponent, MixturePolicyConfig
from .hub_files import COMMIT_HASH, License, Location, is_repo, read_license


CITATION = """@inproceedings{wang2025mpo,
    title     = {{MPO: An Efficient Post-Processing Framework for Mixing Diverse Preference Alignment}},
    author    = {Wang, Tianze and Gui, Dongnan and Hu, Yifan and Lin, Shuhang and Zhang, Linjun},
    booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
    year      = {2025},
    url       = {https://arxiv.org/abs/2502.18699}
}"""

# Text between such comments is rewritten when the card is pushed again; the rest belongs to its author.
SECTION = "<!-- mpo_hf: {name} -->{text}<!-- mpo_hf: end of {name} -->"

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A log-linear mixture of {{ count }} policies, $\\pi(y|x) \\propto \\prod_k \\pi_k(y|x)^{\\lambda_k}$: the decoding rule of
[Mixing Preference Optimization](https://arxiv.org/abs/2502.18699) (MPO; Wang et al., ICML 2025), made with `mpo_hf`.

{{ policies }}

{{ loading }}
{{ fit }}
## Citation

```bibtex
{{ citation }}
```
"""

LOADING = """## How to load it

```python
import mpo_hf  # registers the mixture with Transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})
```"""

LOADING_WITH_CODE = """

Where `mpo_hf` is not installed, the code in this repository does the same; it needs {needs}:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({name})
```"""

# What means something in Markdown, HTML or TeX inside a line. An underscore between letters does not.
MARKUP = re.compile(r"[\\`*\[\]<>&~$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")

# Licenses by repository or folder; its subfolders share one card.
Licenses = dict[Location, License | None]
# Mean rewards by policy and objective; a pair is a mean and its standard error.
Rewards = Mapping[str, Mapping[str, float | tuple[float, float]]]


def create_model_card(
    config: MixturePolicyConfig,
    name: str,
    rewards: Rewards | None = None,
    plot: str | None = None,
    note: str | None = None,
    with_code: bool = False,
    token: bool | str | None = None,
) -> ModelCard:
    """
    The model card of a mixture: its components with their revisions and licenses, its weights, how to load it and,
    after a fit, the mean rewards.

    Args:
        config ([`MixturePolicyConfig`]): the mixture.
        name (`str`): repo id or title.
        rewards (`Mapping[str, Mapping[str, float]]`, *optional*):
            Mean reward of every objective, for one or more policies: `{"fitted mixture": {"helpful": 0.3}}`. A pair is a
            mean and its standard error.
        plot (`str`, *optional*): path of a picture of the fit, relative to the card.
        note (`str`, *optional*): a description of the rewards, and of how they were measured.
        with_code (`bool`, *optional*, defaults to `False`): whether the code of the mixture is in the same repo.
        token (`bool` or `str`, *optional*): token to read the components' cards with.

    Returns:
        [`~huggingface_hub.ModelCard`].
    """
    licenses = read_licenses(config, token)
    paths = {location.name_or_path for location in _places(config)}
    base_models = sorted(path for path in paths if is_repo(path) and path != name)
    shared = _shared_license(config, licenses)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mpo", "mpo_hf", "merge", "text-generation"],
        base_model=base_models or None,
        base_model_relation="merge" if base_models else None,
        **({key: value for key, value in vars(shared).items() if value} if shared else {}),
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=escaped(name),
        count=len(config.components),
        policies=_section(
            "policies", f"{_holds(config, name)}\n\n{_component_table(config, name, licenses, rewards)}"
        ),
        loading=_section("loading", _loading(config, name, with_code)),
        fit=_fit_section(config, rewards, plot, note),
        citation=CITATION,
    )


def update_model_card(card: ModelCard, current: ModelCard) -> None:
    """
    Brings a card that somebody may have edited up to date: its metadata, and the sections that are written by `mpo_hf`.

    Args:
        card (`ModelCard`): the card. Text by its author is kept.
        current (`ModelCard`): the card of the mixture as it is now, as [`create_model_card`] makes it.
    """
    _rename(card, current)
    _keep_names(card, current)
    for name in ("policies", "loading"):
        section = _section_of(name)
        text = section.search(current.text)[0]
        card.text = section.sub(lambda _, text=text: text, card.text)
    for name, value in vars(current.data).items():
        # fields that follow from the components are updated; the others belong to the author
        if name.startswith("base_model") or card.data.get(name) is None:
            card.data[name] = value
    add_tags(card, current.data.tags)


def _section_of(name: str) -> re.Pattern:
    return re.compile(SECTION.format(name=name, text=".*?"), re.DOTALL)


def _rename(card: ModelCard, current: ModelCard) -> None:
    """Replaces the name of a folder in the title, if it is there still, by that of the repository."""
    loaded = re.compile(r'from_pretrained\(("(?:[^"\\]|\\.)*")')
    names = [loaded.search(text) for text in (card.text, current.text)]
    before, after = (f"# {escaped(json.loads(found[1]))}" if found else None for found in names)
    if before and after:
        card.text = re.sub(f"^{re.escape(before)}$", lambda _: after, card.text, count=1, flags=re.MULTILINE)


def _keep_names(card: ModelCard, current: ModelCard) -> None:
    """Keeps the names that a fit has given to components without labels."""
    row = re.compile(r"^\| (.*?)(?= \| \d\.\d{4} \|)", re.MULTILINE)
    section = _section_of("policies")
    sections = [section.search(text) for text in (card.text, current.text)]
    if not all(sections):
        return
    known, text = row.findall(sections[0][0]), sections[1][0]
    if len(known) == len(row.findall(text)):
        names = iter(enumerate(known))

        def named(found: re.Match) -> str:
            k, name = next(names)
            return f"| {name}" if found[1] == f"policy_{k}" else found[0]

        current.text = current.text.replace(text, row.sub(named, text))


def add_tags(card: ModelCard, tags: list[str]) -> None:
    """Adds tags to a card that does not have them yet."""
    known = card.data.tags or []
    card.data.tags = known + [tag for tag in tags if tag not in known] or None


def escaped(text: str) -> str:
    """
    A name by somebody else, in a line of Markdown: as it is written, whatever it would mean as Markdown, HTML or TeX.

    Args:
        text (`str`): a label, a revision, the name of a license or of a folder.
    """
    text = " ".join(text.split())
    # control characters, also those that have no width or change the direction
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    text = "".join(
        str(char.encode("unicode_escape"), "ascii") if unicodedata.category(char) in hidden else char for char in text
    )
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)


def pictures_of(card: ModelCard) -> list[str]:
    """Paths of the pictures in a card that are in its own folder."""
    shown = re.findall(r"!\[[^\]]*\]\(([^)\s]+)", card.text)
    paths = [os.path.normpath(path) for path in shown if ":" not in path]
    return [path for path in paths if not path.startswith("..") and not os.path.isabs(path)]


# ---- licenses ----


def read_licenses(config: MixturePolicyConfig, token: bool | str | None = None) -> Licenses:
    """The licenses of a mixture's components, and of its reference, according to their cards; `None` where unknown."""
    licenses: Licenses = {}
    offline = False
    for place in _places(config, with_reference=True):
        if place not in licenses:
            try:
                licenses[place] = read_license(place, token, local_files_only=offline)
            except LocalEntryNotFoundError:
                licenses[place], offline = None, True  # no connection: the Hub is not asked again
            except Exception:  # no card, a broken one, or one that may not be read
                licenses[place] = None
    return licenses


def _shared_license(config: MixturePolicyConfig, licenses: Licenses) -> License | None:
    """The license of the mixture: that of its components, if all have the same one."""
    found = {licenses[place] for place in _places(config)}
    whole = any(component.name_or_path is None for component in config.components)
    return found.pop() if len(found) == 1 and not whole else None


def _places(config: MixturePolicyConfig, with_reference: bool = False) -> list[Location]:
    """The repositories and folders that the components come from, base and adapter apart."""
    components = [*config.components, *([config.reference] if with_reference and config.reference else [])]
    parts = [part for component in components for part in _parts(component)]
    return [_place_of(location) for location in parts if location is not None]


def _place_of(location: Location) -> Location:
    """The whole repository or folder that a location is in, at its revision."""
    return Location(location.name_or_path, location.revision)


def _parts(component: MixtureComponent) -> list[Location | None]:
    """Where the adapter lies, if there is one, and the model; `None` for a model in memory."""
    return [*filter(None, [component.adapter_location]), component.location]


# ---- sections ----


def _section(name: str, text: str) -> str:
    return SECTION.format(name=name, text=f"\n{text}\n")


def _holds(config: MixturePolicyConfig, name: str) -> str:
    if all(component.name_or_path is None for component in config.components):
        return "This repository holds the weights of all components."
    if any(component.adapter is not None and _is_inside(component.adapter, name) for component in config.components):
        return (
            "This repository holds a configuration and adapters: their bases, and the other components, are loaded\n"
            "from their own repositories."
        )
    return (
        "This repository holds a configuration and no weights: the components are\nloaded from their own repositories."
    )


def _loading(config: MixturePolicyConfig, name: str, with_code: bool) -> str:
    name = json.dumps(name, ensure_ascii=False)  # in quotation marks, as Python writes it too
    text = LOADING.format(name=name)
    if with_code:
        adapters = any(component.adapter for component in config.components)
        needs = "`transformers>=5.20`" + (" and `peft`" if adapters else "")
        text += LOADING_WITH_CODE.format(name=name, needs=needs)
    return text


def _is_inside(path: str, name: str) -> bool:
    """Whether a path leads into the repository that the card belongs to."""
    return path.startswith("./") or path == name


def _labels(config: MixturePolicyConfig, objectives: Sequence[str]) -> list[str]:
    """Names of the components: their labels, or those of the objectives that a fit was for."""
    known = [*objectives, *config.labels[len(objectives) :]]
    return [component.label or name for component, name in zip(config.components, known)]


def _component_table(
    config: MixturePolicyConfig, name: str, licenses: Licenses, rewards: Rewards | None = None
) -> str:
    rows = [["objective", "weight", "policy", "revision", "license"], ["---"] * 5]
    labels = _labels(config, _objectives(rewards))
    for label, weight, component in zip(labels, config.mixture_weights, config.components):
        rows.append([escaped(label), f"{weight:.4f}", *_component_cells(component, name, licenses)])
    if config.reference is not None:
        rows.append(["*reference*", "", *_component_cells(config.reference, name, licenses)])
    return _table(rows)


def _component_cells(component: MixtureComponent, name: str, licenses: Licenses) -> list[str]:
    parts = _parts(component)
    revisions = [_revision(part) for part in parts]
    cells = [
        [
            "in this repository" if part is None or _is_inside(part.name_or_path, name) else _link(part)
            for part in parts
        ],
        revisions if any(revision != "-" for revision in revisions) else ["-"],
        [escaped(str((part and licenses.get(_place_of(part))) or "unknown")) for part in parts],
    ]
    return [" over ".join(cell) for cell in cells]


def _table(rows: list[list[str]]) -> str:
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _link(location: Location) -> str:
    path, subfolder = location.name_or_path, location.subfolder
    # the path of a local folder means nothing to a reader
    link = f"[{path}](https://huggingface.co/{path})" if is_repo(path) else _code(os.path.basename(path.rstrip("/")))
    return f"{link}, {_code(subfolder)}" if subfolder else link


def _code(text: str) -> str:
    """A name as code, if nothing in it needs to be escaped, which code does not allow."""
    return f"`{text}`" if escaped(text) == text else escaped(text)


def _revision(location: Location | None) -> str:
    revision = location and location.revision
    if revision is None or not is_repo(location.name_or_path):
        return escaped(revision or "-")
    short = revision[:7] if COMMIT_HASH.fullmatch(revision) else escaped(revision)
    return f"[{short}](https://huggingface.co/{location.name_or_path}/tree/{quote(revision, safe='')})"


def _fit_section(
    config: MixturePolicyConfig,
    rewards: Rewards | None,
    plot: str | None,
    note: str | None,
) -> str:
    if not rewards and not plot:
        return ""
    labels = _labels(config, _objectives(rewards))
    weights = ", ".join(f"{escaped(label)} {w:.4f}" for label, w in zip(labels, config.mixture_weights))
    lines = ["", "## Rewards and weights"]
    if rewards:
        names = _objectives(rewards)
        rows = [["mean reward of", *map(escaped, names)], ["---"] * (len(names) + 1)]
        rows += [[escaped(policy), *(_mean(values[name]) for name in names)] for policy, values in rewards.items()]
        lines += [*(["", note] if note else []), "", _table(rows)]
    # the weights may be changed later, the rewards stay those of the fit
    lines += ["", f"The weights of the mixture at that time: {weights}."]
    if plot:
        lines += ["", f"![Mixture weights during the fit]({plot})"]
    return "\n".join([*lines, ""])


def _objectives(rewards: Rewards | None) -> list[str]:
    return list(next(iter(rewards.values()))) if rewards else []


def _mean(value: float | tuple[float, float]) -> str:
    return f"{value[0]:.4f} ± {value[1]:.4f}" if isinstance(value, tuple) else f"{value:.4f}"
