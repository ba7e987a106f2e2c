"""Where models are asked."""

from __future__ import annotations

from dataclasses import dataclass

OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server.

    ``api_key_env`` names the environment variable with the key; a local server needs none. ``accept_models`` are names
    under which the server may answer beside the one that was asked.
    """

    base_url: str = OPENAI_URL
    api_key_env: str = "OPENAI_API_KEY"
    accept_models: tuple[str, ...] = ()
    timeout_s: float = 120.0
