"""Reading a PEFT LoRA adapter directory: what every tensor in it is, and whether its update is s·B·A at all."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .checkpoint import FLOAT_DTYPES, Header, TensorInfo, check_name, locate, read_header, read_json
from .errors import SafeLoraError

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MLX_FILE = "adapters.safetensors"
REPORT_FILE = "safelora_report.json"
METADATA_KEY = "safelora"
COMPANIONS = (
    "README.md", "LICENSE*", "NOTICE*", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "*.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json", "generation_config.json",
)  # fmt: skip

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<factor>lora_A|lora_B)\.weight")
_EMBEDDING_FACTOR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<factor>[AB])")
_LORA_PART = re.compile(r"\.(lora_\w+|token_adapter\.trainable_tokens_delta)(\.|$)")

_NOT_BA = "its update is not s·B·A"
_REFUSED_OPTIONS = {
    "use_dora": f"it is a DoRA adapter: {_NOT_BA} (a magnitude vector rescales the merged weight). "
    "Merge it into the model, or train without use_dora",
    "kasa_config": f"it is a KaSA adapter: {_NOT_BA} (a diagonal sits between B and A, on a truncated base weight)",
    "use_bdlora": f"it is a block-diagonal (BD-LoRA) adapter: {_NOT_BA} with dense factors",
    "use_qalora": f"it is a QA-LoRA adapter: {_NOT_BA} (A acts on pooled inputs)",
    "arrow_config": f"it is an Arrow router over several adapters: {_NOT_BA}. Project each of them alone",
}
_MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_REFUSED_PARTS = {
    "lora_magnitude_vector": _REFUSED_OPTIONS["use_dora"],
    "lora_diag": _REFUSED_OPTIONS["kasa_config"],
    "lora_E": "it is an AdaLoRA adapter: its update is B·diag(E)·A",
}


@dataclass(frozen=True)
class Mark:
    """How an adapter says that a method changed it, so that it is not changed twice unless told to.

    key: in the metadata of the weight file (with value `done`) and in the front matter of the model card.
    report: the file beside the adapter, whose field `count` is the number of changed modules.
    attribute: on the PEFT config of an adapter in memory.
    """

    key: str
    done: str
    doing: str
    report: str
    count: str
    attribute: str

    def of(self, root: Path, header: Header) -> str | None:
        """Where the adapter in `root` bears this mark, or None."""
        if self.key in header.metadata:
            return f"{header.path.name} says so in its metadata"
        report_path = root / self.report
        if report_path.exists():
            report, _ = read_json(report_path, f"the report of {self.doing.lower()}")
            if report.get(self.count) != 0:
                return f"it has a {self.report}"
        readme = root / "README.md"
        if readme.is_file():
            with open(readme, encoding="utf-8", errors="replace") as file:
                if re.match(rf"\A---\n(.*\n)*?{self.key}:\s", file.read(1 << 20), re.MULTILINE):
                    return "its README.md says so"
        return None

    def refusal(self, what: str, remedy: str) -> SafeLoraError:
        """The error for an adapter that bears the mark."""
        return SafeLoraError(
            f"{what}. {self.doing} twice shrinks the update twice; {remedy}, or say so explicitly "
            f"(allow_{self.done}=True, --allow-{self.done})."
        )


PROJECTED = Mark(METADATA_KEY, "projected", "Projecting", REPORT_FILE, "num_projected", "_safelora_projected")


class LoraModule(NamedTuple):
    """One adapted module: update ∝ B·A with `lora_B` (d_out × r) and `lora_A` (r × d_in).

    kind is "linear", "conv" (factors with kernel dimensions, flattened), "embedding" (whose stored weight is
    d_in × d_out, with d_in the vocabulary) or "expert": then `expert` of `experts` owns rows expert·r … of lora_A and
    columns expert, expert + experts, … of lora_B, and `swapped` says that lora_A is the factor on the output side; or
    "part" of a fused module, which owns `rows` of lora_B.
    """

    name: str
    kind: str
    lora_A: TensorInfo
    lora_B: TensorInfo
    expert: int = 0
    experts: int = 1
    swapped: bool = False
    rows: tuple[int, int] | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0] // self.experts

    @property
    def d_out(self) -> int:
        return self._sides[0]

    @property
    def d_in(self) -> int:
        return self._sides[1]

    @property
    def output(self) -> TensorInfo:
        """The factor on the output side, which a projection replaces."""
        return self.lora_A if self.swapped else self.lora_B

    @property
    def _sides(self) -> tuple[int, int]:
        size = math.prod(self.lora_A.shape[1:])
        other = self.lora_B.shape[0] if self.rows is None else self.rows[1] - self.rows[0]
        return (size, other) if self.swapped else (other, size)

    def of_a(self, tensor: torch.Tensor) -> torch.Tensor:
        """This module's part of lora_A (r × its dimension), a view."""
        return tensor.reshape(self.experts, self.rank, -1)[self.expert]

    def of_b(self, tensor: torch.Tensor) -> torch.Tensor:
        """This module's part of lora_B (its dimension × r), a view."""
        part = tensor.reshape(tensor.shape[0], self.rank, self.experts)[:, :, self.expert]
        return part if self.rows is None else part[slice(*self.rows)]

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where in the tensor of `output` this module's d_out × r factor lies, a view."""
        return self.of_a(tensor).t() if self.swapped else self.of_b(tensor)

    def factors(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(d_out × r, r × d_in) views of the stored factors."""
        a, b = self.of_a(lora_A), self.of_b(lora_B)
        return (a.t(), b.t()) if self.swapped else (b, a)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk. `modules` are in natural order (layers.2 before layers.10)."""

    source: str
    root: Path
    weights: Path
    config: dict[str, Any]
    modules: list[LoraModule]
    passed_through: list[str]
    warnings: list[str]
    header: Header
    loaded: dict[str, torch.Tensor] | None

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        allow_projected: bool = False,
        mark: Mark = PROJECTED,
    ) -> Adapter:
        """Read a PEFT adapter directory (or repository id) and classify every tensor in it.

        Raises SafeLoraError when files are missing or inconsistent, when the adapter's update is not s·B·A (DoRA and
        its like), or when it bears `mark`, has been projected before, and `allow_projected` is false: C is not
        idempotent, so a second projection shrinks the update once more.
        """
        root = locate(source, revision, local_files_only, [CONFIG_FILE, "adapter_model.*", mark.report, *COMPANIONS])
        config_path = root / CONFIG_FILE
        if not config_path.exists():
            raise SafeLoraError(f"{root} is not a PEFT adapter: it has no {CONFIG_FILE}. {_nested_hint(root)}".strip())
        config, _ = read_json(config_path, "the adapter configuration")
        _check_kind(config, root)
        weights, header, loaded = _open_weights(root)
        modules, passed_through, warnings = _classify(header.tensors, config, weights)
        place = mark.of(root, header)
        if place:
            if not allow_projected:
                what = f"{root} has been {mark.done} already ({place})"
                raise mark.refusal(what, "start from the original adapter")
            warnings.append(f"The input had been {mark.done} before; its update is shrunk a second time.")
        return cls(os.fspath(source), root, weights, config, modules, passed_through, warnings, header, loaded)

    @property
    def base_model(self) -> str | None:
        """`base_model_name_or_path`: the (aligned) model the adapter was trained on."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name and name.isprintable() else None

    def read(self, name: str) -> torch.Tensor:
        """One tensor of the adapter, in its stored dtype and shape."""
        from .stream import map_range, to_tensor

        if self.loaded is not None:
            return self.loaded[name]
        info = self.header.tensors[name]
        return to_tensor(map_range(info), info)

    def file_of(self, info: TensorInfo) -> Path:
        """The file that a tensor of the adapter, or of a checkpoint, was read from."""
        return info.file


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a contiguous CPU tensor, without a copy; valid while the tensor lives."""
    import ctypes

    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key that orders layers.2 before layers.10."""
    return [(0, int(part)) if part.isdecimal() and len(part) < 19 else (1, part) for part in name.split(".")]


def _check_kind(config: dict[str, Any], root: Path) -> None:
    kind = config.get("peft_type")
    if (root / MLX_FILE).exists() and kind is None:
        raise SafeLoraError(f"{root} is an MLX adapter; write it as a PEFT adapter first: safelora convert {root} OUT.")
    if kind != "LORA":
        raise SafeLoraError(f"{root}: peft_type is {kind!r}; only LORA adapters (update s·B·A) can be projected.")
    for option, reason in _REFUSED_OPTIONS.items():
        if config.get(option):
            raise SafeLoraError(f"{root} cannot be projected: {reason}.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        raise SafeLoraError(
            f"{root} was initialised with init_lora_weights={init!r}, which changes the model's weights: B·A is not "
            "the update relative to the aligned model. Save it with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) first, which makes it an ordinary LoRA."
        )


def _open_weights(root: Path) -> tuple[Path, Header, dict[str, torch.Tensor] | None]:
    if (root / WEIGHTS_FILE).exists():
        header = read_header(root / WEIGHTS_FILE)
        return header.path, header, None
    path = root / PICKLE_FILE
    if not path.exists():
        hint = (
            f" Its adapter_*.pt is torchtune's own format: safelora convert {root} OUT --model ALIGNED."
            if any(root.glob("adapter_*.pt"))
            else ""
        )
        raise SafeLoraError(f"{root} has neither {WEIGHTS_FILE} nor {PICKLE_FILE}.{hint}")
    loaded = load_pickle(path)
    from .stream import dtype_name

    tensors, position = {}, 0
    for name, tensor in loaded.items():
        size = tensor.numel() * tensor.element_size()
        tensors[name] = TensorInfo(name, dtype_name(tensor.dtype), tuple(tensor.shape), path, position, position + size)
        position += size
    return path, Header(path, path.stat().st_size, 0, "", {"format": "pt"}, tensors), loaded


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled state dict, read without running code from it. Raises SafeLoraError."""
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an untrusted pickle can fail in any way; all of them mean the same
        raise SafeLoraError(
            f"{path} could not be loaded as plain tensors (weights_only=True): {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:300]}. Re-save the adapter with a current PEFT."
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in loaded.items()
    ):
        raise SafeLoraError(f"{path} is not a state dict (tensor name -> tensor).")
    for name in loaded:
        check_name(path, name)
    unusual = [name for name, tensor in loaded.items() if tensor.layout is not torch.strided or tensor.is_quantized]
    if unusual:
        raise SafeLoraError(f"{path}: {unusual[0]} is not a dense tensor.")
    widest_first = sorted(loaded, key=lambda name: (-loaded[name].element_size(), natural_key(name)))
    return {name: loaded[name].detach().contiguous() for name in widest_first}


def _classify(
    tensors: dict[str, TensorInfo], config: dict[str, Any], weights: Path
) -> tuple[list[LoraModule], list[str], list[str]]:
    """Pair the factors by module name; everything else is passed through or refused."""
    pairs: dict[str, dict[str, TensorInfo]] = {}
    passed_through = []
    extras_known = bool(config.get("velora_config") or config.get("monteclora_config"))
    for name in sorted(tensors, key=natural_key):
        found = _FACTOR.fullmatch(name) or _EMBEDDING_FACTOR.fullmatch(name)
        if found:
            factor = found["factor"][-1]
            parts = pairs.setdefault(module_name(found["module"]), {})
            if factor in parts:
                raise SafeLoraError(f"{weights}: {parts[factor].name} and {name} are the same factor of one module.")
            parts[factor] = tensors[name]
            continue
        part = _LORA_PART.search(name)
        if part and part[1] in _REFUSED_PARTS:
            raise SafeLoraError(f"{weights} cannot be projected: {_REFUSED_PARTS[part[1]]} (tensor {name}).")
        if part and part[1].startswith("lora_") and not name.endswith(".lora_B.bias") and not extras_known:
            raise SafeLoraError(
                f"{weights}: tensor {name} belongs to no known LoRA layout. Save the adapter with "
                "PeftModel.save_pretrained, which writes <module>.lora_A.weight and <module>.lora_B.weight."
            )
        passed_through.append(name)
    modules = [_module(name, parts, weights) for name, parts in pairs.items()]
    if not modules:
        raise SafeLoraError(f"{weights} holds no LoRA factors (lora_A, lora_B): there is nothing to project.")
    warnings = [passed_through_warning(passed_through)] if passed_through else []
    return sorted(modules, key=lambda module: natural_key(module.name)), passed_through, warnings


def passed_through_warning(names: list[str]) -> str:
    """What is said about tensors that a projection copies."""
    return (
        f"{len(names)} tensor(s) are not LoRA factors (modules_to_save, biases, token embeddings) and "
        f"are copied as they are; what they changed stays unprojected: {_some(names)}."
    )


def module_name(path: str) -> str:
    """A key of the adapter as a name in the model it was trained on."""
    return path.replace("_orig_mod.", "").removeprefix("base_model.model.")


def _module(name: str, parts: dict[str, TensorInfo], weights: Path) -> LoraModule:
    if set(parts) != {"A", "B"}:
        (present,) = parts.values()
        missing = "lora_B" if "A" in parts else "lora_A"
        raise SafeLoraError(f"{weights}: {present.name} has no {missing} beside it.")
    a, b = parts["A"], parts["B"]
    for info in (a, b):
        if info.dtype not in FLOAT_DTYPES:
            raise SafeLoraError(f"{weights}: {info.name} has dtype {info.dtype}, expected one of {FLOAT_DTYPES}.")
    flat_b = len(b.shape) >= 2 and all(size == 1 for size in b.shape[2:])
    if len(a.shape) < 2 or not flat_b or a.shape[0] != b.shape[1] or 0 in a.shape or 0 in b.shape:
        raise SafeLoraError(
            f"{weights}: the factors of {name} do not fit: lora_A has shape {list(a.shape)}, expected (r, d_in); "
            f"lora_B has shape {list(b.shape)}, expected (d_out, r)"
            + (" (a convolution with groups has no such update)." if len(a.shape) > 2 else ".")
        )
    kind = "embedding" if "lora_embedding_" in a.name else "conv" if len(a.shape) > 2 else "linear"
    return LoraModule(name, kind, a, b)


def _nested_hint(root: Path) -> str:
    if not root.is_dir():
        return "Give the directory that holds it."
    nested = sorted(path.parent.name for path in root.glob(f"*/{CONFIG_FILE}"))
    return f"Its sub-directories are adapters; give one of them: {_some(nested)}." if nested else ""


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
