"""One Slurm cluster for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, find_missing

NUM_NODES = 14


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Nodes, idle at the start of every test; what a test mounts on a node it unmounts itself."""
    missing = find_missing()
    if missing:
        pytest.skip(missing)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        started.up(NUM_NODES)
        yield started


@pytest.fixture(autouse=True)
def _tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: no job, node or link is left as that test wanted it."""
    yield
    used = request.node.funcargs.get("cluster")
    if used is not None:
        used.tidy()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """A failure shows what the daemons logged."""
    report = yield
    used = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and used is not None:
        report.sections.append(("Slurm daemons", used.logs(num_lines=6)))
    return report
