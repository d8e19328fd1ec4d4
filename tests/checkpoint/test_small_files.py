"""Small files that exports copy: from a model's folder, through links, from the Hub."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import huggingface
from fast_llm.checkpoint.weights import export_hugging_face
from fast_llm.errors import CheckpointError
from tests import hub

SMALL = {
    "LICENSE": b"free",
    "README.md": b"---\nlicense: mit\n---\n# A model",
    "added_tokens.json": b"{}",
    "additional_chat_templates/rag.jinja": b"{{ documents }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "assets/plot.png": b"\x89PNG",
    "chat_template.jinja": b"{{ messages }}",
    "chat_template.json": b'{"chat_template": "{{ messages }}"}',
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b'{"temperature": 0.6}',
    "merges.txt": b"a b",
    "original/params.json": b'{"dim": 4096}',
    "original/tokenizer.model": b"\x0a\x00",
    "special_tokens_map.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"\x0a\x01",
    "tokenizer_config.json": b'{"model_max_length": 8192}',
}
LARGE = (
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "optimizer.pt",
    "original/consolidated.00.pth",
    "onnx/model.onnx",
    "model-Q4_K_M.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
    "data.zip",
)
HIDDEN = (
    ".gitattributes",
    ".git/config",
    ".cache/huggingface/download/x.lock",
    "additional_chat_templates/.DS_Store",
)
OTHER = ("checkpoint-500/config.json", "checkpoint-500/tokenizer.json", folders.MANIFEST)


def write(folder: Path, *further: str) -> Path:
    for name, content in {**SMALL, **dict.fromkeys(further, b"x")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_everything_but_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert huggingface.small_files(write(tmp_path, *LARGE, *HIDDEN, *OTHER)) == SMALL
    assert caplog.text == ""


def test_what_is_too_large_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(huggingface, "LARGEST_SMALL", 2**20)
    write(tmp_path)
    for name in ("a.txt", "video.mp4", "tokenizer.json"):
        (tmp_path / name).write_bytes(bytes(2**20 + 1))
    os.mkfifo(tmp_path / "pipe")  # reading it would block
    with caplog.at_level(logging.WARNING):
        found = huggingface.small_files(tmp_path)
    assert found.keys() == SMALL.keys() and len(found["tokenizer.json"]) > 2**20
    assert (
        f"{tmp_path}: exports will not have a.txt, pipe, video.mp4: larger than 1 MiB, not a file,"
        " or" in caplog.text
    )
    monkeypatch.setattr(huggingface, "LARGEST_TOTAL", 2**20 + 40)
    assert sum(map(len, huggingface.small_files(tmp_path).values())) <= 2**20 + 40


def test_the_hubs_cache_is_made_of_links(tmp_path: Path) -> None:
    blobs, snapshot = (
        tmp_path / "models--org--name" / "blobs",
        tmp_path / "models--org--name" / "snapshots" / "0123",
    )
    blobs.mkdir(parents=True)
    for number, (name, content) in enumerate(SMALL.items()):
        (blobs / f"{number:040x}").write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(
            os.path.relpath(blobs / f"{number:040x}", (snapshot / name).parent)
        )
    assert huggingface.small_files(snapshot) == SMALL


def test_a_folder_of_links_to_a_model(tmp_path: Path) -> None:
    """A folder of links as `cp -rs` makes it; also with another model's tokenizer."""
    model = write(tmp_path / "model")
    shutil.copytree(
        model, tmp_path / "links", copy_function=lambda source, target: os.symlink(source, target)
    )
    assert huggingface.small_files(tmp_path / "links") == SMALL
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_bytes(b"{}")
    (tmp_path / "mine" / "tokenizer.json").symlink_to(model / "tokenizer.json")
    (tmp_path / "linked").symlink_to(model)
    assert huggingface.small_files(tmp_path / "mine").keys() == {"config.json", "tokenizer.json"}
    assert huggingface.small_files(tmp_path / "linked") == SMALL


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "chat_template.jinja", "tokenizer.json", "additional_chat_templates/a.jinja"],
)
@pytest.mark.parametrize("kind", ["absolute", "relative", "folder", "loop"])
def test_links_to_secrets_are_not_followed(
    tmp_path: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A cloned repository must not copy the user's files into an export."""
    model, secrets = write(tmp_path / "model"), tmp_path / "home"
    secrets.mkdir()
    (secrets / "config.json").write_bytes(b"secret")
    link = model / name
    link.unlink(missing_ok=True)
    if kind == "folder":
        link = model / "secrets"
        link.symlink_to(secrets)
    elif kind == "loop":
        link.symlink_to(link)
    else:
        target = secrets / "config.json"
        link.symlink_to(target if kind == "absolute" else os.path.relpath(target, link.parent))
    with caplog.at_level(logging.WARNING):
        found = huggingface.small_files(model)
    assert b"secret" not in found.values() and link.relative_to(model).as_posix() not in found
    assert "a link out of the folder" in caplog.text or kind == "folder"


def test_from_the_hub(tmp_path: Path) -> None:
    """With the Hub's real client, with and without weights; then offline, from its cache."""
    write(tmp_path / "hub" / "models" / "org" / "name", *LARGE, *HIDDEN)
    (tmp_path / "hub" / "models" / "org" / "name" / "sub").mkdir()
    (tmp_path / "hub" / "models" / "org" / "name" / "sub" / "model.safetensors").write_bytes(
        b"second"
    )
    code = (
        "import sys; from fast_llm.checkpoint import huggingface\n"
        "path = huggingface.fetch('org/name', weights=sys.argv[1] == 'yes')\n"
        "print(*sorted(str(p.relative_to(path)) for p in path.rglob('*') if p.is_file()),"
        " sep='\\n')\n"
        "print('small:', *sorted(huggingface.small_files(path)), sep='\\n')"
    )

    def fetched(weights: str, **environment: str) -> tuple[set[str], set[str]]:
        result = subprocess.run(
            [sys.executable, "-c", code, weights],
            env={**os.environ, "HF_HOME": str(tmp_path / "home"), **environment},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        every, _, small = result.stdout.partition("small:\n")
        return set(every.split()), set(small.split())

    indices = {"model.safetensors.index.json", "pytorch_model.bin.index.json"}
    with hub.serve(tmp_path / "hub") as address:
        assert fetched("no", HF_ENDPOINT=address) == (SMALL.keys() | indices, set(SMALL))
        every, small = fetched("yes", HF_ENDPOINT=address)
    assert every == SMALL.keys() | indices | {
        "model.safetensors",
        "model-00001-of-00002.safetensors",
    }
    assert small == SMALL.keys()
    assert fetched("no", HF_HUB_OFFLINE="1")[1] == SMALL.keys()


def test_exports_hold_files_in_folders(tmp_path: Path) -> None:
    path = tmp_path / "export"
    config = json.loads(SMALL["config.json"])
    weights = {"w": torch.ones(2)}
    export_hugging_face(
        path, weights, config=config, dtype="fp32", files=SMALL, parameters_per_file=9, step=1
    )
    for name, content in SMALL.items():  # config.json too
        assert (path / name).read_bytes() == content
    assert set(folders.verify(path).files) == {*SMALL, "model.safetensors"}
    assert huggingface.small_files(path) == SMALL
    (path / "additional_chat_templates" / "rag.jinja").write_bytes(b"{{ Documents }}")
    with pytest.raises(
        CheckpointError, match=r"rag\.jinja: its content has changed since it was saved"
    ):
        folders.verify(path)
    (path / "additional_chat_templates" / "rag.jinja").unlink()
    assert not folders.is_complete(path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"a": "é", "model_max_length":  512}', '{"a": "é", "model_max_length":  4096}'),
        ('{"model_max_length": 8192}', None),
        ('{"model_max_length": 1000000000000000019884624838656}', None),
        ('{"model_max_length": null}', None),
        ('{"a": 1}', None),
        ("[]", None),
        ("not JSON", None),
        (
            '{"extra": {"model_max_length": 7}, "model_max_length": 512}',
            '{\n  "extra": {\n    "model_max_length": 7\n  },\n  "model_max_length": 4096\n}\n',
        ),
    ],
)
def test_the_tokenizers_limit_is_raised_to_what_was_trained(before: str, after: str | None) -> None:
    found = huggingface.export_files(
        {"tokenizer_config.json": before.encode(), "LICENSE": b"\xff"}, 4096
    )
    assert found == {"tokenizer_config.json": (after or before).encode(), "LICENSE": b"\xff"}
    assert huggingface.export_files({"LICENSE": b""}, 4096) == {"LICENSE": b""}
