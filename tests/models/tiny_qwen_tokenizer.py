"""Qwen's tokenizer, built offline: byte-level BPE, whose merges make each word of a text one token."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

from scripts.tiny.models import learn_merges

MARKS = ["<|im_start|>", "<|im_end|>"]  # around each turn of a chat
CHAT = (  # what Qwen's own template makes of one turn
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(text: str = "") -> Qwen2Tokenizer:
    """Without a text, every byte is a token of its own."""
    pieces = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    merges: list[Any] = learn_merges(Counter(piece for piece, _ in pieces), end="")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges), "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, chat_template=CHAT
    )
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    return tokenizer
