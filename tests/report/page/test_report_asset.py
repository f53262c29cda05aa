"""The report of a conversion to Core AI, alone and beside packages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from anequant.checkpoints.source import BUNDLED_MODEL, Source
from anequant.errors import InputError
from anequant.lower_options import AssetOptions, LowerOptions
from anequant.recipe import Calibration
from anequant.recipe_files import load_recipe
from anequant.report.page.conversion_report import convert_and_report
from anequant.report.page.render import render_report
from anequant.report.page.write_report import write_report
from anequant.request import Request
from anequant.targets.coreai.bundle import DESIGN, find_asset, read_design
from anequant.targets.coreai.design import list_functions
from anequant.targets.coreai.installed import find_problem

problem = find_problem()
pytestmark = pytest.mark.skipif(problem is not None, reason=problem.what if problem else "")

Convert = Callable[..., Path]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """`converted(packages)`: the bundled model, converted to an asset and maybe to packages."""
    made: dict[bool, Path] = {}

    def run(packages: bool) -> Path:
        if packages not in made:
            folder = tmp_path_factory.mktemp("converted") / "out"
            lowering = LowerOptions(context=256, batch=8) if packages else None
            request = Request(
                Source(BUNDLED_MODEL, BUNDLED_MODEL.name),
                load_recipe("w4-nearest"),
                Calibration(),
                lowering=lowering,
                asset=AssetOptions(256, (8,)),
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("anequant.pipeline.converting.SAMPLE_WINDOWS", 1)
                patch.setattr("anequant.pipeline.converting.SAMPLE_LENGTH", 64)
                convert_and_report(request, folder)
            made[packages] = folder
        return made[packages]

    return run


def read(folder: Path) -> tuple[dict[str, Any], str]:
    page = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads((folder / "report.json").read_text(encoding="utf-8")), re.sub(r"\s+", " ", page)


@pytest.mark.parametrize("packages", [False, True])
def test_the_asset_is_as_it_lies_on_disk(converted: Convert, packages: bool) -> None:
    folder = converted(packages)
    data, page = read(folder)
    asset, bundle = data["asset"], folder / "coreai"
    design, _ = read_design(bundle)
    on_disk = sum(path.stat().st_size for path in find_asset(bundle).iterdir())
    assert asset["bytes"] == data["sizes"]["asset_bytes"] == on_disk
    assert asset["constant_bytes"] == sum(constant.nbytes for constant in design.constants.values())
    assert asset["context"] == 256
    assert [
        (function["name"], [port["name"] for port in function["states"]]) for function in asset["functions"]
    ] == [(ports.name, [port.name for port in ports.states]) for ports in list_functions(design)]
    (extend,) = (function for function in asset["functions"] if function["name"] == "extend_256_8")
    logits = {"name": "out_logits", "dtype": "float16", "shape": [1, 1, 8, 8192], "shapes": []}
    assert extend["outputs"] == [logits]
    assert "Size of the asset" in page and "Asset verified" in page
    assert f"{data['verified']['asset']['constants']} constants" in page
    assert "Apple's interpreter ran 4 of 4 layers" in page.replace("&#39;", "'")
    documented = set(re.findall(r"`(\w+)`", (REPOSITORY / "docs" / "report.md").read_text(encoding="utf-8")))
    assert data["asset"].keys() | data["sizes"].keys() <= documented


def test_without_packages_it_says_so(converted: Convert) -> None:
    data, page = read(converted(False))
    assert data["packages"] is data["sizes"]["packages_bytes"] is data["verified"]["packages"] is None
    assert data["missing"] == {"packages": "they were not asked for (--target coreml or both)"}
    assert data["verified"]["asset"]["witness"] is None
    assert "they were not asked for" in page and "There are no packages to hold it against" in page
    assert "Size of the packages" not in page and "Packages verified" not in page


def test_with_packages_both_are_held_against_each_other(converted: Convert) -> None:
    data, page = read(converted(True))
    assert data["packages"]["packages"] and data["missing"] == {}
    assert 0 < data["verified"]["asset"]["witness"] < 1e-2
    assert "which share no code, are" in page and "Packages verified" in page


def test_the_command_writes_it_again(converted: Convert) -> None:
    folder = converted(False)
    before, _ = read(folder)
    assert write_report(folder).data == before


def test_a_record_that_is_gone_is_named(converted: Convert) -> None:
    design = converted(False) / "coreai" / DESIGN
    kept = design.read_bytes()
    design.unlink()
    try:
        with pytest.raises(InputError, match=DESIGN):
            write_report(converted(False))
    finally:
        design.write_bytes(kept)


def test_a_report_of_before_is_shown(converted: Convert) -> None:
    """Reports of outputs that older versions wrote have no key for an asset."""
    data, _ = read(converted(True))
    del data["asset"], data["sizes"]["asset_bytes"]
    assert "Size of the asset" not in render_report(data)
