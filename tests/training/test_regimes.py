"""The training regimes: what the fused path is given, what the separate decoder learns from, who may train."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch

from training.config import TrainConfig
from training.errors import UserError
from training.loader import Subjects, batches
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 1500


def config(small, out, **changes):
    data, split = small
    settings = {"data": data, "split": split, "out": out, "epochs": 1, "device": "cpu", "foreground": 1.0}
    return TrainConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def trainers(small_data, tmp_path_factory):
    """One trainer by regime, none of which has made a step."""
    out = tmp_path_factory.mktemp("runs")
    return {r: Trainer(config(small_data, out / r, regime=r)) for r in ("idt", "idt_drop", "pdt")}


@pytest.fixture(scope="module")
def subjects(trainers):
    """Subjects by regime; `masks` of idt and idt_drop are 1111, 1011, 0110, 0100."""
    return {regime: trainer.subjects for regime, trainer in trainers.items()}


def within(part, whole):
    return all(has or not kept for kept, has in zip(part, whole, strict=True))


# What is drawn


def test_idt_gives_every_subject_the_same_mask_in_every_epoch(subjects):
    idt = subjects["idt"]
    for index, mask in enumerate(idt.masks):
        assert {idt.subset(index, epoch) for epoch in range(50)} == {mask}
    assert idt.masks[1] == (True, False, True, True)


@pytest.mark.parametrize("regime", ["idt_drop", "pdt"])
def test_subsets_are_uniform_over_the_non_empty_ones_of_what_is_there(subjects, regime):
    of = subjects[regime]
    for index, mask in enumerate(of.masks):
        drawn = Counter(of.subset(index, epoch) for epoch in range(EPOCHS))
        subsets = 2 ** sum(mask) - 1
        assert len(drawn) == subsets
        assert all(any(subset) and within(subset, mask) for subset in drawn)
        expected = EPOCHS / subsets
        # Chi-squared against uniform; its mean is the degrees of freedom, and 40 is beyond 0.1 % of 14 of them.
        assert sum((n - expected) ** 2 / expected for n in drawn.values()) < 40
    assert (of.masks[0], sum(of.masks[3])) == ((True,) * 4, 4 if regime == "pdt" else 1)


def test_subsets_depend_on_seed_epoch_and_subject_alone(subjects):
    of = subjects["pdt"]
    draws = [[of.subset(i, epoch) for i in range(4)] for epoch in range(30)]
    backwards = [[of.subset(i, epoch) for i in reversed(range(4))][::-1] for epoch in reversed(range(30))][::-1]
    assert draws == backwards
    other = replace(of, seed=of.seed + 1)
    assert draws != [[other.subset(i, epoch) for i in range(4)] for epoch in range(30)]
    assert len({tuple(subset) for subset in draws}) > 25  # not the same in every epoch
    assert any(row[0] != row[1] for row in draws)  # nor for every subject


# What is in a batch


def test_idt_drop_reads_only_what_it_drew(subjects):
    of: Subjects = subjects["idt_drop"]
    for epoch in range(4):
        for index in range(4):
            x, _, mask, present = of.draw(index, epoch)
            assert mask == present == of.subset(index, epoch)
            assert [bool(channel.any()) for channel in x] == list(mask)


def test_pdt_reads_everything_whatever_the_fused_path_is_given(subjects):
    of = subjects["pdt"]
    masks = set()
    for epoch in range(4):
        for batch in batches(of, epoch, batch_size=2, workers=0):
            assert batch.present == [(True,) * 4] * 2
            assert batch.x.flatten(2).any(2).all()
            masks.update(batch.masks)
    assert any(sum(mask) < 4 for mask in masks)


def test_pdt_crops_do_not_depend_on_the_subset(subjects):
    of = subjects["pdt"]
    whole = replace(of, regime="idt")  # the same complete masks, nothing drawn
    x, labels, mask, _ = of.draw(0, 1)
    wanted, wanted_labels, full, _ = whole.draw(0, 1)
    assert sum(mask) < sum(full) == 4
    assert torch.equal(x, wanted)
    assert torch.equal(labels, wanted_labels)


def test_draws_do_not_depend_on_the_number_of_workers(subjects):
    """For the other regimes: tests/training/test_loader.py."""
    here, there = (list(batches(subjects["idt_drop"], 3, batch_size=2, workers=n)) for n in (0, 2))
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.x, b.x)
        assert (a.masks, a.present) == (b.masks, b.present)


# What is trained


def test_the_modality_weight_is_of_the_subjects_and_1_under_pdt(trainers):
    for regime in ("idt", "idt_drop"):  # not of the subsets drawn
        assert trainers[regime].modal_weight.tolist() == pytest.approx([4 / 2, 4 / 3, 4 / 3, 4 / 2])
        assert trainers[regime].card().missing_rates == {"flair": 0.5, "t1ce": 0.25, "t1": 0.25, "t2": 0.5}
    assert trainers["pdt"].modal_weight.tolist() == [1, 1, 1, 1]
    assert set(trainers["pdt"].card().missing_rates.values()) == {0}


def drawn(trainer, wanted):
    """The first batch of one subject whose fused path is given `wanted` modalities."""
    for epoch in range(40):
        for batch in batches(trainer.subjects, epoch, 1, 0):
            if sum(batch.masks[0]) == wanted:
                return batch
    raise AssertionError("no such batch")


@pytest.mark.parametrize("method", ["none", "passion"])
def test_pdt_trains_every_separate_path_and_fuses_the_subset(small_data, tmp_path, method):
    trainer = Trainer(config(small_data, tmp_path, regime="pdt", method=method, weight_decay=0))
    batch = drawn(trainer, 2)
    mask = torch.tensor(batch.masks)
    losses = trainer.step(batch)
    assert torch.equal(losses.mask, mask)
    assert losses.present.all()
    assert (losses.sep > 0).all()
    assert not losses.kl[~mask].any()
    assert not losses.dist[~mask].any()
    reached = [
        any(p.grad.any() for p in trainer.network.get_submodule(f"{name}_encoder").parameters())
        for name in trainer.task.names
    ]
    if method == "none":
        assert all(reached)
        assert trainer.state.sums["seen/t2"] == trainer.state.sums["seen/flair"] == 1
    else:  # a modality that the fused path lacks is no laggard, so its separate loss does not count in this step
        assert (losses.kl[mask] > 0).all()
        assert reached == list(batch.masks[0])


def test_the_fused_path_does_not_see_what_the_subset_lacks(trainers):
    trainer = trainers["pdt"]
    batch = drawn(trainer, 1)
    x, mask = batch.x, batch.masks[0]
    changed = x.clone()
    changed[0, [not has for has in mask]] += 1
    with torch.no_grad():
        logits = [trainer.network.fuse(trainer.network.encode(v, [True] * 4), mask).logits for v in (x, changed)]
    assert torch.equal(*logits)


# Who may train


@pytest.fixture
def one_incomplete(small_data, tmp_path):
    """The small data with a first subject that has no T2 file."""
    data, split = small_data
    copy = tmp_path / "prepared"
    shutil.copytree(data, copy)
    first = (split / "train.txt").read_text().split()[0]
    record = json.loads((copy / first / "case.json").read_text())
    record["modalities"].remove("t2")
    (copy / first / "case.json").write_text(json.dumps(record))
    (copy / first / "t2.npy").unlink()
    return copy, split, first


def test_pdt_refuses_a_subject_that_is_not_complete(one_incomplete, tmp_path):
    data, split, first = one_incomplete
    with pytest.raises(UserError, match=f"{first}: has no t2, but regime pdt trains on complete subjects") as caught:
        Trainer(config((data, split), tmp_path / "run", regime="pdt"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("regime", ["idt", "idt_drop"])
def test_a_table_that_gives_what_a_subject_lacks_is_refused(one_incomplete, tmp_path, regime):
    data, split, first = one_incomplete
    with pytest.raises(UserError, match=f"{first}: has no t2, but missingness.csv gives it to the subject"):
        Trainer(config((data, split), tmp_path / "run", regime=regime))


def test_pdt_needs_no_table_of_what_is_missing(small_data, tmp_path):
    data, split = small_data
    (tmp_path / "train.txt").write_text((split / "train.txt").read_text())
    trainer = Trainer(config((data, tmp_path), tmp_path / "run", regime="pdt"))
    assert trainer.subjects.masks == [(True,) * 4] * 4


def test_an_unknown_regime_names_the_known_ones(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: a\nsplit: b\nout: c\nregime: idt-drop\n")
    with pytest.raises(UserError, match=r"regime: .*'idt', 'idt_drop' or 'pdt'"):
        TrainConfig.read(path)


def test_a_run_is_not_resumed_under_another_regime_or_method(small_data, tmp_path):
    data, split = small_data
    (tmp_path / "train.txt").write_text((split / "train.txt").read_text().splitlines()[0] + "\n")
    shutil.copy(split / "missingness.csv", tmp_path)
    settings = config((data, tmp_path), tmp_path / "run", method="none")
    trainer = Trainer(settings)
    trainer.config.out.mkdir()
    trainer.save()
    for change in ({"regime": "pdt"}, {"method": "dwa"}):
        with pytest.raises(UserError, match=f"another {next(iter(change))}"):
            Trainer(settings.model_copy(update=change), resume=True)
