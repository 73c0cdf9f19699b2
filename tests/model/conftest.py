import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Run torch on one thread: small operations are faster that way and never stall."""
    torch.set_num_threads(1)
