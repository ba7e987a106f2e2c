"""What a recipe's ``prepare`` names: data and models that are built before a run, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def prepare_named(name: str, log: Callable[..., None]) -> Path:
    """The folder of a preparation, which is built where it is not there.

    Raises ConfigError when it cannot be built.
    """
    # They import what only the extra llava_ds[quickstart] brings.
    from llava_ds.quickstart.prepare import prepare
    from llava_ds.quickstart.scienceqa.prepare import prepare as prepare_scienceqa

    return {"quickstart": prepare, "quickstart_scienceqa": prepare_scienceqa}[name](log)
