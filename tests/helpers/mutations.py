"""Ways to spoil a LLaVA record, or the line that it is written as."""

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

SPECIALS = (
    "</s>", "<s>", "<unk>", "<|im_end|>", "<|im_start|>", "[INST]", "[/INST]",
    "###", "ASSISTANT:", " ASSISTANT: ", "USER:",
    "<<SYS>>", "<|eot|>", "<|end|>", "<|user|>", "<0x0A>", "### Human:", "{}", "{0}", "%s", "{{ x }}", "{% if %}", "\\",
)
LETTERS = (
    "\0", "👩‍👩‍👧‍👦", "👍🏽", "هذه قطة", "\u202eabc\u202c", "e\u0301\u0323",
    "\ue0b00\ue0b1", "\ue0b0", "\ue0b11\ue0b0", "\u2581", "\ufeff",
    "日本の桜", "\u00a0", "\u2028", "\x85", "\x1b[31m", "\ufffd", "\U0010ffff", "이 사진", "\r\n", "\x7f",
)
SPACES = (" ", "  ", "\n", "\t", "\n\n\n", " \n ", "      ", "\n ", " " * 40, "\t\t")
SURROGATES = ("\ud800", "\udfff", "\ude42\ud83d", "a\udc00b")
ROLES = ("Human", "gpt ", "system", "user", "assistant", "human", "gpt", "", "\ud800", "bot")
NAMES = ("a.png", "b/../c d.png", "/etc/x.png", ".", "../y", "\0.png", "이미지.jpg", "<image>", " ", "x" * 300, "http://x/y")
Record = dict[str, Any]


def odd_value(rng: Random) -> Any:
    """A JSON value of any type."""
    odd = [None, True, False, 0, -1, 7.5, 10**40, 10**4000, float("nan"), float("inf"),
           -0.0, "", " ", "text", [], {}, [[]]]
    odd += [[None], {"a": None}, [1, "a"], {"from": "human", "value": "Hi"}, ["a.png", ""], [["a.png"]], "\ud800", "0"]
    return copy.deepcopy(rng.choice(odd))


def _turns(record: Record) -> list[Any]:
    turns = record.get("conversations")
    return turns if isinstance(turns, list) else []


def _dicts(record: Record) -> list[Record]:
    return [record, *(turn for turn in _turns(record) if isinstance(turn, dict))]


def _drop_key(rng: Random, record: Record) -> None:
    target = rng.choice(_dicts(record))
    if target:
        del target[rng.choice(list(target))]


def _rename_key(rng: Random, record: Record) -> None:
    target = rng.choice(_dicts(record))
    if target:
        key = rng.choice(list(target))
        target[rng.choice([key.upper(), key + " ", "", "text", "\ud800", key[::-1]])] = target.pop(key)


def _reorder_keys(rng: Random, record: Record) -> None:
    for target in _dicts(record):
        items = rng.sample(list(target.items()), len(target))
        target.clear()
        target.update(items)


def _add_key(rng: Random, record: Record) -> None:
    key = rng.choice(["caption", "text", "Image", "images", "role", "\0", "weight"])
    rng.choice(_dicts(record))[key] = odd_value(rng)


def _drop_turn(rng: Random, record: Record) -> None:
    if turns := _turns(record):
        del turns[rng.randrange(len(turns))]


def _repeat_turn(rng: Random, record: Record) -> None:
    if turns := _turns(record):
        number = rng.randrange(len(turns))
        turns.insert(number, copy.deepcopy(turns[number]))


def _repeat_rounds(rng: Random, record: Record) -> None:
    turns = _turns(record)
    turns += copy.deepcopy(turns) * rng.choice([1, 1, 2, 7] if len(str(turns)) < 2000 else [1])


def _add_rounds(rng: Random, record: Record) -> None:
    for number in range(rng.randint(1, 6)):
        question = rng.choice(["", " ", "Why?", "How many?\nTell me."]) + "so " * rng.randrange(12)
        _turns(record).extend([{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {number}."}])


def _reorder_turns(rng: Random, record: Record) -> None:
    rng.shuffle(_turns(record))


def _change_type(rng: Random, record: Record) -> None:
    """Of any value, at any depth."""
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [record]
    while waiting:
        found = waiting.pop()
        keys = list(found) if isinstance(found, dict) else range(len(found))
        places += [(found, key) for key in keys]
        waiting += [found[key] for key in keys if isinstance(found[key], dict | list)]
    if places:
        holder, key = rng.choice(places)
        holder[key] = odd_value(rng)


def _nest(rng: Random, record: Record) -> None:
    value: Any = []
    for _ in range(rng.choice([3, 50, 300])):
        value = [value] if rng.random() < 0.7 else {"a": value}
    rng.choice(_dicts(record))[rng.choice(["id", "image", "conversations", "value", "from", "extra"])] = value


def _change_role(rng: Random, record: Record) -> None:
    if len(dicts := _dicts(record)) > 1:
        rng.choice(dicts[1:])["from"] = rng.choice(ROLES)


def _rename_roles(rng: Random, record: Record) -> None:
    """To the other known names; nothing else changes."""
    for turn in _dicts(record)[1:]:
        if isinstance(turn.get("from"), str):
            turn["from"] = {"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"])


def _edit_text(rng: Random, record: Record, edit: Callable[[str], str]) -> None:
    texts = [turn for turn in _dicts(record)[1:] if isinstance(turn.get("value"), str)]
    if texts:
        turn = rng.choice(texts)
        turn["value"] = edit(turn["value"])


def _insert(rng: Random, record: Record, choices: tuple[str, ...]) -> None:
    def edit(text: str) -> str:
        for _ in range(rng.randint(1, 3)):
            place = rng.choice([0, len(text), rng.randint(0, len(text))])
            text = text[:place] + rng.choice(choices) + text[place:]
        return text

    _edit_text(rng, record, edit)


def _empty_text(rng: Random, record: Record) -> None:
    _edit_text(rng, record, lambda text: rng.choice(["", "", " ", "\n", "\t \n"]))


def _long_text(rng: Random, record: Record) -> None:
    num_words = rng.choice([10, 40, 100, 100, 400]) if rng.random() < 0.97 else 10_000
    words = " ".join(rng.choices(["fox", "old", "a", "wizards", "Where", "\n", "코"], k=num_words))
    _edit_text(rng, record, lambda text: rng.choice([text + words, words]))


def _image_key(rng: Random, record: Record) -> None:
    record["image"] = rng.choice(["a.png", "", [], None, ["a.png"], ["a.png", "b.png"], [""], ["a.png", None],
                                  [rng.choice(NAMES) for _ in range(rng.randrange(4))], rng.choice(NAMES),
                                  "\udc00.png"])


def _images_in_text(rng: Random, record: Record) -> None:
    _insert(rng, record, ("<image>", "<image>\n", "\n<image>", "< image>", "<IMAGE>", "<image", "<image><image>"))


def _images_agree(rng: Random, record: Record) -> None:
    """0 to 3 images in questions, and a path for each."""
    questions = [turn for turn in _dicts(record)[1:] if turn.get("from") in ("human", "user")]
    questions = [turn for turn in questions if isinstance(turn.get("value"), str)]
    for _ in range(rng.randrange(4) if questions else 0):
        turn = questions[0] if rng.random() < 0.6 else rng.choice(questions)
        place = rng.choice([0, len(turn["value"]), rng.randint(0, len(turn["value"]))])
        image = rng.choice(["<image>", "<image>\n", "\n<image>"])
        turn["value"] = turn["value"][:place] + image + turn["value"][place:]
    count = sum(turn["value"].count("<image>") for turn in questions)
    record["image"] = [rng.choice(NAMES) for _ in range(count)]


def _image_in_image(rng: Random, record: Record) -> None:
    """A placeholder whose removal makes another one."""
    _insert(rng, record, ("<im<image>age>", "<image<image>>"))
    record["image"] = ["a.png"] * rng.randrange(5)


def _odd_id(rng: Random, record: Record) -> None:
    record["id"] = rng.choice([odd_value(rng), 0, 7, -3, "", " ", "a\nb", "같은",
                               "'", '"', "x" * 500, "\0", "\udc00", 10**40])


def _same_id(rng: Random, record: Record) -> None:
    record["id"] = "same"


KINDS: dict[str, tuple[float, Callable[[Random, Record], None]]] = {
    "drop_key": (0.5, _drop_key), "rename_key": (0.5, _rename_key), "reorder_keys": (1, _reorder_keys),
    "add_key": (1, _add_key), "drop_turn": (0.4, _drop_turn), "repeat_turn": (0.4, _repeat_turn),
    "repeat_rounds": (3, _repeat_rounds), "add_rounds": (4, _add_rounds), "reorder_turns": (0.5, _reorder_turns),
    "change_type": (0.8, _change_type), "nest": (0.3, _nest), "change_role": (0.7, _change_role),
    "rename_roles": (1, _rename_roles), "empty_text": (0.8, _empty_text), "long_text": (1.5, _long_text),
    "special_tokens": (5, lambda rng, record: _insert(rng, record, SPECIALS)),
    "letters": (4, lambda rng, record: _insert(rng, record, LETTERS)),
    "spaces": (4, lambda rng, record: _insert(rng, record, SPACES)),
    "surrogates": (0.3, lambda rng, record: _insert(rng, record, SURROGATES)),
    "image_key": (0.6, _image_key), "images_in_text": (0.7, _images_in_text), "images_agree": (5, _images_agree),
    "image_in_image": (0.2, _image_in_image), "odd_id": (1, _odd_id), "same_id": (0.5, _same_id),
}
"""By name: how often, and what."""


def mutate(rng: Random, record: Record) -> tuple[Record, list[str]]:
    """A copy with one to four mutations, and their names."""
    mutated = copy.deepcopy(record)
    names = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()], k=rng.randint(1, 4))
    for name in names:
        KINDS[name][1](rng, mutated)
    return mutated, names


def _cut(rng: Random, line: bytes) -> bytes:
    return line[: rng.randrange(1, len(line))]


def _flip(rng: Random, line: bytes) -> bytes:
    damaged = bytearray(line)
    for _ in range(rng.randint(1, 4)):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _invalid_utf8(rng: Random, line: bytes) -> bytes:
    place = rng.randint(0, len(line))
    return line[:place] + rng.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\x80", b"\xf0\x9f\x98"]) + line[place:]


def _repeat_key(rng: Random, line: bytes) -> bytes:
    """The second one counts in JSON."""
    key = rng.choice(["id", "image", "conversations", "from"])
    return line.replace(b"{", b"{" + json.dumps({key: odd_value(rng)})[1:-1].encode() + b", ", 1)


def _other_line(rng: Random, line: bytes) -> bytes:
    return rng.choice([b"7", b"null", b'"id"', b"[]", b"{}",
                       b"[" + line + b"]", line + b"," + line, line + b"\r", b"NaN",
                       b"\xef\xbb\xbf" + line, b"\0", b"[" * 100_000, b'{"id": 1' + b"0" * 5000 + b"}", b"  " + line])


DAMAGES: dict[str, Callable[[Random, bytes], bytes]] = {
    "cut": _cut, "flip": _flip, "invalid_utf8": _invalid_utf8, "repeat_key": _repeat_key, "other_line": _other_line
}


def write_line(rng: Random, record: Record) -> tuple[bytes, list[str]]:
    """The record as a line of JSON, one in twelve of them damaged."""
    line = json.dumps(record).encode()
    if rng.random() < 0.5:
        with suppress(UnicodeEncodeError):  # half a surrogate pair is an escape or nothing
            line = json.dumps(record, ensure_ascii=False).encode()
    if rng.random() > 1 / 12:
        return line, []
    name = rng.choice(list(DAMAGES))
    return DAMAGES[name](rng, line), [name]
