from functools import partial

import pytest
import tiny_checkpoint
from live_stack import running_stack


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with one small model, `tiny`."""
    folder = tmp_path_factory.mktemp("models")
    tiny_checkpoint.make(folder / "tiny")
    return folder


@pytest.fixture(scope="session")
def stack(tmp_path_factory, models):
    """The stack that most tests share."""
    with running_stack(tmp_path_factory.mktemp("stack"), models) as stack:
        yield stack


@pytest.fixture
def own_stack(tmp_path, models):
    """Starts a stack for one test, with settings of its own."""
    return partial(running_stack, tmp_path, models)
