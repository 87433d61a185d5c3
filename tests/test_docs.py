"""Every code block of the documentation runs, against a Hub on loopback that holds the repositories it names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, TESTS


DOCS = ROOT / "docs"
sys.path.append(str(TESTS / "pages"))

from hub_server import Hub  # noqa: E402
from run_pages import blocks_of  # noqa: E402
from team_hub import TOKENS, fill  # noqa: E402


pytestmark = pytest.mark.integration
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
RUN = [page for page in PAGES if any(blocks_of(page))]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of somebody who is logged in to a Hub, where the pages' repositories are."""
    root = tmp_path_factory.mktemp("pages")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    paths = [os.path.dirname(sys.executable), os.environ["PATH"]]
    own = {"HF_HOME": str(root / "home"), "HF_TOKEN": "team-token", "HF_HUB_DISABLE_XET": "1"}
    own |= {"PATH": os.pathsep.join(paths), "PYTHONPATH": f"{ROOT}/tests:{ROOT}/tests/pages", "OMP_NUM_THREADS": "1"}
    with Hub(TOKENS, members=set()) as hub:
        fill(hub, root)
        env = {**kept, **own, "HF_ENDPOINT": hub.endpoint}
        subprocess.run([sys.executable, "-m", "team_hub"], env=env, check=True, capture_output=True)
        yield env


@pytest.fixture(scope="module")
def report(environment):
    """What came of every page, run one after another."""
    command = [sys.executable, "-m", "run_pages", *map(str, RUN)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    return done.stdout, done.stderr


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_code_block_runs(report, page):
    stdout, stderr = report
    assert f"== {page}: passed" in stdout, stderr[-5000:]


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(r"local: (\S+)", (DOCS / "_toctree.yml").read_text())
    assert yaml.safe_load((DOCS / "_toctree.yml").read_text())
    assert sorted(listed) == sorted(page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md"))


def test_reference_is_built_from_the_docstrings(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    command = [
        Path(sys.executable).with_name("doc-builder"),
        "build",
        "mpo_hf",
        DOCS,
        "--build_dir",
        tmp_path / "built",
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert not re.search("warning|error|not found", done.stdout + done.stderr, re.IGNORECASE), (
        done.stdout + done.stderr
    )
    built = {path.stem: path.read_text() for path in (tmp_path / "built").rglob("reference/*.mdx")}
    assert {"mixtures", "fitting", "mathematics"} <= built.keys()
    for name, text in built.items():
        assert "<docstring>" in text and "[[autodoc]]" not in text, name
    links = re.findall(r"\[`[^`]+`\](?!\()", "".join(built.values()))
    assert links == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page}: {target}"
