"""What every test of surgery must leave behind: nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from avatarl_env.surgery import theater


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Check that the test closed its theaters and gave SIGINT back."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    assert theater._open_theaters == []
    assert theater._interrupts._depth == 0
    assert not theater._interrupts.pending
    assert signal.getsignal(signal.SIGINT) is handler
