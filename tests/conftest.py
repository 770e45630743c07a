"""What every test starts from."""

import pytest
import torch
from hypothesis import settings

# The tensors of the tests are small: more threads would only wait for one another where the cores are shared.
torch.set_num_threads(1)

# Reproducible and quick by default; `pytest --hypothesis-profile=thorough` looks for new examples.
settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu"] + (["cuda"] if torch.cuda.is_available() else []))
def device(request: pytest.FixtureRequest) -> str:
    return request.param
