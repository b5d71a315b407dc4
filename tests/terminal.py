"""Processes that are started as from a terminal, wherever the tests themselves run."""

from __future__ import annotations

import signal


def usual_signals() -> None:
    """For ``preexec_fn``: tests that run in the background, or under nohup, hand on signals that are ignored."""
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)
