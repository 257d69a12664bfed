"""Speed and memory of `dmm soup` on 2.13 GB files shaped as SD 1.5, beside `cp`, sd-mecha and mergekit in the same run.

The peers are installed from their packages in environments of their own:

  python3 -m venv mecha && mecha/bin/pip install sd-mecha
  python3 -m venv kit && kit/bin/pip install mergekit
  python benchmarks/soup.py --folder /tmp/soup --sd-mecha mecha/bin/python --mergekit kit/bin/python --runs 5

Every merge is a process of its own, timed from after its imports to the end of the merge; private memory is
sampled every 5 ms (Linux: RssAnon), above what is there after the imports. The runs alternate; medians are printed.
Four files of 2.13 GB are written to the folder on the first run and stay; each output is removed at once.

A transformer's file in bf16, shaped as FLUX.1's, with one LoRA of rank 16 on all of its layers, beside `cp`:

  python benchmarks/soup.py --folder /tmp/soup --only transformer --runs 3                  # 24 GB, and as much again
  python benchmarks/soup.py --folder /tmp/soup --only transformer --runs 3 --blocks 3 6     # 4 GB
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("base", "a", "b", "c")
MEASURED = ("weighted_sum", "ties", "dare_ties", "memory")
TRANSFORMER, LORA = "transformer.safetensors", "lora.safetensors"
RANK = 16

# in every child: what is imported counts for nothing, then the clock and the memory are watched
WATCH = """
import json, os, sys, threading, time
def private():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
def watch(work):
    start, peak, ended = private(), [0.0], threading.Event()
    def sample():
        while not ended.wait(0.005):
            peak[0] = max(peak[0], private())
    thread = threading.Thread(target=sample)
    thread.start()
    wall, before = time.monotonic(), os.times()
    work()
    after, wall = os.times(), time.monotonic() - wall
    ended.set()
    thread.join()
    cpu = sum(after[:4]) - sum(before[:4])
    print("RESULT" + json.dumps({"wall": wall, "cpu": cpu, "MiB": peak[0] - start}))
"""
DMM = """
from pathlib import Path
import dmm.soup.cook, dmm.soup.reading
from dmm.soup.make import make_soup
from dmm.soup.recipe import SoupRecipe
folder, method, names, cache = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","), sys.argv[4]
teachers = [{"name": name, "model": str(folder / f"{name}.safetensors")} for name in names]
base = {"base": str(folder / "base.safetensors")} if method != "weighted_sum" else {}
recipe = SoupRecipe(method=method, teachers=teachers, **base)
digests = dmm.soup.reading.Digests(Path(cache))
watch(lambda: make_soup(recipe, folder / "out.safetensors", digests=digests))
"""
BAKE = """
from pathlib import Path
import dmm.soup.cook, dmm.soup.reading
from dmm.soup.make import make_soup
from dmm.soup.recipe import SoupRecipe
folder, cache = Path(sys.argv[1]), sys.argv[2]
teacher = {"name": "a", "model": str(folder / "transformer.safetensors"), "lora": str(folder / "lora.safetensors")}
recipe = SoupRecipe(method="soup", teachers=[teacher])
digests = dmm.soup.reading.Digests(Path(cache))
watch(lambda: make_soup(recipe, folder / "out.safetensors", digests=digests))
"""
MECHA = """
import torch, sd_mecha
from pathlib import Path
folder, method, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
models = [sd_mecha.model(folder / f"{name}.safetensors") for name in names]
base = sd_mecha.model(folder / "base.safetensors")
if method == "weighted_sum":
    recipe = sd_mecha.weighted_sum(*models, alpha=0.5)
else:  # its TIES is that of DARE-TIES which drops nothing
    recipe = sd_mecha.add_ties_with_dare(base, *models, probability=0.0 if method == "ties" else 0.9, k=0.2)
watch(lambda: sd_mecha.merge(
    recipe, merge_device="cpu", merge_dtype=torch.float32, output_dtype=torch.float16, strict_mandatory_keys=False,
    check_extra_keys=False, output=folder / "out.safetensors"))
"""
MERGEKIT = """
import yaml
from mergekit.scripts import merge_raw_pytorch as raw
from pathlib import Path
folder, method, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
one = {"weighted_sum": {"weight": 0.5}, "ties": {"weight": 1.0, "density": 0.2}}[method]
config = {
    "merge_method": {"weighted_sum": "linear"}.get(method, method), "out_dtype": "float16", "dtype": "float32",
    "models": [{"model": str(folder / f"{name}.safetensors"), "parameters": one} for name in names],
}
if method == "ties":
    config["base_model"] = str(folder / "base.safetensors")
(folder / "kit.yaml").write_text(yaml.safe_dump(config))
def work():
    try:
        raw.main.main([str(folder / "kit.yaml"), str(folder / "out.kit")], standalone_mode=False)
    finally:
        (folder / "kit.yaml").unlink()
watch(work)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; takes 11 GB")
    parser.add_argument("--sd-mecha", metavar="PYTHON", type=Path)
    parser.add_argument("--mergekit", metavar="PYTHON", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=(*MEASURED, "transformer"), default=MEASURED)
    parser.add_argument("--blocks", nargs=2, type=int, default=(19, 38), help="of the transformer: double and single")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if set(args.only) & set(MEASURED):
        write_models(args.folder)
    if "transformer" in args.only:
        write_transformer(args.folder, *args.blocks)
    rows: dict[str, list[dict[str, float]]] = {}
    for run in range(args.runs):
        for name, work in plan(args).items():
            warm(args.folder)
            result = work()
            rows.setdefault(name, []).append(result)
            print(f"run {run + 1}: {name}: " + ", ".join(f"{k} {v:.2f}" for k, v in result.items()), flush=True)
    print(f"\nmedian of {args.runs}, {os.cpu_count()} CPU cores; load {os.getloadavg()[0]:.1f}")
    print(f"{'':<34}{'wall s':>10}{'CPU s':>10}{'MiB':>10}")
    for name, results in rows.items():
        values = [statistics.median(one[key] for one in results) for key in ("wall", "cpu", "MiB")]
        print(f"{name:<34}" + "".join(f"{value:>10.2f}" for value in values))


def plan(args: argparse.Namespace) -> dict:
    """Name -> what is run, in the order of one round."""
    mine = lambda method, names, cold: lambda: run_dmm(args.folder, method, names, cold=cold)  # noqa: E731
    peer = lambda python, code, *rest: lambda: child(python, code, args.folder, *rest)  # noqa: E731
    work: dict = {}
    if "weighted_sum" in args.only:
        work["cp and sync"] = lambda: copy(args.folder)
        work["sha256 of both inputs"] = lambda: hash_both(args.folder)
        work["dmm, weighted sum of 2"] = mine("weighted_sum", "a,b", True)
        work["dmm, the same, hashes known"] = mine("weighted_sum", "a,b", False)
    if "ties" in args.only:
        work["dmm, TIES of base + 3"] = mine("ties", "a,b,c", True)
    if "dare_ties" in args.only:
        work["dmm, DARE-TIES of base + 3"] = mine("dare_ties", "a,b,c", True)
    if "transformer" in args.only:
        work["cp and sync, transformer"] = lambda: copy(args.folder, TRANSFORMER)
        work["dmm, one LoRA on it"] = lambda: bake(args.folder, cold=True)
        work["dmm, the same, hashes known"] = lambda: bake(args.folder, cold=False)
    if "memory" in args.only:
        work["dmm, weighted sum of 1"] = mine("weighted_sum", "a", False)
        work["dmm, weighted sum of 4"] = mine("weighted_sum", "base,a,b,c", False)
    for title, python, code in (("sd-mecha", args.sd_mecha, MECHA), ("mergekit", args.mergekit, MERGEKIT)):
        if python is not None and "weighted_sum" in args.only:
            work[f"{title}, weighted sum of 2"] = peer(python, code, "weighted_sum", "a,b")
        if python is not None and "ties" in args.only:
            work[f"{title}, TIES of base + 3"] = peer(python, code, "ties", "a,b,c")
    if args.sd_mecha is not None and "dare_ties" in args.only:
        work["sd-mecha, DARE-TIES of base + 3"] = peer(args.sd_mecha, MECHA, "dare_ties", "a,b,c")
    return work


def run_dmm(folder: Path, method: str, names: str, *, cold: bool) -> dict[str, float]:
    cache = folder / "digests.json"
    if cold:
        cache.unlink(missing_ok=True)
    return child(Path(sys.executable), DMM, folder, method, names, str(cache))


def bake(folder: Path, *, cold: bool) -> dict[str, float]:
    cache = folder / "digests.json"
    if cold:
        cache.unlink(missing_ok=True)
    return child(Path(sys.executable), BAKE, folder, str(cache))


def child(python: Path, code: str, folder: Path, *rest: str) -> dict[str, float]:
    try:
        done = subprocess.run([python, "-c", WATCH + code, folder, *rest], capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        if not found:
            sys.exit(f"{python}: {done.stderr[-3000:]}")
        return json.loads(found[0].removeprefix("RESULT"))
    finally:
        remove_outputs(folder)


def remove_outputs(folder: Path) -> None:
    (folder / "out.safetensors").unlink(missing_ok=True)
    if (folder / "out.kit").is_dir():
        for path in (folder / "out.kit").iterdir():
            path.unlink()
        (folder / "out.kit").rmdir()


def copy(folder: Path, name: str = "a.safetensors") -> dict[str, float]:
    wall, before = time.monotonic(), os.times()
    subprocess.run(["cp", folder / name, folder / "out.safetensors"], check=True)
    subprocess.run(["sync", folder / "out.safetensors"], check=True)
    after, wall = os.times(), time.monotonic() - wall
    remove_outputs(folder)
    return {"wall": wall, "cpu": sum(after[:4]) - sum(before[:4]), "MiB": 0.0}


def hash_both(folder: Path) -> dict[str, float]:
    wall, before = time.monotonic(), os.times()
    for name in "ab":
        subprocess.run(["sha256sum", folder / f"{name}.safetensors"], check=True, capture_output=True)
    after, wall = os.times(), time.monotonic() - wall
    return {"wall": wall, "cpu": sum(after[:4]) - sum(before[:4]), "MiB": 0.0}


def warm(folder: Path) -> None:
    """Have all models in the page cache."""
    for name in (*(f"{name}.safetensors" for name in NAMES), TRANSFORMER):
        if (folder / name).is_file():
            subprocess.run(["cat", folder / name], check=True, stdout=subprocess.DEVNULL)


def write_models(folder: Path) -> None:
    """A base and three models near it, with SD 1.5's names and shapes."""
    if all((folder / f"{name}.safetensors").is_file() for name in NAMES):
        return
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from dmm.families import SD1
    from dmm.formats.original_layout import original_places, to_original
    from dmm.soup.writing import Declared, NewWeightFile

    vae = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(cross_attention_dim=768, sample_size=64),
            "vae": AutoencoderKL(**vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **text)),
        }
    tensors = {}
    for component, places in original_places(models, SD1).items():
        for name, tensor in to_original(models[component].state_dict(), places).items():
            tensors[name] = Declared(torch.float16, tuple(tensor.shape))
    for i, name in enumerate(NAMES):
        file = NewWeightFile(folder / f"{name}.safetensors", tensors, {"modelspec.prediction_type": "epsilon"})
        common, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(100 + i)
        for tensor, what in tensors.items():
            values = torch.randn(what.num_elements, generator=common) * 0.03
            if i:
                values += torch.randn(what.num_elements, generator=own) * 0.002
            file.write(tensor, 0, values.half())
        file.close()


def write_transformer(folder: Path, double: int, single: int) -> None:
    """A file with FLUX.1's names and shapes, and a LoRA for it by the same names."""
    if (folder / TRANSFORMER).is_file():
        return
    import torch

    from dmm.soup.writing import Declared, NewWeightFile

    d = 3072
    shapes = {"img_in": (d, 64), "txt_in": (d, 4096), "final_layer.linear": (64, d)}
    for name, inputs in {"time_in": 256, "guidance_in": 256, "vector_in": 768}.items():
        shapes |= {f"{name}.in_layer": (d, inputs), f"{name}.out_layer": (d, d)}
    for i in range(double):
        for stream in (f"double_blocks.{i}.img", f"double_blocks.{i}.txt"):
            shapes |= {f"{stream}_mod.lin": (6 * d, d), f"{stream}_attn.qkv": (3 * d, d), f"{stream}_attn.proj": (d, d)}
            shapes |= {f"{stream}_mlp.0": (4 * d, d), f"{stream}_mlp.2": (d, 4 * d)}
    for i in range(single):
        block = f"single_blocks.{i}"
        shapes |= {
            f"{block}.linear1": (7 * d, d),
            f"{block}.linear2": (d, 5 * d),
            f"{block}.modulation.lin": (3 * d, d),
        }
    shapes["final_layer.adaLN_modulation.1"] = (2 * d, d)
    factors = {}
    for name, (rows, columns) in shapes.items():
        layer = "lora_unet_" + name.replace(".", "_")
        factors |= {f"{layer}.lora_down.weight": (RANK, columns), f"{layer}.lora_up.weight": (rows, RANK)}
    weights = {f"model.diffusion_model.{name}.weight": shape for name, shape in shapes.items()}
    weights |= {f"model.diffusion_model.{name}.bias": (rows,) for name, (rows, _) in shapes.items()}
    random = torch.randn(2**26, generator=torch.Generator().manual_seed(7)).mul_(0.03).bfloat16()
    for path, tensors in ((LORA, factors), (TRANSFORMER, weights)):
        declared = {name: Declared(torch.bfloat16, shape) for name, shape in tensors.items()}
        file = NewWeightFile(folder / path, declared, {})
        for i, (name, what) in enumerate(declared.items()):
            begin = i * 9973 % (len(random) // 2)
            values = random.repeat(1 + (begin + what.num_elements) // len(random))
            file.write(name, 0, values[begin : begin + what.num_elements].clone())
        file.close()


if __name__ == "__main__":
    main()
