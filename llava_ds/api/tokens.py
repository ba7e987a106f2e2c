"""How many tokens a request may take, where no tokenizer of the endpoint's model is at hand."""

from __future__ import annotations

from typing import NamedTuple

from llava_ds.api.messages import ChatRequest

_BYTES_PER_TOKEN = 4
"""Of English, in the tokenizers of GPT-4 and LLaMA."""
_TEMPLATE_TOKENS, _TOKENS_PER_MESSAGE = 64, 8
"""What a chat template adds: a default system message at most, and the marks around each message."""


class Tokens(NamedTuple):
    """Tokens that were read and written."""

    prompt: int
    completion: int

    def plus(self, other: Tokens) -> Tokens:
        """Both together."""
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def minus(self, other: Tokens) -> Tokens:
        """What is left."""
        return Tokens(self.prompt - other.prompt, self.completion - other.completion)


def expected_tokens(request: ChatRequest) -> Tokens:
    """A guess at the prompt, and the longest completion."""
    marks = _TOKENS_PER_MESSAGE * len(request.messages)
    prompt = guess_tokens("".join(message.content for message in request.messages)) + marks
    return Tokens(prompt, request.max_reply_tokens)


def worst_tokens(request: ChatRequest) -> Tokens:
    """A bound: no tokenizer makes more than a token of a byte."""
    num_bytes = sum(len(message.content.encode(errors="replace")) for message in request.messages)
    marks = _TEMPLATE_TOKENS + _TOKENS_PER_MESSAGE * len(request.messages)
    return Tokens(num_bytes + marks, request.max_reply_tokens)


def guess_tokens(text: str) -> int:
    """Tokens of a text, about."""
    return -(-len(text.encode(errors="replace")) // _BYTES_PER_TOKEN)
