"""
The core tests in environments of their own: with the lowest versions that pyproject.toml allows, and with the newest.

torch is the exception: what runs is the version of the present environment, so its own bound is not tested.
"""

import os

import pytest
from environments import PROJECT, TESTING, installed_torch, installed_versions, make_environment, run_core_tests
from packaging.requirements import Requirement
from packaging.version import Version


pytestmark = pytest.mark.integration
REQUIREMENTS = {r.name: r for r in map(Requirement, PROJECT["dependencies"]) if r.name != "torch"}


def lowest(requirement: Requirement) -> str:
    """The lower bound of a requirement."""
    return next(bound.version for bound in requirement.specifier if bound.operator == ">=")


@pytest.mark.slow
def test_core_works_with_the_lowest_versions(tmp_path):
    exact = [f"{name}=={lowest(requirement)}" for name, requirement in REQUIREMENTS.items()]
    python = make_environment(tmp_path / "venv", f"torch=={installed_torch()}", *exact, *TESTING)
    found = installed_versions(python)
    for name, requirement in REQUIREMENTS.items():
        bound = Version(lowest(requirement))
        assert Version(found[name]).release[:2] == bound.release[:2], f"{name}: {found[name]} is not {bound}"
    # older versions of huggingface_hub ask huggingface.co itself whether a card is valid
    run_core_tests(python, skipped=["cards_are_valid"])


@pytest.mark.slow
def test_core_works_with_the_newest_versions(tmp_path):
    """
    What a user gets who installs without constraints. `MPO_HF_NEWEST` names other requirements, separated by blanks, such
    as `transformers@git+https://github.com/huggingface/transformers` for a version that is still in the making.
    """
    newest = {name: str(requirement) for name, requirement in REQUIREMENTS.items()}
    for wanted in map(Requirement, os.environ.get("MPO_HF_NEWEST", "").split()):
        newest[wanted.name] = str(wanted)
    python = make_environment(tmp_path / "venv", f"torch=={installed_torch()}", *newest.values(), *TESTING)
    found = installed_versions(python)
    print({name: found[name] for name in newest})
    run_core_tests(python)
