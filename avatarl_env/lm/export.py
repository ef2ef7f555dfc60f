"""Export of a `GPT` to transformers: same logits, loadable without this package.

The Arcee architecture (https://hf.co/arcee-ai/AFM-4.5B) computes the same function as `GPT`:
pre-norm RMSNorm, rotary positions that pair the two halves of a head, no biases, and an ungated
feed-forward with any activation. Only the fused projection has to be split.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from avatarl_env.files import is_utf8
from avatarl_env.lm.gpt import GPT, NORM_EPS, ROTARY_BASE, Block
from avatarl_env.lm.tokenizer import UNKNOWN, CharTokenizer

if TYPE_CHECKING:
    from transformers import ArceeForCausalLM, PreTrainedTokenizerFast

CARD = "README.md"
STARTS = ("\n", " ", UNKNOWN)
"""Start of text for an empty prompt: the first of these in the vocabulary."""


def export_model(
    folder: str | os.PathLike[str], model: GPT, tokenizer: CharTokenizer, corpus: str | None = None
) -> None:
    """Write a model and its tokenizer to a folder in transformers' format.

        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)

    Args:
        folder: new or empty.
        model: its weights are written in their current precision.
        tokenizer: the model's own.
        corpus: name of the training text, for the model card.

    Raises:
        ValueError: if the folder is not empty or cannot be written to, its name is not UTF-8, the
            tokenizer is not the model's, or a character cannot be written as UTF-8.
    """
    path = Path(folder)
    if not is_utf8(str(path)):
        raise ValueError(
            f"out must be a folder whose name is UTF-8, for transformers, got {str(path)!r}"
        )
    try:
        held = sorted(os.listdir(path)) if path.exists() else []
        if held:
            raise ValueError(
                f"out must be an empty or new folder, got {str(path)!r} which holds {held[0]}"
            )
        exported, characters = to_transformers(model, tokenizer)
        path.mkdir(parents=True, exist_ok=True)
        exported.save_pretrained(path)
        characters.save_pretrained(path)
        (path / CARD).write_bytes(_card(model, corpus).encode("utf-8", "replace"))
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be written to, got {str(path)!r}: {error.strerror}"
        ) from error


def to_transformers(
    model: GPT, tokenizer: CharTokenizer
) -> tuple[ArceeForCausalLM, PreTrainedTokenizerFast]:
    r"""Return a transformers model of the same logits, on the CPU, and its tokenizer.

    The arithmetic is equal bit for bit except for the rotary angles, which transformers rounds to
    single precision before it takes their cosine: logits differ in the fifth decimal.

    Rows of a batch are padded on the left with the unknown symbol, which is also the tokenizer's
    end of text (eos), for libraries that need one. Other tokens cannot be used: transformers
    removes special tokens from decoded text. To stop at the end of a line, set
    `tokenizer.eos_token = "\n"` after loading.

    By default, `generate` samples half a context from the whole distribution at temperature 1. An
    empty prompt stands for the first of a line break, a blank and the unknown symbol that is in the
    vocabulary. (Positions beyond the context raise no error, but were never trained.)

    Args:
        model: copied, in its current precision.
        tokenizer: the model's own.

    Raises:
        ValueError: if they do not have the same number of tokens, or a character cannot be written
            as UTF-8.
    """
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"tokenizer must have the model's {model.vocab_size} tokens, got {tokenizer.vocab_size}"
        )
    characters = _fast_tokenizer(tokenizer, model.context)
    known = (start for start in STARTS if start in tokenizer.characters)
    start_id = tokenizer.characters.index(next(known))
    return _arcee(model, end_id=tokenizer.unknown_id, start_id=start_id), characters


def _arcee(model: GPT, end_id: int, start_id: int) -> ArceeForCausalLM:
    from transformers import ArceeConfig, ArceeForCausalLM, GenerationConfig

    sizes = model.config
    config = ArceeConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=sizes.context,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=True,
        bos_token_id=start_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    # The constructor draws weights, which are then replaced, from the global generator.
    with torch.random.fork_rng(devices=[]):
        exported = ArceeForCausalLM(config)
    # Called on the base class, since the overrides in transformers are not typed.
    nn.Module.to(exported, model.embed.weight.dtype)
    exported.load_state_dict(_weights(model))
    exported.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        top_k=0,
        max_new_tokens=max(1, sizes.context // 2),
        bos_token_id=start_id,
        pad_token_id=end_id,
    )
    nn.Module.eval(exported)
    return exported


def _weights(model: GPT) -> dict[str, Tensor]:
    """Return the weights by their names in Arcee, the fused projection split."""
    weights = {
        "model.embed_tokens.weight": model.embed.weight,
        "lm_head.weight": model.lm_head.weight,
        "model.norm.weight": model.norm.weight,
    }
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        query, key, value = block.attn.c_attn.weight.chunk(3)
        parts = {
            "input_layernorm": block.norm_1.weight,
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": block.attn.c_proj.weight,
            "post_attention_layernorm": block.norm_2.weight,
            "mlp.up_proj": block.mlp.c_fc.weight,
            "mlp.down_proj": block.mlp.c_proj.weight,
        }
        weights |= {f"model.layers.{layer}.{name}.weight": part for name, part in parts.items()}
    return weights


def _fast_tokenizer(tokenizer: CharTokenizer, context: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the same ids: BPE without merges has one token per character."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    ids = {character: number for number, character in enumerate(tokenizer.characters)}
    for character in ids:
        if not is_utf8(character):
            raise ValueError(
                f"tokenizer must have characters that UTF-8 can encode, got {character!r}"
            )
    fast = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=UNKNOWN))
    fast.decoder = decoders.Fuse()  # without it, characters would be separated by blanks
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=fast,
        unk_token=UNKNOWN,
        pad_token=UNKNOWN,
        eos_token=UNKNOWN,
        padding_side="left",
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _card(model: GPT, corpus: str | None) -> str:
    """Return the text of the model card."""
    trained = f" It was trained on {corpus}." if corpus else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
A language model of {model.n_parameters:,} parameters that writes one character at a time and sees
the last {model.context} of them.{trained} Made with avatarl-env; transformers alone can load it:

```python
from transformers import pipeline

write = pipeline("text-generation", model="this/folder")
print(write("\\n", max_new_tokens={model.context // 2})[0]["generated_text"])
```

End of text (eos) and padding are U+FFFD, which no text contains. To stop at the end of a line, set
`tokenizer.eos_token = "\\n"` after loading.
"""
