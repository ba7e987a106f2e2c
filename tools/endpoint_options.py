"""The options of commands that ask a chat endpoint: ``@endpoint_options`` hands them over as one ``ClientOptions``."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llava_ds.api.endpoint import OPENAI_URL
from llava_ds.api.options import ClientOptions

POSITIVE = click.FloatRange(0, min_open=True)
PRICE = click.FloatRange(0)


def _json_object(_context: click.Context, _option: click.Parameter, text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise click.BadParameter(f"{text!r} is no JSON object; give one such as '{{\"top_k\": 40}}'")
    return value


OPTIONS = (
    click.option("--model", help="Name of the model that is asked."),
    click.option("--base-url", default=OPENAI_URL, show_default=True, envvar="OPENAI_BASE_URL", show_envvar=True,
                 help="An OpenAI-compatible endpoint."),
    click.option("--api-key-env", default="OPENAI_API_KEY", show_default=True, metavar="NAME",
                 help="Environment variable with the key; a local server needs none."),
    click.option("--accept-model", "accept_models", multiple=True, metavar="NAME",
                 help="A name under which the endpoint may answer, too; may be given again."),
    click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True, help="Calls at one time."),
    click.option("--requests-per-minute", type=POSITIVE, help="[default: no limit]"),
    click.option("--tokens-per-minute", type=POSITIVE, help="[default: no limit]"),
    click.option("--max-cost", "max_cost_usd", type=PRICE, metavar="USD",
                 help="Asks nothing that could cost more, this run; needs both prices."),
    click.option("--max-total-tokens", type=click.IntRange(0), help="Asks nothing that could take more, this run."),
    click.option("--price-in", type=PRICE, metavar="USD", help="Of a million prompt tokens."),
    click.option("--price-out", type=PRICE, metavar="USD", help="Of a million completion tokens."),
    click.option("--timeout-s", type=POSITIVE, default=120.0, show_default=True, help="Longest silence of a call."),
    click.option("--max-tries", type=click.IntRange(1), default=6, show_default=True,
                 help="Calls for a reply that the endpoint fails to give."),
    click.option("--extra-body", callback=_json_object, metavar="JSON",
                 help="Fields beside the usual ones, e.g. a grammar; null leaves one out."),
    click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Folder of paid replies."),
    click.option("--dry-run", is_flag=True, help="Prints calls, tokens and cost, and asks nothing."),
)
NAMES = frozenset(ClientOptions.__dataclass_fields__)


def endpoint_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options; the command gets them as ``endpoint``, for ``llava_ds.api.options.open_client``."""

    @functools.wraps(command)
    def with_endpoint(*args: Any, **options: Any) -> None:
        ours = {name: options.pop(name) for name in NAMES}
        command(*args, endpoint=ClientOptions(**ours), **options)

    return functools.reduce(lambda decorated, option: option(decorated), reversed(OPTIONS), with_endpoint)
