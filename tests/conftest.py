"""Shared fixtures: one thread (the machine is shared), and one trained tiny model for the whole session."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Directory of a llama of 4 blocks, width 64, trained for a few seconds on ``tiny.corpus()``. Do not write into it."""
    from tiny import trained_tiny

    path = tmp_path_factory.mktemp("trained")
    trained_tiny(path)
    return path
