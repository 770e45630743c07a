"""What the tests of the kernel start from."""

import pytest

from lightning_lyapunov.kernel import interval


@pytest.fixture(params=["small in float64", "all in float32"])
def small_states(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers as a CPU follows them, in float64, and as what is large or elsewhere is followed."""
    if request.param == "all in float32":
        monkeypatch.setattr(interval, "_SMALL_STATE", {})
