"""Finding the subspaces: one forward pass over each data set, for all modules at once."""

from __future__ import annotations

import copy
import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..distributed import Ranks, process_group
from ..errors import SafeLoraError
from ..versions import versions
from .sketch import Sketch, leading_subspace
from .subspaces import Subspaces

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, Any], None]


def calibrate(
    model: Any,
    config: Any = None,
    safety_data: Any = None,
    task_data: Any = None,
    *,
    safety_rank: int = 32,
    task_rank: int = 32,
    oversample: int | None = None,
    seed: int = 0,
    exact: bool = False,
    passes: int = 1,
    rcond: float = 1e-3,
    tokenizer: Any = None,
    batch_size: int = 8,
    max_length: int = 1024,
    limit: int | None = None,
    distributed: bool | None = None,
    progress: Progress | None = None,
) -> Subspaces:
    """The subspaces of SaLoRA (arXiv 2501.01765): U = the top left singular vectors of W X_hᵀ, module by module.

    The rows of X_h are what reaches a module at the response tokens (label ≠ −100, padding left out) of harmful
    prompts with safe answers; U_t is the same for `task_data`. Z = X_h Wᵀ is the module's output less its bias, so no
    weight is read and quantised models work. One pass over the data serves all modules: per module the sketch
    ``Y = Zᵀ(Z Ω)``, Ω a random orthonormal d_out × (rank + oversample), is summed in fp64 over the batches, and the
    leading eigenvectors of Nyström's ``Y (ΩᵀY)⁻¹ Yᵀ ≈ ZᵀZ`` are U. No d_out × d_out matrix is formed.

    Args:
        model: a transformers model, or a PeftModel (whose adapters are switched off meanwhile); also under
            DistributedDataParallel or fully_shard.
        config: the LoraConfig that training will use, matched as PEFT matches it; a list of target modules or a
            regular expression; None for the modules that a PeftModel already adapts.
        safety_data, task_data: a DataLoader or an iterable of batches, mappings with `labels` (−100 outside the
            responses) and the model's inputs; or prompts with responses, whatever :func:`safelora.data.load_examples`
            takes, with a tokenizer.
        safety_rank, task_rank: how many directions at most.
        oversample: columns of the sketch beyond the rank; by default three times the rank.
        seed: of Ω. The same seed, model and data give the same bits on one machine.
        exact: sum the whole Gram matrix ZᵀZ instead, d_out² numbers a module in fp64. For checking.
        passes: 2 goes over the data once more with the first pass's directions for Ω, which squares the error.
        rcond: directions whose singular value is below rcond·σ₁ are dropped. Below about 1e-3 the fp32 products of one
            pass hold noise only.
        tokenizer, batch_size, max_length, limit: for data that is not batched yet; limit counts examples.
        distributed: add up the sketches of all ranks of torch's process group. Batches given ready-made are taken to
            be each rank's own share; other data is shared out. By default where the model is wrapped or sharded.
        progress: called with (batches done, batches in all or None).

    Returns:
        Subspaces, the same on all ranks, with the captured energy ``Σ_{i≤k} σᵢ²/‖Z‖²`` of each module. Modules
        without a plain matrix (experts, convolutions), with the vocabulary for an output or input, or that are never
        called, are in `skipped` with the reason.

    Raises:
        SafeLoraError: for data without labels or response tokens, a configuration that matches nothing, NaN.
    """
    ranks_asked = {"safety": safety_rank, "task": task_rank}
    wrapped, inner = _inner(model)
    sharded = any(hasattr(parameter, "device_mesh") for parameter in inner.parameters())
    shared = wrapped or sharded if distributed is None else distributed
    ranks = process_group() if shared else Ranks()
    try:
        with ranks.together():
            _check_options(ranks_asked, oversample, passes, rcond, batch_size)
            if safety_data is None:
                raise SafeLoraError(
                    "safety_data is missing: harmful prompts with safe answers, whose response tokens span U."
                )
            targets, skipped = _targets(inner, config)
            found: dict[str, dict[str, Any]] = {"safety": {}, "task": {}}
            details: dict[str, dict[str, Any]] = {name: {} for name in targets}
            sources = {}
            spanned: list[str] = []
            for kind, data in (("safety", safety_data), ("task", task_data)):
                if data is None:
                    continue
                batches = _batches(data, tokenizer, batch_size, max_length, limit, ranks)
                if passes > 1 and iter(batches) is batches:
                    batches = list(batches)
                sweep = _Sweep(inner, targets, ranks, sharded, progress)
                rank = ranks_asked[kind]
                sketches = {
                    name: Sketch(
                        name, rank, 3 * rank if oversample is None else oversample, _seed(seed, kind, name), exact
                    )
                    for name in targets
                }
                for number in range(passes):
                    if number:
                        for sketch in sketches.values():
                            sketch.refine()
                    sources[kind] = sweep.run(batches, sketches, kind)
                    for sketch in sketches.values():
                        sketch.reduce(ranks)
                skipped.update(sweep.skipped)
                for name, sketch in sketches.items():
                    if name in skipped:
                        continue
                    basis, numbers = leading_subspace(sketch, rcond)
                    if kind == "safety" and len(basis) == basis.shape[1]:
                        spanned.append(name)
                    found[kind][name] = ranks_equal(basis, ranks)
                    details[name].update({f"{kind}_{key}": value for key, value in numbers.items()})
    finally:
        ranks.close()
    if spanned:
        warnings.warn(
            f"safety_rank={safety_rank} spans all outputs of {len(spanned)} modules ({spanned[0]}): nothing of them is "
            "left to train. Lower it for more room.",
            stacklevel=2,
        )
    for name in skipped:
        details.pop(name, None)
    if not details:
        raise SafeLoraError(f"no module has a subspace: {next(iter(skipped.values()), 'nothing matched')}.")
    return Subspaces(
        bases={name: found["safety"][name] for name in details},
        task_bases={name: basis for name, basis in found["task"].items() if name in details},
        details=details,
        skipped=skipped,
        provenance={
            "method": "SaLoRA, arXiv 2501.01765",
            "model": _model_identity(inner),
            "data": sources,
            "options": {
                "safety_rank": safety_rank,
                "task_rank": task_rank,
                "oversample": oversample,
                "seed": seed,
                "exact": exact,
                "passes": passes,
                "rcond": rcond,
            },
            "versions": versions("torch", "peft"),
        },
    )


def weight_subspaces(
    model: Any, config: Any = None, *, rank: int = 16, input_rank: int | None = None, seed: int = 0
) -> Subspaces:
    """OPLoRA's subspaces: the top singular vectors of the frozen weights themselves, on both sides.

    With W ≈ U S Vᵀ (rank `rank`), an adapter kept out of U on the output side and out of V on the input side,
    ``ΔW = (I − UUᵀ) s·B·A (I − VVᵀ)``, leaves W's leading singular triples as they are. No data is needed.
    `input_rank` is `rank` by default; 0 leaves the input side free. Raises SafeLoraError as :func:`calibrate` does.
    """
    from .initialization import frozen_matrix, leading_factors

    _, inner = _inner(model)
    targets, skipped = _targets(inner, config)
    input_rank = rank if input_rank is None else input_rank
    if rank < 1 or input_rank < 0:
        raise SafeLoraError(f"rank must be positive and input_rank not negative, got {rank} and {input_rank}.")
    bases, input_bases, details = {}, {}, {}
    for name, module in targets.items():
        weight = frozen_matrix(module, name)
        kept = min(max(rank, input_rank), *weight.shape)
        left, values, right = leading_factors(weight, kept, _seed(seed, "weight", name), iterations=16)
        energy = float((values[:rank] ** 2).sum() / weight.double().norm() ** 2)
        bases[name] = left[:, :rank].float().cpu().contiguous()
        if input_rank:
            input_bases[name] = right[:, :input_rank].float().cpu().contiguous()
        details[name] = {"safety_rank": min(rank, kept), "safety_energy": energy}
    provenance = {
        "method": "OPLoRA: leading singular vectors of the weights",
        "model": _model_identity(inner),
        "options": {"rank": rank, "input_rank": input_rank, "seed": seed},
        "versions": versions("torch", "peft"),
    }
    return Subspaces(bases, {}, input_bases, details, skipped, provenance)


class _Sweep:
    """Forward passes over one data set, with a hook on every module."""

    def __init__(
        self, model: Any, targets: dict[str, Any], ranks: Ranks, sharded: bool, progress: Progress | None
    ) -> None:
        import torch

        self.model = model
        self.targets = targets
        self.ranks = ranks
        self.sharded = sharded
        self.progress = progress
        self.skipped: dict[str, str] = {}
        self._index = torch.empty(0, dtype=torch.int64)
        self._positions = 0
        self._on: dict[Any, torch.Tensor] = {}

    def run(self, batches: Iterable[Any], sketches: dict[str, Sketch], kind: str) -> dict[str, Any]:
        """Feed every batch; returns what the data was."""
        import torch

        digest = hashlib.sha256()
        total = len(batches) if isinstance(batches, Sized) else None
        done, tokens, last = 0, 0, None
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_evaluating(self.model))
            if hasattr(self.model, "disable_adapter"):
                stack.enter_context(self.model.disable_adapter())
            for name, module in self.targets.items():
                hook = module.register_forward_hook(self._hook(name, module, sketches[name]))
                stack.callback(hook.remove)
            for batch in self._together(batches):
                empty = batch is None  # this rank has no more, but has to take part in the gathering of weights
                inputs, mask = _inputs(last if empty else batch, kind)
                if empty:
                    mask = torch.zeros_like(mask)
                index = mask.flatten().nonzero().flatten()
                self._index, self._positions, self._on = index, mask.numel(), {}
                if len(index) or self.sharded:
                    self._forward(inputs)
                tokens += len(index)
                last = last if empty else batch
                for key in ("input_ids", "labels"):
                    if not empty and key in batch:
                        digest.update(torch.as_tensor(batch[key]).cpu().contiguous().numpy().tobytes())
                done += not empty
                if self.progress is not None:
                    self.progress(done, total)
        counts = self.ranks.gather((done, tokens, digest.hexdigest()))
        if not any(count[1] for count in counts):
            what = "no batch at all" if not any(count[0] for count in counts) else "every label is −100"
            raise SafeLoraError(f"the {kind} data has no response token: {what}. Labels mark the responses.")
        for name, sketch in sketches.items():
            if not sketch.called and not any(self.ranks.gather(sketch.called)):
                self.skipped.setdefault(name, "it is never called in a forward pass")
        seen = (
            hashlib.sha256("".join(count[2] for count in counts).encode()).hexdigest()
            if len(counts) > 1
            else counts[0][2]
        )
        return {
            "batches": sum(count[0] for count in counts),
            "response_tokens": sum(count[1] for count in counts),
            "sha256": seen,
        }

    def _together(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; where weights are sharded, as many on each rank, the missing ones None."""
        if not (self.sharded and self.ranks.size > 1):
            yield from batches
            return
        mine = iter(batches)
        while True:
            batch = next(mine, None)
            if not any(self.ranks.gather(batch is not None)):
                return
            yield batch

    def _forward(self, inputs: dict[str, Any]) -> None:
        device = getattr(self.model, "device", None)
        accepted = inspect.signature(_plain(self.model).forward).parameters
        extra = {key: value for key, value in (("use_cache", False), ("logits_to_keep", 1)) if key in accepted}
        self.model(**{key: _moved(value, device) for key, value in inputs.items()}, **extra)

    def _hook(self, name: str, module: Any, sketch: Sketch) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            rows = output.detach().reshape(-1, output.shape[-1])
            if len(rows) != self._positions:
                self.skipped[name] = "its outputs are not one row per token of the batch"
                return
            index = self._on.setdefault(rows.device, self._index.to(rows.device))
            bias = getattr(module, "bias", None)
            sketch.add(rows[index], None if bias is None else _whole(bias))

        return hook


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _targets(model: Any, config: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The plain modules to calibrate, by name in the plain model, and those without a subspace with the reason."""
    from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    from ..peft_model import _WRAPPERS

    plain = _plain(model)
    layers = {_WRAPPERS.sub("", name): module for name, module in plain.named_modules()}
    if config is None:
        matched = {name: module for name, module in layers.items() if isinstance(module, LoraLayer)}
        if not matched:
            raise SafeLoraError("config is missing: give the LoraConfig that training will use, or a PeftModel.")
        targeted = [
            f"{name} ({module.parameter_name})" for name, module in matched.items() if hasattr(module, "parameter_name")
        ]
    else:
        if isinstance(config, str) or (isinstance(config, Iterable) and not hasattr(config, "target_modules")):
            config = LoraConfig(target_modules=config if isinstance(config, str) else list(config))
        if not hasattr(config, "target_modules"):
            raise SafeLoraError(f"config must be a LoraConfig or target modules, got {type(config).__name__}.")
        settings = copy.deepcopy(config)
        model_config: Any = getattr(plain, "config", None)
        model_config = model_config.to_dict() if hasattr(model_config, "to_dict") else {"model_type": None}
        try:
            settings = LoraModel._prepare_adapter_config(LoraModel, settings, model_config)
        except (ValueError, KeyError) as error:
            raise SafeLoraError(
                f"the model's usual target modules are not known; give target_modules ({error})."
            ) from error
        settings = _maybe_include_all_linear_layers(settings, plain)
        inside = {
            f"{name}.{suffix}" for name, module in layers.items() if isinstance(module, LoraLayer)
            for suffix, _ in module.named_modules() if suffix
        }  # fmt: skip
        matched = {
            name: module
            for name, module in layers.items()
            if name not in inside
            and settings.target_modules is not None
            and LoraModel._check_target_module_exists(settings, name)
        }
        targeted = list(getattr(settings, "target_parameters", None) or ())
        if not matched and not targeted:
            raise SafeLoraError(
                f"target_modules={config.target_modules!r} match no module of the {type(plain).__name__}."
            )
    skipped = dict.fromkeys(targeted, "experts are parameters without a forward pass of their own")
    head = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    targets = {}
    for name, module in matched.items():
        if hasattr(module, "parameter_name"):
            continue
        if isinstance(module, LoraLayer):
            if module.merged_adapters:
                raise SafeLoraError(f"{name}: adapter {module.merged_adapters[0]!r} is merged; unmerge it first.")
            base = module.get_base_layer()
        else:
            base = module
        reason = _unfit(base, _base_of(head))
        if reason:
            skipped[name] = reason
        else:
            targets[name] = base
    if not targets:
        raise SafeLoraError(f"no module can have a subspace: {next(iter(skipped.values()))}.")
    return targets, skipped


def _unfit(module: Any, head: Any) -> str | None:
    """Why a module can have no subspace, None if it can."""
    import torch

    if module is head:
        return "its output is the vocabulary, a subspace of which protects no behaviour"
    if isinstance(module, torch.nn.Embedding):
        return "it is an embedding: its input is a token, not an activation"
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        return "it is a convolution, whose outputs are not rows per token"
    if isinstance(module, torch.nn.MultiheadAttention):
        return "it multiplies by its weights outside a forward pass of their own"
    if not hasattr(module, "weight") and not hasattr(module, "qweight") and not hasattr(module, "W_q"):
        return f"a {type(module).__name__} has no weight"
    return None


def _base_of(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _plain(model: Any) -> Any:
    """The transformers model inside a PeftModel."""
    from peft import PeftModel

    return model.base_model.model if isinstance(model, PeftModel) else model


def _inner(model: Any) -> tuple[bool, Any]:
    """Whether the model is wrapped in DistributedDataParallel, and what is inside."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    wrapped = False
    while True:
        if isinstance(model, DistributedDataParallel):
            wrapped, model = True, model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, torch.nn.Module):
            return wrapped, model
        else:
            raise SafeLoraError(f"model must be a torch.nn.Module or a PeftModel, got {type(model).__name__}.")


def _batches(
    data: Any, tokenizer: Any, batch_size: int, max_length: int, limit: int | None, ranks: Ranks
) -> Iterable[Any]:
    """The data as batches: given ones as they are, others made and shared out over the ranks."""
    from ..data import batches, load_examples

    if limit is not None:
        data = load_examples(data, limit=limit)
    made = batches(data, tokenizer, batch_size=batch_size, max_length=max_length)
    if made is data or not isinstance(made, list):
        return made
    return made[ranks.rank :: ranks.size]


def _inputs(batch: Any, kind: str) -> tuple[dict[str, Any], torch.Tensor]:
    """The model's inputs without the labels, and the mask of the response tokens."""
    import torch

    if not hasattr(batch, "keys") or "labels" not in batch:
        found = f"keys {', '.join(map(str, batch))}" if hasattr(batch, "keys") else type(batch).__name__
        raise SafeLoraError(
            f"a batch of the {kind} data has no labels ({found}). Expected a mapping with input_ids, attention_mask "
            "and labels, −100 outside the responses."
        )
    labels = torch.as_tensor(batch["labels"])
    mask = labels != -100
    attention = batch.get("attention_mask") if hasattr(batch, "get") else None
    if attention is not None and attention.shape == mask.shape:
        mask &= attention.to(mask.device) != 0
    return {key: batch[key] for key in batch.keys() if key != "labels"}, mask  # noqa: SIM118 (BatchEncoding)


def _moved(value: Any, device: Any) -> Any:
    return value.to(device) if hasattr(value, "to") and device is not None else value


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, but for bitsandbytes layers: evaluating these on a CPU repacks their weights for good."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            if not type(module).__module__.startswith("bitsandbytes"):
                module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def ranks_equal(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Rank 0's tensor, everywhere: machines may differ in the last bit of an eigenvector."""
    tensor = tensor.cpu().contiguous()
    if ranks.size > 1:
        ranks.broadcast(tensor, 0)
    return tensor


def _seed(seed: int, *names: str) -> int:
    """A seed of its own for every module, whatever the others are."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:8], "little") >> 1


def _model_identity(model: Any) -> dict[str, Any]:
    plain = _plain(model)
    config = getattr(plain, "config", None)
    return {
        "class": type(plain).__name__,
        "name_or_path": str(getattr(config, "_name_or_path", "") or ""),
        "revision": getattr(config, "_commit_hash", None),
        "dtype": str(next(iter(plain.parameters())).dtype).removeprefix("torch."),
    }


def _check_options(
    ranks_asked: dict[str, int], oversample: int | None, passes: int, rcond: float, batch_size: int
) -> None:
    for kind, rank in ranks_asked.items():
        if not isinstance(rank, int) or rank < 1:
            raise SafeLoraError(f"{kind}_rank must be a positive integer, got {rank!r}.")
    if oversample is not None and oversample < 0:
        raise SafeLoraError(f"oversample must not be negative, got {oversample}.")
    if passes not in (1, 2):
        raise SafeLoraError(f"passes must be 1 or 2, got {passes!r}.")
    if not 0 <= rcond < 1:
        raise SafeLoraError(f"rcond must be in [0, 1), got {rcond!r}.")
    if batch_size < 1:
        raise SafeLoraError(f"batch_size must be positive, got {batch_size}.")
