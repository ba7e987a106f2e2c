"""Replies of a model: what is parsed, what is refused and for which reason, and what must not be refused."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llava_ds.datagen.grammar import reply_grammar
from llava_ds.datagen.kinds import KINDS
from llava_ds.datagen.prompt_files import OUR_PROMPTS, load_prompts
from llava_ds.datagen.records import Instance
from llava_ds.datagen.reply import Pair, parse_reply
from llava_ds.datagen.validate import find_fault, find_fault_in_pairs
from llava_ds.errors import ConfigError, DataError

CONVERSATION, DETAIL, COMPLEX = KINDS["conversation"], KINDS["detail"], KINDS["complex"]
TALK = "Question:\nWhat is it?\n===\nAnswer:\nA cat.\n===\nQuestion:\nIs it old?\n===\nAnswer:\nNo, it is a kitten."
LONG = (
    "The image shows a cat on a mat near a window, and the light of the morning falls onto its grey fur from the left "
    "while a dog looks on."
)


@pytest.mark.parametrize(
    "text",
    [
        TALK,
        f"\n {TALK}\n===\n",
        TALK.replace("\n===\n", "\n\n  =====  \n\n"),
        TALK.replace("Question:\n", "**Question:** ").replace("Answer:\n", "answer: "),
        f"<think>\nTwo questions.\n===\nQuestion: ...\n</think>\n\n{TALK}",
    ],
)
def test_forms_that_are_read(text):
    assert parse_reply(CONVERSATION, text) == (Pair("What is it?", "A cat."), Pair("Is it old?", "No, it is a kitten."))


def test_lines_inside_an_answer_stay():
    pairs = parse_reply(COMPLEX, "Question:\nWhy?\n===\nAnswer:\nOne.\n\nTwo: a = b == c.\n")
    assert pairs == (Pair("Why?", "One.\n\nTwo: a = b == c."),)
    assert parse_reply(DETAIL, " Some text.\n\nMore. ") == (Pair("", "Some text.\n\nMore."),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("Here is a conversation:\n" + TALK, "expected 'Question:', found 'Here is"),
        ("Question:\nWhat?", "a last question without an answer"),
        ("Answer:\nA cat.\n===\nQuestion:\nWhat?", "expected 'Question:', found 'Answer:'"),
        ("Question:\nA?\n===\nQuestion:\nB?", "expected 'Answer:', found 'Question:'"),
        ("Question:\nA?\n===\nAnswer:\n", "nothing follows 'Answer:'"),
        ("Question:\nA?\n===\n===\nAnswer:\nb", "expected 'Answer:', found ''"),
        ("Question: A? Answer: b", "a last question without an answer"),
        (TALK + "\n\nQuestion:\nWhere is it?\n\nAnswer:\nThere.", "'Question:' inside a text; is a line === missing"),
        ("Question: A?\n**Answer 1**: b\n===\nAnswer: c", "'**Answer 1**:' inside a text"),
        ("<think>Hm.\n" + TALK, "expected 'Question:', found '<think>Hm."),
    ],
)
def test_forms_that_are_refused(text, words):
    with pytest.raises(DataError, match=re.escape(words)):
        parse_reply(CONVERSATION, text)
    assert words in find_fault(CONVERSATION, text, "stop", ())


@pytest.mark.parametrize(
    "text",
    [
        f"Sure! Here is a detailed description of the picture:\n\n{LONG}", f"Certainly, {LONG}", f"It shows:\n\n{LONG}",
        f"Here\u2019s the detailed description: {LONG}", f"**Description:** {LONG}",
        f"**Detailed description**\n\n{LONG}", f"## The picture\n{LONG}",
        f"```\n{LONG}\n```", f'{{"description": "{LONG}"}}', f"{LONG}\n===\n{LONG}",
        f"Question:\nWhat is it?\n===\nAnswer:\n{LONG}", f"{LONG}\n\nQuestion: What is it?\nAnswer: A cat.",
        f"<think>Hm.</think>\nSure! {LONG}",
    ],
)
def test_what_is_no_plain_description(text):
    assert (find_fault(DETAIL, text, "stop", ()) or "").startswith("wrong form: ")


def test_thoughts_are_no_part_of_a_description():
    assert parse_reply(DETAIL, f"<think>\n**A cat**\n\n</think>\n\n{LONG}") == (Pair("", LONG),)
    assert find_fault(DETAIL, f"<think>Hm.\x1b</think>\n\n{LONG}", "stop", ()) is None
    for text in (f"{LONG} </think> {LONG}", f"<think> {LONG}", f"{LONG}<think>Hm.</think>"):
        assert (find_fault(DETAIL, text, "stop", ()) or "").startswith("holds a placeholder or special token: ")


@pytest.mark.parametrize("character", ["\ud83d", "\udc00", "\x00", "\x1b", "\r", "\x85"])
def test_characters_that_are_no_text(character):
    for kind, text in ((DETAIL, f"{LONG}{character} It is day."), (CONVERSATION, TALK.replace("cat", character))):
        assert find_fault(kind, text, "stop", ()) == f"holds a character that is no text: {character!r}"
    assert find_fault(DETAIL, f"{LONG}\r\n\n\tTwo \U0001f600 faces.", "stop", ()) is None
    assert parse_reply(CONVERSATION, TALK.replace("\n", "\r\n")) == parse_reply(CONVERSATION, TALK)


def fault(answer: str, question: str = "What is in the picture?") -> str | None:
    kind = replace(CONVERSATION, num_pairs=(1, 1), answer_words=(1, 400))
    return find_fault_in_pairs(kind, [Pair(question, answer)])


LEAKS = {
    "speaks of captions or boxes": [
        "According to the captions, there are two dogs.", "The caption says that it rains.",
        "One caption mentions a cat.", "All five captions agree.", "The bounding box of the car is large.",
        "Its coordinates show that it is far away.", "The bounding-boxes overlap.",
        "The list of objects holds a chair.", "There are four detected objects.",
        "It is not clear from the captions.", "Based on the provided captions, it is noon.",
        "Its bbox is large.", "The boxes show that it is near.", "Based on the boxes, it is near.",
        "Based on coordinates, it is near.", "The object coordinates put it there.", "Caption 3 calls it a boat.",
    ],
    "speaks of its source": [
        "Based on the provided information, he is late.", "The given description does not tell.",
        "It is red, according to the description.", "The sentences mention a dog.", "From the sentences we know it.",
        "The colour is not specified.", "It is not explicitly mentioned.", "As mentioned above, it is a dog.",
        "The information provided suggests so.", "They are described as antique.",
        "The terms jeep and truck are used to describe the same car.", "Its colour isn\u2019t specified.",
        "The breed isn't mentioned.", "Based on the text provided, it is noon.", "It is a boat, according to the list.",
        "The list mentions a dog.", "The numbers suggest that it is far away.",
    ],
    "speaks as a language model": [
        "As an AI language model, I look.", "As a language model I guess.", "I'm sorry, that is unclear.",
        "I cannot see the picture.", "I am unable to tell.", "I can't help with this.", "I apologize for this.",
        "I\u2019m sorry, but no.", "I can\u2019t see it.", "I don't have access to the image itself.",
        "I'm an AI assistant.", "Let me know if you would like me to change anything!", "I hope this helps.",
    ],
    "gives coordinates": [
        "The cat is at [0.12, 0.5, 0.6, 0.7].", "Its left edge is at 0.123 of the width.",
        "The dog (0.37, 0.58) is small.", "It stands at [120, 40].", "cat: [0.120, 0.500, 0.600, 0.700]",
        "It stands at (370, 584).", "It is at x=0.37, y=0.58.", "person: 0.37, 0.58, 0.50, 1.00",
        "It goes from 0.37 to 0.50 of the width.",
    ],
    "holds a placeholder or special token": [
        "This <image> shows it.", "A cat.</s>", "<|im_end|> A cat.", "[INST] Go on. [/INST]",
        "A cat.\n### Human: more", "A cat.\nUSER: and now?", "<start_of_turn>model", "A cat.<|im_end",
    ],
}


@pytest.mark.parametrize(("reason", "text"), [(reason, text) for reason, texts in LEAKS.items() for text in texts])
def test_leaks_are_refused(reason, text):
    assert (fault(text) or "").startswith(f"{reason}: ")
    assert (fault("A cat.", text) or "").startswith(f"{reason}: ")


@pytest.mark.parametrize(
    "text",
    [
        "The newspaper page has a caption below its photo.",
        "Three cardboard boxes and a pizza box stand on the table.", "She coordinates the work of the others.",
        "His tie is coordinated with his shirt.", "It costs $0.999 or 1.5 dollars.",
        "The tower is 1,024 feet high, and the clock shows 10:30.", "A sentence is painted on the wall.",
        "The text on the sign says STOP.", "The bus is line 3.125 times as long.",
        "The scene may be described with one word.", "The list on the fridge holds five things.",
        "She provided information to tourists.", "He is sorry for the dog.",
        "The first box is at the left, the second in the middle.",
        "The boat (with 3 sails) and the pier [of wood] are old.", "The cat cannot see the mouse.",
        "They mention no price; the store gives details.", "An AI robot vacuum cleans.",
        "The given name on the cake is Ann.", "The following details stand out: a clock and a lamp.",
        "The human: a complex being, some say.", "From the description on the sign, visitors learn its age.",
        "The scale reads 1.500 kg.", "A batting average of .300 is shown.", "The board shows a point (3.5, 2.0).",
        "The details provided by the hotel stand on a card.", "It holds 0.5 litres and costs 1.00 or 0.75 euros.",
        "Based on the boxes stacked by the door, they are moving.", "The boxes show signs of wear.",
        "From the list on the board, he picks a dish.", "Two numbers show the time.", "He doesn't mention a price.",
    ],
)
def test_what_is_no_leak(text):
    assert fault(text) is None


def test_numbers_that_are_edges_of_the_boxes():
    """An edge is found as the model was shown it, or rounded to two decimals; no box says anything of other numbers."""
    instances = [Instance("cat", (0.0, 0.3704, 0.5, 1.0)), Instance("dog", (0.1, 0.2346, 0.845, 0.9996))]

    def found(text: str, kind=COMPLEX) -> str | None:
        kind = replace(kind, num_pairs=(1, 1), answer_words=(1, 400))
        return find_fault_in_pairs(kind, [Pair("What is there?", text)], instances)

    for number in ("0.370", ".370", "0.37", "0.235", "0.23", "0.24", "0.845", "0.84", "0.85", "0.500", "0.50", "0.100"):
        assert found(f"It begins at {number}.") == f"gives coordinates: {number!r} is the edge of a box"
    for text in (
        "0.36", "0.371", "0.846", "0.5 litres", "0.1", "1.00", "0.00", "1.000", "0.000", "1.37", "10.37", "$0.37",
        "€.37", "0.37 %", "0.37%", "3.0.37", "37", "v0.370",
    ):
        assert found(f"It says {text}.") is None
    assert found("It begins at 0.37.", CONVERSATION) is None  # it was shown no boxes


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (DETAIL, LONG, None),
        (DETAIL, "A cat.", "answer too short: 2 words, at least 25 expected"),
        (DETAIL, "word " * 401, "answer too long: 401 words, at most 400 expected"),
        (CONVERSATION, TALK, None),
        (CONVERSATION, TALK.split("\n===\nQuestion")[0], "wrong number of questions: 1, expected 2 to 12"),
        (CONVERSATION, TALK.replace("Is it old?", "what  is: it"), "a question twice"),
        (COMPLEX, f"Question:\nWhy is it there?\n===\nAnswer:\n{LONG}", None),
        (COMPLEX, f"Question:\nWhy?\n===\nAnswer:\n{LONG}", "question too short: 1 words, at least 3 expected"),
        (COMPLEX, TALK, "wrong number of questions: 2, expected 1 to 1"),
        (DETAIL, LONG + " and then the cat sat" * 4, None),
        (DETAIL, LONG + " and then the cat sat" * 5, "goes round in circles: 'and then the cat' 5 times"),
        (DETAIL, LONG * 4 + " and on the left side" * 5, None),
        (DETAIL, LONG * 4 + " and on the left side" * 6, "goes round in circles: 'and on the left' 6 times"),
    ],
)
def test_numbers_lengths_and_repetition(kind, text, reason):
    found = find_fault(kind, text, "stop", ())
    assert found == reason or (reason is not None and found is not None and found.startswith(reason))


def test_replies_that_were_cut_off():
    assert find_fault(DETAIL, LONG, "length", ()) == "cut off: it reached max_tokens"
    assert "content filter" in find_fault(DETAIL, LONG, "content_filter", ())


@pytest.mark.parametrize("name", KINDS)
def test_our_prompts(name):
    prompt = load_prompts(OUR_PROMPTS, [name])[name]
    roles = [message.role for message in prompt.messages]
    assert roles == ["system", *["user", "assistant"] * 2]
    for asked, answered in zip(prompt.messages[1::2], prompt.messages[2::2], strict=True):
        assert find_fault(KINDS[name], answered.content, "stop", ()) is None
        has_boxes = re.search(r"^\w[\w ]*: \[0\.\d{3}(, 0\.\d{3}){3}\]$", asked.content, re.MULTILINE) is not None
        assert has_boxes == KINDS[name].sees_boxes
        assert len(asked.content.split("\n\n")[0].splitlines()) == 5
    assert prompt.ask("A cat.")[-1].content == "A cat."


def test_own_prompts(tmp_path):
    folder = tmp_path / "prompts"
    shutil.copytree(OUR_PROMPTS, folder)
    ours = load_prompts(OUR_PROMPTS, KINDS)
    assert {name: prompt.sha256 for name, prompt in load_prompts(folder, KINDS).items()} == {
        name: prompt.sha256 for name, prompt in ours.items()
    }
    for number in (1, 2):
        for part in ("input", "reply"):
            file = folder / "detail" / f"example-{number}-{part}.txt"
            file.rename(file.with_name(f"example-{number * 10}-{part}.txt"))
    (folder / "detail" / "example-9-input.txt").write_text("Nine.")
    (folder / "detail" / "example-9-reply.txt").write_text("Neun.")
    changed = load_prompts(folder, KINDS)
    assert [message.content for message in changed["detail"].messages[1:3]] == ["Nine.", "Neun."]
    assert changed["detail"].sha256 != ours["detail"].sha256 and changed["complex"] == ours["complex"]
    shutil.rmtree(folder / "conversation")
    (folder / "complex" / "example-1-reply.txt").write_text("Because.")
    (folder / "detail" / "system.md").write_text(" \n")
    with pytest.raises(ConfigError) as raised:
        load_prompts(folder, KINDS)
    for words in ("conversation/system.md: ", "complex/example-1-reply.txt: wrong form", "detail/system.md: the file"):
        assert words in str(raised.value)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_the_grammar_allows_is_not_refused(kind):
    """The shortest and the longest text of each grammar have the right form and length."""
    assert reply_grammar(kind).startswith("root ::= ")
    short = " ".join(["Aa" + " bcd" * 5 + "."] * 5)
    long = " ".join(["Aa" + ", efgh" * 18 + "."] * 6)
    for number, (question, answer) in enumerate((("Aa" + " b" * 3 + "?", short), ("Aa" + " c" * 14 + "?", long))):
        answer = answer if kind.answer_words[0] > 1 else answer[: answer.index(".") + 1]
        pairs = [Pair(f"{question[:-1]}{n}?", answer) for n in range(kind.num_pairs[0] + number)]
        if kind.num_pairs[1] == 1:
            pairs = pairs[:1]
        fault = find_fault_in_pairs(kind, pairs) or ""
        assert not fault or fault.startswith("goes round in circles")


@pytest.mark.skipif("LLAVA_DS_BENCH_COCO" not in os.environ, reason="LLAVA_DS_BENCH_COCO names no folder")
def test_the_90_reference_answers():
    """GPT-4 wrote them from captions and boxes. Two are refused: they speak of the words they were shown."""
    folder = Path(os.environ["LLAVA_DS_BENCH_COCO"])
    questions, answers = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("qa90_questions.jsonl", "qa90_gpt4_answer.jsonl")
    )
    faults = {}
    for question, answer in zip(questions, answers, strict=True):
        assert question["question_id"] == answer["question_id"]
        if answer["category"] == "detail":
            assert parse_reply(DETAIL, answer["text"]) == (Pair("", answer["text"].strip()),)
        kind = replace(KINDS.get(answer["category"], CONVERSATION), num_pairs=(1, 1))
        faults[answer["question_id"]] = find_fault_in_pairs(kind, [Pair(question["text"], answer["text"])])
    assert len(faults) == 90
    assert {number: found for number, found in faults.items() if found} == {
        2: "speaks of its source: 'they are described as'",
        81: "speaks of its source: 'terms motorcycle, scooter, and moped are used interchangeably to describe'",
    }
