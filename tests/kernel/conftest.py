"""Fixtures for the tests of the kernel."""

import pytest

from lightning_lyapunov.kernel import interval


@pytest.fixture(params=["small in float64", "all in float32"])
def small_states(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow small layers in float64, as on a CPU, and in float32, as large layers or on other devices."""
    if request.param == "all in float32":
        monkeypatch.setattr(interval, "_SMALL_STATE", {})
