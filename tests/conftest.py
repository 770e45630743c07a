"""Settings and fixtures of all tests."""

import pytest
import torch
from hypothesis import settings

# Its assertions say what differs.
pytest.register_assert_rewrite("promises")
# They hold no doctests, and several modules of one name cannot be imported.
collect_ignore_glob = ["*/conftest.py"]
# Before 2.7, `fully_shard` shards on GPUs only.
collect_ignore = ["layers/test_sharded.py"] if torch.__version__ < "2.7" else []

# The tensors of the tests are small: more threads would only wait for one another where the cores are shared.
torch.set_num_threads(1)


def _trains_lstm_in_bfloat16() -> bool:
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
    except RuntimeError:
        return False
    return True


# oneDNN has no LSTM in bfloat16 for some CPUs, on which torch's own can train only without it.
torch.backends.mkldnn.enabled = _trains_lstm_in_bfloat16()

# Reproducible and quick by default; `pytest --hypothesis-profile=thorough` looks for new examples.
settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _pictures_whatever_time_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    # The runs of the tests are so short that only their first and last pictures would be drawn.
    monkeypatch.setattr("lightning_lyapunov.reporting.budget._MAX_TIME_SHARE", 1.0)


@pytest.fixture(params=["cpu"] + (["cuda"] if torch.cuda.is_available() else []))
def device(request: pytest.FixtureRequest) -> str:
    return request.param
