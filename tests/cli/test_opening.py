"""Where a model runs, as the options tell."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from dmm.cli import main
from dmm.cli.opening import place_model
from dmm.errors import UserError
from dmm.models.devices import find_device
from dmm.pipeline.sampling import sample


def test_a_device_that_is_not_there_is_refused():
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda:99: torch finds"):
        find_device("cuda:99")


def test_an_offloaded_model_paints_the_same(styled):
    def paint():
        return np.asarray(next(sample(styled, ["a cat"], [0], styles=["ink"], steps=2)), dtype=int)

    plain = paint()
    # the processor stands in for a GPU, which it can where whole models move
    place_model(Namespace(device="cpu", offload="model"), styled)
    assert (paint() == plain).all()
    assert hasattr(styled.unet, "_hf_hook")


def test_offloading_without_a_gpu_is_refused(sd1_folder, tmp_path, capsys):
    command = ["generate", str(sd1_folder), "a cat", "--device", "cpu", "--offload", "model"]
    assert main([*command, "--output", str(tmp_path / "cat.png")]) == 2
    assert "--offload frees the memory of a GPU" in capsys.readouterr().err
