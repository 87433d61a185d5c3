"""`mpo-hf inspect`: the components of a mixture, without loading them."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, logging

from ..mixture.component_paths import resolve_relative
from ..mixture.configuration_mixture import MixtureComponent, MixturePolicyConfig
from ..mixture.hub_files import Location, read_license
from ..mixture.mixture_building import read_mixture_config
from ..text_table import align_columns, format_table, to_json
from .loading import named_in_errors
from .parser import CommandParser


@dataclass
class InspectArguments:
    """How to show a mixture."""

    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the mixture's repo."})
    json: bool = field(default=False, metadata={"help": "Write JSON instead of tables."})
    offline: bool = field(default=False, metadata={"help": "Do not ask the Hub for licenses and sizes of policies."})


EXAMPLES = """
mpo-hf inspect mix
mpo-hf inspect user/mix --json | jq ".components[].license"
"""


def make_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(
        "inspect",
        [InspectArguments],
        usage="MIXTURE [options]",
        description="Shows the components of a mixture: weights, sources, revisions, sizes and licenses. It reads the "
        "mixture's config, and no weights. Unknown values are shown as '-'.",
        sections={"mixture": ["mixture", "revision"], "output": ["json", "offline"]},
        examples=EXAMPLES,
    )
    parser.add_argument("mixture", help="Folder or repo id of the mixture.")
    return parser


def run(argv: Sequence[str]) -> None:
    """Runs `mpo-hf inspect`."""
    args, namespace = make_parser().parse(argv)
    kwargs = {} if args.revision is None else {"revision": args.revision}
    with named_in_errors(namespace.mixture):
        config = read_mixture_config(namespace.mixture, None, kwargs)
    facts = describe(config, namespace.mixture, args.revision, online=not args.offline)
    print(to_json(facts, indent=2) if args.json else format_facts(facts))


def describe(
    config: MixturePolicyConfig, source: str, revision: str | None = None, online: bool = True
) -> dict[str, Any]:
    """
    Facts about a mixture, as `--json` writes them.

    Args:
        config ([`MixturePolicyConfig`]): its config.
        source (`str`): the folder or repo id that it was read from.
        revision (`str`, *optional*): the revision of that repo.
        online (`bool`, *optional*, defaults to `True`): whether the Hub may be asked.
    """
    sizes: dict[Any, int | None] = {}
    components = []
    configs: list[PreTrainedConfig | None] = list(config.component_configs) or [None] * len(config.components)
    for k, (label, weight, part) in enumerate(zip(config.labels, config.mixture_weights, configs)):
        component = config.components[k]
        # components in the mixture's own checkpoint share no parameters
        checkpoint = component.checkpoint if component.name_or_path is not None else k
        if checkpoint not in sizes:
            sizes[checkpoint] = None if part is None else _count_parameters(part)
        located = _locate(component, source, revision)
        components.append(
            {
                **_facts(component, located, online),
                "label": label,
                "weight": weight,
                "model_type": part.model_type if part is not None else None,
                "parameters": sizes[checkpoint],
                "adapter_parameters": _count_adapter_parameters(located.adapter_location, online),
            }
        )
    reference = config.reference
    if reference is not None:
        size = sizes.get(reference.checkpoint)
        reference = {**_facts(reference, _locate(reference, source, revision), online), "parameters": size}
    return {
        "mixture": source,
        "components": components,
        "reference": reference,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_hidden_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "base_shared": len(sizes) < len(components),
        "models_in_memory": len(sizes),
        "parameters": _total([*sizes.values(), *_adapter_sizes(components)]),
    }


def _facts(component: MixtureComponent, located: MixtureComponent, online: bool) -> dict[str, Any]:
    """Facts about a component or a reference. Its four main fields are included even if they are not set."""
    return {
        **dict.fromkeys(("name_or_path", "revision", "adapter", "adapter_revision")),
        **component.to_dict(),
        "license": _license(located.location, online),
        "adapter_license": _license(located.adapter_location, online),
    }


def format_facts(facts: dict[str, Any]) -> str:
    """The facts as tables."""
    header = ["component", "weight", "policy", "revision", "parameters", "license"]
    rows = [[c["label"], c["weight"], *_cells(c)] for c in facts["components"]]
    if facts["reference"] is not None:
        rows.append(["(reference)", None, *_cells(facts["reference"])])
    models = facts["models_in_memory"]
    shared = f"{models} in memory for {len(facts['components'])} components"
    about = [
        ["models", shared + (", adapters share a base" if facts["base_shared"] else "")],
        ["parameters", _shorten(facts["parameters"])],
        ["vocabulary", f"{facts['vocab_size']} tokens in common" if facts["vocab_size"] else "-"],
        ["layers", f"{facts['num_hidden_layers']} in all"],
        ["context", f"{facts['max_position_embeddings']} tokens" if facts["max_position_embeddings"] else "-"],
    ]
    return "\n".join([format_table(header, rows), "", align_columns(about)])


def _cells(component: dict[str, Any]) -> list[str]:
    """Policy, revision, parameters and license, of the model or of an adapter and its base."""

    def over(adapter: str | None, base: str | None, joint: str) -> str:
        return joint.join([adapter or "-", base or "-"]) if component.get("adapter") else base or "-"

    policy = over(component.get("adapter"), component.get("name_or_path"), " over ")
    revision = over(_short_hash(component.get("adapter_revision")), _short_hash(component.get("revision")), " over ")
    parameters = over(_shorten(component.get("adapter_parameters")), _shorten(component.get("parameters")), " + ")
    license = over(component.get("adapter_license"), component.get("license"), " over ")
    if policy == "-":  # a component; a reference always has a location
        policy = "in the mixture's own checkpoint"
    return [policy, *("-" if set(text) <= set("- over+") else text for text in (revision, parameters, license))]


def _short_hash(revision: str | None) -> str | None:
    is_hash = revision is not None and len(revision) == 40 and set(revision) <= set("0123456789abcdef")
    return revision[:8] if is_hash else revision


def _shorten(count: int | None) -> str:
    if count is None:
        return "-"
    power = min(max(int(math.log10(max(count, 1))) // 3, 0), 4)
    return f"{count / 1000**power:.3g}{['', 'K', 'M', 'B', 'T'][power]}"


# ---- sizes ----


def _count_parameters(config: PreTrainedConfig) -> int | None:
    """Parameters of a model of this config, counted on a model without storage."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return sum(parameter.numel() for parameter in model.parameters())
    except Exception:  # such as an architecture that cannot be built on the meta device; the other facts are shown
        return None
    finally:
        logging.set_verbosity(verbosity)


def _count_adapter_parameters(location: Location | None, online: bool) -> int | None:
    if location is None:
        return None
    path, subfolder = location.name_or_path, location.subfolder
    try:
        if os.path.isdir(path):
            with safe_open(os.path.join(path, subfolder or "", ADAPTER_SAFE_WEIGHTS_NAME), framework="pt") as file:
                return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
        if not online:
            return None
        filename = "/".join(filter(None, [subfolder, ADAPTER_SAFE_WEIGHTS_NAME]))
        metadata = HfApi().parse_safetensors_file_metadata(path, filename, revision=location.revision)
        return sum(metadata.parameter_count.values())
    except Exception:  # no network, no such file, no access
        return None


def _adapter_sizes(components: Sequence[dict[str, Any]]) -> list[int | None]:
    adapters = {}
    for component in components:
        if component["adapter"] is not None:
            key = (component["adapter"], component["adapter_revision"], component.get("adapter_subfolder"))
            adapters[key] = component["adapter_parameters"]
    return list(adapters.values())


def _total(sizes: Sequence[int | None]) -> int | None:
    return None if None in sizes else sum(sizes)


# ---- licenses ----


def _locate(component: MixtureComponent, source: str, revision: str | None) -> MixtureComponent:
    try:
        return resolve_relative(component, source, revision)
    except OSError:  # it refers to a folder that does not exist; the other facts are shown
        return component


def _license(location: Location | None, online: bool) -> str | None:
    """The license that the model card states."""
    if location is None or not (online or os.path.isdir(location.name_or_path)):
        return None
    try:
        found = read_license(location)
    except Exception:  # no network, no such repo, no card
        return None
    return found and found.license
