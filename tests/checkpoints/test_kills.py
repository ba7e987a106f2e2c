"""``kill -9`` of one rank or of all, at random moments, loses nothing that was committed."""

import pytest

from tests.checkpoints.kills import kill_and_compare

pytestmark = pytest.mark.slow


def test_five_kills_change_nothing(tmp_path):
    """The seed is fixed; what the machine does in the meantime is not."""
    outcome = kill_and_compare(tmp_path, 5, seed=3)
    assert sum(outcome.kills.values()) == 5
    assert max(outcome.resumed_from) > 0  # some kill came after the first save of a step
