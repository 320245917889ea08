"""Text to ids, exactly as a server tokenises it, without tokenising the same text twice.

Why cutting is exact: a fast tokenizer looks for its added tokens (normalized=False) in the raw text first and works on
the text between them separately. So ids(a + T + b) = ids(a) + ids(T + b) for such a token T, if T takes no white space
from its left (lstrip), needs no word boundary (single_word) and no other added token can overlap it. Every piece but
the first starts with such a token, so a tokenizer that treats the start of a text specially (Metaspace, "first") sees
a start only where there is one. Tokenizers without such tokens get complete texts.
"""

from __future__ import annotations

import re
import weakref
from bisect import bisect_left, bisect_right
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from formats.as_text import TEXT_MARK, ids_as_text
from formats.base import Format, FormatError

CACHED_PIECES = 8_000
KEPT_PIECES = 3  # of a text's end, cut again when the text continues
COMPARED_TEXTS = 32  # the first texts of every tokenizer are also tokenised without cutting, and compared


class Piece(NamedTuple):
    """The tokens of one piece of text: ids, positions of first characters, and control tokens among them that the
    text does not spell (a normaliser made them)."""

    ids: list[int]
    starts: list[int]
    unspelled: list[str]


class Tokenized:
    """Ids of a text, and where its tokens begin."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.unspelled: list[str] = []
        self.offsets: list[int] = []  # first character of each piece
        self._firsts: list[int] = []  # number of its first token
        self._pieces: list[Piece] = []

    def add(self, offset: int, piece: Piece) -> None:
        """Append a piece that begins at character `offset`."""
        self.offsets.append(offset)
        self._firsts.append(len(self.ids))
        self._pieces.append(piece)
        self.ids += piece.ids
        self.unspelled += piece.unspelled

    def first_pieces(self, number: int) -> tuple[Tokenized, int]:
        """(the tokens of the first pieces, where the next piece begins); there must be one."""
        first = Tokenized()
        first.offsets, first._firsts = self.offsets[:number], self._firsts[:number]
        first._pieces = self._pieces[:number]
        first.ids = self.ids[: self._firsts[number]]
        if self.unspelled:
            first.unspelled = [name for piece in first._pieces for name in piece.unspelled]
        return first, self.offsets[number]

    def start(self, number: int) -> int:
        """The position of the first character of a token."""
        at = bisect_right(self._firsts, number) - 1
        return self.offsets[at] + self._pieces[at].starts[number - self._firsts[at]]

    def before(self, character: int) -> int:
        """How many tokens begin before the character at this position."""
        at = bisect_right(self.offsets, character) - 1
        if at < 0:
            return 0
        return self._firsts[at] + bisect_left(self._pieces[at].starts, character - self.offsets[at])


class Tokens:
    """Tokenises texts with one tokenizer; the pieces that a text is cut into are cached."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = added_tokens(tokenizer)
        self.end_ids: dict[tuple, set[int]] = {}  # results of `check_tokenizer`, by format
        self.escapers: dict[tuple, Any] = {}  # of formats.escape, by format
        self.skeletons: dict[tuple, Any] = {}  # of formats.roles
        self.probed: dict[tuple, tuple[int | None, str] | None] = {}  # results of formats.losses
        self.anchors = _anchors(tokenizer) if getattr(tokenizer, "is_fast", False) else []
        self._cut = _any_of(self.anchors) if self.anchors else None
        self._names = {number: token for token, number in self.added.items()}
        self._control = _any_of(sorted(self.added, key=len, reverse=True))
        self._piece = lru_cache(CACHED_PIECES)(self._tokenize)
        self._comparisons_left = COMPARED_TEXTS
        self._last = ("", Tokenized())  # the last text, which the next one may continue

    @cached_property
    def as_text(self) -> dict[str, list[int]]:
        """Control strings with a mark, and their ids as ordinary text."""
        return ids_as_text(self.tokenizer, self.added, self._names.keys())

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        return _any_of([*sorted(self.as_text, key=len, reverse=True), TEXT_MARK])

    def tokenized(self, text: str) -> Tokenized:
        """The tokens of a text, as the tokenizer gives them for all of it; marked control strings are ordinary text."""
        if TEXT_MARK in text:
            return self._with_marks(text)
        result, offset = self._begun(text)
        pieces = self.pieces(text, offset)
        for piece in pieces:
            result.add(offset, self._piece(piece))
            offset += len(piece)
        self._last = (text, result)
        if self._comparisons_left and len(pieces) > 1:
            self._comparisons_left -= 1
            if self.tokenizer(text, add_special_tokens=False)["input_ids"] != result.ids:
                # The argument above does not hold for this tokenizer: only complete texts from now on.
                self._cut, self.anchors = None, []
                self._piece.cache_clear()
                self._last = ("", Tokenized())
                return self.tokenized(text)
        return result

    def _with_marks(self, text: str) -> Tokenized:
        result, at = Tokenized(), 0
        for match in (*self._marks.finditer(text), None):
            segment = text[at : match.start() if match else len(text)]
            offset = at
            for number, piece in enumerate(self.pieces(segment)):
                inside = at > 0 and number == 0  # not the start of a text
                result.add(offset, self._behind_newline(piece) if inside else self._piece(piece))
                offset += len(piece)
            if match:
                ids = self.as_text.get(match[0], [])
                result.add(match.start(), Piece(ids, [0] * len(ids), []))
                at = match.end()
        return result

    def _behind_newline(self, text: str) -> Piece:
        newline, piece = self._piece("\n").ids, self._piece("\n" + text)
        if piece.ids[: len(newline)] != newline:
            return self._piece(text)
        return Piece(piece.ids[len(newline) :], [at - 1 for at in piece.starts[len(newline) :]], piece.unspelled)

    def _begun(self, text: str) -> tuple[Tokenized, int]:
        """(the tokens that `text` shares with the last text, where it continues): a conversation grows turn by turn."""
        last, known = self._last
        if self._cut is None or len(known.offsets) < KEPT_PIECES or not text.startswith(last):
            return Tokenized(), 0
        # An anchor may begin in the end of the last text, so its last pieces are cut again.
        return known.first_pieces(len(known.offsets) - KEPT_PIECES)

    def pieces(self, text: str, at: int = 0) -> list[str]:
        """`text` from the anchor at `at` on, cut before every anchor."""
        cuts = [match.start() for match in self._cut.finditer(text, at)] if self._cut else []
        return [text[a:b] for a, b in zip([at, *cuts], [*cuts, len(text)], strict=True) if a < b]

    def continued(self, prompt: str, text: str, prompt_ids: list[int]) -> Tokenized:
        """The tokens of `prompt` followed by those of `text` as it is generated.

        These are the tokens of the joined text if it starts with `prompt_ids`, else those of `text` by itself: a model
        can only add tokens after the prompt's.
        """
        joined = self.tokenized(prompt + text)
        if joined.ids[: len(prompt_ids)] == prompt_ids:
            return joined
        # After an anchor, so that the tokenizer does not treat it as the start of a text.
        anchor = self.anchors[0] if self.anchors else ""
        alone = self.tokenized(anchor + text)
        numbers = range(1 if anchor else 0, len(alone.ids))
        starts = [alone.start(number) - len(anchor) for number in numbers]
        result = self.tokenized(prompt)
        self._last = ("", Tokenized())  # `result` is changed
        result.add(len(prompt), Piece(alone.ids[numbers.start :], starts, alone.unspelled))
        return result

    def _tokenize(self, text: str) -> Piece:
        if not getattr(self.tokenizer, "is_fast", False):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return Piece(ids, [0] * len(ids), self._unspelled(text, ids))
        backend = self.tokenizer.backend_tokenizer
        if self._cut and backend.padding is None and backend.truncation is None and not backend.encode_special_tokens:
            encoding = backend.encode(text, add_special_tokens=False)  # the same as below, without its overhead
            ids, offsets = encoding.ids, encoding.offsets
        else:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        return Piece(ids, [start for start, _ in offsets], self._unspelled(text, ids))

    def _unspelled(self, text: str, ids: list[int]) -> list[str]:
        """Control tokens that `ids` contain more often than `text` spells them."""
        made = set(ids) & self._names.keys()
        spelled = self._control.findall(text) if made else []
        return [self._names[number] for number in made if ids.count(number) > spelled.count(self._names[number])]


def _any_of(texts: list[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


_KNOWN: weakref.WeakKeyDictionary[Any, tuple[int, Tokens]] = weakref.WeakKeyDictionary()


def tokens_of(tokenizer: Any) -> Tokens:
    """The `Tokens` of a tokenizer; rebuilt when its vocabulary has grown."""
    size = len(tokenizer)
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != size:
        known = _KNOWN[tokenizer] = (size, Tokens(tokenizer))
    return known[1]


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """Every added token's text and id, special or not."""
    return {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}


def _anchors(tokenizer: Any) -> list[str]:
    tokens = list(tokenizer.added_tokens_decoder.values())
    overlapping = may_overlap([str(token) for token in tokens])
    found = [
        token
        for token in tokens
        if token.special and not (token.lstrip or token.single_word or token.normalized or str(token) in overlapping)
        if str(token).strip() == str(token)
    ]
    # rstrip tokens may start a piece but cannot precede arbitrary text, so they come last (see `continued`).
    return [str(token) for token in sorted(found, key=lambda token: token.rstrip)]


def may_overlap(texts: list[str]) -> set[str]:
    """Those texts that can overlap another one in some string, and perhaps a few more.

    Judged by first characters, because vocabularies have up to a thousand added tokens: two texts overlap only where
    one starts inside the other or both start together.
    """
    firsts = {text[:1] for text in texts}
    inner = {character for text in texts for character in text[1:]}
    prefixes = {text[:n] for text in texts for n in range(1, len(text))}
    known = set(texts)
    return {
        text
        for text in texts
        if text[:1] in inner
        or firsts.intersection(text[1:])
        or text in prefixes
        or any(text[:n] in known for n in range(1, len(text)))
    }


def check_tokenizer(tokenizer: Any, fmt: Format) -> list[int]:
    """Ids that end a turn of `fmt` under `tokenizer`.

    Raises FormatError when a control token of the format is not exactly one token, or when what ends a turn is what
    starts a text (a tokenizer with a wrong end token). Write the ids into generation_config.eos_token_id.
    """
    ends = []
    for text in dict.fromkeys((*fmt.end_of_turn, *fmt.tokens)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise FormatError(
                f"format {fmt.name}: its control token {text} is {len(ids)} tokens in this tokenizer "
                f"({type(tokenizer).__name__}, {len(tokenizer)} entries); choose a format made for this model, "
                "or --format auto"
            )
        if text in fmt.end_of_turn:
            ends.append(ids[0])
    if not ends:
        raise FormatError(f"format {fmt.name}: no end-of-turn token")
    if tokenizer.bos_token_id in ends and tokenizer.bos_token != tokenizer.eos_token:
        raise FormatError(f"format {fmt.name}: the end of a turn is the tokenizer's start token {tokenizer.bos_token}")
    return ends
