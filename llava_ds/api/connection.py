"""One call over HTTP, by the ``openai`` package: its only import site."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from llava_ds.api.endpoint import Endpoint
from llava_ds.api.faults import Fault, http_fault
from llava_ds.api.messages import ChatRequest
from llava_ds.api.reading import Received, read_reply
from llava_ds.errors import BackendUnavailableError

if TYPE_CHECKING:
    import openai

# The package raises the same error whether the server was reached or not; its cause tells.
_NOT_REACHED = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError")
_DETAIL_LENGTH = 300


def check_installed() -> None:
    """Raises BackendUnavailableError when the ``openai`` package is missing."""
    if find_spec("openai") is None:
        raise BackendUnavailableError(
            "asking a chat endpoint takes the openai package, which is not installed: pip install 'llava_ds[generate]'"
        )


class Connection:
    """Calls to one endpoint, from any number of threads. What it raises never holds the key.

    Raises BackendUnavailableError without the ``openai`` package, ConfigError when a key is missing.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        check_installed()
        import openai

        self._openai, self._endpoint, self._key = openai, endpoint, endpoint.read_key()
        self._client = openai.OpenAI(
            base_url=endpoint.base_url, api_key=self._key or "none", timeout=endpoint.timeout_s, max_retries=0
        )

    def send(self, request: ChatRequest) -> Received:
        """Makes one call. Raises Fault when it brings no reply that may be used."""
        fields = request.body()
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=fields.pop("model"), messages=fields.pop("messages"), extra_body=fields
            )
        except self._openai.APIError as error:
            self._raise_fault(error)
        except UnicodeEncodeError as error:
            raise Fault("not_sent", f"a message holds half a character ({error.reason})", "request") from error
        try:
            body = response.content.decode()
        except UnicodeDecodeError as error:
            raise Fault("bad_json", f"not UTF-8 ({error.reason})", may_be_paid=True) from error
        try:
            return read_reply(request, body, self._endpoint.accept_models)
        except Fault as fault:  # some servers repeat what they were sent
            fault.detail = self._describe(fault.detail)
            raise

    def close(self) -> None:
        """Closes what is open."""
        self._client.close()

    def _raise_fault(self, error: openai.APIError) -> NoReturn:
        # ``from None``: the errors below hold the request, and with it the key.
        if isinstance(error, self._openai.APIStatusError):
            names, detail = (error.code, error.type), self._describe(error.message)
            raise http_fault(error.status_code, names, detail, error.response.headers) from None
        cause = error.__cause__
        reached = type(cause).__name__ not in _NOT_REACHED
        if isinstance(error, self._openai.APITimeoutError) and reached:
            detail = f"nothing came for {self._endpoint.timeout_s:g} s"
            raise Fault("timeout", detail, may_be_paid=True) from None
        detail = self._describe(f"{type(cause).__name__}: {cause}")
        raise Fault("connection", detail, may_be_paid=reached) from None

    def _describe(self, text: str) -> str:
        text = " ".join(text.split())
        return (text.replace(self._key, "<key>") if self._key else text)[:_DETAIL_LENGTH]
