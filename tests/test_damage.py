"""Files that are damaged or made up, by the hundred: each opens, or is told in a sentence, and nothing is written."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline
from safetensors.torch import save_file
from tiny_families import later_on_disk  # noqa: F401 - a fixture

from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.files.yaml import parse_yaml, write_yaml
from dmm.formats.detect import check_is_checkpoint
from dmm.formats.lora import read_lora
from dmm.formats.tensors import read_header
from dmm.models.side_car import read_side_car
from dmm.models.teachers import ModelSource, check_model
from dmm.recipes.recipe import load_recipe
from dmm.soup.recipe import load_soup_recipe

NUM_MUTATIONS = 500
NUM_SLOW = 60  # of what is checked against a whole pipeline's configs
SEED = 17

NUMBERS = [0, -1, 1, 7, 10**9, 10**15, -(10**15), 10**400, 0.5, -1e-300, 1e308, float("inf"), float("nan")]
TEXTS = ["", "x", "nope", "x" * 5000, "a\nb", "\ud800", "\x00", "../../etc/passwd", "/", "~nobody/x", "1", "true"]
OTHERS = [None, True, False, [], {}, [None], [[]], {"a": 1}, ["os", "system"], json.loads("[" * 90 + "]" * 90)]


def places(value, place=()):
    """All places in nested keys and values."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*place, key))


def mutate_value(draw: random.Random, value):
    """Keys and values of which one is gone, new, another's or of another kind."""
    value = json.loads(json.dumps(value))
    *outer, last = draw.choice(list(places(value))[1:])
    holder = value
    for key in outer:
        holder = holder[key]
    match draw.randrange(5):
        case 0:
            del holder[last]
        case 1 if isinstance(holder, dict):
            holder[draw.choice(TEXTS)] = holder[last]
        case 2:
            inner = value
            for key in draw.choice(list(places(value))):
                inner = inner[key]
            holder[last] = json.loads(json.dumps(inner))
        case _:
            holder[last] = draw.choice([*NUMBERS, *TEXTS, *OTHERS])
    return value


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    """Bytes of which some are others, gone, doubled or new."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at, length = draw.randrange(len(data) + 1), draw.choice([1, 1, 2, 9, 200])
        match draw.randrange(4):
            case 0:
                data[at : at + length] = draw.randbytes(len(data[at : at + length]))
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case _:
                data[at:at] = draw.choice(
                    [b"{", b"[" * 999, b'"', b"\\ud800", b"\xff", b"\x00", b"&a ", b"1e999", b"- "]
                )
    return bytes(data)


def mutations(text: str, count: int = NUM_MUTATIONS):
    """A JSON text, mutated again and again: half of it as text, half as what it says."""
    draw = random.Random(SEED)
    for i in range(count):
        yield mutate_bytes(draw, text.encode()) if i % 2 else json.dumps(mutate_value(draw, json.loads(text))).encode()


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def told(read: Callable[[], object]) -> str | None:
    """The sentence by which damage is refused; None where it opens all the same. Anything else is raised."""
    try:
        read()
    except UserError as error:
        sentence = str(error)
        assert sentence
        assert sentence.isprintable()
        assert len(sentence) < 5000
        return sentence
    return None


def count_refused(file: Path, texts, read: Callable[[], object]) -> int:
    """How many of the contents of a file are refused; whatever comes of them, the folder is as it was."""
    whole = file.read_bytes()
    before = everything_in(file.parent)
    refused = 0
    for i, text in enumerate(texts):
        file.write_bytes(text)
        try:
            refused += told(read) is not None
        except BaseException:
            print(f"mutation {i}: {text[:2000]!r}")
            raise
    file.write_bytes(whole)
    assert everything_in(file.parent) == before
    assert told(read) is None
    return refused


def with_header(data: bytes, header: bytes) -> bytes:
    """A safetensors file with another header, and its tensors' bytes."""
    length = int.from_bytes(data[:8], "little")
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def header_of(data: bytes) -> str:
    return data[8 : 8 + int.from_bytes(data[:8], "little")].decode()


def test_headers_of_weights(sd1_file, tmp_path):
    file = tmp_path / "model.safetensors"
    shutil.copy(sd1_file, file)
    data = file.read_bytes()

    def read():
        check_is_checkpoint(file, read_header(file), SD1)

    texts = (with_header(data, header) for header in mutations(header_of(data)))
    assert count_refused(file, texts, read) > NUM_MUTATIONS * 0.8


def test_headers_of_single_files_whose_tensors_lie_joined(later_on_disk, tmp_path):  # noqa: F811
    family, folder, whole = later_on_disk
    file = tmp_path / "model.safetensors"
    shutil.copy(whole, file)
    data = file.read_bytes()
    header = json.loads(header_of(data))
    prefix = family.text_encoders[-1].original_prefix
    texts = {name: one for name, one in header.items() if name.startswith(prefix)}

    def files():
        draw = random.Random(SEED)
        for _ in range(NUM_SLOW):
            changed = mutate_value(draw, texts)
            yield with_header(
                data, json.dumps({**{k: v for k, v in header.items() if k not in texts}, **changed}).encode()
            )

    refused = count_refused(file, files(), lambda: check_model(ModelSource(file, config=folder)))
    assert refused > NUM_SLOW * 0.8


def test_indices_of_pipelines_of_every_family(later_on_disk, tmp_path):  # noqa: F811
    _, whole, _ = later_on_disk
    folder = tmp_path / "folder"
    shutil.copytree(whole, folder)
    file = folder / "model_index.json"
    texts = mutations(file.read_text(), NUM_SLOW)
    assert count_refused(file, texts, lambda: check_model(ModelSource(folder))) > NUM_SLOW * 0.3


@pytest.fixture(scope="module")
def peft_lora(tmp_path_factory):
    """A LoRA whose metadata tell of its alphas, as diffusers writes them; and the models that it is for."""
    pipeline = tiny_pipeline()
    models = {name: getattr(pipeline, name) for name in ("unet", "text_encoder")}
    tensors = {}
    for name, module in pipeline.unet.named_modules():
        if name.endswith(("to_q", "to_v")):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(2, module.in_features)
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 2)
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    adapter = {"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {"to_q": 2}, "unet.alpha_pattern": {"to_q": 1.5}}
    adapter |= {"unet.target_modules": ["to_q", "to_v"], "unet.use_dora": False, "unet.use_rslora": False}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(adapter)})
    return path, models


def test_metadata_of_loras(peft_lora, tmp_path):
    path, models = peft_lora
    file = tmp_path / "lora.safetensors"
    shutil.copy(path, file)
    data = file.read_bytes()
    header = json.loads(header_of(data))
    metadata = header["__metadata__"]

    def files():
        for i, text in enumerate(mutations(metadata["lora_adapter_metadata"])):
            changed = {**metadata, "lora_adapter_metadata": text.decode("utf-8", "surrogateescape")}
            if i % 10 == 9:  # or what holds it
                changed = mutate_value(random.Random(i), metadata)
            yield with_header(data, json.dumps({**header, "__metadata__": changed}).encode())

    assert count_refused(file, files(), lambda: read_lora(file, models)) > NUM_MUTATIONS * 0.2


RECIPE = {
    "base": "base",
    "start": "average",
    "teachers": [
        {"name": "ink", "model": "base", "clip_skip": 1, "weight": 2},
        {"name": "photo", "lora": "lora.safetensors", "lora_scale": 0.5},
    ],
    "data": {"synthesize": {"prompts": "prompts.txt", "count": 4}},
    "size": 16,
    "training": {"steps": 4, "batch_size": 6, "micro_batch_size": 3, "learning_rate": 1e-3, "precision": "fp32"},
    "losses": {"feature": 0.1, "adversarial": 0.0},
    "checkpoint": {"every": 2, "keep": 2},
    "logging": {"every": 1, "sample_every": None},
    "finetune": {"synthesize": {"prompts": "prompts.txt"}},
    "seed": 7,
}
SOUP = {"method": "ties", "base": "base", "density": 0.5, "teachers": RECIPE["teachers"], "weights": {"ink": 0.3}}


@pytest.mark.parametrize(("recipe", "load"), [(RECIPE, load_recipe), (SOUP, load_soup_recipe)], ids=["merge", "soup"])
def test_recipes(tmp_path, recipe, load):
    for name in ("lora.safetensors", "prompts.txt", "base/model_index.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a cat")
    if load is load_soup_recipe:
        recipe = {**recipe, "teachers": [{"name": "ink", "model": "base"}, {"name": "photo", "model": "base"}]}
    file = tmp_path / "recipe.yaml"
    file.write_text(write_yaml(recipe))

    def texts():
        draw = random.Random(SEED)
        for i in range(NUM_MUTATIONS):
            if i % 2:
                yield mutate_bytes(draw, file_text)
            else:
                # as JSON, which YAML takes: all that it can say
                yield json.dumps(mutate_value(draw, recipe)).encode()

    file_text = file.read_bytes()
    assert count_refused(file, texts(), lambda: load(file)) > NUM_MUTATIONS * 0.5


def test_overrides_of_recipes(tmp_path):
    draw = random.Random(SEED)
    for _ in range(NUM_MUTATIONS):
        told(lambda: parse_yaml(mutate_bytes(draw, b"{a: [1, 2.5, 'x']}").decode("utf-8", "replace"), "--set a"))


@pytest.mark.parametrize("name", ["config.json", "styles.json"])
def test_side_cars(merged, tmp_path, name):
    folder = tmp_path / "merged"
    shutil.copytree(merged, folder)
    file = folder / "styles" / name
    refused = count_refused(file, mutations(file.read_text()), lambda: read_side_car(folder))
    assert refused > NUM_MUTATIONS * 0.5


def test_headers_of_side_cars(merged, tmp_path):
    folder = tmp_path / "merged"
    shutil.copytree(merged, folder)
    file = folder / "styles" / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    texts = (with_header(data, header) for header in mutations(header_of(data)))
    assert count_refused(file, texts, lambda: read_side_car(folder)) > NUM_MUTATIONS * 0.5


def test_indices_of_pipelines(sd1_folder, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(sd1_folder, folder)
    file = folder / "model_index.json"
    refused = count_refused(file, mutations(file.read_text()), lambda: check_model(ModelSource(folder)))
    assert refused > NUM_MUTATIONS * 0.5
