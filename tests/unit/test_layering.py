"""Imports go down the layers only, heavy packages have one import site, and no module hides a standard one."""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "llava_ds"
LAYERS = {
    "constants": 0, "errors": 0,
    "schema": 1, "config": 1, "distributed": 1,
    "text": 2, "ops": 2, "metrics": 2,
    "data": 3, "models": 3,
    "checkpoint": 4,
    "engine": 5, "inference": 5,
    "evaluation": 6, "quickstart": 6,
    "train": 7,
}
ONE_SITE = {"deepspeed", "flash_attn", "triton", "open_clip", "openai", "gradio", "wandb", "matplotlib"}
# The quickstart runs the whole path, its own evaluation included.
SIBLINGS_ALLOWED = {("quickstart", "evaluation")}


def _imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _unit(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_down_only():
    num_checked = 0
    for file in sorted(PACKAGE.rglob("*.py")):
        unit = _unit(file)
        if unit == "__init__":
            continue
        for name in _imports(file):
            parts = name.split(".")
            if parts[0] != "llava_ds" or len(parts) < 2 or parts[1] == unit:
                continue
            target = parts[1]
            num_checked += 1
            below = LAYERS[target] < LAYERS[unit]
            assert below or (unit, target) in SIBLINGS_ALLOWED, f"{file.name} ({unit}) imports {name}"
    assert num_checked > 50


def test_every_unit_has_a_layer():
    units = {_unit(file) for file in PACKAGE.rglob("*.py")} - {"__init__"}
    assert units <= set(LAYERS), units - set(LAYERS)


def test_heavy_packages_have_one_import_site():
    sites: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for name in _imports(file):
            root = name.split(".")[0]
            if root in ONE_SITE:
                sites.setdefault(root, set()).add(str(file.relative_to(PACKAGE)))
    assert {"deepspeed", "open_clip", "matplotlib"} <= set(sites)
    assert all(len(files) == 1 for files in sites.values()), sites


def test_click_only_at_the_top():
    users = {str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if "click" in set(_imports(f))}
    assert users == {"train.py"}


def test_no_module_hides_a_standard_one():
    names = {path.stem for path in PACKAGE.iterdir()}
    assert len(names) > 10
    assert not names & set(sys.stdlib_module_names)
