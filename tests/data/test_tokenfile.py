"""The .bin/.idx pair: byte for byte, from files that others wrote, and damaged in every way."""

import hashlib
import os
import struct
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_llm.data.entries import open_path
from fast_llm.data.tokenfile import CODES, MAGIC, TokenFile, TokenFileInfo, TokenFileWriter
from fast_llm.errors import DataError

TWO = [[1, 2, 3], [4, 5]]
IDX = bytes.fromhex(
    "4d4d494449445800 00 0100000000000000 04 0200000000000000 0300000000000000 03000000 02000000"
    "0000000000000000 0c00000000000000 0000000000000000 0100000000000000 0200000000000000"
)
BIN = np.array([1, 2, 3, 4, 5], "<i4").tobytes()


def write(prefix: Path, documents: list[list[int]], dtype: str = "int32") -> TokenFileInfo:
    writer = TokenFileWriter(prefix, np.dtype(dtype))
    for document in documents:
        writer.append(np.array(document, dtype))
    return writer.close()


def read(prefix: Path) -> list[list[int]]:
    file = TokenFile(prefix)
    edges = [file.start_of(number) for number in range(file.documents + 1)]
    return [file.tokens_at(begin, end).tolist() for begin, end in pairwise(edges)]


def raw(prefix: Path, idx: bytes, data: bytes = BIN) -> Path:
    prefix.with_name(prefix.name + ".idx").write_bytes(idx)
    prefix.with_name(prefix.name + ".bin").write_bytes(data)
    return prefix


def build(
    documents: list[list[int]], dtype: str, version: int = 1, spans: Any = None
) -> tuple[bytes, bytes]:
    """A file made from the module docstring's table alone."""
    code = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}[dtype]
    lengths = np.array([len(document) for document in documents], "<i4")
    starts = np.array(
        [sum(map(len, documents[:i])) * np.dtype(dtype).itemsize for i in range(len(documents))],
        "<i8",
    )
    head = b"MMIDIDX\0\0" + struct.pack("<Q", version)
    if version == 2:
        head += bytes([spans is not None])
    idx = (
        head
        + struct.pack("<BQQ", code, len(documents), len(documents) + 1)
        + lengths.tobytes()
        + starts.tobytes()
    )
    if spans is not None:
        idx += np.array([len(some) for some in spans], "<i4").tobytes()
        idx += np.array([span for some in spans for span in some], "<i4").tobytes()
    idx += np.arange(len(documents) + 1, dtype="<i8").tobytes()
    return idx, np.array([*chain(*documents)], np.dtype(dtype).newbyteorder("<")).tobytes()


def test_bytes(tmp_path: Path) -> None:
    info = write(tmp_path / "x", TWO)
    assert (tmp_path / "x.idx").read_bytes() == IDX
    assert (tmp_path / "x.bin").read_bytes() == BIN
    assert (info.documents, info.tokens) == (2, 5)
    assert info.sha256_idx == hashlib.sha256(IDX).hexdigest()
    assert info.sha256_bin == hashlib.sha256(BIN).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@pytest.mark.parametrize("dtype", [str(dtype) for dtype in CODES])
@pytest.mark.parametrize("version", [1, 2])
def test_files_of_others(tmp_path: Path, dtype: str, version: int) -> None:
    largest = int(np.iinfo(dtype).max)  # would come back wrong if read with the wrong sign or width
    documents = [[1, largest, 3], [], [4], [0, 5]]
    assert read(raw(tmp_path / "x", *build(documents, dtype, version))) == documents
    if version == 1:
        write(tmp_path / "y", documents, dtype)
        for suffix in (".idx", ".bin"):
            assert (tmp_path / f"y{suffix}").read_bytes() == (tmp_path / f"x{suffix}").read_bytes()


def test_version_2_with_loss_masking_spans(tmp_path: Path) -> None:
    idx, data = build(TWO, "int32", 2, [[(0, 1), (2, 3)], []])
    assert read(raw(tmp_path / "x", idx, data)) == TWO


@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=5), max_size=8),
    cut=st.integers(0, 8),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], cut: int
) -> None:
    prefix = (
        tmp_path_factory.mktemp("round") / "x.y"
    )  # a dot in the name is no suffix to be replaced
    writer = TokenFileWriter(prefix, np.dtype("uint16"))
    for document in documents[:cut]:
        writer.append(np.array(document, np.uint16))
    rest = documents[cut:]
    writer.append_many(
        np.array([*chain(*rest)], np.uint16), np.array([len(some) for some in rest], np.int64)
    )
    writer.close()
    assert read(prefix) == documents
    file = TokenFile(prefix)
    owners = [number for number, document in enumerate(documents) for _ in document]
    assert [file.document_at(token) for token in range(file.tokens)] == owners


def test_nothing_before_close_and_nothing_after_abandon(tmp_path: Path) -> None:
    writer = TokenFileWriter(tmp_path / "x", np.dtype("int32"))
    writer.append(np.arange(10**6, dtype=np.int32))  # more than its buffer
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
    writer.abandon()
    assert not list(tmp_path.iterdir())


def patched(offset: int, value: bytes, data: bytes = IDX) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


@pytest.mark.parametrize(
    ("idx", "data", "suffix", "words"),
    [
        (patched(0, b"X"), BIN, "idx", "not an index of tokens"),
        (b"", BIN, "idx", "not an index of tokens"),
        (IDX[:20], BIN, "idx", "truncated inside its header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", BIN, "idx", "git lfs pull"),
        (patched(9, b"\3"), BIN, "idx", "version 3"),
        (patched(9, b"\0"), BIN, "idx", "version 0"),
        (patched(17, b"\6"), BIN, "idx", "token type 6"),
        (patched(17, b"\5"), BIN, "idx", "document 1 begins at byte 12"),
        (patched(18, b"\3"), BIN, "idx", "3 document boundaries, must be 3 + 1"),
        (patched(26, b"\7"), BIN, "idx", "7 document boundaries, must be 2 + 1"),
        (
            patched(18, struct.pack("<QQ", 2**62, 2**62 + 1)),
            BIN,
            "idx",
            "need",
        ),  # allocates nothing
        (patched(18, struct.pack("<QQ", 1, 2)), BIN, "idx", "its 1 documents need"),
        (patched(34, struct.pack("<i", -3)), BIN, "idx", "document 0 has a negative length"),
        (patched(34, struct.pack("<i", 4)), BIN, "idx", "document 1 begins at byte 12"),
        (patched(38, struct.pack("<i", 3)), BIN, "bin", "6 tokens"),
        (patched(34, struct.pack("<ii", 2, 3)), BIN, "idx", "document 1 begins at byte"),
        (patched(42, b"\4"), BIN, "idx", "document 0 begins at byte"),
        (patched(50, b"\xff" * 8), BIN, "idx", "document 1 begins at byte"),
        (IDX[:-1], BIN, "idx", "truncated"),
        (IDX + b"\0", BIN, "idx", "damaged"),
        (IDX, BIN[:-1], "bin", "19 bytes"),
        (IDX, BIN + b"\0", "bin", "21 bytes"),
        (IDX, b"", "bin", "0 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_named(tmp_path: Path, idx: bytes, data: bytes, suffix: str, words: str) -> None:
    with pytest.raises(DataError) as error:
        TokenFile(raw(tmp_path / "x", idx, data))
    assert str(error.value).startswith(f"{tmp_path / 'x'}.{suffix}: ") and words in str(error.value)


@pytest.mark.parametrize("suffix", ["idx", "bin"])
@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_missing(tmp_path: Path, suffix: str, kind: str) -> None:
    path = raw(tmp_path / "x", IDX).with_name(f"x.{suffix}")
    path.unlink()
    if kind == "folder":
        path.mkdir()
    with pytest.raises(DataError, match=str(path)):
        TokenFile(tmp_path / "x")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    raw(tmp_path / "x", IDX).with_name("x.bin").unlink()
    os.mkfifo(tmp_path / "x.bin")
    with pytest.raises(DataError, match=r"x\.bin: not a file"):
        TokenFile(tmp_path / "x")


def test_cut_off_while_open(tmp_path: Path) -> None:
    """Not the end of the process by SIGBUS."""
    file = TokenFile(raw(tmp_path / "x", IDX))
    os.truncate(tmp_path / "x.bin", 8)
    assert file.tokens_at(0, 2).tolist() == [1, 2]
    with pytest.raises(
        DataError, match=r"x\.bin: ends at byte 8; it was truncated after it was opened"
    ):
        file.tokens_at(0, 5)


def test_tokens_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    writer = TokenFileWriter(tmp_path / "x", np.dtype("uint8"))
    with pytest.raises(ValueError, match="do not fit uint8"):
        writer.append(np.array([1, 256]))
    writer.abandon()


def test_an_old_index_is_never_next_to_new_tokens(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1], [2, 3]])
    write(tmp_path / "x", TWO)
    assert (tmp_path / "x.idx").read_bytes() == IDX


def read_or_refused(prefix: Path, expected: list[list[int]]) -> None:
    """Nothing but a DataError that names one of the files, or the right tokens."""
    try:
        assert read(prefix) == expected
    except DataError as error:
        assert str(error).startswith((f"{prefix}.idx: ", f"{prefix}.bin: "))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


# Up to two flips: three could make two lengths and the start between them wrong in a way that fits
# together.
@given(
    version=st.sampled_from([1, 2]),
    flips=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 255)), min_size=1, max_size=2),
)
def test_flipped_bytes(folder: Path, version: int, flips: list[tuple[int, int]]) -> None:
    # int32 is the only type of four bytes, so that another type never fits .bin.
    idx, data = build(
        [[7, 8, 9], [], [10]], "int32", version, [[(0, 1)], [], []] if version == 2 else None
    )
    changed = bytearray(idx)
    for place, mask in flips:
        changed[place % len(idx)] ^= mask
    read_or_refused(raw(folder / "f", bytes(changed), data), [[7, 8, 9], [], [10]])


@pytest.mark.parametrize("version", [1, 2])
def test_every_truncation(folder: Path, version: int) -> None:
    idx, data = build(TWO, "int32", version)
    for length in range(len(idx)):
        read_or_refused(raw(folder / "t", idx[:length], data), TWO)
    for length in range(len(data)):
        with pytest.raises(DataError, match=r"t\.bin: "):
            read(raw(folder / "t", idx, data[:length]))


@given(st.binary(max_size=120), st.binary(max_size=40))
def test_garbage(folder: Path, tail: bytes, data: bytes) -> None:
    for idx in (tail, MAGIC + tail, MAGIC + struct.pack("<Q", 1) + tail):
        try:
            TokenFile(raw(folder / "g", idx, data))
        except DataError as error:
            assert str(error).startswith(f"{Path(folder / 'g')}.")


def test_formats_of_others_are_named(tmp_path: Path) -> None:
    writer = TokenFileWriter(tmp_path / "multimodal", np.dtype("uint16"))
    for _ in range(3):
        writer.append(np.arange(5, dtype="uint16"))
    writer.close()
    with (tmp_path / "multimodal.idx").open("ab") as index:
        index.write(b"\x00\x01\x00")  # Megatron-LM appends the modes as int8
    with pytest.raises(
        DataError,
        match=r"multimodal.idx: a multimodal index of Megatron-LM, with a mode for each sequence;"
        r" only indices of text are read$",
    ):
        TokenFile(tmp_path / "multimodal")
    other = tmp_path / "a.fast_llm_dataset"
    other.write_bytes(bytes(100))
    words = "a.fast_llm_dataset is a file of a Fast-LLM version with another"
    with pytest.raises(DataError, match=f"^data.path: .*{words}"):
        open_path(str(other), False, {})
