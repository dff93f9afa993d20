"""Every test of data has a Minari root and a cache of its own."""

import pytest


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Every test has its own Minari root and its own cache."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("DQL_CACHE", str(tmp_path / "cache"))
    return tmp_path
