"""Text to ids, exactly as a server tokenises it, without tokenising the same words twice.

Why cutting is exact: a fast tokenizer looks for its added tokens (normalized=False) in the raw text first and works on
what lies between them separately. So ids(a + T + b) = ids(a) + ids(T + b) for such a token T, as long as T takes no
whitespace from its left (lstrip), needs no word boundary (single_word) and no other added token can overlap it. Every
piece but the first starts with such a token, so a tokenizer that treats the start of a text specially (Metaspace,
"first") sees a start only where there is one. Tokenizers without such tokens are given whole texts.
"""

from __future__ import annotations

import re
import weakref
from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict
from typing import Any, NamedTuple

from formats.base import Format, FormatError

CACHED_PIECES = 20_000
CACHED_CHARACTERS = 64_000_000
PROOFS = 32  # the first texts of every tokenizer are also tokenised whole and compared


class Piece(NamedTuple):
    """Ids and first characters of the tokens of one piece of text.

    `stray` are control tokens among them that the text does not spell (a normaliser made them).
    """

    ids: list[int]
    starts: list[int]
    stray: list[str]


class Tokenized:
    """Ids of a text, and where its tokens begin, without a list of all their positions."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.ids: list[int] = []
        self.stray: list[str] = []
        self._offsets: list[int] = []  # first character of each piece
        self._firsts: list[int] = []  # number of its first token
        self._pieces: list[Piece] = []

    @property
    def piece_count(self) -> int:
        return len(self._pieces)

    def add(self, offset: int, piece: Piece) -> None:
        """Append a piece that begins at character `offset`."""
        self._offsets.append(offset)
        self._firsts.append(len(self.ids))
        self._pieces.append(piece)
        self.ids += piece.ids
        self.stray += piece.stray

    def take(self, other: Tokenized, characters: int) -> int:
        """Take over the pieces of `other` that end before its first `characters` do; returns where the next begins.

        `characters` are those that the two texts begin with alike, less the length of the longest anchor, so that
        both texts are cut alike.
        """
        count = max(0, bisect_right(other._offsets, characters) - 1)
        if not count:
            return 0
        self.ids = other.ids[: other._firsts[count]]
        self._offsets, self._firsts = other._offsets[:count], other._firsts[:count]
        self._pieces = other._pieces[:count]
        if other.stray:
            self.stray = [name for piece in self._pieces for name in piece.stray]
        return other._offsets[count]

    def start(self, number: int) -> int:
        """The position of the first character of a token."""
        at = bisect_right(self._firsts, number) - 1
        return self._offsets[at] + self._pieces[at].starts[number - self._firsts[at]]

    def before(self, character: int) -> int:
        """How many tokens begin in front of the character at this position."""
        at = bisect_right(self._offsets, character) - 1
        if at < 0:
            return 0
        return self._firsts[at] + bisect_left(self._pieces[at].starts, character - self._offsets[at])


class Tokens:
    """Ids and character positions of texts under one tokenizer; pieces are cached."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = added_tokens(tokenizer)
        self.anchors = _anchors(tokenizer) if getattr(tokenizer, "is_fast", False) else []
        self._cut = re.compile("|".join(map(re.escape, self.anchors))) if self.anchors else None
        self._longest = max(map(len, self.anchors), default=0)
        control = sorted(self.added, key=len, reverse=True)
        self._names = {number: token for token, number in self.added.items()}
        self.end_ids: dict[tuple, set[int]] = {}  # what `check_tokenizer` found, by format
        self.escapers: dict[tuple, Any] = {}  # of formats.escape, by format
        self._control = re.compile("|".join(map(re.escape, control))) if control else None
        self._cache: OrderedDict[str, Piece] = OrderedDict()
        self._characters = 0
        self._proofs = PROOFS

    def ids(self, text: str) -> list[int]:
        return self.tokenized(text).ids

    def tokenized(self, text: str, known: Tokenized | None = None) -> Tokenized:
        """The tokens of a text, as the tokenizer gives them for the whole of it.

        What `text` has in common with the beginning of `known` is taken from there.
        """
        result = Tokenized(text)
        offset = 0
        if known is not None and self._cut is not None:
            offset = result.take(known, _common_prefix(known.text, text) - self._longest)
        pieces = self._pieces(text, offset)
        missing = list(dict.fromkeys(piece for piece in pieces if piece not in self._cache))
        fresh = dict(zip(missing, self._tokenize(missing), strict=True)) if missing else {}
        for piece in pieces:
            if (made := fresh.get(piece)) is None:
                made = self._cache[piece]
                self._cache.move_to_end(piece)
            result.add(offset, made)
            offset += len(piece)
        for piece, made in fresh.items():
            self._remember(piece, made)
        if self._proofs and self._cut and result.piece_count > 1:
            self._proofs -= 1
            whole = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if whole != result.ids:
                # Not a tokenizer the argument above holds for: from now on whole texts only.
                self._cut, self.anchors = None, []
                self._cache.clear()
                return self.tokenized(text)
        return result

    def _pieces(self, text: str, start: int = 0) -> list[str]:
        """`text` from `start` on, cut in front of every anchor."""
        if self._cut is None:
            return [text]
        cuts = [match.start() for match in self._cut.finditer(text, start)]
        return [text[a:b] for a, b in zip([start, *cuts], [*cuts, len(text)], strict=True) if a < b]

    def continued(self, prompt: str, text: str, prompt_tokens: Tokenized) -> Tokenized:
        """The tokens of `prompt` and behind them those of `text` as it is generated.

        The tokens of the joined text where the prompt's own tokens are left alone, else the tokens of `text` by
        itself: a model can only add tokens behind the prompt's.
        """
        joined = self.tokenized(prompt + text, prompt_tokens)
        count = len(prompt_tokens.ids)
        if joined.ids[:count] == prompt_tokens.ids:
            return joined
        # Behind an added token, so that nothing is put in front as at the start of a text.
        anchor = self.anchors[0] if self.anchors else ""
        alone = self.tokenized(anchor + text)
        skipped = 1 if anchor else 0
        starts = [alone.start(number) - len(anchor) for number in range(skipped, len(alone.ids))]
        result = self.tokenized(prompt)
        result.text = ""  # not cut as a text is: no other one may take over these pieces
        result.add(len(prompt), Piece(alone.ids[skipped:], starts, alone.stray))
        return result

    def _tokenize(self, texts: list[str]) -> list[Piece]:
        if not getattr(self.tokenizer, "is_fast", False):
            lists = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            return [Piece(ids, [0] * len(ids), self._stray(text, ids)) for text, ids in zip(texts, lists, strict=True)]
        backend = self.tokenizer.backend_tokenizer
        plain = backend.padding is None and backend.truncation is None and not backend.encode_special_tokens
        if self._cut and plain:  # what the call below comes to, without its 50 microseconds
            found = [(made.ids, made.offsets) for made in backend.encode_batch(texts, add_special_tokens=False)]
        else:
            encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
            found = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        return [
            Piece(ids, [start for start, _ in offsets], self._stray(text, ids))
            for text, (ids, offsets) in zip(texts, found, strict=True)
        ]

    def _stray(self, text: str, ids: list[int]) -> list[str]:
        """Control tokens that stand more often in `ids` than `text` spells them."""
        made = set(ids) & self._names.keys()
        if not made:
            return []
        spelled = self._control.findall(text)
        return [self._names[number] for number in made if ids.count(number) > spelled.count(self._names[number])]

    def _remember(self, piece: str, known: Piece) -> None:
        self._cache[piece] = known
        self._characters += len(piece)
        while len(self._cache) > CACHED_PIECES or self._characters > CACHED_CHARACTERS:
            old, _ = self._cache.popitem(last=False)
            self._characters -= len(old)


def _common_prefix(one: str, two: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


_KNOWN: weakref.WeakKeyDictionary[Any, tuple[int, Tokens]] = weakref.WeakKeyDictionary()


def tokens_of(tokenizer: Any) -> Tokens:
    """The `Tokens` of a tokenizer; made anew when its vocabulary has grown."""
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
    entangled = _entangled([str(token) for token in tokens])
    found = []
    for token in tokens:
        text = str(token)
        plain = token.special and not (token.lstrip or token.single_word or token.normalized)
        if plain and text.strip() == text and text not in entangled:
            found.append(text)
    # rstrip tokens may start a piece but cannot stand in front of a free text: they go last (see `continued`).
    right = {str(token) for token in tokens if token.rstrip}
    return sorted(found, key=lambda text: text in right)


def _entangled(texts: list[str]) -> set[str]:
    """Those texts that hold another one, stand in another one, or end as another one begins (or the reverse).

    Vocabularies have up to a thousand added tokens, so no pair is looked at: ends are looked up among beginnings.
    """
    known = set(texts)
    heads = Counter(text[:n] for text in known for n in range(1, len(text)))
    tails = Counter(text[-n:] for text in known for n in range(1, len(text)))
    everything = "\0".join(known)
    return {text for text in known if _touches(text, known, heads, tails) or everything.count(text) > 1}


def _touches(text: str, known: set[str], heads: Counter, tails: Counter) -> bool:
    for n in range(1, len(text)):
        head, tail = text[:n], text[-n:]
        own = head == tail  # a text that begins as it ends does not count by itself
        if heads[tail] > own or tails[head] > own:
            return True
    pieces = (text[a:b] for a in range(len(text)) for b in range(a + 1, len(text) + 1))
    return any(piece in known for piece in pieces if piece != text)


def check_tokenizer(tokenizer: Any, fmt: Format) -> list[int]:
    """Ids that end a turn of `fmt` under `tokenizer`.

    Raises FormatError when a control token of the format is not exactly one token, or when what ends a turn is what
    starts a text (a tokenizer with its end token set wrong). Write the ids into generation_config.eos_token_id.
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
