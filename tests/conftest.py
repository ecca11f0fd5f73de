"""Every test runs on one thread of torch: tiny tensors gain nothing from more, and two busy processes lose a lot."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
