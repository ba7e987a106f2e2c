"""Checks of the files that commands write: before work that is long or costs money, not when its result is lost."""

from collections.abc import Mapping
from pathlib import Path

import click

from llava_ds.errors import ConfigError


def in_a_folder(_context: click.Context, _option: click.Parameter, file: Path | None) -> Path | None:
    """A callback for options: the folder of the file is there."""
    if file and not file.parent.is_dir():
        raise click.BadParameter(f"{file}: there is no folder {file.parent}; create it, or give another file")
    return file


def check_apart(json_file: Path | None, others: Mapping[str, Path | None]) -> None:
    """Raises ConfigError when ``--json`` names the file of another option, which it would replace."""
    for option, file in others.items():
        if json_file and file and json_file.resolve() == file.resolve():
            raise ConfigError(f"{option} and --json are one file, {json_file}; give --json another")
