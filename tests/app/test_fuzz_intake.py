"""A small part of what `benchmarks/fuzz_intake.py` does: the same files each time."""

import shutil

from serving import serving

from benchmarks import fuzz_intake as fuzz

FILES = 1500


def test_damaged_files_are_refused_or_scrubbed_and_never_break_the_service(settings, tiny):
    shutil.copytree(tiny, settings.models / "tiny")
    with serving(settings.model_copy(update=fuzz.LIMITS)) as client:
        counts, failures, _ = fuzz.survey(range(FILES), 7, client)
    assert failures == []
    outcomes = {outcome: n for outcome, n in counts.items() if not outcome.startswith("HTTP")}
    assert sum(outcomes.values()) == FILES
    # Neither all refused nor all taken, or the damage is of no use.
    assert FILES / 4 < outcomes[fuzz.CLEAN] < FILES * 3 / 4
    assert len(outcomes) > 10
    assert not any(settings.store.iterdir())


def test_the_files_depend_on_seed_and_number_alone():
    assert fuzz.damaged(3, 5) == fuzz.damaged(3, 5)
    assert len({fuzz.damaged(seed, number) for seed in range(3) for number in range(30)}) > 80
