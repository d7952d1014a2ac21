"""The demo's modules are scripts in a folder of their own; the tests import them from there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "vault"))

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A build folder whose base checkpoint is a random two-layer Llama with a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    target = tmp_path_factory.mktemp("build") / "base"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>").save_pretrained(
        target
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(special) + len(alphabet), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def tiny_data(tiny_base, tmp_path_factory) -> Path:
    """Artefacts of the recipe itself on the tiny model, with two steps of training each."""
    import make_vault
    import model

    data = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        for recipe in (make_vault.ALIGNMENT, make_vault.FINETUNING):
            patch.setitem(recipe, "steps", 2)
        make_vault.align(tiny_base, data / "alignment", seed=0)
        aligned = model.aligned_checkpoint(tiny_base, data / "alignment", tiny_base.parent)
        make_vault.finetune(aligned, data / "adapter", seed=0)
        make_vault.finetune(aligned, data / "again", seed=0)
        make_vault.finetune(aligned, data / "other", seed=1)
    return data
