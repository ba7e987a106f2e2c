"""What a recipe names is looked for before minutes go into building from it."""

from __future__ import annotations

from pathlib import Path

from llava_ds.config import RunConfig
from llava_ds.errors import ConfigError, DataError
from llava_ds.models.vision_tower import check_tower
from llava_ds.text.templates import CHAT_TEMPLATE, get_template


def check_inputs(config: RunConfig) -> None:
    """Looks for what the recipe names before anything is built from it.

    Raises DataError for missing files (which one machine may lack) or else ConfigError, with every problem at once.
    """
    settings, files = [], []
    try:
        if config.data.template != CHAT_TEMPLATE:
            get_template(config.data.template)
    except ConfigError as error:
        settings.append(str(error))
    try:
        check_tower(config.model.vision_tower, config.model.vision_pretrained)
    except ConfigError as error:
        settings.append(str(error))
    for group, source in config.named_sources():
        is_local = "://" not in source.path and "{" not in source.path
        if is_local and not Path(source.path).exists():
            files.append(f"{group}.path={source.path}: no such file or folder; give its data")
        if source.image_root is not None and not Path(source.image_root).is_dir():
            files.append(f"{group}.image_root={source.image_root}: no such folder, so all image file(s) are missing")
    problems = "\n".join(settings + files)
    if files:
        raise DataError(problems)
    if settings:
        raise ConfigError(problems)
