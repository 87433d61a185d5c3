"""The model card of a mixture."""

import os
from collections.abc import Mapping

from huggingface_hub import ModelCard, ModelCardData

from .configuration_mixture import MixtureComponent, MixturePolicyConfig


CITATION = """@inproceedings{wang2025mpo,
    title     = {{MPO: An Efficient Post-Processing Framework for Mixing Diverse Preference Alignment}},
    author    = {Wang, Tianze and Gui, Dongnan and Hu, Yifan and Lin, Shuhang and Zhang, Linjun},
    booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
    year      = {2025},
    url       = {https://arxiv.org/abs/2502.18699}
}"""

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A log-linear mixture of {{ count }} policies, $\\pi(y|x) \\propto \\prod_k \\pi_k(y|x)^{\\lambda_k}$, made with
[mpo_hf](https://arxiv.org/abs/2502.18699). {{ holds }}

{{ table }}

## How to load it

```python
import mpo_hf  # registers the mixture with Transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ name }}")
tokenizer = AutoTokenizer.from_pretrained("{{ name }}")
```
{{ fit }}
## Citation

```bibtex
{{ citation }}
```
"""


def create_model_card(
    config: MixturePolicyConfig,
    name: str,
    rewards: Mapping[str, Mapping[str, float]] | None = None,
    plot: str | None = None,
) -> ModelCard:
    """
    The model card of a mixture: its components, weights and, where it was fitted, what the objectives reach.

    Args:
        config ([`MixturePolicyConfig`]): the mixture.
        name (`str`): repo id or title.
        rewards (`Mapping[str, Mapping[str, float]]`, *optional*):
            Mean reward of every objective, for one or more policies: `{"fitted mixture": {"helpful": 0.3}}`.
        plot (`str`, *optional*): path of a picture of the fit, relative to the card.

    Returns:
        [`~huggingface_hub.ModelCard`].
    """
    base_models = sorted({path for c in config.components for path in (c.adapter, c.name_or_path) if _is_repo(path)})
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mpo", "mpo_hf", "merge", "text-generation"],
        base_model=base_models or None,
        base_model_relation="merge" if base_models else None,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        count=len(config.components),
        holds=_holds(config),
        table=_component_table(config),
        fit=_fit_section(config, rewards, plot),
        citation=CITATION,
    )


def _holds(config: MixturePolicyConfig) -> str:
    if all(component.name_or_path is None for component in config.components):
        return "This repository holds the components whole."
    if any((component.adapter or "").startswith("./") for component in config.components):
        return (
            "This repository holds a configuration and adapters: what they lie over, and other components, are loaded\n"
            "from where they live."
        )
    return "This repository holds a configuration and no weights: the components are\nloaded from where they live."


def _is_repo(path: str | None) -> bool:
    return path is not None and not os.path.isabs(path) and not path.startswith(".") and path.count("/") == 1


def _component_table(config: MixturePolicyConfig) -> str:
    rows = ["| objective | weight | policy | revision |", "|---|---|---|---|"]
    for label, weight, component in zip(config.labels, config.mixture_weights, config.components):
        rows.append(f"| {label} | {weight:.4f} | {_source(component)} | {_revision(component)} |")
    if config.reference is not None:
        rows.append(f"| *reference* | | {_source(config.reference)} | {_revision(config.reference)} |")
    return "\n".join(rows)


def _source(component: MixtureComponent) -> str:
    parts = [component.adapter, component.name_or_path] if component.adapter else [component.name_or_path]
    return " over ".join(_link(part) for part in parts)


def _link(path: str | None) -> str:
    if path is None:
        return "in this repository"
    # a folder of the author's machine means nothing to a reader
    return f"[{path}](https://huggingface.co/{path})" if _is_repo(path) else f"`{os.path.basename(path.rstrip('/'))}`"


def _revision(component: MixtureComponent) -> str:
    return " over ".join(r for r in (component.adapter_revision, component.revision) if r) or "-"


def _fit_section(
    config: MixturePolicyConfig, rewards: Mapping[str, Mapping[str, float]] | None, plot: str | None
) -> str:
    if not rewards:
        return ""
    names = list(next(iter(rewards.values())))
    lines = ["", "## Mean reward by objective", "", "| policy | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for policy, values in rewards.items():
        lines.append(f"| {policy} | " + " | ".join(f"{values[name]:.4f}" for name in names) + " |")
    if plot:
        lines += ["", f"![Mixture weights during the fit]({plot})"]
    return "\n".join([*lines, ""])
