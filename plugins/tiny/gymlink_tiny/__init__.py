"""A tokenizer and a model of about 200 000 parameters, made on the spot: nothing is downloaded.

    python -m gymlink_tiny FOLDER

For the demo, the examples and tests. The chat format is plain ChatML with byte-level BPE, so every text has tokens and
every token has bytes; the model is a Qwen2 with random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

CORPUS = ("system user assistant", "0 1 2 3 4 5 6 7 8 9", "the quick brown fox jumps over the lazy dog")


def make_tokenizer(corpus: Iterable[str] = CORPUS, *, vocab_size: int = 320) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with a ChatML template, its merges learnt from `corpus`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    make: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerBase = make(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, padding_side="left")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(
    tokenizer: PreTrainedTokenizerBase, *, max_context: int = 1024, seed: int = 0, heads: int = 4
) -> Qwen2ForCausalLM:
    """A Qwen2 of two layers with random weights for this tokenizer; torch's own random state is left alone.

    A head has 64 / `heads` dimensions: vLLM takes none of fewer than 32.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def save_tiny(folder: Path, corpus: Iterable[str] = CORPUS, *, seed: int = 0, heads: int = 4) -> Path:
    """Write a tiny model with its tokenizer to `folder`, as `from_pretrained` reads them. See `make_model`."""
    tokenizer = make_tokenizer(corpus)
    make_model(tokenizer, seed=seed, heads=heads).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: write a tiny model to the folder that is named."""
    parser = argparse.ArgumentParser(prog="python -m gymlink_tiny", description="Write a tiny random chat model.")
    parser.add_argument("folder", type=Path, help="where the model and its tokenizer go; made when missing")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--heads", type=int, default=4, help="of attention: vLLM wants 2 at most")
    given = parser.parse_args(arguments)
    save_tiny(given.folder, seed=given.seed, heads=given.heads)
    print(f"A tiny model is in {given.folder}")  # noqa: T201 - this is a program
