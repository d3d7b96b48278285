"""Shared fixtures: one thread (the machine is shared), tiny checkpoints, and one trained model for the whole run."""

import os

import pytest
import torch

os.environ["LISSOM_CACHE"] = "off"  # no images of tiny models in the user's cache; tests of images set their own


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, worker_id):
    """A folder that all workers of pytest-xdist see."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def trained(shared_folder):
    """Directory of a llama of 4 blocks, width 64, trained for a few seconds on ``tiny.corpus()``. Do not write into it."""
    from filelock import FileLock

    from tiny import trained_tiny

    path = shared_folder / "trained"
    with FileLock(f"{path}.lock"):
        if not (path / "tokenizer_config.json").exists():
            trained_tiny(path)
    return path


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory):
    """``random_checkpoint(kind)``: directory of a random model of a kind of ``tiny.KINDS``. Do not write into it."""
    from tiny import tiny_model

    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny_model(kind, made[kind])
        return made[kind]

    return get
