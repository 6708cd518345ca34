"""Settings refuse what they do not know, and survive JSON."""

import dataclasses

import pytest

from pymend import EditRequest, MendConfig, Probe, TrainConfig
from pymend.config import from_json, to_json


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (TrainConfig, {"schedule": "linear"}),
        (TrainConfig, {"outer": "all"}),
        (TrainConfig, {"prefix_cache": "disk"}),
        (TrainConfig, {"steps": 0}),
        (TrainConfig, {"batch_size": 10, "accumulate": 3}),
        (TrainConfig, {"lr": float("nan")}),
        (TrainConfig, {"c_loc": -1.0}),
        (TrainConfig, {"clip": 0.0}),
        (MendConfig, {"init": "identity"}),
        (MendConfig, {"init_v": "zeros"}),
        (MendConfig, {"rank": 0}),
        (MendConfig, {"alpha": float("inf")}),
        (MendConfig, {"x_only": True}),
        (MendConfig, {"combine": False, "x_only": True, "delta_only": True}),
    ],
)
def test_a_wrong_setting_is_named(cls, wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
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
