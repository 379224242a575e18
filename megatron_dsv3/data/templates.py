"""DeepSeek's chat formats as data: one row a template, read by `chat.render`.

`deepseek_v3` and `deepseek_r1` write what the template in DeepSeek's own tokenizer writes, R1 with
its <think> block; `deepseek_v3_0324` and `deepseek_v3_1` are the templates of those releases. Of
V3.1's thinking turns, <Assistant><think>{reasoning}</think>{answer}, only its model card speaks: it
gives both prompts and the tags, and puts nothing between tag and text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum


class Special(Enum):
    """DeepSeek's special tokens; BOS and EOS are whatever the tokenizer says they are."""

    BOS = "bos_token"
    EOS = "eos_token"
    USER = "<｜User｜>"
    ASSISTANT = "<｜Assistant｜>"
    THINK = "<think>"
    THINK_END = "</think>"
    CALLS = "<｜tool▁calls▁begin｜>"
    CALLS_END = "<｜tool▁calls▁end｜>"
    CALL = "<｜tool▁call▁begin｜>"
    CALL_END = "<｜tool▁call▁end｜>"
    SEP = "<｜tool▁sep｜>"
    OUTPUTS = "<｜tool▁outputs▁begin｜>"
    OUTPUTS_END = "<｜tool▁outputs▁end｜>"
    OUTPUT = "<｜tool▁output▁begin｜>"
    OUTPUT_END = "<｜tool▁output▁end｜>"


Pieces = tuple[Special | str, ...]
"""What a template writes, in order; {name} in a text stands for the turn's own text."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How a template writes a turn that thinks; `open` and `close` count, `prompt` is given."""

    prompt: Pieces
    open: Pieces
    close: Pieces
    with_calls: bool
    """Whether a turn that calls tools may think."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The pieces of one chat format."""

    name: str
    prompt: Pieces
    """What serving puts before an assistant's turn: never counted."""
    reasoning: Reasoning | None
    calls: Pieces
    call: Pieces
    call_separator: Pieces
    calls_end: Pieces
    outputs: Pieces
    output: Pieces
    output_separator: Pieces
    outputs_end: Pieces
    prompt_follows_user: bool
    """Whether the prompt stands behind every user's turn, one that nobody answers too."""
    every_round: bool
    """Whether each round of tool calls is written like the first. The first releases' template
    opens calls and outputs once a conversation: later rounds have no opening token, no prompt and
    none of the turn's text. Training must see what serving shows, so this is kept, and counted."""


# The template that DeepSeek's tokenizer carries (V3 and R1).
_V3 = ChatTemplate(
    name="deepseek_v3",
    prompt=(Special.ASSISTANT,),
    reasoning=None,
    calls=(Special.CALLS,),
    call=(
        *(Special.CALL, "{type}", Special.SEP),
        *("{name}\n```json\n{arguments}\n```", Special.CALL_END),
    ),
    call_separator=("\n",),
    calls_end=(Special.CALLS_END,),
    outputs=(Special.OUTPUTS,),
    output=(Special.OUTPUT, "{content}", Special.OUTPUT_END),
    output_separator=(),
    outputs_end=(Special.OUTPUTS_END,),
    prompt_follows_user=False,
    every_round=False,
)

_R1_REASONING = Reasoning(
    prompt=(Special.ASSISTANT,),
    open=(Special.THINK, "\n"),
    close=("\n", Special.THINK_END, "\n\n"),
    with_calls=True,
)

# Serving chooses the mode by the token after <Assistant>, so both tags are given; a turn that
# answers tool outputs follows them directly. The published format has no thinking turn with calls.
_V3_1_REASONING = Reasoning(
    prompt=(Special.ASSISTANT, Special.THINK),
    open=(),
    close=(Special.THINK_END,),
    with_calls=False,
)

TEMPLATES: Mapping[str, ChatTemplate] = {
    template.name: template
    for template in (
        _V3,
        replace(_V3, name="deepseek_r1", reasoning=_R1_REASONING),
        replace(
            _V3,
            name="deepseek_v3_0324",
            output_separator=("\n",),
            prompt_follows_user=True,
            every_round=True,
        ),
        ChatTemplate(
            name="deepseek_v3_1",
            prompt=(Special.ASSISTANT, Special.THINK_END),
            reasoning=_V3_1_REASONING,
            calls=(Special.CALLS,),
            call=(Special.CALL, "{name}", Special.SEP, "{arguments}", Special.CALL_END),
            call_separator=(),
            calls_end=(Special.CALLS_END,),
            outputs=(),
            output=(Special.OUTPUT, "{content}", Special.OUTPUT_END),
            output_separator=(),
            outputs_end=(),
            prompt_follows_user=False,
            every_round=True,
        ),
    )
}


def find_template(name: str) -> ChatTemplate:
    """The built-in template of that name."""
    if name not in TEMPLATES:
        raise ValueError(
            f"template: expected one of {', '.join(TEMPLATES)}, or tokenizer for the tokenizer's "
            f"own, got {name!r}"
        )
    return TEMPLATES[name]
