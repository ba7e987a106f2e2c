"""What a good model would write: replies for tests of data generation, each a function of the request alone."""

import hashlib
import json
from pathlib import Path

from llava_ds.datagen.kinds import KINDS
from llava_ds.datagen.prompt_files import OUR_PROMPTS, load_prompts
from llava_ds.datagen.records import AnnotatedImage, Instance

WORDS = "amber brick cedar delta ember fjord grove haven ivory jetty knoll lilac maple north olive pearl".split()
SMALL_PROMPTS = {
    "conversation": "Write questions about a picture, and answers.",
    "detail": "Describe the picture in five sentences.",
    "complex": "Write a question about the picture that takes thought, and an answer of five sentences.",
}
"""For a model so small that examples only slow it down."""
_KIND_OF = {prompt.messages[0].content: name for name, prompt in load_prompts(OUR_PROMPTS, KINDS).items()}
_KIND_OF |= {text: name for name, text in SMALL_PROMPTS.items()}


def kind_of(body: dict) -> str:
    """The kind that a request asks for, by its system message."""
    return _KIND_OF[body["messages"][0]["content"]]


def words_of(body: dict, count: int = 8) -> str:
    """Words that no other request has."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
    return " ".join(WORDS[byte % 16] for byte in digest[:count])


def write_reply(body: dict) -> str:
    """A good reply."""
    about = words_of(body, 12)
    answer = f"The picture shows {about}, and it is quiet there, as nobody but a heron passes by before the sun is up."
    answer += " Later in the day, boats come and go."
    if kind_of(body) == "detail":
        return answer
    question = f"Why would somebody walk past {about}?"
    pair = f"Question:\n{question}\n===\nAnswer:\n{answer}"
    if kind_of(body) == "complex":
        return pair
    return f"{pair}\n===\nQuestion:\nWhat is there?\n===\nAnswer:\n{about}."


def make_images(count: int) -> list[AnnotatedImage]:
    """Images with captions of their own, and boxes of most."""
    return [
        AnnotatedImage(
            f"{n:04d}", f"images/{n:04d}.jpg", (f"Picture {n}.", "A thing."),
            tuple(Instance("thing", (0.1, 0.2, 0.3 + k / 10, 0.5)) for k in range(n % 3)),
        )
        for n in range(count)
    ]


def write_small_prompts(folder: Path) -> Path:
    """A folder for ``--prompts``."""
    for name, text in SMALL_PROMPTS.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "system.md").write_text(text)
    return folder
