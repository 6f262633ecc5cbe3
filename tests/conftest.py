"""What all tests share: small phantoms, prepared once, and a small checkpoint."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

SMALL_TASK = """
name: glioma-small
modalities:
  - {name: flair, aliases: [t2f]}
  - {name: t1ce, aliases: [t1c, t1gd]}
  - {name: t1, aliases: [t1n]}
  - {name: t2, aliases: [t2w]}
labels:
  - {name: background, value: 0}
  - {name: necrotic core, value: 1}
  - {name: oedema, value: 2}
  - {name: enhancing tumour, value: 4, also_read: [3]}
regions:
  - {name: WT, labels: [1, 2, 3]}
  - {name: TC, labels: [1, 3]}
  - {name: ET, labels: [3]}
patch_size: [16, 16, 16]
spacing: [6.0, 6.0, 6.0]
orientation: LPS
min_crop: 16
"""


@pytest.fixture(scope="session")
def small_task_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "glioma-small.yaml"
    path.write_text(SMALL_TASK)
    return path


@pytest.fixture(scope="session")
def small_phantoms(tmp_path_factory):
    """Four phantom patients of 40x40x26 voxels at 6 mm."""
    from training.phantom import make_subject, write_subject

    folder = tmp_path_factory.mktemp("phantoms")
    for index in range(1, 5):
        write_subject(folder, make_subject(3, index, shape=(40, 40, 26), spacing=6.0))
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory, small_phantoms, small_task_file):
    """The four phantoms prepared, and split with a modality missing here and there. Returns (prepared, split)."""
    from models.task import Task
    from training.missingness import MissingnessTable
    from training.prepare import prepare_dataset

    root = tmp_path_factory.mktemp("data")
    task = Task.load(small_task_file)
    report = prepare_dataset(small_phantoms, root / "prepared", task, workers=1)
    assert not report.broken
    ids = sorted(p.name for p in small_phantoms.iterdir())
    masks = [
        (True, True, True, True),
        (True, False, True, True),
        (False, True, True, False),
        (False, True, False, False),
    ]
    split = root / "split"
    split.mkdir()
    (split / "train.txt").write_text("".join(f"{i}\n" for i in ids))
    MissingnessTable(task.names, dict(zip(ids, masks, strict=True))).write(split / "missingness.csv")
    return root / "prepared", split


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory, small_task_file):
    """The folder of a checkpoint with random weights for the small phantoms' grid."""
    import tiny_checkpoint

    from models.task import Task

    return tiny_checkpoint.make(tmp_path_factory.mktemp("checkpoints") / "small", task=Task.load(small_task_file))


@pytest.fixture
def one_thread():
    """Sums are in the same order everywhere, so results are equal and not only close."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
