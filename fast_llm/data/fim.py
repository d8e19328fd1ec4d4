"""Fill-in-the-middle: documents rearranged so that the model learns to fill gaps.

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", 2022, at the level
of the context, as in BigCode's Megatron-LM and Fast-LLM 0.2. A document (or the part of it that a
sequence holds) is decoded and cut at two random characters into prefix, middle and suffix. Each is
encoded again, and they become

    PSM  <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle
    SPM  <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle

BOS stays in front and EOS at the end. If a document of the token file has BOS or EOS inside, each
text between them is a document, as in the published code; `prepare` writes no such documents. Empty
ones are not rearranged. The sequence is then cut to its length, or padded with tokens
that are no targets. All random numbers come from numpy's RandomState((seed + i) mod 2³²) for
sequence i of the run, so they depend neither on processes nor on where a run was resumed.

Special tokens inside a document are cut and encoded as the text that spells them, which the
tokenizer finds again, as in the published code. In a document without them, such text stays text.

It differs from Fast-LLM 0.2 in what that loses: adjacent split tokens are kept; padding of
sequences is no target. And these documents are left as they are: text with U+FFFD, such as a
character that the border of the sequence cuts; special tokens that a cut falls into or that are not
found again; documents with tokens of FIM in them.

Decoding and encoding a document of 4,096 tokens takes some 30 ms, in the loader's threads.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fast_llm.config.train import FimConfig
from fast_llm.data.source import PackedSample
from fast_llm.data.tokenizer import Loaded
from fast_llm.errors import ConfigError
from fast_llm.terminal import nearest

Tokens = NDArray[np.int64]
_UNDECODABLE = "\ufffd"
FIM_COUNTS = ("fim_documents", "fim_rearranged", "fim_left", "fim_tokens")  # in metrics.jsonl


@dataclass(frozen=True)
class Fim:
    """The transformation of a run's sequences."""

    config: FimConfig
    tokenizer: Tokenizer
    """Reads the spellings of special tokens as plain text."""
    own: Tokenizer
    """The model's own encoding, which finds special tokens in text."""
    ids: Mapping[str, int]
    """Of prefix, middle, suffix and pad, and of split if documents have fragments."""
    bos: int | None
    eos: int | None
    seed: int
    vocab_size: int
    special: NDArray[np.int64]
    """Ids of special tokens, which text cannot spell."""

    @functools.cached_property
    def kept(self) -> frozenset[int]:
        """Ids that a document must not have inside to be rearranged."""
        return frozenset(self.ids.values())

    def sequence(self, packed: PackedSample, index: int) -> PackedSample:
        """Sequence `index` of the run, with the documents in it rearranged."""
        if int(packed.tokens.view(np.uint64).max()) >= self.vocab_size:
            return packed  # the tokenizer could not decode it; the loader reports it
        draw = np.random.RandomState((self.seed + index) % 2**32)
        size = len(packed.tokens)
        filled = size - packed.padding
        begins = packed.starts[packed.starts < filled]
        documents = np.split(packed.tokens[:filled], begins[1:])
        counts = FimCounts()
        changed = [self.document(tokens, draw, counts) for tokens in documents]
        starts = np.cumsum([0, *(len(tokens) for tokens in changed[:-1])])
        # Where a sequence is joined from several ranges, a document does not continue with the next
        # token. Documents with breaks already (best_fit.py) keep their lengths.
        torn = 1 + np.flatnonzero(packed.targets[begins[1:] - 1] != packed.tokens[begins[1:]])
        breaks = np.union1d(packed.breaks, starts[torn] - 1)
        starts, breaks = starts[starts < size], breaks[breaks < size - 1]
        joined = np.concatenate(changed)[:size]
        padding = size - len(joined)
        tokens = np.concatenate([joined, np.full(padding, self.ids["pad"], np.int64)])
        return PackedSample(
            tokens,
            starts,
            tokens[1:],
            starts[1:] - 1,
            padding,
            breaks,
            packed.source,
            counts.values(),
        )

    def document(
        self, tokens: Tokens, draw: np.random.RandomState, counts: "FimCounts | None" = None
    ) -> Tokens:
        """A document, or a part of one, with its BOS and EOS where they were."""
        counts = FimCounts() if counts is None else counts
        after = 1 + np.flatnonzero(tokens == (-1 if self.eos is None else self.eos))
        before = np.flatnonzero(tokens == (-1 if self.bos is None else self.bos))
        borders = np.union1d(after, before)
        texts = np.split(tokens, borders[(borders > 0) & (borders < len(tokens))])
        return np.concatenate([self._text(text, draw, counts) for text in texts])

    def _text(self, tokens: Tokens, draw: np.random.RandomState, counts: "FimCounts") -> Tokens:
        """A document without BOS and EOS inside."""
        begin = int(len(tokens) > 0 and tokens[0] == self.bos)
        end = len(tokens) - int(len(tokens) > begin and tokens[-1] == self.eos)
        if begin == end:
            return tokens
        counts.documents += 1
        text = self._fragments(tokens[begin:end], draw, counts)
        return np.concatenate([tokens[:begin], text, tokens[end:]])

    def _fragments(
        self, tokens: Tokens, draw: np.random.RandomState, counts: "FimCounts"
    ) -> Tokens:
        """The text of a document: as one piece, or each fragment between split tokens."""
        split = self.ids.get("split", -1)
        borders = np.flatnonzero(tokens == split)
        if not len(borders):
            return self._drawn(tokens, self.config.rate, draw, counts)
        if not draw.binomial(1, self.config.rate):
            return tokens
        parts = []
        for fragment in np.split(tokens, borders):
            front = int(len(fragment) > 0 and fragment[0] == split)
            parts.append(fragment[:front])
            if len(fragment) > front:
                rate = self.config.fragment_rate
                parts.append(self._drawn(fragment[front:], rate, draw, counts))
        return np.concatenate(parts)

    def _drawn(
        self, tokens: Tokens, rate: float, draw: np.random.RandomState, counts: "FimCounts"
    ) -> Tokens:
        """Rearranged with probability `rate`."""
        if not draw.binomial(1, rate):
            return tokens
        changed = self._rearranged(tokens, draw)
        if changed is None:
            counts.left += 1
            return tokens
        counts.rearranged += 1
        counts.tokens += len(changed)
        return changed

    def _rearranged(self, tokens: Tokens, draw: np.random.RandomState) -> Tokens | None:
        """Prefix, middle and suffix in their new order; None for text that is left as it is."""
        config = self.config
        inside = tokens[np.isin(tokens, self.special)].tolist()
        if not self.kept.isdisjoint(inside):
            return None
        text = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        ignored = config.ignore_prefix is not None and text.startswith(config.ignore_prefix)
        if ignored or _UNDECODABLE in text:
            return None
        if config.max_middle_len is None:
            first, last = sorted(draw.randint(0, len(text) + 1, size=2))
        else:
            length = draw.randint(0, min(config.max_middle_len, len(text)) + 1)
            first = draw.randint(0, len(text) - length + 1)
            last = first + length
        pieces = text[:first], text[first:last], text[last:]
        prefix, middle, suffix = (self._encode(piece, bool(inside)) for piece in pieces)
        if inside and not self._holds(inside, text, (prefix, middle, suffix)):
            return None
        if config.truncate_or_pad:
            more = len(prefix) + len(middle) + len(suffix) + 3 - len(tokens)
            if more >= len(suffix) and more > 0:
                return None
            suffix = suffix[:-more] if more > 0 else suffix + [self.ids["pad"]] * -more
        before, between, after = (self.ids[name] for name in ("prefix", "suffix", "middle"))
        if draw.binomial(1, config.spm_rate):
            order = [before, between, *suffix, after, *prefix, *middle]
        else:
            order = [before, *prefix, between, *suffix, after, *middle]
        return np.array(order, np.int64)

    def _encode(self, text: str, with_special: bool) -> list[int]:
        tokenizer = self.own if with_special else self.tokenizer
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _holds(self, inside: list[int], text: str, pieces: Iterable[list[int]]) -> bool:
        """Whether pieces have exactly the special tokens `inside`, and spell `text`."""
        pieces = list(pieces)
        # Plain text may spell a special token, too: then the text has more of them than `inside`.
        for each in ([self._encode(text, True)], pieces):
            found = [token for piece in each for token in piece if token in self.special]
            spelled = (self.own.decode(piece, skip_special_tokens=False) for piece in each)
            if found != inside or "".join(spelled) != text:
                return False
        return True


@dataclass
class FimCounts:
    """Counts of a sequence."""

    documents: int = 0  # documents, or parts of them
    rearranged: int = 0  # of them; fragments are counted one by one
    left: int = 0  # chosen, but left as they are
    tokens: int = 0  # of the rearranged ones

    def values(self) -> tuple[int, int, int, int]:
        """In the order of FIM_COUNTS."""
        return self.documents, self.rearranged, self.left, self.tokens


def make_fim(
    config: FimConfig,
    loaded: Loaded | None,
    seed: int,
    vocab_size: int,
    masked: Sequence[str] = (),
) -> Fim:
    """The transformation that `data.fim` describes. Raises ConfigError for a tokenizer that is
    missing or does not have its tokens, and if all sources have masked tokens (`masked`: their
    names).
    """
    if masked:
        raise ConfigError(
            [
                f"data.fim: rearranges documents, but tokens of {', '.join(masked)} are masked;"
                " train without data.fim, or on all tokens with data.use_loss_masking_spans: no"
            ]
        )
    if loaded is None:
        raise ConfigError(
            ["data.fim: needs the model's tokenizer; name its folder in data.tokenizer.path"]
        )
    ids, problems = _token_ids(config, loaded, vocab_size)
    tokenizer = Tokenizer.from_str(loaded.tokenizer.to_str())  # the caller's stays as it is
    tokenizer.encode_special_tokens = True
    own = Tokenizer.from_str(loaded.tokenizer.to_str())
    own.encode_special_tokens = False
    one, other = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("ab", "cd"))
    if not problems and tokenizer.decode(one + other) != "abcd":
        problems.append(
            f"data.fim: {loaded.path} puts a space in front of each piece of text, so cutting a"
            " document would add spaces; train without data.fim"
        )
    if problems:
        raise ConfigError(problems)
    special = [int(token["id"]) for token in loaded.added if token.get("special")]
    return Fim(
        config,
        tokenizer,
        own,
        ids,
        loaded.bos,
        loaded.eos,
        seed,
        loaded.vocab_size,
        np.array(special, np.int64),
    )


def _token_ids(
    config: FimConfig, loaded: Loaded, vocab_size: int
) -> tuple[dict[str, int], list[str]]:
    """The ids of the tokens of `data.fim` by their part, and problems with them."""
    names = {name: f"{name}_token" for name in ("prefix", "middle", "suffix", "pad")}
    if config.split_sample is not None:
        names["split"] = "split_sample"
    ids, problems = dict[str, int](), list[str]()
    known = [str(token.get("content")) for token in loaded.added]
    for name, setting in names.items():
        token = getattr(config, setting)
        found = loaded.tokenizer.token_to_id(token)
        if found is None or found >= vocab_size:
            problem = (
                f"is not a token of {loaded.path}{nearest(token, known)}; give the model's own"
                " token, or add it with fast-llm extend-vocabulary"
                if found is None
                else f"is token {found}, but the model's vocab_size is {vocab_size}"
            )
            problems.append(f"data.fim.{setting}: given {token}, which {problem}")
        else:
            ids[name] = found
    return ids, problems
