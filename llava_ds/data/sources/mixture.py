"""Several sources as one, numbered through."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from llava_ds.data.sources.source import Source
from llava_ds.schema import Sample


class JoinedSources:
    """The records of all sources after one another. A ``Source``."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.starts = [0, *accumulate(len(source) for source in sources)]

    @property
    def name(self) -> str:
        return " + ".join(source.name for source in self.sources)

    @property
    def fingerprint(self) -> str:
        return "|".join(source.fingerprint for source in self.sources)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Sample:
        number = bisect_right(self.starts, index) - 1
        return self.sources[number][index - self.starts[number]]
