"""llama.cpp, through the prebuilt wheel xllamacpp: a real server over two GGUF files, and its answers beside ours.

``python -m tests.helpers.llama_cpp MODEL GGUF_FOLDER PICTURE...`` counts the answers that are equal.
"""

import base64
import io
import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from PIL import Image

from llava_ds.inference.session import Sampling, Session, load_session
from llava_ds.models.llava import Llava
from llava_ds.schema import Turn


@dataclass(frozen=True)
class LlamaServer:
    """A running server; all that it is asked goes through HTTP."""

    address: str

    def ask(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a rendered prompt, as the server itself makes them."""
        return self.ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def render(self, turns: Sequence[Turn]) -> str:
        """A conversation through the file's chat template; texts only."""
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        return self.ask("/apply-template", {"messages": messages})["prompt"]

    def complete(
        self, prompt: list[int] | str, images: Sequence[bytes] = (), num_tokens: int = 8, num_probs: int = 0
    ) -> dict:
        """Greedy words behind ids, or behind a text where ``<image>`` stands for an image."""
        if isinstance(prompt, str):
            marked = prompt.replace("<image>", self.ask("/props")["media_marker"])
            prompt = {"prompt_string": marked, "multimodal_data": [base64.b64encode(data).decode() for data in images]}
        return self.ask("/completion", {
            "prompt": prompt, "n_predict": num_tokens, "temperature": 0, "n_probs": num_probs, "cache_prompt": False,
            "return_tokens": True,
        })

    def next_log_probs(self, prompt: list[int] | str, num_words: int, images: Sequence[bytes] = ()) -> torch.Tensor:
        """[V] log probabilities of the next word. The likeliest must be no stray byte: the server withholds those."""
        answer = self.complete(prompt, images, num_tokens=1, num_probs=num_words)
        out = torch.full((num_words,), float("nan"))
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            out[entry["id"]] = entry["logprob"]
        return out

    def chat(self, question: str, image: bytes, num_tokens: int) -> str:
        """A greedy answer to a question about an image, as a client of OpenAI's API asks it."""
        url = "data:image/png;base64," + base64.b64encode(image).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": num_tokens, "temperature": 0,
                "cache_prompt": False}
        return self.ask("/v1/chat/completions", body)["choices"][0]["message"]["content"].strip()


@contextmanager
def serve(folder: Path, num_positions: int = 256) -> Iterator[LlamaServer]:
    """A server over ``text.gguf`` and ``mmproj.gguf`` of a folder, on one thread, on a free port.

    Keys and values are in fp32 and attention is plain; llama.cpp's defaults round them to fp16.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = str(folder / "text.gguf"), str(folder / "mmproj.gguf")
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = num_positions, 1, 1
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.fit_params, params.verbosity = False, False, 1
    server = xllamacpp.Server(params)
    try:
        yield LlamaServer(server.listening_address)
    finally:
        del server


def as_png(levels: torch.Tensor) -> bytes:
    """[3, H, W] uint8 as a file."""
    file = io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return file.getvalue()


class ClassTokenLast(torch.nn.Module):
    """A tower with the features that llama.cpp gives: the first patch's is missing, the class token's comes last."""

    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()
        self.tower, self.spec, self.block = tower, tower.spec, tower.block

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[I, 3, H, W] -> [I, P, C]."""
        out = self.tower.visual.forward_intermediates(
            pixel_values, indices=[self.block], stop_early=True, intermediates_only=True, output_fmt="NLC",
            output_extra_tokens=True,
        )
        patches, class_token = out["image_intermediates"][0], out["image_intermediates_prefix"][0]
        return torch.cat([patches[:, 1:], class_token], dim=1)


@contextmanager
def class_token_last(model: Llava) -> Iterator[None]:
    """The model gets its features in llama.cpp's order, for as long."""
    tower = model.vision_tower
    model.vision_tower = ClassTokenLast(tower)
    try:
        yield
    finally:
        model.vision_tower = tower


@dataclass(frozen=True)
class Comparison:
    """Answers to the same questions: llama.cpp's, ours, and ours with the features in llama.cpp's order."""

    theirs: list[str]
    ours: list[str]
    in_their_order: list[str]

    def count_equal(self) -> tuple[int, int]:
        """How many of ``ours`` and of ``in_their_order`` llama.cpp gives, too."""
        pairs = (self.ours, self.in_their_order)
        return tuple(sum(a == b for a, b in zip(self.theirs, mine, strict=True)) for mine in pairs)


def compare_with_llama_cpp(
    session: Session, gguf_folder: Path, questions: Sequence[tuple[str, Path]], max_new_tokens: int = 32,
    resized_by_us: bool = True,
) -> Comparison:
    """Asks llama.cpp's chat and the session each question about its picture, greedily.

    ``resized_by_us`` gives llama.cpp the picture in the tower's size, as our transform makes it; else the file itself.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens)
    batch = [[Turn("user", f"<image>\n{question}")] for question, _ in questions]
    pictures = [[picture] for _, picture in questions]

    def answers() -> list[str]:  # one by one: padding beside them could turn a close call
        return [session.answer_batch([turns], [paths], sampling)[0]
                for turns, paths in zip(batch, pictures, strict=True)]

    ours = answers()
    with class_token_last(session.model):
        in_their_order = answers()
    num_positions = session.model.llm.config.max_position_embeddings
    with serve(gguf_folder, num_positions) as server:
        theirs = [
            server.chat(question, as_png(session.transform.levels(file)) if resized_by_us else file.read_bytes(),
                        max_new_tokens)
            for question, file in questions
        ]
    return Comparison(theirs, ours, in_their_order)


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("gguf_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("pictures", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--question", default="What is this?", show_default=True)
@click.option("--resized-by-us/--files", default=True, show_default=True, help="Who resizes the pictures.")
@click.option("--at-least", type=float, default=0.0, help="Exit code 1 below this share, in llama.cpp's order.")
def main(
    model: Path, gguf_folder: Path, pictures: tuple[Path, ...], question: str, resized_by_us: bool, at_least: float
) -> None:
    """Counts the answers about PICTURES that are the same from MODEL and from its GGUF files."""
    found = compare_with_llama_cpp(
        load_session(model), gguf_folder, [(question, picture) for picture in pictures], resized_by_us=resized_by_us
    )
    for picture, *answers in zip(pictures, found.theirs, found.ours, found.in_their_order, strict=True):
        click.echo(f"{picture.name}: llama.cpp {answers[0]!r}, ours {answers[1]!r}, in its order {answers[2]!r}")
    equal, equal_in_order = found.count_equal()
    click.echo(f"of {len(pictures)} answers {equal} are equal, {equal_in_order} with the features in llama.cpp's order")
    if equal_in_order < at_least * len(pictures):
        raise click.ClickException(f"{equal_in_order} of {len(pictures)} are below --at-least {at_least}")


if __name__ == "__main__":
    main()
