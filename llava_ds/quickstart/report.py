"""The quickstart's one page: loss curves, pictures with questions and answers, and the score table."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .6rem; border: 1px solid #ddd; border-radius: 6px; font-size: .85rem; }
figure img { width: 112px; display: block; margin: 0 auto .4rem; }
.right { color: #176d2c; } .wrong { color: #a3261b; }
"""


def write_report(
    path: Path,
    seeing: Mapping[str, Any],
    blind: Mapping[str, Any],
    image_root: Path,
    loss_curve: Path,
    facts: Sequence[str],
) -> None:
    """Writes a self-contained HTML page.

    Args:
        seeing: result of ``exact_match.score`` for the trained model.
        blind: the same for the blind control.
        facts: sentences about how it was made, shown at the top.
    """
    rows = "".join(
        f"<tr><td>{html.escape(kind)}</td><td>{seeing['num_questions'][kind]}</td>"
        f"<td>{score:.3f}</td><td>{blind['accuracy'][kind]:.3f}</td></tr>"
        for kind, score in seeing["accuracy"].items()
    )
    figures = "".join(_figure(record, image_root) for record in choose_examples(seeing["records"]))
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>llava_ds quickstart</title>
<style>{_STYLE}</style>
<h1>A small LLaVA, trained on this machine</h1>
<ul>{''.join(f'<li>{html.escape(fact)}</li>' for fact in facts)}</ul>
<h2>Scores on pictures it never saw</h2>
<p>Exact match of the whole answer. The blind control trained on the same steps with zero image features.</p>
<table><tr><th>question</th><th>number</th><th>seeing</th><th>blind</th></tr>{rows}</table>
<h2>Loss</h2><img alt="loss over optimizer steps" src="{_data_uri(loss_curve)}">
<h2>Questions and answers</h2><div class="grid">{figures}</div></html>
"""
    path.write_text(page, encoding="utf-8")


def choose_examples(records: Sequence[Mapping[str, Any]], per_kind: int = 6) -> list[Mapping[str, Any]]:
    """The same number of every kind, evenly spaced over the questions, right or wrong as they come."""
    chosen: list[Mapping[str, Any]] = []
    for kind in dict.fromkeys(record["kind"] for record in records):
        group = [record for record in records if record["kind"] == kind]
        chosen += group[:: max(1, len(group) // per_kind)][:per_kind]
    return chosen


def _figure(record: Mapping[str, Any], image_root: Path) -> str:
    mark = "right" if record["correct"] else "wrong"
    return (
        f'<figure><img alt="" src="{_data_uri(image_root / record["image"])}">'
        f"{html.escape(record['question'])}<br>truth: {html.escape(record['answer'])}<br>"
        f'<span class="{mark}">answer: {html.escape(record["prediction"])} ({mark})</span></figure>'
    )


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
