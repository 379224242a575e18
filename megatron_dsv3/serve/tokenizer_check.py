"""Do tokenizer, chat template and config.json of a directory go together, as vLLM uses them?

A chat template is a program, so it is judged by what it writes for a few conversations.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dsv3.data.templates import TEMPLATES, Special
from megatron_dsv3.data.tokens import encode, load_tokenizer
from megatron_dsv3.serve.finding import Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_QUESTION, _THOUGHT, _ANSWER, _NEXT = "Six times seven?", "Seven six times.", "It is 42.", "Sure?"
_WITH_THOUGHT = f"{Special.THINK.value}\n{_THOUGHT}\n{Special.THINK_END.value}\n\n{_ANSWER}"
_PARSED: Mapping[Special, str] = {
    Special.THINK: "reasoning",
    Special.THINK_END: "reasoning",
    Special.CALLS: "tool",
    Special.CALLS_END: "tool",
}
"""Tokens without which a parser of vLLM refuses every request."""
_TEMPLATE = "chat template"
_TAKE_OVER = "copy the tokenizer files of the model that was trained"


def check_tokenizer(directory: Path, content: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings about the tokenizer.

    Args:
        directory: Holds the tokenizer's files.
        content: Of its config.json.
    """
    try:
        tokenizer = load_tokenizer(directory)
    except (ValueError, FileNotFoundError) as error:
        yield Finding("tokenizer", str(error), _TAKE_OVER)
        return
    yield from _check_ids(directory, content, tokenizer)
    if not tokenizer.chat_template:
        what = "is missing, so /v1/chat/completions answers with an error"
        yield Finding(_TEMPLATE, what, _TAKE_OVER)
        return
    try:
        findings = [*_check_prompt(tokenizer), *_check_history(tokenizer)]
        findings += _check_format(tokenizer)
    except Exception as error:  # whatever a template that somebody wrote can raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        yield Finding(_TEMPLATE, f"fails on a plain conversation ({reason})", _TAKE_OVER)
        return
    yield from findings


def _check_ids(
    directory: Path, content: Mapping[str, Any], tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[Finding]:
    size = content.get("vocab_size")
    if isinstance(size, int) and len(tokenizer) > size:
        what = f"has {len(tokenizer)} tokens, more than config.json's vocab_size {size}"
        yield Finding("tokenizer", what, _TAKE_OVER)
    for tag, parser in _PARSED.items():
        if tokenizer.convert_tokens_to_ids(tag.value) in (None, tokenizer.unk_token_id):
            what = f"{tag.value} is no token of its own: the {parser} parser would not start"
            yield Finding("tokenizer", what, f"serve with --{parser}-parser none", blocks=False)
    yield from _check_ends("config.json", content, tokenizer)
    path = directory / "generation_config.json"
    if path.is_file():
        try:
            generation = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            yield Finding(path.name, f"not valid JSON: {error}", _TAKE_OVER)
            return
        if not isinstance(generation, dict):
            yield Finding(path.name, f"expected a JSON object, got {generation!r}", _TAKE_OVER)
            return
        yield from _check_ends(path.name, generation, tokenizer)


def _check_ends(
    file: str, content: Mapping[str, Any], tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[Finding]:
    """vLLM ends an answer at the ids of these files, beside the tokenizer's."""
    for key in ("bos_token_id", "eos_token_id"):
        ids, wanted = content.get(key), getattr(tokenizer, key)
        if ids is not None and wanted not in (ids if isinstance(ids, list) else [ids]):
            what = f"{key} is {ids}, the tokenizer's is {wanted}"
            yield Finding(file, what, f"set it to {wanted}, or answers end at the wrong token")


def _check_prompt(tokenizer: "PreTrainedTokenizerFast") -> Iterator[Finding]:
    prompt = _text(tokenizer, [_user(_QUESTION)], add_generation_prompt=True)
    if prompt.count(tokenizer.bos_token) != 1 or not prompt.startswith(tokenizer.bos_token):
        what = f"a prompt should begin with one {tokenizer.bos_token}, it is {prompt!r}"
        yield Finding(_TEMPLATE, what, _TAKE_OVER)
    if _QUESTION not in prompt:
        yield Finding(_TEMPLATE, f"the question is not in the prompt {prompt!r}", _TAKE_OVER)
    opening = prompt.rpartition(_QUESTION)[2].strip()
    allowed = [Special.ASSISTANT.value + tag for tag in ("", "<think>", "</think>")]
    if opening not in allowed:
        what = f"a prompt should end in {Special.ASSISTANT.value}, it ends in {opening!r}"
        yield Finding(_TEMPLATE, what, "the model was trained to go on from there; " + _TAKE_OVER)


def _check_history(tokenizer: "PreTrainedTokenizerFast") -> Iterator[Finding]:
    """An earlier turn's reasoning is stripped, its answer and end stay."""
    history = [_user(_QUESTION), _assistant(_WITH_THOUGHT), _user(_NEXT)]
    text = _text(tokenizer, history, add_generation_prompt=True)
    if f"{_ANSWER}{tokenizer.eos_token}" not in text:
        what = f"an earlier answer and {tokenizer.eos_token} are not in {text!r}"
        yield Finding(_TEMPLATE, what, _TAKE_OVER)
    if _THOUGHT in text:
        what = "keeps the <think> of earlier turns, which training strips (history_reasoning)"
        way_out = "keep it only if the model was trained with history_reasoning: keep"
        yield Finding(_TEMPLATE, what, way_out, blocks=False)


def _check_format(tokenizer: "PreTrainedTokenizerFast") -> Iterator[Finding]:
    """Whether a plain conversation has the ids of one of the formats that one can train in."""
    messages = [_user(_QUESTION), _assistant(_ANSWER), _user(_NEXT), _assistant(_ANSWER)]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    formats = [encode(messages, tokenizer, t).tokens.tolist() for t in TEMPLATES.values()]
    if ids not in formats:
        what = f"writes none of the formats {', '.join(TEMPLATES)}"
        way_out = "serve the one that the model was trained in (data.template)"
        yield Finding(_TEMPLATE, what, way_out, blocks=False)


def _text(
    tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, str]], **options: Any
) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
