"""Models, tokenizers and adapters for evaluation: loaded, checked to fit, and taken off again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .adapter import CONFIG_FILE, WEIGHTS_FILE
from .checkpoint import locate, read_header, read_json
from .errors import SafeLoraError
from .peft_model import flags_kept

ADAPTER = "evaluated"
ADAPTER_FILES = [CONFIG_FILE, "adapter_model.*"]
BARE = "no adapter"


@dataclass(frozen=True)
class AdaptedModel:
    """A model and the adapters that it is looked at with, one after another.

    source, names: what a report calls the model and the adapters. labels: the adapters for people.
    live: the model is a PeftModel and the adapters are its own; else they are loaded on it by name.
    """

    model: Any
    tokenizer: Any
    source: str
    names: list[str]
    labels: list[str]
    live: bool
    local_files_only: bool

    @classmethod
    def open(
        cls, model: Any, adapters: Iterable[str | os.PathLike[str]], tokenizer: Any, local_files_only: bool
    ) -> AdaptedModel:
        """Load what is given by name and check that every adapter is there.

        Args:
            model: a causal language model in memory (plain, or a PeftModel), a directory or a repository id.
            adapters: adapter directories or repository ids; names of adapters for a PeftModel, by default all of it.
            tokenizer: the model's; by default that of the model's directory.
            local_files_only: for repository ids.

        Raises SafeLoraError for a model or adapter that cannot be found, an adapter named twice, a missing tokenizer.
        """
        source = f"a {type(model).__name__} in memory"
        if isinstance(model, (str, os.PathLike)):
            source = str(model)
            model, found = load_model(model, local_files_only=local_files_only)
            tokenizer = tokenizer or found
        if tokenizer is None:
            raise SafeLoraError("give the tokenizer of a model in memory.")
        live = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        names = [os.fspath(adapter) for adapter in adapters] or (list(model.peft_config) if live else [])
        if len(set(names)) < len(names):
            raise SafeLoraError(f"an adapter is named twice: {', '.join(names)}.")
        for name in names:
            if not live:
                locate(name, None, local_files_only, ADAPTER_FILES)
            elif name not in model.peft_config:
                raise SafeLoraError(f"the model has no adapter {name!r}; it has {', '.join(model.peft_config)}.")
        labels = names if live else _labels(names)
        return cls(model, tokenizer, source, names, labels, live, local_files_only)

    def states(self, bare: bool) -> Generator[Any, None, None]:
        """The model without an adapter where `bare`, then with each; it is as it was at the end."""
        model = self.model
        if not self.live:
            if bare:
                yield model
            for name in self.names:
                with adapted(model, name, local_files_only=self.local_files_only) as tuned:
                    yield tuned
            return
        if bare:
            with model.disable_adapter():
                yield model
        active = list(model.active_adapters)
        with flags_kept(model):
            try:
                for name in self.names:
                    model.set_adapter(name)
                    yield model
            finally:
                model.base_model.set_adapter(active)


def _labels(paths: Sequence[str]) -> list[str]:
    """The last components of the paths, or the paths themselves where these coincide."""
    names = [os.path.basename(os.path.normpath(path)) for path in paths]
    return [path if names.count(name) > 1 or name == BARE else name for path, name in zip(paths, names, strict=True)]


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
    quiet: bool = False,
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode (:func:`load_bare_model`), and its tokenizer.

    chat_template: a Jinja file to use instead of the tokenizer's own. quiet: keep transformers from printing.

    Raises SafeLoraError when one of them cannot be loaded.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    if quiet:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(source, error) from error
    if chat_template is not None:
        path = Path(chat_template)
        if not path.is_file():
            raise SafeLoraError(f"the chat template {path} is not a file.")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    model = load_bare_model(source, dtype=dtype, device=device, local_files_only=local_files_only, revision=revision)
    return model, tokenizer


def load_bare_model(
    source: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
) -> Any:
    """A causal language model in evaluation mode.

    dtype: "auto" (as stored), "float32", "bfloat16" or "float16". device: by default cuda where there is one; "auto"
    spreads the model over what there is (accelerate).

    Raises SafeLoraError when it cannot be loaded.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    spread = {"device_map": "auto"} if device == "auto" else {}
    wanted = {"dtype" if _renamed(transformers.__version__) else "torch_dtype": dtype}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, local_files_only=local_files_only, revision=revision, **wanted, **spread
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(source, error) from error
    if not spread:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval()


def _unloadable(source: str | os.PathLike[str], error: Exception) -> SafeLoraError:
    return SafeLoraError(f"{os.fspath(source)} cannot be loaded as a causal language model: {error}")


def _renamed(version: str) -> bool:
    """Whether this transformers calls the option dtype, as it does from 4.56 on."""
    return tuple(int(part) for part in version.split(".")[:2]) >= (4, 56)


@contextmanager
def adapted(model: Any, adapter: str | os.PathLike[str], *, local_files_only: bool = False) -> Iterator[Any]:
    """A PeftModel of a plain model and an adapter directory (or repository id); the plain model is back afterwards.

    The adapter keeps the dtype it is stored in. Raises SafeLoraError where its tensors are not those that the model
    has room for.
    """
    from peft import PeftModel

    if hasattr(model, "peft_config"):
        raise SafeLoraError("the model has adapters already; give the plain model to load adapters on.")
    root = locate(adapter, None, local_files_only, ADAPTER_FILES)
    read_json(root / CONFIG_FILE, "the adapter configuration")
    with _restored(model):
        try:
            with warnings.catch_warnings(record=True):  # tensors without a place are refused below
                warnings.simplefilter("always")
                tuned = PeftModel.from_pretrained(model, str(root), adapter_name=ADAPTER, autocast_adapter_dtype=False)
        except Exception as error:  # PEFT tells a wrong model in many ways
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise SafeLoraError(f"{root} does not fit the model: {reason}") from error
        _check_loaded(tuned, root)
        yield tuned.eval()
        tuned.unload()


@contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Whatever is put into the model inside the context is out of it afterwards, also after an error."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    attributes = set(vars(model))
    with flags_kept(model):
        try:
            yield
        finally:
            for module, modules in children:
                module._modules.clear()
                module._modules.update(modules)
            for name in set(vars(model)) - attributes:
                delattr(model, name)


def _check_loaded(model: Any, root: Path) -> None:
    from peft import get_peft_model_state_dict

    if not (root / WEIGHTS_FILE).exists():
        return
    stored = set(read_header(root / WEIGHTS_FILE).tensors)
    wanted = set(get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False))
    missing, unknown = sorted(wanted - stored), sorted(n for n in stored - wanted if "lora_" in n)
    if missing or unknown:
        what = [f"{len(missing)} that the model needs are not in it ({missing[0]})"] if missing else []
        what += [f"{len(unknown)} have no place in the model ({unknown[0]})"] if unknown else []
        raise SafeLoraError(f"{root} does not fit the model: of its tensors, {' and '.join(what)}.")
