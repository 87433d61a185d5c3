"""Every example in a docstring of the package prints what it says."""

import doctest
import importlib
import pkgutil
import re

import pytest

import mpo_hf


MODULES = [info.name for info in pkgutil.walk_packages(mpo_hf.__path__, "mpo_hf.")]


class FencedParser(doctest.DocTestParser):
    """Reads examples in Markdown code blocks, whose closing fence is no output."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"(?m)^\s*```\w*$", "", string), name)


def examples_in(name: str) -> list[doctest.DocTest]:
    module = importlib.import_module(name)
    tests = doctest.DocTestFinder(parser=FencedParser()).find(module, name)
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_print_what_they_say(name):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for test in examples_in(name):
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("name", ["pooling", "configuration_mixture", "modeling_mixture"])
def test_main_modules_come_with_an_example(name):
    assert examples_in(f"mpo_hf.mixture.{name}")
