"""Where models are asked."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from llava_ds.errors import ConfigError

OPENAI_URL = "https://api.openai.com/v1"
_KEY = re.compile(r"[!#-&(-\[\]-~]*")
"""Printable ASCII. Quotes and backslashes would be written in other ways where an answer repeats the key, and no longer
be found and blotted out."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server.

    ``api_key_env`` names the environment variable with the key; a local server needs none. ``accept_models`` are names
    under which the server may answer beside the one that was asked. ``timeout_s`` is the longest silence of a call.

    Raises ConfigError when ``base_url`` is no address.
    """

    base_url: str = OPENAI_URL
    api_key_env: str = "OPENAI_API_KEY"
    accept_models: tuple[str, ...] = ()
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            _ = parts.port
        except ValueError:  # neither it nor the address is told: what stands before the host may be a password
            raise ConfigError(
                "--base-url is no address: its host or port cannot be read; give one such as http://127.0.0.1:8000/v1"
            ) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.public_url!r} is no address; give one such as http://127.0.0.1:8000/v1")

    @property
    def public_url(self) -> str:
        """The address without a password or key that may stand in it."""
        parts = urlsplit(self.base_url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()

    def read_key(self) -> str:
        """The API key; empty where the environment has none.

        Raises ConfigError when it cannot be a key, or OpenAI itself would be asked without one.
        """
        key = os.environ.get(self.api_key_env, "").strip()
        if not _KEY.fullmatch(key):
            raise ConfigError(
                f"the environment variable {self.api_key_env} holds no key: among its {len(key)} characters "
                "are quotes, backslashes, line breaks, white space or characters beyond ASCII; set it to the key alone"
            )
        if not key and urlsplit(self.base_url).hostname == urlsplit(OPENAI_URL).hostname:
            raise ConfigError(
                f"{self.public_url} takes a key, and the environment variable {self.api_key_env} is not set: set it, "
                "name another by --api-key-env, or ask another endpoint by --base-url"
            )
        return key
