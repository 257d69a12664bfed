"""Pickled checkpoints with classes that are not tensors': their tensors are read, nothing of theirs runs."""

import datetime
import os
import pickle

import numpy as np
import pytest
import torch

from dmm.errors import UserError
from dmm.formats.tensors import read_header, read_tensors


class ModelCheckpoint:
    """As Lightning's, with state of its own."""

    def __init__(self):
        self.best = {"path": "a.ckpt", "score": np.float64(0.5)}


class Runs:
    """Would run a command when it is opened."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


class Opens:
    """Would write a file when it is opened."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def save(path, **more):
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}
    torch.save({"state_dict": weights, "global_step": 3, **more}, path)
    return weights


@pytest.mark.parametrize(
    "more",
    [
        {"callbacks": {ModelCheckpoint: ModelCheckpoint()}},
        {"loss": np.float64(0.25), "noise": np.zeros(3)},
        {"callbacks": [ModelCheckpoint()], "when": datetime.datetime(2022, 8, 22)},
    ],
    ids=["callbacks", "numpy", "dates"],
)
def test_tensors_are_read_whatever_else_there_is(tmp_path, more):
    path = tmp_path / "model.ckpt"
    weights = save(path, **more)
    header = read_header(path, allow_pickle=True)
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {
        name: tensor.shape for name, tensor in weights.items()
    }
    read = read_tensors(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())


def test_what_would_write_a_file_is_inert(tmp_path):
    weights = save(tmp_path / "model.ckpt", hook=Opens(tmp_path / "ran"))
    assert read_header(tmp_path / "model.ckpt", allow_pickle=True).tensors.keys() == weights.keys()
    assert not (tmp_path / "ran").exists()


def test_what_would_run_a_command_is_named(tmp_path):
    save(tmp_path / "model.ckpt", hook=Runs(tmp_path / "ran"))
    with pytest.raises(UserError, match=r"names (posix|nt|os)\.system, which no checkpoint needs"):
        read_header(tmp_path / "model.ckpt", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_damage_is_one_sentence_without_colours(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(pickle.dumps([1, 2, 3], protocol=2)[:-4])
    with pytest.raises(UserError, match="cannot be read as a pickle") as told:
        read_header(path, allow_pickle=True)
    assert "\n" not in str(told.value)
    assert "\x1b" not in str(told.value)


def test_a_pickle_of_no_named_tensors_is_told(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list where named tensors were expected"):
        read_header(tmp_path / "list.pt", allow_pickle=True)
