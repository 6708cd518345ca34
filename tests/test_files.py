"""Files are written whole or not at all, and odd ones are refused by name."""

import json
import os

import pytest
import torch

from pymend.files import (
    digest,
    read_json,
    read_tensors,
    replacing,
    writable_dir,
    write_json,
    write_tensors,
)


def test_a_failed_write_leaves_the_old_file_and_no_scrap(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("half way")
    assert read_json(path) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_json_carries_a_format_version_that_is_checked(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    assert json.loads(path.read_text())["format_version"] == 1
    path.write_text('{"format_version": 99, "x": 1}')
    with pytest.raises(ValueError, match="format_version 99"):
        read_json(path)


@pytest.mark.parametrize("text", ["", '{"x": ', "[1]"])
def test_broken_json_is_named(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_json(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        read_tensors(tmp_path / "none.safetensors")


def test_tensors_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5, 2).t(), "c": torch.tensor(7)}
    write_tensors(path, tensors)
    back = read_tensors(path)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], v) for k, v in tensors.items())


def test_truncated_tensors_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="truncated"):
        read_tensors(path)


def test_tensors_belong_to_their_json(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.zeros(1)}, digest({"rank": 4}))
    read_tensors(path, digest({"rank": 4}))
    with pytest.raises(ValueError, match="does not belong"):
        read_tensors(path, digest({"rank": 5}))


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(PermissionError, match="choose another output folder"):
        writable_dir(file / "below")
