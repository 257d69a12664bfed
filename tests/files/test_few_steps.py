"""A folder says how it is painted with in few steps; a scheduler of such models says so too."""

import json

import pytest

from dmm.errors import UserError
from dmm.files.few_steps import FILE, KEY, FewSteps, few_steps_of_header, read_few_steps

TOLD = FewSteps("lcm", (3.0, 12.0), 20, 64)


def write_scheduler(folder, name):
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))


def test_what_is_written_is_read(tmp_path):
    (tmp_path / FILE).write_text(TOLD.written())
    assert read_few_steps(tmp_path) == TOLD
    assert few_steps_of_header({KEY: TOLD.written()}, "a.safetensors") == TOLD
    assert few_steps_of_header({"ss_network_dim": "64"}, "a.safetensors") is None


def test_guidance_that_is_in_the_weights_is_off_and_what_is_told_is_within_its_range():
    assert FewSteps("splam", (7.0, 7.0), 20).guidance_scale == 1
    assert TOLD.guidance_scale == 7.5


@pytest.mark.parametrize(("scheduler", "sampler"), [("LCMScheduler", "LCM"), ("TCDScheduler", "TCD")])
def test_a_scheduler_tells_of_a_few_step_model(tmp_path, scheduler, sampler):
    write_scheduler(tmp_path, scheduler)
    found = read_few_steps(tmp_path)
    assert (found.sampler, found.guidance_scale) == (sampler, 1.0)


def test_any_other_model_says_nothing(tmp_path):
    assert read_few_steps(tmp_path) is None
    write_scheduler(tmp_path, "PNDMScheduler")
    assert read_few_steps(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"method": "lcm", "guidance": [1], "skip": 1, "rank": 0, "sampler": "LCM"}',
        TOLD.written().replace("LCM", "Euler"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=FILE):
        read_few_steps(tmp_path)
