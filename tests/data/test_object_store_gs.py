"""Documents at gs:// through our own code, with a store of fsspec that answers as gcsfs does.

It has neither network nor credentials: what gcsfs and Google do is not tested.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.registry import _registry
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from fast_llm.config.prepare import SourceConfig
from fast_llm.data import files, object_store
from fast_llm.data.documents import open_documents
from fast_llm.data.prepare import prepare
from fast_llm.errors import DataError
from tests.data import synthetic
from tests.data.preparing import configure, content

TEXTS = [f"{number} {synthetic.text(number, 30)}" for number in range(200)]


class Stored(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.objects[self.path][start:end]  # type: ignore[no-any-return]


class Store(AbstractFileSystem):  # type: ignore[misc]
    """Names without gs://, folders only as parts of names, a generation for each write."""

    protocol = "gs"
    objects: ClassVar[dict[str, bytes]] = {}
    generations: ClassVar[dict[str, int]] = {}

    def put(self, name: str, data: bytes) -> None:
        self.objects[name] = data
        self.generations[name] = self.generations.get(name, 1700000000000000) + 1

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        name = self._strip_protocol(path)
        if name in self.objects:
            generation = str(self.generations[name])
            size = len(self.objects[name])
            return {"name": name, "size": size, "type": "file", "generation": generation}
        if any(each.startswith(name + "/") for each in self.objects):
            return {"name": name, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        name = self._strip_protocol(path)
        if self.info(name)["type"] == "file":
            return [self.info(name)] if detail else [name]
        below = (each for each in self.objects if each.startswith(name + "/"))
        size = len(name) + 1
        names = sorted({name + "/" + each[size:].split("/")[0] for each in below})
        return [self.info(each) for each in names] if detail else names

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Stored:
        settings.pop("autocommit", None)
        return Stored(self, path, mode, **settings)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setitem(_registry, "gs", Store)
    monkeypatch.setattr(object_store, "_WAITS", (0.01,))
    Store.objects.clear()
    yield fsspec.filesystem("gs")
    Store.clear_instance_cache()


def test_token_files_are_those_of_local_files(store: Store, tmp_path: Path, model: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (local / "a.jsonl").write_bytes(lines)
    (local / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    for path in local.iterdir():
        store.put(f"bucket/lines/{path.name}", path.read_bytes())
    pq.write_table(pa.table({"text": TEXTS}), local.with_suffix(".parquet"), row_group_size=50)
    store.put("bucket/rows.parquet", local.with_suffix(".parquet").read_bytes())
    places: dict[str, Path] = {"lines": local, "rows.parquet": local.with_suffix(".parquet")}
    for name, path in places.items():
        digests = []
        for number, source in enumerate((str(path), f"gs://bucket/{name}")):
            made = prepare(configure(tmp_path / f"{name}{number}" / "x", source, model))
            digests.append([each["sha256"] for each in content(made)["datasets"]])
        assert digests[0] == digests[1]


def test_patterns_and_changes(store: Store) -> None:
    for name in ("a.txt", "b.txt", ".hidden.txt", "deep/c.txt"):
        store.put(f"bucket/x/{name}", b"text")
    found = files.find(SourceConfig(path="gs://bucket/x/*.txt"))
    assert found.files["train"] == ["gs://bucket/x/a.txt", "gs://bucket/x/b.txt"]
    (path, _) = found.files["train"]
    assert isinstance(path, object_store.StoredObject) and path.size == 4
    # Of the same size, so only its generation tells.
    store.put("bucket/x/a.txt", b"TEXT")
    with pytest.raises(DataError, match=r"gs://bucket/x/a\.txt: changed since it was listed"):
        object_store.open_object(path)
    with pytest.raises(DataError, match="gs://bucket/none"):
        open_documents(files.find(SourceConfig(path="gs://bucket/none")), 1)
