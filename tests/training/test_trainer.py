"""A run goes on where it stopped, on any number of processes, and never saves what is broken."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from toy import STYLES, toy_recipe, toy_student, toy_trainer

from dmm.errors import UserError
from dmm.files.runs import CHECKPOINTS, LOG
from dmm.training.checkpoint import load_checkpoint, newest_checkpoint
from dmm.training.trainer import Stopped, Trainer

TOY = Path(__file__).parents[1] / "toy.py"
LAUNCH_SECONDS = 120  # on a busy machine
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(autouse=True)
def fresh_process():
    """One thread, and no precision that an accelerator before has set for the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def read_log(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def saved(folder):
    return load_checkpoint(newest_checkpoint(folder / CHECKPOINTS))


def assert_same(a, b):
    assert a.step == b.step
    assert a.info == b.info
    assert a.tensors.keys() == b.tensors.keys()
    for group, tensors in a.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, b.tensors[group][name]), f"{group}: {name}"


def launch_two(folder, settings, *kill):
    """Train in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(TOY)]
    command = [*launch, str(folder), json.dumps(settings), *kill]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=LAUNCH_SECONDS + 30)


SETTINGS = {"training": {"lr_schedule": "cosine", "warmup_steps": 2, "ema_decay": 0.9}}


def test_a_run_that_stopped_and_went_on_ends_as_one_that_did_not(tmp_path):
    toy_trainer(tmp_path / "whole", toy_recipe(**SETTINGS)).train()
    for stop_after in (2, 4):

        def stop(done, stop_after=stop_after):
            if done == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

        recipe = toy_recipe(**SETTINGS, logging={"every": 1, "sample_every": 1})
        with pytest.raises(Stopped, match=f"step {stop_after + 1} of 6 is saved"):
            toy_trainer(tmp_path / "cut", recipe, show=stop).train()
    toy_trainer(tmp_path / "cut", toy_recipe(**SETTINGS)).train()
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "cut"))


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    recipe = toy_recipe(**SETTINGS)
    toy_trainer(tmp_path / "whole", recipe).train()

    class Killed(BaseException):
        pass

    trainer = toy_trainer(tmp_path / "cut", recipe)
    step = trainer._step

    def die(number):
        if number == 5:
            raise Killed
        step(number)

    trainer._step = die
    with pytest.raises(Killed):
        trainer.train()
    assert saved(tmp_path / "cut").step == 4
    toy_trainer(tmp_path / "cut", recipe).train()
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "cut"))
    toy_trainer(tmp_path / "cut", recipe).train()  # nothing is left to do
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "cut"))


def test_a_step_is_the_same_whole_or_in_micro_batches(tmp_path):
    toy_trainer(tmp_path / "whole", toy_recipe(training={"steps": 2})).train()
    toy_trainer(tmp_path / "cut", toy_recipe(training={"steps": 2, "micro_batch_size": 3})).train()
    for whole, cut in zip(read_log(tmp_path / "whole"), read_log(tmp_path / "cut"), strict=True):
        assert cut["score"] == pytest.approx(whole["score"], rel=1e-5)


def test_two_processes_train_as_one(tmp_path):
    settings = {"training": {"batch_size": 9, "ema_decay": 0.9}}
    toy_trainer(tmp_path / "one", toy_recipe(**settings)).train()
    launch_two(tmp_path / "two", settings).check_returncode()
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        for name in ("score", "feature", *(f"score/{style}" for style in STYLES)):
            assert b[name] == pytest.approx(a[name], rel=1e-4)
    codebooks = [saved(tmp_path / run).tensors["student"]["style_prompts.embeddings"] for run in ("one", "two")]
    torch.testing.assert_close(*codebooks, rtol=1e-3, atol=1e-4)
    assert not torch.equal(codebooks[1], toy_student().style_prompts.embeddings)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_run_which_then_goes_on(tmp_path, rank):
    settings = {"training": {"batch_size": 9, "steps": 4}}
    launch_two(tmp_path / "whole", settings).check_returncode()
    start = time.monotonic()
    ended = launch_two(tmp_path / "cut", settings, f"{rank}:3")
    assert time.monotonic() - start < LAUNCH_SECONDS + 30
    assert ended.returncode != 0
    told = f"Rank {1 - rank} of 2, step 3: another process of the run is gone"
    # the launcher may be the quicker one, and ends the process that is left before that has told
    assert told in ended.stderr or "closing signal SIGTERM" in ended.stderr
    assert saved(tmp_path / "cut").step == 2
    launch_two(tmp_path / "cut", settings).check_returncode()
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "cut"))


def test_losses_fall_and_are_told_by_style(tmp_path):
    recipe = toy_recipe(training={"steps": 60, "learning_rate": 1e-2}, checkpoint={"every": 60, "keep": 1})
    toy_trainer(tmp_path, recipe).train()
    log = read_log(tmp_path)
    for style in STYLES:
        curve = [row[f"score/{style}"] for row in log]
        assert sum(curve[-5:]) < 0.5 * sum(curve[:5])
    assert log[0]["score"] == pytest.approx(sum(log[0][f"score/{style}"] for style in STYLES) / 2)


def test_what_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    student = toy_student()
    trainer = toy_trainer(tmp_path, toy_recipe(), student)
    step = trainer._step

    def spoil(number):
        if number == 3:
            student.unet.conv_in.weight.data[0, 0, 0, 0] = float("nan")
        step(number)

    trainer._step = spoil
    with pytest.raises(UserError, match=r"Step 3: the gradient of 'unet\.\S+' is not finite"):
        trainer.train()
    assert saved(tmp_path).step == 2


def test_a_run_goes_on_at_the_rate_that_its_recipe_now_says(tmp_path):
    toy_trainer(tmp_path, toy_recipe(training={"steps": 2})).train()
    changed = {"steps": 3, "learning_rate": 1e-12, "weight_decay": 0.0}
    before = saved(tmp_path).tensors["student"]
    toy_trainer(tmp_path, toy_recipe(training=changed)).train()
    after = saved(tmp_path)
    assert all((tensor - before[name]).abs().max() < 1e-9 for name, tensor in after.tensors["student"].items())
    assert {group["options"]["weight_decay"] for group in after.info["student"]["optimizer"]["groups"]} == {0.0}
    with pytest.raises(UserError, match="has trained 3 steps already"):
        toy_trainer(tmp_path, toy_recipe(training={"steps": 2})).train()


def test_an_average_can_begin_later(tmp_path):
    toy_trainer(tmp_path, toy_recipe(training={"steps": 2})).train()
    before = saved(tmp_path).tensors["student"]
    slow = {"steps": 3, "ema_decay": 0.9, "learning_rate": 1e-12}
    toy_trainer(tmp_path, toy_recipe(training=slow)).train()
    ema = saved(tmp_path).tensors["ema"]
    assert all((tensor - before[name]).abs().max() < 1e-6 for name, tensor in ema.items())


def test_what_was_logged_after_the_checkpoint_is_logged_anew(tmp_path):
    recipe = toy_recipe(training={"steps": 4})
    trainer = toy_trainer(tmp_path, recipe)
    trainer._save = lambda done: Trainer._save(trainer, done) if done < 3 else None
    trainer.train()
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 5, "sc')
    toy_trainer(tmp_path, recipe).train()
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4]


def test_teachers_do_not_change(tmp_path):
    trainer = toy_trainer(tmp_path, toy_recipe(training={"steps": 2}))
    before = [{k: v.clone() for k, v in teacher.denoiser.state_dict().items()} for teacher in trainer.lesson.teachers]
    trainer.train()
    for teacher, weights in zip(trainer.lesson.teachers, before, strict=True):
        assert all(torch.equal(weights[name], value) for name, value in teacher.denoiser.state_dict().items())
        assert not any(module.training for module in teacher.denoiser.modules())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision_and_checkpointing_run(tmp_path, precision):
    training = {"steps": 2, "precision": precision, "gradient_checkpointing": True}
    toy_trainer(tmp_path, toy_recipe(training=training)).train()
    assert all(tensor.dtype == torch.float32 for tensor in saved(tmp_path).tensors["student"].values())


def test_the_curves_are_means_of_what_was_seen(tmp_path):
    """Of the first step of an untrained student: the adversary guesses, and the score is that of a run without it."""
    toy_trainer(tmp_path / "with", toy_recipe(training={"steps": 1})).train()
    without = toy_recipe(training={"steps": 1}, losses={"feature": 0.1, "adversarial": 0})
    toy_trainer(tmp_path / "without", without).train()
    first, plain = read_log(tmp_path / "with")[0], read_log(tmp_path / "without")[0]
    assert first["score"] == plain["score"]
    assert first["feature"] == plain["feature"]
    guess = math.log(2 * len(STYLES))
    assert first["adversarial"] == pytest.approx(guess, rel=0.3)
    assert first["discriminator"] == pytest.approx(2 * guess, rel=0.3)
    assert "adversarial" not in plain
