"""Grammars (GBNF, of llama.cpp) that leave a model no other form than that of a reply.

A small model cannot keep to a form that it is told; with a grammar it must. What it says gets no better by it.
"""

from __future__ import annotations

from llava_ds.datagen.kinds import Kind

_TEXT = r"""
question ::= [A-Z] [a-z]{1,9} (" " word){3,14} "?"
sentence ::= [A-Z] [a-z]{0,9} (","? " " word){5,18} "."
word ::= [A-Za-z'-]{1,14}
"""


def reply_grammar(kind: Kind) -> str:
    """Questions of up to 16 words and sentences of up to 20, as many as the kind asks; letters only, so no numbers."""
    if not kind.asks:
        return f'root ::= sentence (" " sentence){{4,5}}{_TEXT}'
    fewest = kind.num_pairs[0]
    most = 1 if kind.num_pairs[1] == 1 else 3
    sentences = "{4,5}" if kind.answer_words[0] > 6 else "{0,1}"
    return (
        f'root ::= pair ("\\n===\\n" pair){{{fewest - 1},{most - 1}}}\n'
        'pair ::= "Question:\\n" question "\\n===\\nAnswer:\\n" answer\n'
        f'answer ::= sentence (" " sentence){sentences}{_TEXT}'
    )
