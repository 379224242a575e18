"""Samples of a store as text for a person: which tokens count is seen by colour, or by marks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from megatron_dsv3.data.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_OPEN, _CLOSE = "\u27e6", "\u27e7"
# A terminal would obey them; line breaks and tabs are text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def show(
    store: Store, tokenizer: PreTrainedTokenizerFast, num: int, *, color: bool
) -> Iterator[Text]:
    """The first samples, each with its id and counts; counted tokens green, or in brackets."""
    for i in range(min(num, len(store))):
        tokens, spans = store.tokens(i), store.spans(i)
        counted = int((spans[:, 1] - spans[:, 0]).sum())
        head = f"--- {store.id(i)}: {len(tokens)} tokens, {counted} counted ---\n"
        text = Text(head, style="bold")
        position = 0
        for start, end in spans.tolist():
            text.append(_decode(tokenizer, tokens[position:start].tolist()), style="not bold dim")
            learned = _decode(tokenizer, tokens[start:end].tolist())
            text.append(learned if color else f"{_OPEN}{learned}{_CLOSE}", style="not bold green")
            position = end
        text.append(_decode(tokenizer, tokens[position:].tolist()), style="not bold dim")
        yield text


def _decode(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
