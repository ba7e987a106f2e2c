"""The paper's ensembles of LLaVA (first) with a text-only model (second) on ScienceQA: section 5.2, Table 7.

*complement*: the second model's answer, and the first's where the second has none. *judge*: where both have an answer
and these differ, the second model is asked again with both, and its final answer counts; the first's where it gives
none. Where only one has an answer, that one counts. (The official ``eval_science_qa_gpt4*.py`` draw at random for an
answer that failed, and leave out of complement what one of the files lacks.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from llava_ds.evaluation.scienceqa_answers import Answer

ENSEMBLES = ("complement", "judge")


def complement(first: Mapping[str, Answer], second: Mapping[str, Answer]) -> dict[str, Answer]:
    """The second's answer to each problem, or else the first's."""
    return {pid: _given(second[pid]) or first[pid] for pid in first}


def to_judge(first: Mapping[str, Answer], second: Mapping[str, Answer]) -> list[str]:
    """The problems to which both have an answer, and not the same."""
    return [pid for pid in first if _given(first[pid]) and _given(second[pid]) and first[pid] != second[pid]]


def judge(first: Mapping[str, Answer], second: Mapping[str, Answer], judged: Mapping[str, Answer]) -> dict[str, Answer]:
    """The judge's answer where there is one, or else the first's, or else the second's."""
    return {
        pid: (_given(judged[pid]) if pid in judged else None) or _given(first[pid]) or _given(second[pid]) or first[pid]
        for pid in first
    }


def count_cases(first: Mapping[str, Answer], second: Mapping[str, Answer]) -> dict[str, int]:
    """How many problems both answer alike or differently, only one answers, or none."""
    cases = Counter(_case(_given(first[pid]), _given(second[pid])) for pid in first)
    return {case: cases[case] for case in ("agree", "differ", "only_first", "only_second", "none")}


def _case(first: Answer | None, second: Answer | None) -> str:
    if first and second:
        return "agree" if first == second else "differ"
    return "only_first" if first else "only_second" if second else "none"


def _given(answer: Answer) -> Answer | None:
    return None if answer.reason else answer
