"""The options that commands share, down to the client that they make."""

import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from llava_ds.api import connection
from llava_ds.api.options import ClientOptions, open_client
from llava_ds.errors import BackendUnavailableError, ConfigError

LOCAL = ["--model", "m", "--base-url", "http://127.0.0.1:9/v1"]


@pytest.fixture
def given(monkeypatch):
    """Parses options as a command does."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    from endpoint_options import endpoint_options

    def parse(*options: str) -> ClientOptions:
        seen = []

        @click.command()
        @click.option("--own", default=1)
        @endpoint_options
        def command(own: int, endpoint: ClientOptions) -> None:
            seen.append(endpoint)

        result = CliRunner().invoke(command, list(options), standalone_mode=False)
        if result.exception:
            raise result.exception
        return seen[0]

    yield parse
    sys.modules.pop("endpoint_options", None)


def test_defaults_are_those_of_the_library(given):
    assert given() == ClientOptions()


def test_every_option_arrives(given, tmp_path):
    options = given(
        *LOCAL, "--api-key-env", "KEY", "--accept-model", "a", "--accept-model", "b", "--concurrency", "3",
        "--requests-per-minute", "60", "--tokens-per-minute", "1e5", "--max-cost", "2.5", "--max-total-tokens", "1000",
        "--price-in", "0.5", "--price-out", "1.5", "--timeout-s", "7", "--max-tries", "2",
        "--extra-body", '{"top_k": 1}', "--cache", str(tmp_path / "c"), "--dry-run",
    )
    assert options == ClientOptions(
        "m", "http://127.0.0.1:9/v1", "KEY", ("a", "b"), 3, 60.0, 1e5, 2.5, 1000, 0.5, 1.5, 7.0, 2, {"top_k": 1},
        tmp_path / "c", True,
    )
    with open_client(options) as client:
        assert client.endpoint.accept_models == ("a", "b") and client.endpoint.timeout_s == 7
        assert (client.limits.concurrency, client.limits.requests_per_minute) == (3, 60)
        assert (client.budget.max_cost_usd, client.budget.prices.completion_usd_per_million) == (2.5, 1.5)
        assert client.retries.max_tries == 2
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("text", ["{", "[1]", "grammar=x"])
def test_extra_body_is_a_json_object(given, text):
    with pytest.raises(click.BadParameter, match="JSON"):
        given("--extra-body", text)


def test_all_that_is_missing_is_named_at_once(given):
    with pytest.raises(ConfigError, match="(?s)no model is named.*--max-cost 3 cannot be held without --price-out"):
        open_client(given("--max-cost", "3", "--price-in", "1"))


def test_the_cache_lies_where_it_is_told(given, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_DS_CACHE", str(tmp_path / "user"))
    for options, default, place in (
        (("--cache", str(tmp_path / "own")), tmp_path / "task", "own"),
        ((), tmp_path / "task", "task"),
        ((), None, "user/replies"),
    ):
        with open_client(given(*LOCAL, *options), default) as client:
            assert client.cache.folder == tmp_path / place


def test_without_the_package_it_says_how_to_get_it(given, tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'llava_ds\[generate\]'"):
        open_client(given(*LOCAL), tmp_path / "c")
    assert not (tmp_path / "c").exists()
    open_client(given(*LOCAL, "--dry-run"), tmp_path / "c").close()
