"""Fixtures for the tests of the layers."""

import pytest

from lightning_lyapunov.layers import registry


@pytest.fixture(autouse=True)
def _same_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo the registrations of a test."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
