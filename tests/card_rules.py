"""What the Hub demands of the metadata of a model card, as far as its documentation says so."""

import re

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id


RELATIONS = {"finetune", "adapter", "quantized", "merge"}
# some of the identifiers in the Hub's list of licenses
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "llama3.2", "gemma", "other", "unknown"}
TEXTS = ("library_name", "pipeline_tag", "license", "license_name", "license_link", "base_model_relation")
LISTS = ("tags", "base_model", "datasets", "language")


def problems_of(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata of a card."""
    block = REGEX_YAML_BLOCK.search(content)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(block[2])
    except yaml.YAMLError as err:
        return [f"the metadata is not YAML: {err}"], []
    if not isinstance(metadata, dict):
        return ["the metadata must be a mapping"], []
    errors = [f'"{name}" must be a string' for name in TEXTS if not isinstance(metadata.get(name, ""), str)]
    if errors:
        return errors, []
    for name in LISTS:
        values = metadata.get(name, [])
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
            errors.append(f'"{name}" must be a string or a list of strings')
        elif len(set(values)) != len(values):
            errors.append(f'"{name}" must not have duplicates')
        elif name in ("base_model", "datasets"):
            errors += [f'"{name}" with value "{value}" is not a repo id' for value in values if not _is_repo_id(value)]
        elif name == "language":
            errors += [f'"{value}" is not a language' for value in values if not re.fullmatch(r"[a-z]{2,3}", value)]
    if metadata.get("license", "other") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if metadata.get("license") == "other" and not metadata.get("license_name"):
        errors.append('"license: other" needs a "license_name"')
    if metadata.get("base_model_relation", "merge") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    if "base_model_relation" in metadata and not metadata.get("base_model"):
        errors.append('"base_model_relation" needs a "base_model"')
    return errors, []


def _is_repo_id(value: str) -> bool:
    try:
        validate_repo_id(value)
    except ValueError:
        return False
    return True
