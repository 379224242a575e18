"""Hashes by which a trainer knows that a store was made with its own tokenizer and template.

They cover what decides tokens and nothing else: the same tokenizer saved by another version of
transformers, with other spaces or another order of keys, has the same fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from enum import Enum
from typing import TYPE_CHECKING, Any

from megatron_dsv3.data.own_template import OwnTemplate
from megatron_dsv3.data.templates import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Set anew by every caller that truncates or pads; `chat.tokenize` switches them off.
_NOT_TOKENS = ("truncation", "padding")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of vocabulary, merges, added tokens and pre-tokenizer, and of which are BOS and EOS.

    Post-processing counts too, though the templates of this project write BOS themselves.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in _NOT_TOKENS:
        content.pop(name, None)
    return _hash([content, tokenizer.bos_token, tokenizer.eos_token])


def template_fingerprint(template: ChatTemplate | OwnTemplate) -> str:
    """SHA-256 of a built-in template's pieces, or of the text of a tokenizer's own."""
    return _hash(template.text if isinstance(template, OwnTemplate) else asdict(template))


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=_name_of)
    return hashlib.sha256(text.encode()).hexdigest()


def _name_of(value: object) -> str:
    assert isinstance(value, Enum)
    return f"{type(value).__name__}.{value.name}"
