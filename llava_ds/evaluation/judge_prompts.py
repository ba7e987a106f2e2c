"""What a judge is asked: a rule file's words around question, context and two answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, field_validator

from llava_ds.config import Strict, parse_strict
from llava_ds.data.sources.llava_json import check_unicode
from llava_ds.errors import ConfigError
from llava_ds.evaluation.llava_bench import Kind, Question

Order = Literal["reference_first", "candidate_first"]
ORDERS: tuple[Order, ...] = get_args(Order)
BOTH = "both"
OWN_RULE = Path(__file__).with_name("judge_rule.yaml")
_PREFIX: dict[Kind, str] = {"coco": "", "in_the_wild": "llava_bench_"}


class JudgeSettings(Strict):
    """How a judge is asked; the defaults are the official scripts', which an official rule file goes with."""

    system: str = "You are a helpful and precise assistant for checking the quality of the answer."
    temperature: float | None = Field(0.2, ge=0)
    """None sends none: the server takes its own."""
    max_tokens: int = Field(1024, ge=1)
    orders: tuple[Order, ...] = ("reference_first",)
    send_seed: bool = False

    @field_validator("orders")
    @classmethod
    def _each_once(cls, orders: tuple[Order, ...]) -> tuple[Order, ...]:
        if not orders or len(set(orders)) < len(orders):
            raise ValueError(f"name one or both of {', '.join(ORDERS)}, each once (--repeats asks again); got {orders}")
        return orders


@dataclass(frozen=True)
class JudgeRule:
    """Prompts by kind of question, ``{key: {role, prompt}}``; keys as in the official ``rule.json``."""

    path: Path
    sha256: str
    prompts: Mapping[str, Mapping[str, str]]
    settings: JudgeSettings
    is_own: bool

    def prompt(self, kind: Kind, category: str) -> Mapping[str, str]:
        """Role and prompt for a question of a benchmark."""
        return self.prompts[_PREFIX[kind] + category]

    def orders(self, asked: str | None) -> tuple[Order, ...]:
        """The orders under a name of ``ORDERS`` or ``BOTH``; the rule's own where none is asked for."""
        if asked is None:
            return self.settings.orders
        return tuple(order for order in ORDERS if asked in (BOTH, order))

    def check(self, kind: Kind, categories: Collection[str]) -> None:
        """Raises ConfigError that lists what the file lacks for these questions."""
        lacking = sorted({_PREFIX[kind] + category for category in categories} - set(self.prompts))
        if lacking:
            has = ", ".join(sorted(self.prompts))
            raise ConfigError(f"{self.path}: no rule for {', '.join(lacking)}; it has {has}")

    def content(self, kind: Kind, question: Question, answer: str, order: Order) -> str:
        """The judge's user message, laid out as by the official scripts (eval_gpt_review_visual.py, .._bench.py)."""
        rule = self.prompt(kind, question.category)
        first, second = question.reference, answer
        if order == "candidate_first":
            first, second = second, first
        role = rule["role"]
        return (
            f"[Context]\n{question.context}\n\n"
            f"[Question]\n{question.text}\n\n"
            f"[{role} 1]\n{first}\n\n[End of {role} 1]\n\n"
            f"[{role} 2]\n{second}\n\n[End of {role} 2]\n\n"
            f"[System]\n{rule['prompt']}\n\n"
        )


def load_rule(path: Path | None = None) -> JudgeRule:
    """A rule file, JSON or YAML; ours where none is given. Without ``judge`` in it, settings are the official ones.

    Raises ConfigError that names the file and the keys, DataError for half a surrogate pair in its words.
    """
    file = path or OWN_RULE
    try:
        content = file.read_bytes()
        values = json.loads(content) if file.suffix == ".json" else yaml.safe_load(content)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as a judge's rule: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected rules by kind of question, got {type(values).__name__}")
    settings = parse_strict(JudgeSettings, values.pop("judge", {}), f"{file}, judge", "judge")
    wrong = [str(key) for key, rule in values.items() if not (isinstance(key, str) and _is_rule(rule))]
    if wrong or not values:
        raise ConfigError(f"{file}: each kind of question needs 'role' and 'prompt' as text; see {wrong or 'no kind'}")
    check_unicode(str(file), settings.system, *(rule[key] for rule in values.values() for key in ("role", "prompt")))
    return JudgeRule(file, hashlib.sha256(content).hexdigest(), values, settings, path is None)


def _is_rule(rule: Any) -> bool:
    return isinstance(rule, dict) and all(isinstance(rule.get(key), str) for key in ("role", "prompt"))
