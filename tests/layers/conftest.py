"""What the tests of the layers start from."""

import pytest

from lightning_lyapunov.layers import registry


@pytest.fixture(autouse=True)
def _same_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget after a test what it has registered."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
