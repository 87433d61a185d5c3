"""Getting Transformers' own tests: they are fetched for every run, and no text of them is kept here."""

import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path


# What Transformers' tests import, besides what mpo_hf needs anyway.
REQUIREMENTS = ("parameterized", "peft", "pytest", "pytest-timeout")

# What a source distribution lacks, and the suites under test use; the last is for the pipelines' imports.
SUBFOLDERS = ("tests/exporters", "tests/generation", "tests/pipelines", "utils/test_module")


def missing_requirements() -> list[str]:
    """Those of the requirements that are not installed."""
    missing = []
    for name in REQUIREMENTS:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


def fetch_tests(cache: Path) -> Path:
    """
    Downloads the tests of exactly the installed Transformers version, once.

    Args:
        cache (`Path`): folder to keep them in.

    Returns:
        `Path`: a folder with a package `tests`, to be put on the path, and Transformers' configuration of pytest.
    """
    name = f"transformers-{version('transformers')}"
    root = cache / name
    if not (root / "tests" / "__init__.py").exists():
        shutil.rmtree(root, ignore_errors=True)
        with tarfile.open(_download(cache) / f"{name}.tar.gz") as tar:
            wanted = (f"{name}/tests/", f"{name}/pyproject.toml")
            tar.extractall(cache, [m for m in tar.getmembers() if m.name.startswith(wanted)], filter="data")
        _complete(root)
    return root


def add_checkout(root: Path, checkout: Path, target: Path) -> Path:
    """
    Lays out those tests together with the sub-folders of a checkout.

    Args:
        root (`Path`): what [`fetch_tests`] returned.
        checkout (`Path`):
            The `tests` folder of a checkout of Transformers, of the installed version or one not far from it.
        target (`Path`): an empty folder.

    Returns:
        `Path`: `target`, to be put on the path.
    """
    for name in SUBFOLDERS:
        shutil.copytree(checkout.parent / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*root.glob("tests/*.py"), root / "pyproject.toml"]:
        shutil.copy(file, target / file.relative_to(root))
    _complete(target)
    return target


def _download(cache: Path) -> Path:
    """The folder of the source distribution, from whatever package index pip is set up for."""
    cache.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--no-binary", "transformers", "--quiet", "--disable-pip-version-check"]
    requirement = f"transformers=={version('transformers')}"
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", cache, requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(
            f"Nothing was tested: pip cannot download the source distribution of {requirement}, which holds "
            f"Transformers' tests. It said:\n{result.stderr}"
        )
    return cache


def _complete(root: Path) -> None:
    # the pipeline tests import the library from beside them: let it be the installed one all the same
    (root / "src").mkdir()
    (root / "src" / "transformers").symlink_to(Path(str(distribution("transformers").locate_file("transformers"))))
    # other distributions install a package of this name, which would hide a folder without the file
    (root / "tests" / "__init__.py").touch()
