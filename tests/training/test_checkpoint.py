import errno
import json
import multiprocessing
import os
import random
import shutil
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dmm.errors import UserError
from dmm.training.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    pack_optimizer,
    save_checkpoint,
    sweep,
    unpack_optimizer,
)

# a forked server that has torch: a process of its own starts in milliseconds
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dmm.training.checkpoint", "pytest"])

NUM_GROUPS = 6


def save(root: Path, step: int, *, keep: int = 2) -> Path:
    """A checkpoint of many small files, every value of which is its step."""
    tensors = {f"group{i}": {"weight": torch.full((16,), float(step))} for i in range(NUM_GROUPS)}
    return save_checkpoint(root, step, tensors, {"position": step}, keep=keep)


def assert_whole(folder: Path | None, step: int) -> None:
    assert folder is not None
    checkpoint = load_checkpoint(folder)
    assert checkpoint.step == step
    assert checkpoint.info == {"position": step}
    assert len(checkpoint.tensors) == NUM_GROUPS
    assert all((group["weight"] == step).all() for group in checkpoint.tensors.values())


def step_of(folder: Path) -> int:
    return load_checkpoint(folder).step


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_every_tensor_comes_back_to_the_bit(tmp_path):
    torch.manual_seed(0)
    tied = nn.Parameter(torch.randn(5, 3))
    tensors = {
        "student": {
            "fp64": torch.randn(3, dtype=torch.float64),
            "fp32": torch.tensor([0.0, -0.0, 1e-45, -3.4e38, 0.1]),
            "bf16": torch.randn(2, 3).bfloat16(),
            "fp16": torch.randn(7).half(),
            "int64": torch.tensor([-(2**63), 2**63 - 1]),
            "int32": torch.tensor([-1], dtype=torch.int32),
            "int16": torch.tensor([[3]], dtype=torch.int16),
            "int8": torch.tensor([-128, 127, 0], dtype=torch.int8),
            "uint8": torch.tensor([255], dtype=torch.uint8),
            "bool": torch.tensor([True, False, True]),
            "scalar": torch.tensor(3.5),
            "scalar int": torch.tensor(7),
            "empty": torch.empty(0),
            "empty bf16": torch.empty(2, 0, 3, dtype=torch.bfloat16),
            "tied": tied,
            "tied.too": tied,
            "part": tied[1:3, ::2],
            "transposed": tied.T,
            "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "shared": torch.randn(4).share_memory_(),
            "large": torch.randn(2**22 + 3),  # more than is written at a time
            "ünïcode": torch.ones(1),
        },
        "nothing": {},
    }
    info = {"list": [1, 0.1, None, True], "float": 1 / 3, "nested": {"text": "käfer"}, "large": 2**70}
    checkpoint = load_checkpoint(save_checkpoint(tmp_path / "new" / "root", 7, tensors, info, keep=1))
    assert checkpoint.step == 7
    assert checkpoint.info == info
    assert checkpoint.tensors.keys() == tensors.keys()
    for group, named in tensors.items():
        assert checkpoint.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert bits(checkpoint.tensors[group][name]) == bits(tensor.detach()), name
    # any other tool reads the files
    assert load_file(tmp_path / "new" / "root" / "step-00000007" / "student.safetensors")["tied"].equal(tied)


def test_what_is_loaded_is_ones_own(tmp_path):
    folder = save(tmp_path, 1)
    for group in load_checkpoint(folder).tensors.values():
        group["weight"].zero_()
    assert newest_checkpoint(tmp_path) == folder
    assert_whole(folder, 1)


def test_older_ones_are_pruned_and_the_newest_is_found(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 10, 90, 100, 100_000_000):  # the last has a digit more than the others
        assert_whole(save(tmp_path, step, keep=3), step)
        assert_whole(newest_checkpoint(tmp_path), step)
    assert names(tmp_path) == ["step-00000090", "step-00000100", "step-100000000"]
    save(tmp_path, 100_000_001, keep=1)
    assert names(tmp_path) == ["step-100000001"]


def test_a_step_that_is_saved_again_is_the_newest_and_never_replaces_a_whole_one(tmp_path):
    first = save(tmp_path, 3)
    second = save_checkpoint(tmp_path, 3, {"other": {"weight": torch.ones(1)}}, {}, keep=2)
    assert first != second
    assert newest_checkpoint(tmp_path) == second
    assert_whole(first, 3)
    third = save(tmp_path, 3)
    assert newest_checkpoint(tmp_path) == third
    assert names(tmp_path) == sorted([second.name, third.name])
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step-00000004"]


def test_a_byte_that_changed_anywhere_is_seen(tmp_path, caplog):
    save(tmp_path, 1)
    folder = save_checkpoint(tmp_path, 2, {"student": {"weight": torch.arange(4.0)}}, {"position": 2}, keep=2)
    contents = load_checkpoint(folder)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for i in range(len(whole)):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x01]) + whole[i + 1 :])
            caplog.clear()
            newest = newest_checkpoint(tmp_path)
            if newest == folder:  # a space of the manifest that became another character JSON skips
                assert load_checkpoint(folder).info == contents.info
                assert load_checkpoint(folder).tensors["student"]["weight"].equal(torch.arange(4.0))
            else:
                assert_whole(newest, 1)
                assert f"'{folder}' is passed over: its {path.name}" in caplog.text or path.name == "manifest.json"
        path.write_bytes(whole)
    assert newest_checkpoint(tmp_path) == folder


@pytest.mark.parametrize("name", ["student.safetensors", "info.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_one_that_is_not_whole_is_passed_over_with_a_warning_and_left(tmp_path, caplog, name, damage):
    save(tmp_path, 1, keep=9)
    folder = save_checkpoint(tmp_path, 2, {"student": {"weight": torch.ones(4)}}, {}, keep=9)
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-1] if damage == "cut" else b"")
    assert_whole(newest_checkpoint(tmp_path), 1)
    assert str(folder) in caplog.text
    assert name in caplog.text
    # the run goes on from the older one, and comes by that step again
    assert_whole(save(tmp_path, 2, keep=9), 2)
    assert_whole(newest_checkpoint(tmp_path), 2)
    assert folder.is_dir()


def test_a_broken_later_one_does_not_count_as_one_that_is_kept(tmp_path):
    (save(tmp_path, 9) / "manifest.json").write_text("{}")
    for step in (1, 2, 3):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-00000003", "step-00000009"]
    assert_whole(newest_checkpoint(tmp_path), 3)


def test_foreign_things_in_the_root_are_left_alone(tmp_path):
    for name in ("step-1", "step-00000003.bak", "notes.txt", "step-x"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "step-00000007").mkdir()
    save(tmp_path, 1, keep=1)
    save(tmp_path, 2, keep=1)
    assert_whole(newest_checkpoint(tmp_path), 2)
    sweep(tmp_path)
    assert names(tmp_path) == ["notes.txt", "step-00000002", "step-00000003.bak", "step-00000007", "step-1", "step-x"]


def test_what_is_not_finite_is_never_saved(tmp_path):
    save(tmp_path, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for value in (float("nan"), float("inf"), float("-inf")):
            weight = torch.ones(3, 2, dtype=dtype)
            weight[1, 1] = value
            with pytest.raises(UserError, match=r"step 2: student: 1 of the 6 values of 'conv\.weight' are NaN"):
                save_checkpoint(tmp_path, 2, {"ok": {"a": weight[:1]}, "student": {"conv.weight": weight}}, {}, keep=1)
    assert names(tmp_path) == ["step-00000001"]
    # large, but finite, though their sum is not
    save_checkpoint(tmp_path, 2, {"student": {"weight": torch.full((4,), 3e38)}}, {}, keep=1)


class FullDisk:
    """The n-th call that writes, and every one after it, finds the disk full."""

    def __init__(self, monkeypatch, first: int) -> None:
        self.num_calls = 0
        self.first = first
        for owner, name in [(os, "fsync"), (Path, "mkdir"), (Path, "rename")]:
            monkeypatch.setattr(owner, name, self.limited(getattr(owner, name)))
        plain_open = Path.open
        monkeypatch.setattr(Path, "open", lambda *args: self.limited_file(plain_open(*args), *args))

    def limited(self, function):
        def call(*args, **kwargs):
            self.num_calls += 1
            if self.num_calls >= self.first:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call

    def limited_file(self, file, _path, mode="r"):
        if mode != "xb":
            return file
        disk = self

        class File:
            write = staticmethod(disk.limited(file.write))
            flush = staticmethod(disk.limited(file.flush))
            fileno = staticmethod(file.fileno)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

        return File()


def test_a_disk_that_fills_up_at_any_moment_is_one_sentence_and_harms_nothing(tmp_path, monkeypatch):
    for first in count(1):
        root = tmp_path / str(first)
        save(root, 1, keep=1)
        said = None
        with monkeypatch.context() as patch:
            disk = FullDisk(patch, first)
            try:
                save(root, 2, keep=1)
            except UserError as error:
                said = str(error)
        assert said in (
            None,
            f"The checkpoint of step 2 could not be written to '{root}': No space left on device. Those before it are "
            "whole: mend that and resume.",
        )
        newest = newest_checkpoint(root)
        assert_whole(newest, step_of(newest))
        assert not list(root.glob(".tmp-*"))
        if said is None:
            assert step_of(newest) == 2
        if disk.num_calls < first:
            assert first > 4 * NUM_GROUPS  # every write, flush and sync of every file had its turn
            break


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not be written to '.*file'"):
        save(tmp_path / "file", 1)


def save_until_killed(root: Path, first: int, saved) -> None:
    for step in count(first):
        save(root, step)
        saved.send(step)


def test_killed_at_any_moment_the_newest_is_whole_and_no_saved_step_is_lost(tmp_path, caplog):
    moments = random.Random(0)
    newest, num_inside = 0, 0
    for _ in range(12):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=save_until_killed, args=(tmp_path, newest + 1, sender))
        process.start()
        sender.close()
        assert receiver.poll(20)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.join()
        told = newest
        try:
            while True:
                told = receiver.recv()
        except EOFError:
            pass
        num_inside += bool(list(tmp_path.glob(".tmp-*")))
        sweep(tmp_path)
        folder = newest_checkpoint(tmp_path)
        newest = step_of(folder)
        assert newest >= told > 0
        assert_whole(folder, newest)
        assert len(names(tmp_path)) <= 3  # those that are kept, and one that was not pruned any more
        assert not caplog.text  # nothing with a final name was broken
    assert num_inside >= 6  # most kills came in the middle of a save


def save_a_few(root: Path) -> None:
    for step in range(5):
        save(root, step, keep=99)


def test_two_processes_that_save_the_same_steps_at_once_do_not_collide(tmp_path):
    processes = [PROCESSES.Process(target=save_a_few, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    folders = list(tmp_path.iterdir())
    assert sorted(map(step_of, folders)) == sorted([*range(5)] * 2)
    for folder in folders:
        assert_whole(folder, step_of(folder))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 1, bias=False))
    return model.to(memory_format=torch.channels_last)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "AdamW amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True, betas=(0.8, 0.99)),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2),
    "SGD momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
    "Rprop": lambda groups: torch.optim.Rprop(groups, lr=1e-2),
}


def make_optimizer(name: str, model: nn.Module, *, backwards: bool = False) -> torch.optim.Optimizer:
    """Two groups; ``backwards``, the same with their parameters in another order."""
    parameters = list(model.parameters())
    groups = [parameters[:2], parameters[2:]]
    order = slice(None, None, -1 if backwards else 1)
    return OPTIMIZERS[name]([{"params": groups[0][order]}, {"params": groups[1][order], "lr": 3e-3}])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_loaded_and_trained_on_is_never_having_stopped(tmp_path, name):
    straight = small_model()
    optimizer = make_optimizer(name, straight)
    train(straight, optimizer, range(3))
    optimizer.param_groups[0]["lr"] *= 0.5  # as a schedule does
    tensors, info = pack_optimizer(optimizer, dict(straight.named_parameters()))
    folder = save_checkpoint(
        tmp_path, 3, {"student": straight.state_dict(), "optimizer": tensors}, {"optimizer": info}, keep=1
    )
    train(straight, optimizer, range(3, 6))

    resumed = small_model()
    other = make_optimizer(name, resumed, backwards=True)
    train(resumed, other, range(7, 8))  # whatever state it had is gone
    checkpoint = load_checkpoint(folder)
    resumed.load_state_dict(checkpoint.tensors["student"])
    unpack_optimizer(
        other, dict(resumed.named_parameters()), checkpoint.tensors["optimizer"], checkpoint.info["optimizer"]
    )
    train(resumed, other, range(3, 6))

    for before, after in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert bits(before.detach()) == bits(after.detach())
        assert optimizer.state[before].keys() == other.state[after].keys()
        for key, value in optimizer.state[before].items():
            found = other.state[after][key]
            if isinstance(value, torch.Tensor):
                assert bits(found) == bits(value), key
                assert found.stride() == value.stride(), key
            else:
                assert found == value, key
    for one, another in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {**one, "params": 0} == {**another, "params": 0}


def test_state_of_another_dtype_than_its_parameter_is_not_cast():
    model = small_model().bfloat16()
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer("AdamW", model)
    value = torch.tensor(1 / 3)
    for parameter in parameters.values():
        optimizer.state[parameter] = {"step": torch.tensor(2.0), "exp_avg": value.expand(parameter.shape), "count": 3}
    tensors, info = pack_optimizer(optimizer, parameters)
    other = make_optimizer("AdamW", model)
    unpack_optimizer(other, parameters, tensors, json.loads(json.dumps(info)))
    for parameter in parameters.values():
        assert other.state[parameter]["exp_avg"].dtype == torch.float32
        assert (other.state[parameter]["exp_avg"] == value).all()
        assert other.state[parameter]["count"] == 3


def test_an_optimizer_without_state_comes_back_without(tmp_path):
    model = small_model()
    parameters = dict(model.named_parameters())
    tensors, info = pack_optimizer(make_optimizer("AdamW", model), parameters)
    checkpoint = load_checkpoint(save_checkpoint(tmp_path, 0, {"optimizer": tensors}, info, keep=1))
    other = make_optimizer("AdamW", model)
    unpack_optimizer(other, parameters, checkpoint.tensors["optimizer"], checkpoint.info)
    assert not other.state


def test_another_model_or_other_groups_are_refused_and_change_nothing():
    model = small_model()
    optimizer = make_optimizer("AdamW", model)
    train(model, optimizer, range(1))
    parameters = dict(model.named_parameters())
    tensors, info = pack_optimizer(optimizer, parameters)
    before = pack_optimizer(optimizer, parameters)

    def refused(change) -> str:
        changed = json.loads(json.dumps(info))
        change(changed["groups"])
        with pytest.raises(UserError) as caught:
            unpack_optimizer(optimizer, parameters, tensors, changed)
        return str(caught.value)

    assert "has 1 groups of parameters, this run's 2" in refused(lambda groups: groups.pop())
    assert "This run's optimizer has '0.bias' in group 0" in refused(lambda groups: groups[0]["shapes"].pop("0.bias"))
    assert "checkpoint's optimizer has 'x' in group 1" in refused(lambda groups: groups[1]["shapes"].update(x=[1]))
    assert "'0.bias' has shape (5,) in the checkpoint's optimizer and (4,) in this run's" in refused(
        lambda groups: groups[0]["shapes"].update({"0.bias": [5]})
    )
    after = pack_optimizer(optimizer, parameters)
    assert after[1] == before[1]
    assert all(after[0][name] is before[0][name] for name in before[0])


def test_a_stale_temporary_is_swept_and_never_taken_for_a_checkpoint(tmp_path):
    whole = save(tmp_path, 1)
    shutil.copytree(save(tmp_path, 2), tmp_path / ".tmp-3-0123abcd")
    assert_whole(newest_checkpoint(tmp_path), 2)
    sweep(tmp_path)
    assert names(tmp_path) == [whole.name, "step-00000002"]
