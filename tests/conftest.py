"""Tests run on one thread and in a cache folder of their own, so that they neither disturb nor use what a person has."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory):
    before = os.environ.get("TINYLM_HOME")
    os.environ["TINYLM_HOME"] = str(tmp_path_factory.mktemp("home"))
    yield
    if before is None:
        del os.environ["TINYLM_HOME"]
    else:
        os.environ["TINYLM_HOME"] = before


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """What is left open is resolved to the plain path, on every machine alike; tests of the fast one ask for it."""
    from tinylm import backend

    monkeypatch.setattr(backend, "findings", lambda: dict(backend.PLAIN))


@pytest.fixture(autouse=True)
def usual_interrupt():
    """Ctrl-C means what it usually does, whatever a notebook that ran inside an earlier test left of it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
