"""Imports go down the layers only, heavy packages have one import site, and no module hides a standard one."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "llava_ds"
LAYERS = {
    "constants": 0, "errors": 0,
    "schema": 1, "config": 1, "distributed": 1, "cache": 1, "durable": 1, "starts": 1,
    "text": 2, "ops": 2, "metrics": 2, "api": 2,
    "data": 3, "models": 3,
    "checkpoint": 4,
    "engine": 5, "inference": 5,
    "evaluation": 6, "datagen": 6, "quickstart": 6, "cluster": 6,
    "preparations": 7,
    "train": 8,
}
ONE_SITE = {
    "cuda", "deepspeed", "gguf", "flash_attn", "triton", "open_clip", "openai", "gradio", "wandb", "matplotlib",
    "spacy",
}
# The quickstart runs the whole path, its own evaluation included.
SIBLINGS_ALLOWED = {("quickstart", "evaluation")}


def _imports(file: Path):
    yield from _imported_names(file.read_text(), ("llava_ds", *file.relative_to(PACKAGE).parts[:-1]))


def _imported_names(source: str, package: tuple[str, ...]):
    """Every dotted name that source text of a module in ``package`` imports.

    ``from a import b`` gives ``a.b``: b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import llava_ds.engine.loop, os", {"llava_ds.engine.loop", "os"}),
        ("from llava_ds import engine, data", {"llava_ds.engine", "llava_ds.data"}),
        ("from llava_ds.engine.loop import train", {"llava_ds.engine.loop.train"}),
        ("from . import sampler", {"llava_ds.data.sampler"}),
        ("from .sampler import Slot", {"llava_ds.data.sampler.Slot"}),
        ("from .. import engine", {"llava_ds.engine"}),
        ("from ..engine import loop", {"llava_ds.engine.loop"}),
        ("def later():\n    from ..engine.loop import train", {"llava_ds.engine.loop.train"}),
    ],
)
def test_every_form_of_import_is_seen(source, names):
    assert set(_imported_names(source, ("llava_ds", "data"))) == names


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
    assert {"cuda", "deepspeed", "open_clip", "matplotlib"} <= set(sites)
    assert all(len(files) == 1 for files in sites.values()), sites


def test_click_only_at_the_top():
    users = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "click" for name in _imports(file))
    }
    assert users == {"train.py"}


def test_no_module_hides_a_standard_one():
    names = {path.stem for path in PACKAGE.iterdir()}
    assert len(names) > 10
    assert not names & set(sys.stdlib_module_names)


def test_commands_and_benchmarks_import_what_is_there():
    """They run in no other default test as a whole; a renamed function would be found by their users."""
    root, num_checked = PACKAGE.parent, 0
    for file in (*root.glob("tools/*"), *root.glob("benchmarks/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llava_ds"):
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{file.name}: {node.module} has no {missing}"
                num_checked += 1
    assert num_checked > 30
