"""The preference update and the learning rate schedule against a published run."""

import json

import numpy as np
import pytest
import torch
from golden_case import GOLDEN

from training.passion.preference import Preference, relative_preference
from training.schedule import polynomial

RUN = json.loads((GOLDEN / "preference_schedule.json").read_text())


def test_beta_and_eta_follow_the_golden_run():
    preference = Preference.start(4)
    wanted = {u["epoch"]: u for u in RUN["updates"]}
    for epoch, dist in enumerate(RUN["dist_every_epoch"]):
        preference.record(torch.tensor([dist]), torch.ones(1, 4, dtype=torch.bool))
        preference.update(epoch)
        if epoch in wanted:
            np.testing.assert_allclose(preference.beta, wanted[epoch]["beta"], atol=2e-6)
            assert preference.eta == pytest.approx(wanted[epoch]["eta"])
    assert len(wanted) == 11


def test_learning_rate_follows_the_golden_figures():
    lr = RUN["poly_lr"]
    for epoch, value in lr["at"].items():
        assert polynomial(lr["base"], int(epoch), lr["epochs"], lr["power"]) == pytest.approx(value, abs=1e-11)


def test_beta_of_a_modality_that_no_step_had_stays():
    preference = Preference.start(3)
    preference.record(torch.tensor([[0.2, 0.0, 0.4]]), torch.tensor([[True, False, True]]))
    preference.update(0)
    assert preference.beta[1] == 1
    assert preference.beta[0] < 1 < preference.beta[2]
    assert preference.beta.norm().item() == pytest.approx(3**0.5)


def test_mean_distance_counts_only_the_steps_where_a_modality_was_present():
    preference = Preference.start(2)
    preference.record(torch.tensor([[0.2, 0.4]]), torch.tensor([[True, True]]))
    preference.record(torch.tensor([[0.4, 0.0]]), torch.tensor([[True, False]]))
    np.testing.assert_allclose(preference.update(0), [0.3, 0.4], rtol=1e-6)


def test_state_survives_json():
    preference = Preference.start(4)
    preference.update(0)
    preference.record(torch.rand(1, 4), torch.ones(1, 4, dtype=torch.bool))
    again = Preference.restore(json.loads(json.dumps(preference.state())))
    assert again.state() == preference.state()


def test_a_sample_with_one_modality_has_no_preference():
    rp = relative_preference(torch.tensor([[0.3, 0.0], [0.1, 0.3]]), torch.tensor([[True, False], [True, True]]))
    np.testing.assert_allclose(rp, [-0.5, 0.5], rtol=1e-6)
