"""Modules that stand elsewhere now still import under their old names, and say where to go."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import textwrap
import warnings

import pytest

import immunize_ext
from immunize_ext._moved import GONE, PLACES, places_of

# Public names of each old module, but for those that the changelog says are gone.
OLD = {
    "regularizers": "gram_r_ill gram_r_well r_ill r_well",
    "erasure": "uce",
    "immunizers": "ClosedFormImmunizer ConditionNumberImmunizer Immunized several_harms_theta",
    "immunizers.closed_form": "closed_form_theta",
    "immunizers.text_to_image": "METHODS MIMA DiffusionIMMA ImmunizedPipeline LossAscent erase",
    "attacks": "ATTACKERS AttackCurve BudgetOutcome LossName attack_at_budgets compare_attack",
    "attacks.text_to_image": "ATTACKS AttackCurve LoRAAttack FineTuningAttack ConceptScores",
    "attacks.text_to_image.lora": "LoRAAttack",
    "data": "Task Samples digits_task load_mnist read_idx features_task parse_digits",
    "data.mnist": "read_idx",
    "data.concepts": "Concept ConceptSet load_concepts digit_concepts",
    "metrics": "Spread Slowdown SimilarityGap relative_immunization_ratio log_rir_ceiling Delay",
    "metrics.rir": "relative_immunization_ratio",
    "metrics.similarity_gap": "SimilarityGap",
    "report": "Evaluation evaluate check_target environment run_directory",
    "models": "TextToImage WeightEdit apply_edit FeatureExtractor load_backbone TextProjection",
    "models.digits_pipeline": "load_digits_pipeline build_digits_pipeline",
    "models.weight_edit": "apply_edit",
}


@pytest.mark.parametrize("module", OLD)
def test_old_names_are_the_new_things(module: str) -> None:
    old = importlib.import_module(f"immunize_ext.{module}")
    for name in OLD[module].split():
        with pytest.warns(DeprecationWarning, match=rf"immunize_ext\.{module}\.{name} is immun"):
            found = getattr(old, name)
        places = map(importlib.import_module, places_of(f"immunize_ext.{module}"))
        assert any(found is value for place in places for value in vars(place).values())


@pytest.mark.parametrize("module", PLACES)
def test_every_place_is_there(module: str) -> None:
    for place in places_of(f"immunize_ext.{module}"):
        importlib.import_module(place)


def test_the_warning_names_the_line_that_imports() -> None:
    code = """
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from immunize_ext.regularizers import r_well
    assert [w.filename for w in caught] == ["<string>"], caught
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_import_star_binds_the_public_names_and_warns_of_each_once() -> None:
    code = """
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from immunize_ext.regularizers import *
    import immunize_ext.regularizers as old
    from immunize_ext.ops import regularizers as new
    assert dir(old) == sorted(new.__all__), dir(old)
    assert all(globals()[name] is getattr(new, name) for name in new.__all__)
    assert len(caught) == len(new.__all__), caught
    assert {w.filename for w in caught} == {"<string>"}, caught
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize("module", PLACES)
def test_old_modules_list_what_they_give(module: str) -> None:
    if module == "report":
        return  # still a module
    old = importlib.import_module(f"immunize_ext.{module}")
    names = dir(old)
    assert names
    assert old.__all__ == names
    assert set(OLD.get(module, "").split()) <= set(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(hasattr(old, name) for name in names)


@pytest.mark.parametrize("module", GONE)
def test_modules_without_a_successor_say_where_their_content_went(module: str) -> None:
    package, _, name = f"immunize_ext.{module}".rpartition(".")
    with pytest.raises(ModuleNotFoundError, match=rf"immunize_ext\.{module} is gone: .*immuni"):
        importlib.import_module(f"immunize_ext.{module}")
    with pytest.raises(ModuleNotFoundError, match="is gone"):
        exec(f"from {package} import {name}", {})
    for place in re.findall(r"immunize_ext[.a-z_]*", GONE[module]):
        importlib.import_module(place)


def test_what_never_was_is_not_found() -> None:
    for name in ("immunize_ext.nothing", "immunize_ext.data.nothing", "immunize_ext.ops.data"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from immunize_ext.data import nothing  # type: ignore[attr-defined]  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = immunize_ext.nothing


def test_the_package_itself_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(immunize_ext.available(), bool)
        assert immunize_ext.status().loaded == immunize_ext.available()
        assert immunize_ext.ops.condition_number
