"""Fixtures: the checkpoints of `checkpoints.py`, written once a session."""

import gc
import signal

import pytest

LONG = ["test_notebooks.py", "test_export.py", "test_trainer.py", "test_stable_diffusion.py", "test_distributed.py"]


def pytest_configure():
    """Shells start what runs in the background with ^C ignored, which the processes of tests would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that processes that take a file each end together."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="module", autouse=True)
def memory_is_given_back():
    """Models and their compiled functions refer to each other: Python would keep those of many files."""
    yield
    gc.collect()


def _checkpoint(name):
    @pytest.fixture(scope="session", name=name)
    def folder(tmp_path_factory):
        from checkpoints import write_checkpoint

        return write_checkpoint(name, tmp_path_factory.mktemp(name))

    return folder


tiny, narrow_v1, v2_like = map(_checkpoint, ("tiny", "narrow_v1", "v2_like"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Folder of the embedded model's SavedModels, all six, with models.config."""
    from export.__main__ import NAMES, main

    folder = tmp_path_factory.mktemp("exported")
    main(["--preset", "emoji", "--out", str(folder), "--only", *NAMES])
    return folder
