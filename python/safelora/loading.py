"""Models, tokenizers and adapters for evaluation: loaded, checked to fit, and taken off again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .adapter import CONFIG_FILE, WEIGHTS_FILE
from .checkpoint import locate, read_header, read_json
from .errors import SafeLoraError

ADAPTER = "evaluated"
ADAPTER_FILES = [CONFIG_FILE, "adapter_model.*"]


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
    """A causal language model in evaluation mode, and its tokenizer.

    dtype: "auto" (as stored), "float32", "bfloat16" or "float16". device: by default cuda where there is one; "auto"
    spreads the model over what there is (accelerate).
    chat_template: a Jinja file to use instead of the tokenizer's own. quiet: keep transformers from printing.

    Raises SafeLoraError when it cannot be loaded.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    options: dict[str, Any] = {"local_files_only": local_files_only, "revision": revision}
    if quiet:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        spread = {"device_map": "auto"} if device == "auto" else {}
        wanted = {"dtype" if _renamed(transformers.__version__) else "torch_dtype": dtype}
        model = AutoModelForCausalLM.from_pretrained(source, **wanted, **options, **spread)
    except (OSError, ValueError, KeyError) as error:
        raise SafeLoraError(f"{os.fspath(source)} cannot be loaded as a causal language model: {error}") from error
    if chat_template is not None:
        path = Path(chat_template)
        if not path.is_file():
            raise SafeLoraError(f"the chat template {path} is not a file.")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if not spread:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), tokenizer


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
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = set(vars(model))
    try:
        yield
    finally:
        for module, modules in children:
            module._modules.clear()
            module._modules.update(modules)
        for parameter, wanted in trainable:
            parameter.requires_grad_(wanted)
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
