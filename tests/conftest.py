"""Tests run on one thread and in a cache folder of their own, so that they neither disturb nor use what a person has."""

from __future__ import annotations

import os

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
