"""Settings refuse what they do not know, and survive JSON."""

import dataclasses

import pytest

from pymend import EditRequest, MendConfig, Probe, TrainConfig
from pymend.config import from_json, to_json


@pytest.mark.parametrize(
    ("cls", "wrong", "message"),
    [
        (TrainConfig, {"schedule": "linear"}, "schedule is 'linear'; choose one of constant, cos"),
        (TrainConfig, {"outer": "all"}, "outer is 'all'; choose one of both, rephrase, prompt"),
        (TrainConfig, {"prefix_cache": "disk"}, "prefix_cache is 'disk'; choose one of none, mem"),
        (TrainConfig, {"steps": 0}, "steps is 0; it must be at least 1"),
        (
            TrainConfig,
            {"batch_size": 10, "accumulate": 3},
            "batch_size 10 does not split into 3 equal passes; choose accumulate among",
        ),
        (TrainConfig, {"lr": float("nan")}, "lr is nan; it must be at least 0"),
        (TrainConfig, {"lr": -1.0}, "lr is -1.0; it must be at least 0"),
        (TrainConfig, {"c_loc": -1.0}, "c_loc is -1.0; it must be at least 0"),
        (TrainConfig, {"clip": 0.0}, "clip is 0.0; it must be above 0"),
        (MendConfig, {"init": "identity"}, "init is 'identity'; choose one of id, xavier"),
        (MendConfig, {"init_v": "zeros"}, "init_v is 'zeros'; choose one of normal, xavier"),
        (MendConfig, {"rank": 0}, "rank is 0; it must be at least 1"),
        (MendConfig, {"n_edits": 0}, "n_edits is 0; it must be at least 1"),
        (MendConfig, {"alpha": float("inf")}, "alpha is inf; it must be finite"),
        (MendConfig, {"x_only": True}, "x_only needs combine=False: one network for each side"),
        (
            MendConfig,
            {"combine": False, "x_only": True, "delta_only": True},
            "x_only and delta_only exclude each other; choose one",
        ),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(cls, wrong, message):
    with pytest.raises(ValueError, match=message):
        cls(**wrong)


@pytest.mark.parametrize("config", [MendConfig(rank=5, edit=("a", "b")), TrainConfig(lr=1.0)])
def test_settings_survive_json(config):
    assert from_json(type(config), to_json(config), "here") == config


@pytest.mark.parametrize(
    ("values", "culprit"), [({"rnak": 3}, "rnak"), ({"rank": "3"}, "rank"), ({"norm": 1}, "norm")]
)
def test_json_of_other_settings_is_refused_by_name(values, culprit):
    with pytest.raises(ValueError, match=rf"file\.json.*{culprit}"):
        from_json(MendConfig, values, "file.json")


def test_weights_that_are_no_names():
    with pytest.raises(ValueError, match=r"--set: edit must be a list of texts, got \[1\]"):
        from_json(MendConfig, {"edit": [1]}, "--set")


def test_a_record_leaves_out_what_it_does_not_have():
    bare = EditRequest("a", "b")
    assert bare.to_dict() == {"prompt": "a", "target": "b"}
    full = dataclasses.replace(bare, locality=(Probe("c"), Probe("d", "e")), rephrases=("f",))
    assert full.to_dict() == {
        "prompt": "a",
        "target": "b",
        "rephrases": ("f",),
        "locality": [{"prompt": "c"}, {"prompt": "d", "answer": "e"}],
    }
