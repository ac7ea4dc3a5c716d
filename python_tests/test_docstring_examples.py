"""Every example in a docstring of the package runs and gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import immunize_ext
from immunize_ext._extras import MissingExtraError


def module_names() -> list[str]:
    found = pkgutil.walk_packages(immunize_ext.__path__, "immunize_ext.")
    # __main__ would run the command line, _C is compiled.
    return [m.name for m in found if m.name.rpartition(".")[2] not in ("__main__", "_C")]


@pytest.mark.parametrize("name", module_names())
def test_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except MissingExtraError as error:
        pytest.skip(str(error))
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    for test in finder.find(module, name):
        runner.run(test, out=report.append)
    text = "".join(report)
    if "MissingExtraError" in text:
        pytest.skip("an example needs an extra that is not installed")
    assert runner.failures == 0, text
