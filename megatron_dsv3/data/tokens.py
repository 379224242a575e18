"""Rendered conversations to token ids and loss masks.

Special tokens go in by id; the text between two of them is tokenised in one piece, as the
tokenizer's own template does, and can never become a special token itself. A token that holds
anything not to be learned doesn't count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_dsv3.data.chat import Dropped, HistoryReasoning, Rendered, Span, render
from megatron_dsv3.data.messages import parse_conversation
from megatron_dsv3.data.rows import RowError, shown
from megatron_dsv3.data.templates import ChatTemplate, Special

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

_CHARACTERS_PER_CALL = 1 << 20
_LONGEST_PART = 1 << 18
# Of DeepSeek's tokenizers, and of those that transformers saves.
_DESCRIBED_IN_FULL = ("LlamaTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
_LONGEST_WORD = 1 << 20
"""Characters that cannot be parted; the tokenizer takes up to 200 bytes for each at once."""
# Where a long text may be cut, if the tokenizer agrees; how many are tried in a stretch of it; how
# far the tokenizer looks.
_WORD_END = re.compile(r"\w(?=\W)")
_MOST_PLACES = 100
_AROUND = 64


@dataclass(frozen=True, slots=True)
class Encoded:
    """tokens: [n], int32; loss: [n], bool, True where that token itself is a counted target."""

    tokens: Ids
    loss: Mask
    dropped: tuple[Dropped, ...] = ()
    spelled: frozenset[str] = frozenset()
    """Special tokens that the conversation's own words spell; they are text there."""
    num_reasoning: int = 0
    """Tokens of reasoning, in all turns together."""
    num_answer: int = 0
    """Tokens of what the turns that reason say after it."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What of a tokenizer makes tokens. Goes to workers, which needn't import transformers."""

    name: str
    backend: Tokenizer
    added: Mapping[str, int]
    """Special and other added tokens, text to id."""
    bos: str
    eos: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
        """That of a loaded tokenizer."""
        return cls(
            name=str(tokenizer.name_or_path),
            backend=tokenizer.backend_tokenizer,
            added=tokenizer.get_added_vocab(),
            bos=tokenizer.bos_token,
            eos=tokenizer.eos_token,
        )

    def special_id(self, special: Special) -> int:
        """The id of a token that a template writes."""
        named = {Special.BOS: self.bos, Special.EOS: self.eos}
        text = named.get(special, special.value)
        if text not in self.added:
            raise ValueError(
                f"{self.name}: no special token {text} in the tokenizer, but the template writes "
                "it; choose the template that belongs to this model"
            )
        return self.added[text]


class _Piece(NamedTuple):
    ids: Ids
    loss: bool | list[bool]
    """Of all tokens, or of each."""


class Text(NamedTuple):
    """A text between two special tokens."""

    ids: Ids
    spelled: tuple[str, ...]
    """Special tokens that its words spell."""


def encode(
    messages: object,
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    *,
    history_reasoning: HistoryReasoning = "strip",
) -> Encoded:
    """One row's `messages` as tokens and mask; for many, `render` each and `tokenize` them all."""
    rendered = render(parse_conversation(messages), template, history_reasoning=history_reasoning)
    return tokenize([rendered], Vocabulary.of(tokenizer))[0]


def tokenize(
    rendered: Sequence[Rendered], vocabulary: Vocabulary, known: dict[str, Text] | None = None
) -> list[Encoded]:
    """Token ids and masks of many conversations; the tokenizer works with all its threads.

    Args:
        rendered: The conversations.
        vocabulary: Of the tokenizer.
        known: Texts tokenised before, to which new ones are added. What comes again (a system
            prompt; under `expand` all turns before the one that counts) is tokenised once.
    """
    known = {} if known is None else known
    texts = dict.fromkeys(
        s.piece for one in rendered for s in one.spans if isinstance(s.piece, str)
    )
    known.update(_encode_texts([text for text in texts if text not in known], vocabulary))
    specials = {s.piece for one in rendered for s in one.spans if not isinstance(s.piece, str)}
    ids = {special: _special_ids(special, vocabulary) for special in specials}
    return [_join(one, known, ids, vocabulary) for one in rendered]


def _special_ids(special: Special | int, vocabulary: Vocabulary) -> Ids:
    number = vocabulary.special_id(special) if isinstance(special, Special) else special
    return np.array([number], np.int32)


def _join(
    rendered: Rendered,
    texts: Mapping[str, Text],
    specials: Mapping[Special | int, Ids],
    vocabulary: Vocabulary,
) -> Encoded:
    spelled: set[str] = set()
    pieces = []
    for span in rendered.spans:
        if isinstance(span.piece, str):
            text = texts[span.piece]
            spelled.update(text.spelled)
            pieces.append(_Piece(text.ids, _loss(span, text, vocabulary)))
        else:
            pieces.append(_Piece(specials[span.piece], span.counted))
    reasoning, answer = _part_lengths(rendered.spans, pieces)
    return Encoded(
        tokens=np.concatenate([piece.ids for piece in pieces]),
        loss=_mask(pieces),
        dropped=rendered.dropped,
        spelled=frozenset(spelled),
        num_reasoning=reasoning,
        num_answer=answer,
    )


def _mask(pieces: Sequence[_Piece]) -> Mask:
    if all(isinstance(piece.loss, bool) for piece in pieces):
        return np.repeat([piece.loss for piece in pieces], [len(piece.ids) for piece in pieces])
    parts = [
        np.full(len(piece.ids), piece.loss) if isinstance(piece.loss, bool) else piece.loss
        for piece in pieces
    ]
    return np.concatenate(parts).astype(np.bool_)


def _part_lengths(spans: Sequence[Span], pieces: Sequence[_Piece]) -> tuple[int, int]:
    """Tokens between <think> and </think>, and from there to the turn's end."""
    num_by_part = {"reasoning": 0, "answer": 0, "": 0}
    part = ""
    for span, piece in zip(spans, pieces, strict=True):
        if span.piece is Special.THINK:
            part = "reasoning"
        elif span.piece is Special.THINK_END:
            part = "answer" if part == "reasoning" else ""
        elif isinstance(span.piece, Special):
            part = ""
        else:
            num_by_part[part] += len(piece.ids)
    return num_by_part["reasoning"], num_by_part["answer"]


def _encode_texts(texts: Sequence[str], vocabulary: Vocabulary) -> Iterator[tuple[str, Text]]:
    backend = vocabulary.backend
    # A tokenizer.json may carry both, and other users of this object may have switched them on.
    backend.no_truncation()
    backend.no_padding()
    for chunk in _chunks([text for text in texts if len(text) <= _LONGEST_PART]):
        yield from zip(chunk, _encode_chunk(chunk, vocabulary), strict=True)
    for text in (text for text in texts if len(text) > _LONGEST_PART):
        chunks = _chunks(list(_parts(text, backend)))
        parts = [part for chunk in chunks for part in _encode_chunk(chunk, vocabulary)]
        spelled = dict.fromkeys(name for part in parts for name in part.spelled)
        yield text, Text(np.concatenate([part.ids for part in parts]), tuple(spelled))


def _encode_chunk(texts: list[str], vocabulary: Vocabulary) -> Iterator[Text]:
    above = max(vocabulary.added.values(), default=-1) + 1
    is_added = np.zeros(above + 1, np.bool_)
    is_added[list(vocabulary.added.values())] = True
    encodings = vocabulary.backend.encode_batch_fast(texts, add_special_tokens=False)
    for text, encoding in zip(texts, encodings, strict=True):
        ids, spelled = np.array(encoding.ids, np.int32), tuple[str, ...]()
        if (added := is_added[np.minimum(ids, above)]).any():
            found = frozenset(ids[added].tolist())
            spelled = tuple(name for name, n in vocabulary.added.items() if n in found)
            plain = [number for number, _ in _plain_tokens(text, vocabulary.backend)]
            ids = np.array(plain, np.int32)
        yield Text(ids, spelled)


def check_words(rendered: Rendered, vocabulary: Vocabulary) -> None:
    """Whether all text can be tokenised in pieces that fit memory.

    Raises:
        RowError: It cannot; data in text form (images, say) are like that.
    """
    for text in (s.piece for s in rendered.spans if isinstance(s.piece, str)):
        if len(text) <= _LONGEST_WORD:
            continue
        longest = max(_parts(text, vocabulary.backend), key=len)
        if len(longest) > _LONGEST_WORD:
            raise RowError(
                "no text",
                f"{len(longest)} characters without a break ({shown(longest[:_AROUND])}); expected "
                f"text, of which at most {_LONGEST_WORD} characters are one word; is it an image?",
            )


def _parts(text: str, backend: Any) -> Iterator[str]:
    """A long text, cut where its tokens are cut anyway: the tokenizer takes 100 bytes for each."""
    start = 0
    while len(text) - start > _LONGEST_PART:
        place = _place_to_cut(text, start + _LONGEST_PART // 2, backend)
        if place is None:
            break
        yield text[start:place]
        start = place
    yield text[start:]


def _place_to_cut(text: str, start: int, backend: Any) -> int | None:
    for begin in range(start, len(text), _LONGEST_PART // 2):
        ends = _WORD_END.finditer(text, begin, begin + _LONGEST_PART // 2)
        for match in islice(ends, _MOST_PLACES):
            if _is_between_words(text, match.end(), backend):
                return match.end()
    return None


def _is_between_words(text: str, place: int, backend: Any) -> bool:
    """Whether the tokenizer parts the text here, whatever else is in it.

    What surrounds the place decides: tokenizers' patterns look no further from the end of a word.
    """
    around = text[max(0, place - _AROUND) : place + _AROUND]
    if backend.normalizer is not None and backend.normalizer.normalize_str(around) != around:
        return False
    words = backend.pre_tokenizer.pre_tokenize_str(around) if backend.pre_tokenizer else ()
    return any(begin == min(_AROUND, place) for _, (begin, _) in words)


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts by the call: enough for many threads, few enough that their encodings fit memory."""
    chunk: list[str] = []
    num_characters = 0
    for text in texts:
        chunk.append(text)
        num_characters += len(text)
        if num_characters >= _CHARACTERS_PER_CALL:
            yield chunk
            chunk, num_characters = [], 0
    yield chunk


def _loss(span: Span, text: Text, vocabulary: Vocabulary) -> bool | list[bool]:
    if not span.stretches:
        return span.counted
    # Slow, and rare: the characters of each token are asked for.
    words, backend = str(span.piece), vocabulary.backend
    if text.spelled:
        places = [characters for _, characters in _plain_tokens(words, backend)]
    else:
        encoding = backend.encode(words, add_special_tokens=False)
        places = list(_without_gaps(encoding.offsets, len(words)))
    return [
        any(begin <= start and end <= stop for begin, stop in span.stretches)
        for start, end in places
    ]


def _without_gaps(offsets: Sequence[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """Tokenizers may leave spaces out of the characters that they say a token lies in."""
    stops = [0, *(stop for _, stop in offsets)]
    starts = [*(start for start, _ in offsets[1:]), end]
    for (start, stop), before, after in zip(offsets, stops, starts, strict=False):
        yield min(start, before), max(stop, after)


def _plain_tokens(text: str, backend: Any) -> Iterator[tuple[int, tuple[int, int]]]:
    """Ids and the characters they lie in, as the tokenizer does it, but blind to special tokens.

    The model gives no characters for the tokens of a word, only bytes: they all get the word's.
    """
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    for word, characters in backend.pre_tokenizer.pre_tokenize_str(text):
        for token in backend.model.tokenize(word):
            yield token.id, characters


def load_tokenizer(hf_dir: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory.

    Args:
        hf_dir: Where its files are.
        trust_remote_code: Whether Python code among them may be run.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (hf_dir / name).is_file():
            raise FileNotFoundError(
                f"{hf_dir / name}: not found; expected the tokenizer files of a Hugging Face model"
            )
    try:
        tokenizer = _tokenizer_class(hf_dir).from_pretrained(
            hf_dir, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # whatever transformers and tokenizers raise on a broken file
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{hf_dir}: the tokenizer does not load: {reason}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{hf_dir}: the tokenizer is written in Python ({type(tokenizer).__name__}); expected "
            "one that tokenizer.json describes in full"
        )
    for name in (Special.BOS.value, Special.EOS.value):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"{hf_dir / 'tokenizer_config.json'}: {name} is missing")
    return tokenizer


def _tokenizer_class(hf_dir: Path) -> Any:
    """`AutoTokenizer`, or the class that it would choose: itself, it imports torch, 500 MB."""
    config = json.loads((hf_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    if "auto_map" not in config and name in _DESCRIBED_IN_FULL and _is_byte_level(hf_dir):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _is_byte_level(hf_dir: Path) -> bool:
    """What is called Llama's otherwise is one that `AutoTokenizer` builds itself."""
    return b'"ByteLevel"' in (hf_dir / "tokenizer.json").read_bytes()
