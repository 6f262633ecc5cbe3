"""The loader: the same batches for any number of processes, only the crop read, processes that end with the trainer."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from benchmarks.page_cache import drop, resident_pages
from models.intake import Box
from models.task import Task
from training.cases import LABELLED, PreparedCase, PreparedDataset, labelled_places
from training.errors import UserError
from training.loader import Loader, Subjects, batches
from training.mapped import read_box

MASKS = [
    (True, True, True, True),
    (True, False, True, True),
    (False, True, True, False),
    (False, True, False, False),
]
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def subjects(small_data):
    dataset = PreparedDataset.open(small_data[0])
    return Subjects([dataset.case(i) for i in dataset.ids], MASKS, dataset.task, seed=5, foreground=0.5)


@pytest.fixture
def damaged(small_data, tmp_path):
    """A copy of one prepared case, to be harmed."""
    dataset = PreparedDataset.open(small_data[0])
    shutil.copytree(dataset.root / dataset.ids[0], tmp_path / "case")
    return Subjects([PreparedCase(tmp_path / "case")], MASKS[:1], dataset.task, seed=5, foreground=1.0)


def same(a, b):
    return torch.equal(a.x, b.x) and torch.equal(a.labels, b.labels) and (a.masks, a.present) == (b.masks, b.present)


def all_same(ours, theirs):
    return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))


# The same numbers, whoever draws them


@pytest.mark.parametrize(("workers", "regime"), [(2, "idt"), (1, "pdt")])
def test_batches_are_bit_identical_for_any_number_of_processes_in_every_epoch(subjects, workers, regime):
    of = subjects if regime == "idt" else replace(subjects, masks=[MASKS[0]] * 4, regime=regime)
    before = torch.get_rng_state()
    with Loader(of, batch_size=2, workers=workers) as loader:
        for epoch in (0, 1, 7):
            assert all_same(list(loader.epoch(epoch)), list(batches(of, epoch, 2, workers=0)))
        # In mid-epoch, after one that was left in the middle.
        next(loader.epoch(2))
        assert all_same(list(loader.epoch(7, skip=1)), list(batches(of, 7, 2, workers=0))[1:])
    assert torch.equal(torch.get_rng_state(), before), "numbers were taken from torch's generator"


def test_batches_depend_on_seed_and_epoch_and_on_nothing_else(subjects):
    first = list(batches(subjects, 3, 1, workers=0))
    torch.manual_seed(1)
    np.random.seed(1)
    assert all_same(first, list(batches(subjects, 3, 1, workers=0)))
    for other in (batches(subjects, 4, 1, workers=0), batches(replace(subjects, seed=6), 3, 1, workers=0)):
        assert not any(same(a, b) for a in first for b in other)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches_are_the_same(subjects, workers):
    with Loader(subjects, batch_size=2, workers=workers, pin=True) as loader:
        pinned = list(loader.epoch(0))
    assert all_same(pinned, list(batches(subjects, 0, 2, workers=0)))
    for batch in pinned:
        assert batch.x.is_pinned() == batch.labels.is_pinned() == torch.cuda.is_available()


# Crops around a label


def test_crops_around_a_label_are_uniform_over_the_labelled_voxels(subjects):
    case = subjects.cases[0]
    labels = np.asarray(case.labels())
    assert np.array_equal(np.load(case.folder / f"{LABELLED}.npy"), np.flatnonzero(labels))
    rng = np.random.default_rng(0)
    count = int((labels > 0).sum())
    drawn = np.zeros(labels.shape, int)
    for _ in range(20 * count):
        drawn[case.labelled_voxel(rng)] += 1
    assert not drawn[labels == 0].any()
    squares = ((drawn[labels > 0] - 20) ** 2 / 20).sum()
    # Chi-squared: mean count - 1, deviation sqrt(2 (count - 1)).
    assert abs(squares - count) < 5 * np.sqrt(2 * count)


def test_a_folder_without_the_index_gives_the_same_crops(subjects, damaged):
    kept = list(batches(damaged, 0, 1, workers=0))
    (damaged.cases[0].folder / f"{LABELLED}.npy").unlink()
    assert all_same(kept, list(batches(damaged, 0, 1, workers=0)))


def test_a_case_without_labels_is_cropped_anywhere(damaged):
    case = damaged.cases[0]
    labels = np.zeros(case.shape, np.uint8)
    np.save(case.folder / "seg.npy", labels)
    np.save(case.folder / f"{LABELLED}.npy", labelled_places(labels))
    record = json.loads((case.folder / "case.json").read_text())
    record["label_voxels"] = [labels.size, 0, 0, 0]
    (case.folder / "case.json").write_text(json.dumps(record))
    of = replace(damaged, cases=[PreparedCase(case.folder)])
    assert len({of.draw(0, epoch)[0].numpy().tobytes() for epoch in range(5)}) == 5


def test_a_crop_of_the_whole_case_leaves_its_files_as_they_are(damaged):
    case = damaged.cases[0]
    whole = Task.model_validate(damaged.task.model_dump() | {"patch_size": case.shape})
    before = (case.folder / "t1.npy").read_bytes()
    x, *_ = replace(damaged, task=whole).draw(0, 0)
    assert x.shape[1:] == case.shape
    box = Box((0, 0, 0), case.shape)
    mean, std = case.statistics("t1")
    wanted = (np.asarray(case.image("t1")) - np.float32(mean)) / np.float32(std)
    assert np.array_equal(case.normalised("t1", box), wanted)
    assert (case.folder / "t1.npy").read_bytes() == before


# What is read


def pages(shape, itemsize, box, header=128):
    """The pages of a volume's file that hold voxels of a box."""
    rows = np.ravel_multi_index(np.mgrid[tuple(map(slice, box.start[:2], box.stop[:2]))], shape[:2]).ravel()
    first = header + (rows * shape[2] + box.start[2]) * itemsize
    last = header + (rows * shape[2] + box.stop[2]) * itemsize - 1
    return {int(p) for a, b in zip(first // PAGE, last // PAGE, strict=True) for p in range(a, b + 1)}


def mapped_bytes(path):
    """Of a mapped file what this process has touched, or lies in a block of 16 pages with that."""
    found = [m for m in psutil.Process().memory_maps(grouped=False) if m.path == str(path)]
    assert len(found) == 1
    return found[0].rss


def test_of_a_volume_only_the_boxs_pages_are_touched(tmp_path):
    shape, box = (200, 240, 160), Box((90, 100, 60), (122, 132, 92))
    path = tmp_path / "volume.npy"
    volume = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    volume[box.start] = 3
    volume.flush()
    del volume
    drop(path)
    volume = np.load(path, mmap_mode="r")
    cut = read_box(volume, box)
    assert cut.shape == box.shape
    assert (cut[0, 0, 0], cut.sum()) == (3, 3)
    blocks = {page // 16 for page in pages(shape, 4, box)}
    assert mapped_bytes(path) <= len(blocks) * 16 * PAGE < path.stat().st_size / 5


def test_a_draw_reads_its_crop_of_what_the_subject_has_and_nothing_else(subjects, tmp_path):
    """A case of 31 MB a modality, of which none is in the system's memory to begin with."""
    shape, size = (200, 240, 160), (32, 32, 32)
    folder = tmp_path / "case"
    folder.mkdir()
    labels = np.zeros(shape, np.uint8)
    labels[70:130, 70:130, 50:110] = 1
    np.save(folder / "seg.npy", labels)
    np.save(folder / f"{LABELLED}.npy", labelled_places(labels))
    names = subjects.task.names
    for name in names:
        # Written, and not only as long as it should be: of a hole nothing would have to be read.
        np.save(folder / f"{name}.npy", np.ones(shape, np.float32))
    record = {"modalities": names, "shape": shape, "mean": dict.fromkeys(names, 0), "std": dict.fromkeys(names, 1)}
    (folder / "case.json").write_text(json.dumps(record | {"label_voxels": np.bincount(labels.ravel()).tolist()}))
    task = Task.model_validate(subjects.task.model_dump() | {"patch_size": size})
    mask = (True, False, True, False)
    of = Subjects([PreparedCase(folder)], [mask], task, seed=1, foreground=1.0)
    for path in folder.glob("*.npy"):
        drop(path)
    on_disk = not any(any(resident_pages(path)) for path in folder.glob("*.npy"))
    x, drawn, *_ = of.draw(0, 0)
    assert bool(x.any())
    assert bool(drawn.any())
    if on_disk:  # a file system in memory has all of its files there, always
        read = {path.stem: sum(resident_pages(path)) * PAGE for path in folder.glob("*.npy")}
        # 32 planes of at most 32 rows of 640 bytes, each plane from one page to another.
        image, seg = (32 * (-(-32 * 160 * itemsize // PAGE) + 1) * PAGE for itemsize in (4, 1))
        header = 128 * 1024  # it is read as a file is, and some pages ahead
        assert read["t1ce"] == read["t2"] == 0
        assert 0 < read["flair"] == read["t1"] <= image + header
        assert image < (folder / "t1.npy").stat().st_size / 10
        assert 0 < read["seg"] <= seg + header
        assert 0 < read[LABELLED] <= header + PAGE


def test_files_of_modalities_that_the_subject_is_taken_to_lack_are_not_opened(damaged):
    case = damaged.cases[0]
    of = replace(damaged, masks=[(False, True, True, False)])
    wanted = of.draw(0, 0)
    for name in ("flair", "t2"):
        (case.folder / f"{name}.npy").unlink()
    assert torch.equal(of.draw(0, 0)[0], wanted[0])


# What cannot be read


def truncate(folder):
    with (folder / "t1.npy").open("r+b") as file:
        file.truncate(1000)


def resave(name, change):
    def harm(folder):
        array = change(np.load(folder / f"{name}.npy"))
        np.save(folder / f"{name}.npy", array)

    return harm


def change_record(key, value):
    def harm(folder):
        record = json.loads((folder / "case.json").read_text())
        (folder / "case.json").write_text(json.dumps(record | {key: value}))

    return harm


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (truncate, "t1.npy is missing or damaged"),
        (lambda folder: (folder / "t1.npy").write_bytes(b""), "t1.npy is missing or damaged"),
        (lambda folder: (folder / "seg.npy").unlink(), "seg.npy is missing or damaged"),
        (lambda folder: np.save(folder / "t2.npy", np.array({}), allow_pickle=True), "t2.npy is missing or damaged"),
        (resave("t1", lambda a: a.astype(np.float64)), r"t1.npy is float64 \(.*\) and not float32 \("),
        (resave("t1", lambda a: a[1:]), "t1.npy is float32"),
        (resave("seg", np.asfortranarray), "seg.npy is uint8 .* in C order"),
        (resave(LABELLED, lambda a: a[:-1]), f"{LABELLED}.npy does not fit case.json"),
        (resave(LABELLED, lambda a: a.astype(np.int64)), f"{LABELLED}.npy does not fit case.json"),
        (resave(LABELLED, lambda a: a * 0), f"{LABELLED}.npy does not fit seg.npy"),
        (resave(LABELLED, lambda a: a * 0 + 2**31), f"{LABELLED}.npy does not fit seg.npy"),
        (change_record("shape", 3), "case.json is missing or damaged"),
        (change_record("std", {"t1": 1.0}), "case.json is missing or damaged"),
        (lambda folder: (folder / "case.json").write_text("[]"), "case.json is missing or damaged"),
    ],
)
def test_a_damaged_case_names_the_file_and_the_remedy(damaged, harm, said):
    folder = damaged.cases[0].folder
    harm(folder)
    of = replace(damaged, cases=[PreparedCase(folder)])
    with pytest.raises(UserError, match=f"^{folder}: {said}.*; run `passion prepare` again$") as caught:
        list(batches(of, 0, 1, workers=0))
    assert "\n" not in str(caught.value)


def test_a_damaged_case_is_told_in_the_same_words_by_a_process(damaged):
    truncate(damaged.cases[0].folder)
    with pytest.raises(UserError, match=r"t1\.npy is missing or damaged; run `passion prepare` again$") as caught:
        list(batches(damaged, 0, 1, workers=1))
    assert "\n" not in str(caught.value)


# Processes


def processes():
    return [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


def gone(children, seconds=20):
    """Whether all have ended within some time."""
    return not psutil.wait_procs(children, timeout=seconds)[1]


def test_processes_live_from_epoch_to_epoch_have_one_thread_to_compute_with_and_end(subjects):
    settings = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}
    before = {name: os.environ.get(name) for name in settings}
    with Loader(subjects, batch_size=1, workers=2) as loader:
        list(loader.epoch(0))
        first = processes()
        list(loader.epoch(1))
        assert processes() == first
        assert len(first) == 2
        for process in first:
            environment = process.environ()
            assert {environment[name] for name in settings} == {"1"}
            # The program, its watch over the parent, and what torch and multiprocessing send batches with.
            assert process.num_threads() <= 4
    assert gone(first)
    assert {name: os.environ.get(name) for name in settings} == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


def test_batches_left_in_the_middle_leave_no_process(subjects):
    drawn = batches(subjects, 0, 1, workers=1)
    next(drawn)
    children = processes()
    assert children
    drawn.close()
    assert gone(children)


def test_a_killed_process_is_one_line_with_a_remedy(subjects):
    def run():
        with Loader(replace(subjects, cases=subjects.cases * 50, masks=MASKS * 50), 1, 1) as loader:
            for number, _ in enumerate(loader.epoch(0)):
                if number == 0:
                    processes()[0].kill()

    with pytest.raises(UserError, match=r"a process of the loader was killed.*lower `workers`") as caught:
        run()
    assert "\n" not in str(caught.value)


def start_training(small_data, out):
    """`passion train` with two processes of the loader, in a group of its own, once it has made a step."""
    data, split = small_data
    path = out / "run.yaml"
    path.write_text(
        f"data: {data}\nsplit: {split}\nout: {out}/run\nepochs: 1000\ndevice: cpu\nmethod: none\nworkers: 2\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-m", "training", "train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "run" / "log.jsonl").exists() and trainer.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    children = [p for p in psutil.Process(trainer.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    return trainer, children


@pytest.mark.slow
@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_job_is_the_trainers_to_answer(small_data, tmp_path, told):
    trainer, children = start_training(small_data, tmp_path)
    try:
        assert len(children) == 2
        os.killpg(trainer.pid, told)
        output, _ = trainer.communicate(timeout=60)
    finally:
        trainer.kill()
    assert trainer.returncode == 0, output
    assert "--resume" in output
    assert "Traceback" not in output
    assert gone(children)


@pytest.mark.slow
def test_a_killed_trainer_takes_its_processes_along(small_data, tmp_path):
    trainer, children = start_training(small_data, tmp_path)
    trainer.kill()
    trainer.communicate(timeout=60)
    assert len(children) == 2
    assert gone(children)
