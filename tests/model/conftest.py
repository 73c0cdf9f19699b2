import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small operations are faster, and never stall, on one thread."""
    torch.set_num_threads(1)
