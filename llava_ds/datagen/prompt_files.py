"""System messages and examples, which are files that a user may edit.

A folder holds one folder a kind, with ``system.md`` and ``example-<n>-input.txt`` with ``example-<n>-reply.txt``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llava_ds.api.messages import Message
from llava_ds.datagen.kinds import KINDS, Kind
from llava_ds.datagen.reply import parse_reply
from llava_ds.errors import ConfigError, DataError

OUR_PROMPTS = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class Prompt:
    """What stands before every question of a kind, and the hash of it."""

    messages: tuple[Message, ...]
    sha256: str

    def ask(self, text: str) -> tuple[Message, ...]:
        """The whole chat that asks about an image in symbols."""
        return (*self.messages, Message("user", text))


def load_prompts(folder: Path, kinds: Iterable[str]) -> dict[str, Prompt]:
    """The prompts by kind. Raises ConfigError that names all that is missing, empty, or no reply of its kind."""
    problems: list[str] = []
    prompts = {name: _load_prompt(folder / name, KINDS[name], problems) for name in kinds}
    if problems:
        raise ConfigError("\n  ".join([f"the prompts in {folder} cannot be used:", *problems]))
    return prompts


def _load_prompt(folder: Path, kind: Kind, problems: list[str]) -> Prompt:
    messages = [Message("system", _read(folder / "system.md", problems))]
    inputs = sorted(folder.glob("example-*-input.txt"), key=_number)
    for file in inputs:
        reply_file = file.with_name(file.name.replace("-input.txt", "-reply.txt"))
        reply = _read(reply_file, problems)
        messages += [Message("user", _read(file, problems)), Message("assistant", reply)]
        try:
            parse_reply(kind, reply)
        except DataError as error:
            problems.append(f"{reply_file}: {error}")
    text = json.dumps([[message.role, message.content] for message in messages])
    return Prompt(tuple(messages), hashlib.sha256(text.encode()).hexdigest())


def _read(file: Path, problems: list[str]) -> str:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        problems.append(f"{file}: {error}")
        return ""
    if not text:
        problems.append(f"{file}: the file is empty")
    return text


def _number(file: Path) -> tuple[int, str]:
    digits = re.search(r"\d+", file.name)
    return int(digits.group()) if digits else 0, file.name
