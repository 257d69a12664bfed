"""What can be known without torch and diffusers is said without waiting for them."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from dmm.cli import COMMANDS

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "matplotlib")
RUN = f"""
import sys
from dmm.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:  # how --help ends
    status = stop.code or 0
loaded = [name for name in {HEAVY} if name in sys.modules]
print("status", status, "loaded", *loaded)
"""
RECIPE = """\
base: {merged}
teachers: [{{name: ink, model: {merged}}}]
data: {{images: {merged}}}
"""


def run(folder, *arguments):
    """What a command says, the last line telling its exit status and what heavy it imported."""
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout + done.stderr, done.stdout.splitlines()[-1]


@pytest.fixture
def folder(tmp_path, merged, sd1_folder, sd1_file):
    (tmp_path / "model.safetensors").symlink_to(sd1_file)
    (tmp_path / "merged").symlink_to(merged)
    (tmp_path / "stock").symlink_to(sd1_folder)
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    (tmp_path / "there.png").write_text("mine")
    (tmp_path / "bad.yaml").write_text("base: stock\nteachers: []\ndata: {}\n")
    (tmp_path / "good.yaml").write_text(RECIPE.format(merged="merged"))
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    (tmp_path / "unfinished" / "recipe.yaml").write_text(RECIPE.format(merged="merged"))
    (tmp_path / "empty.txt").write_text("\n")
    painted = "data: {synthesize: {prompts: empty.txt}}\n"
    (tmp_path / "painted.yaml").write_text("base: stock\nteachers: [{name: ink, model: stock}]\n" + painted)
    (tmp_path / "fast.yaml").write_text(painted)
    (tmp_path / "soup.yaml").write_text("method: sup\nteachers: []\n")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_help(tmp_path, command):
    assert run(tmp_path, command, "--help")[1] == "status 0 loaded"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate merged fox --style inc", "There is no style 'inc'; did you mean 'ink'"),
        ("generate merged fox --style ink=0.5,photo=0.6", "must sum to 1"),
        ("generate merged fox --styles ink,clai", "There is no style 'clai'"),
        ("generate merged fox --strip ink,fotos", "There is no style 'fotos'"),
        ("generate stock fox --style ink", "a stock model without styles"),
        ("generate model.safetensors fox --style ink", "a stock model without styles"),
        ("generate nowhere.safetensors fox", "nowhere.safetensors: no such file or folder"),
        ("generate merged fox --lora nowhere.safetensors", "--lora nowhere.safetensors: no such file"),
        ("generate merged fox --output there.png", "'there.png' exists"),
        ("export merged --style inc --output out.safetensors", "There is no style 'inc'"),
        ("export nowhere --style ink --output out.safetensors", "nowhere: no such file or folder"),
        ("export merged --style ink --output there.png/", "'there.png' is a file"),
        ("remove merged inc --output out", "There is no style 'inc'"),
        ("remove merged ink --output there", "is not empty"),
        ("evaluate merged --num-images 2048 --output out", "too few for the 2048 features of 'inception'"),
        ("evaluate merged --quick --num-images 19 --output out", "too few for KID and its error, also with --quick"),
        ("evaluate merged --extractor jugde --output out", "There is no extractor 'jugde'; did you mean 'judge'"),
        ("evaluate nowhere --output out", "nowhere: no such file or folder"),
        ("evaluate merged --output there", "is not empty"),
        ("evaluate merged --prompts nowhere.txt --output out", "'nowhere.txt' could not be read"),
        ("evaluate merged --num-images 3000 --output out", "--prompts FILE is missing"),
        ("evaluate merged --quick --teacher inc=stock --output out", "There is no style 'inc'; did you mean 'ink'"),
        ("evaluate merged --quick --mix ink=.5,foto=.5 --score clip --output out", "There is no style 'foto'"),
        ("evaluate merged --quick --teacher ink=nowhere.safetensors --output out", "nowhere.safetensors: no such file"),
        ("evaluate merged --quick --base nowhere --output out", "nowhere: no such file or folder"),
        ("merge bad.yaml --output out", "the list is empty, expected at least one teacher"),
        ("merge good.yaml --output there", "is not empty"),
        ("merge painted.yaml --output out", "empty.txt' is empty"),
        ("add merged bad.yaml --output out", "the list is empty, expected at least one teacher"),
        ("add stock good.yaml --output out", "stock is no merged model: it has no styles/ folder"),
        ("add model.safetensors good.yaml --output out", "model.safetensors is no merged model"),
        ("add nowhere good.yaml --output out", "nowhere: no such file or folder"),
        ("add merged good.yaml --output out", "teacher 'ink': merged has a style of that name"),
        ("add unfinished good.yaml --output out", "unfinished is a merge that has not ended: no checkpoint is saved"),
        ("soup soup.yaml --output out", "found 'sup', expected"),
        ("soup nowhere.safetensors", "nowhere.safetensors: no such file or folder"),
        ("soup lora.safetensors", "lora.safetensors has no ledger"),
        ("soup model.safetensors", "model.safetensors has no ledger"),
        ("generate lora.safetensors fox", "lora.safetensors is a LoRA, not a full model"),
        ("generate stock fox --device cuda:99", "of 'cuda'; choose another, or cpu"),
        ("generate stock fox --device cpu --offload model", "--offload frees the memory of a GPU"),
        ("serve lora.safetensors", "lora.safetensors is a LoRA, not a full model"),
        ("accelerate lora.safetensors fast.yaml --output out", "lora.safetensors is a LoRA, not a full model"),
        # a teacher may be one: what comes next is told
        ("evaluate merged --num-images 3000 --teacher ink=lora.safetensors --output out", "--prompts FILE is missing"),
        (
            "evaluate merged --quick --base lora.safetensors --output out",
            "lora.safetensors is a LoRA, not a full model",
        ),
    ],
)
def test_refusals(folder, command, message):
    told, last = run(folder, *command.split())
    assert message in told
    assert last == "status 2 loaded"
