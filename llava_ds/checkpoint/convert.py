"""From any layout of a LLaVA, or of one of its parts, to any other that the same parts make.

A source is read into a ``StoredModel``, a projector or a tower, whichever the target needs; a target is written from
it, read back, compared with it, and appears whole or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_ds.checkpoint import parity
from llava_ds.checkpoint.conversion.request import Job, Options, check_request
from llava_ds.checkpoint.conversion.target import write_target
from llava_ds.checkpoint.json_file import read_json, write_json
from llava_ds.checkpoint.layout import commit
from llava_ds.checkpoint.new_folder import Phases, new_folder, no_phases, refuse_existing
from llava_ds.checkpoint.parity import Comparison
from llava_ds.checkpoint.recognise import MERGED_FILE, PROJECTOR_FILE, recognise_layout
from llava_ds.errors import CheckpointError, ConfigError
from llava_ds.models.vision_tower import TOWER_CONFIG_FILE


@dataclass(frozen=True)
class Conversion:
    """What was written: file names, what was compared, and what a user should know."""

    source_layout: str
    target_layout: str
    files: list[str]
    comparisons: list[Comparison]
    notes: list[str]


def convert(
    source: Path, out: Path, target_layout: str, source_layout: str = "auto", options: Options | None = None,
    phases: Phases = no_phases,
) -> Conversion:
    """Converts ``source`` into the new folder ``out``, which appears whole or not at all.

    Raises:
        ConfigError: the layouts do not go together, or an option is missing, of no use here or does not fit.
        CheckpointError: the source is incomplete, ``out`` exists or cannot be written, or what was written does not
            compute what the source does.
    """
    options = options or Options()
    source_layout = _choose_layout(source, source_layout)
    check_request(source_layout, target_layout, options)
    refuse_existing(out)
    with new_folder(out) as work:
        job = Job(source, source_layout, target_layout, options, out, work, phases)
        records, comparisons = write_target(job)
        parity.refuse_failures(comparisons, out)
        write_json(work / parity.PARITY_FILE, {
            "from": source_layout, "to": target_layout, "comparisons": [item.as_dict() for item in comparisons],
            "notes": job.notes,
        })
        commit(work, records)
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    return Conversion(source_layout, target_layout, files, comparisons, job.notes)


def _choose_layout(source: Path, asked: str) -> str:
    if asked == "auto":
        return detect_layout(source)
    try:
        found = detect_layout(source)
    except CheckpointError:
        return asked  # an open_clip name, or what the reader of that layout has more to say about
    # A merged folder is transformers' as well; the original code may keep its projector's file beside the whole model.
    also = [name for name, file in (("transformers", MERGED_FILE), ("projector", PROJECTOR_FILE))
            if (source / file).is_file()]
    if asked not in (found, *also):
        raise ConfigError(f"{source} is of the layout {found}, not {asked}; leave --from out")
    return asked


def detect_layout(path: Path) -> str:
    """The source layout of what lies at ``path``. Raises CheckpointError when it is none of them."""
    if (path / TOWER_CONFIG_FILE).is_file():
        return "tower"
    config = path / "config.json"
    if config.is_file() and read_json(config).get("model_type") in ("clip", "clip_vision_model"):
        return "clip"
    if (path / MERGED_FILE).is_file():
        return "llava_ds"
    try:
        layout = recognise_layout(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n  or a vision tower: ours, a transformers CLIP, or with --from tower an open_clip name"
        ) from error
    return {"original": "llava"}.get(layout, layout)
