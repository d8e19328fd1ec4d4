"""What is trained on is the text that was prepared: documents → token files → batches → text."""

import sysconfig
from itertools import chain
from pathlib import Path

from fast_llm.config.batch import BatchSizes
from fast_llm.config.prepare import PrepareConfig
from fast_llm.config.train import DataConfig
from fast_llm.data import tokenizer
from fast_llm.data.dataset import open_dataset
from fast_llm.data.loader import Loader
from fast_llm.data.metadata import verify
from fast_llm.data.prepare import prepare
from tests.data import synthetic

LENGTH = 64


def test_batches_decode_to_the_documents(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    # Real text, and enough of it for several token files of the least size, 100,000 tokens; of all
    # scripts; nasty ones.
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))[:30]
    texts = [
        *(file.read_text("utf-8") for file in files),
        "中文 ½ 😀 e\u0301",
        "\0",
        f"{synthetic.EOS} and {synthetic.BOS}",
        " \n\t ",
    ]
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    model = synthetic.llama(tmp_path / "model")
    given = {"output_path": str(tmp_path / "out" / "X"), "tokens_per_shard": 100_000}
    metadata = prepare(
        PrepareConfig(**given, dataset={"path": str(folder)}, tokenizer={"path": str(model)})  # type: ignore[arg-type]
    )
    assert metadata == tmp_path / "out" / "X.json"
    assert len(list((tmp_path / "out" / "X").glob("*.bin"))) > 2
    assert verify(metadata) > 0

    data = open_dataset(
        DataConfig(format="file", path=[str(metadata)], split=[1]), LENGTH, seed=3, vocab_size=400
    )
    data.check_vocabulary(400, tokenizer.load(str(model)))
    count = data.sequences("training")
    pieces: dict[int, list[int]] = {}
    with Loader(
        data,
        "training",
        BatchSizes(1, 1, 1),
        rank=0,
        processes=1,
        vocab_size=400,
        first_sample=0,
        steps=count,
        isolate=False,  # labels of all tokens, so that the last one can be seen
        workers=2,
        prefetch=4,
    ) as batches:
        for index, (batch,) in enumerate(batches):
            number = data.splits["training"].find(index)[1]
            pieces[number] = batch.tokens[0].tolist()
            assert batch.labels[0, :-1].tolist() == pieces[number][1:]
    assert sorted(pieces) == list(range(count))
    tokens = list(chain.from_iterable(pieces[number] for number in range(count)))

    loaded = tokenizer.load(str(model))
    assert loaded.bos is not None and loaded.eos is not None
    rest = data.tokens("training") - len(tokens)
    assert 0 < rest <= LENGTH  # they fill no sequence any more
    file = data.splits["training"].sources[0].files[-1]  # type: ignore[union-attr]
    tokens += file.tokens_at(file.tokens - rest, file.tokens).tolist()
    documents: list[list[int]] = []
    for token in tokens:
        if token == loaded.bos:
            documents.append([])
        documents[-1].append(token)
    assert len(documents) == len(texts)
    for document, text in zip(documents, texts, strict=True):
        assert document[-1] == loaded.eos and loaded.eos not in document[:-1]
        assert loaded.tokenizer.decode(document[1:-1], skip_special_tokens=False) == text


def test_phases_share_no_document(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(50):
        (folder / f"{number:02}.txt").write_text(f"{number} " + synthetic.text(number, 30))
    model = synthetic.llama(tmp_path / "model")
    metadata = prepare(
        PrepareConfig(
            output_path=str(tmp_path / "X"),
            dataset={"path": str(folder)},  # type: ignore[arg-type]
            tokenizer={"path": str(model)},  # type: ignore[arg-type]
        )
    )
    data = open_dataset(
        DataConfig(format="file", path=[str(metadata)], split=[0.8, 0.1, 0.1]),
        8,
        seed=0,
        vocab_size=400,
    )
    seen = {
        phase: {
            span.document for i in range(data.sequences(phase)) for span in data.locate(phase, i)
        }
        for phase in ("training", "validation", "test")
    }
    assert [len(seen[phase]) for phase in ("training", "validation", "test")] == [40, 5, 5]
    assert set.union(*seen.values()) == set(range(50))
    # From everywhere, not from the end, where documents of one kind often lie.
    assert seen["validation"] == {0, 22, 23, 31, 39} and seen["test"] == {32, 36, 38, 44, 45}
