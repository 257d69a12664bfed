"""What README and the docs tell people to type, run: page by page, in order, on the tiniest models, in few steps."""

import re
import shlex
import shutil

import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image
from plugin_helpers import save_lora
from test_docs import PAGES, blocks

from dmm.cli import main
from dmm.formats.single_file import save_single_file

NOT_RUN = {
    "gallery.md": "names the eight hands and the sizes of the demo's model",
    "results.md": "hours of measurements of the demo's model",
    "experts.md": "the demo's model, and one that minutes of training make: tests/examples/test_train_expert.py",
    "controls.md": "tests/training/test_control_merge.py and tests/pipeline/test_controls.py",
    "evaluate.md": "weights of judges from elsewhere: tests/cli/test_evaluate_command.py",
    "merge.md": "merges: tests/training/test_merge.py",
    "plan.md": "plans and merges: tests/planning",
    "add.md": "merges: tests/training/test_add.py and test_adapting.py",
    "accelerate.md": "distillations: tests/training/test_acceleration.py",
    "README.md: dmm demo": "minutes: tests/cli/test_demo.py",
    "from-a-folder.md": "merges: tests/planning, tests/training",
    "README.md: dmm merge": "a merge: tests/training/test_merge.py",
    "dmm-release": "a model of the authors that is not ours to ship: tests/pipeline/test_authors.py",
    "dmm serve": "goes on until it is stopped: tests/app",
    "--from-checkpoint": "needs a run: tests/training/test_adapting.py",
    "--controlnet": "tests/pipeline/test_plugins.py paints with ControlNets",
    "--ip-adapter": "tests/pipeline/test_plugins.py paints with IP-Adapters",
}
"""What stays out, by page or by words in it, and why: what runs it instead, or that nothing can."""

BRIEF = ["--steps=2", "--device=cpu"]
"""Of what paints."""
SMALLER = {"2048": "32", "0,0,256,512:ink": "0,0,8,16:ink"}
"""Of the tiny models' size, which is 16 pixels."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A file or folder by each name that the pages have for a model, a LoRA, prompts and pictures."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_pipeline()
    for name in ("sd15", "base"):
        base.save_pretrained(folder / "models" / name)
    for seed, name in enumerate(("ink", "photo", "pastel", "dreamshaper", "clay"), 1):
        near = tiny_pipeline()
        generator = torch.Generator().manual_seed(seed)
        for parameter in near.unet.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        near.save_pretrained(folder / "models" / name)
        save_single_file(near, folder / f"{name}.safetensors")
    shutil.copyfile(folder / "dreamshaper.safetensors", folder / "v1-5.safetensors")
    for seed, name in enumerate(("line", "pencil", "lcm-lora", "lcm-lora-sdv1-5", "detail", "photo-lora"), 6):
        save_lora(folder / f"{name}.safetensors", seed)
    for name in ("photo", "mask", "edges"):
        Image.effect_noise((16, 16), 90).convert("RGB").save(folder / f"{name}.png")
    (folder / "prompts.txt").write_text("a cat\na house\n")
    return folder


def lay_out(page, models, merged, folder):
    """The files that a page speaks of, its recipes among them, in an empty folder."""
    shutil.copytree(models, folder, dirs_exist_ok=True)
    recipes = blocks(page, "yaml")
    shutil.copytree(merged, folder / "merged")
    if page.name == "export.md":  # ink.safetensors is what its first command writes
        (folder / "ink.safetensors").unlink()
    loras = {"generate.md": "ink", "soup.md": "clay"}
    if page.name in loras:  # files of that name are checkpoints elsewhere
        shutil.copyfile(models / "line.safetensors", folder / f"{loras[page.name]}.safetensors")
    for block in recipes:
        name = re.match(r"# ([\w-]+\.yaml)", block)
        place = folder / (name[1] if name else "recipe.yaml")
        if not place.exists():
            place.write_text(block)


def short_of(words):
    """A command with what makes it quick behind it, where the last one counts."""
    command, *rest = (SMALLER.get(word, word) for word in words)
    return [command, *rest, *(BRIEF if command == "generate" else ())]


def commands_of(page):
    """Each ``dmm`` command of a page, as words, but for those that are not run."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                told = f"{page.name}: {shlex.join(words)}"
                if words[:1] == ["dmm"] and not any(one in told for one in NOT_RUN):
                    yield words[1:]


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands_of(page))], ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page, models, merged, merged_adapters, tmp_path, monkeypatch, capsys):
    lay_out(page, models, merged if page.name == "export.md" else merged_adapters, tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in commands_of(page):
        given = short_of(words)
        status = main(given)
        said = capsys.readouterr().err
        assert status == 0, f"dmm {shlex.join(given)}: {said}"
