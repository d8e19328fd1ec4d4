"""The files in examples/, as far as a machine without a cluster can check them.

Configurations of training pass `--validate` and fit their GPUs by the planner's forecast. Launchers
have valid syntax and Kubernetes' own schemas; their exact torchrun lines run as two nodes of this
machine. tests/slurm runs slurm.sbatch under a real Slurm.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kubernetes_validate
import numpy as np
import pytest
import yaml

from fast_llm.cli import main
from fast_llm.data.tokenfile import TokenFileWriter
from fast_llm.terminal import counted
from tests.helpers import slow, some_fast
from tests.training.runs import losses, settings, write_tokens

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"


def model(
    layers: int, hidden: int, heads: int, groups: int, inner: int, vocabulary: int
) -> dict[str, Any]:
    """config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": hidden < 4096,
    }


# Processes, and the pretrained model.
TRAIN = {
    "cpu": (1, model(30, 576, 9, 3, 1536, 49_152)),
    "from-scratch": (8, None),
    "long-context": (8, model(32, 4096, 32, 8, 14_336, 128_256)),
    "many-nodes": (64, model(32, 4096, 32, 8, 14_336, 128_256)),
    "one-gpu": (1, model(16, 2048, 32, 8, 8192, 128_256)),
    "one-node": (8, model(32, 4096, 32, 8, 14_336, 128_256)),
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dataset.json of a hundred documents, each longer than any example's sequences."""
    folder = tmp_path_factory.mktemp("tokens")
    writer = TokenFileWriter(folder / "tokens", np.dtype("uint16"))
    for number in range(100):
        writer.append(np.full(140_000, number, "uint16"))
    writer.close()
    entry = {"prefix": "tokens", "num_tokens": 100 * 140_000, "weight": 1}
    (folder / "dataset.json").write_text(json.dumps({"datasets": [entry]}))
    return folder / "dataset.json"


@pytest.mark.parametrize(
    "name",
    some_fast(
        sorted(path.stem for path in (EXAMPLES / "train").glob("*.yaml")),
        {"cpu", "from-scratch", "one-gpu", "one-node"}.__contains__,  # others compare many layouts
    ),
)
def test_training_configurations(
    name: str,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Overridden are only paths, and the validation share of small data."""
    processes, config = TRAIN[name]
    given = []
    if config is None:
        tokenizer = ROOT / "tests" / "fixtures" / "v0.1" / "a" / "tokenizer"
        given += [f"data.tokenizer.path={tokenizer}"]
    else:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        given += [f"pretrained.path={tmp_path}/model"]
    file = ["--config", str(EXAMPLES / "train" / f"{name}.yaml")]
    if name != "cpu":
        assert main(["plan", *file, "--gpus", str(processes), "--device", "h100", *given]) == 0
        configured, _, _ = capsys.readouterr().out.partition("The fastest that fit")
        assert "GB: fits" in configured, configured
    given += [f"data.path={tokens}", "data.split=[1,1,0]", "training.validation.iterations=1"]
    given += ["run.experiment_dir=null"]  # a checkpoint of 8B needs more disk than this machine has
    given += ["pretrained.model_weights=no"] if config else []
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert main(["train", "gpt", *file, "--validate", *given]) == 0, capsys.readouterr().err


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def line_of(name: str) -> str:
    """The command line of a node."""
    if name.endswith(".yaml"):
        job = documents(name)[-1]["spec"]
        template = (
            job["template"]
            if "template" in job
            else job["pytorchReplicaSpecs"]["Worker"]["template"]
        )
        (container,) = template["spec"]["containers"]
        (text,) = container["args"]
        given = "".join(
            f": ${{{one['name']}:={one['value']}}}; export {one['name']}\n"
            for one in container["env"]
        )
        return f"{given}{text}"
    text = (EXAMPLES / name).read_text()
    inner = re.search(r"srun .* bash -c '\n(.*?)'", text, flags=re.S)
    return inner[1] if inner else text


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.s*")))
def test_shell_syntax(name: str) -> None:
    assert subprocess.run(["bash", "-n", str(EXAMPLES / name)], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_kubernetes_schemas(name: str) -> None:
    """Kubernetes has no schema of a PyTorchJob, but of its pods."""
    checked = []
    for document in documents(name):
        if document["kind"] == "PyTorchJob":
            spec = document["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
            document = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": document["metadata"],
                "spec": spec,
            }
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        checked.append(document)
        broken = document | {"spec": document["spec"] | {"templates": 1}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)
    assert checked


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def nodes(
    text: str,
    place: Path,
    count: int,
    *overrides: str,
    head: str = "localhost",
    hosts: list[list[str]] | None = None,
) -> list["subprocess.Popen[str]"]:
    """Start an example's line on `count` nodes; `hosts` has the prefix of a command for each."""
    write_tokens(place / "tokens", 400)
    nested: dict[str, Any] = {}
    for override in settings(place, "batch.micro_batch_size=1", *overrides):
        name, _, value = override.partition("=")
        section = nested
        for key in name.split(".")[:-1]:
            section = section.setdefault(key, {})
        section[name.rpartition(".")[2]] = (
            yaml.safe_load(value) if "e-" not in value else float(value)
        )
    (place / "train-config.yaml").write_text(yaml.safe_dump(nested))
    port = str(free_port())
    environment = os.environ | {
        "PATH": f"{place}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        **{
            "CONFIG": "train-config.yaml",
            "GPUS": "1",
            "NODES": str(count),
            "HEAD": head,
            "PORT": port,
        },
        **{"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "nodes[1-2]"},
        **{"PET_NNODES": f"1:{count}", "PET_NPROC_PER_NODE": "1", "PET_RDZV_BACKEND": "c10d"},
        **{"PET_RDZV_ENDPOINT": f"localhost:{port}", "PET_MAX_RESTARTS": "3"},
    }
    return [
        subprocess.Popen(
            [*host, "bash", "-c", text],
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for host in hosts or [[]] * count
    ]


@contextmanager
def networks() -> Iterator[list[list[str]]]:
    """Two network namespaces with a virtual cable between them, each with a host name."""
    names = [f"fast-llm-{os.getpid()}-{number}" for number in (1, 2)]
    first, second = names
    commands = [f"netns add {first}", f"netns add {second}"]
    commands += [f"link add eth0 netns {first} type veth peer name eth0 netns {second}"]
    for number, name in enumerate(names, start=1):
        commands += [f"-n {name} addr add 10.77.0.{number}/24 dev eth0"]
        commands += [f"-n {name} link set {device} up" for device in ("lo", "eth0")]
    try:
        for command in commands:
            try:
                done = subprocess.run(
                    ["ip", *command.split()], check=False, capture_output=True, text=True
                )
            except FileNotFoundError:
                pytest.skip("there is no `ip`")
            if done.returncode:
                pytest.skip(f"no networks can be made here: ip {command}: {done.stderr.strip()}")
        renamed = ["unshare", "--uts", "bash", "-c"]
        yield [
            ["ip", "netns", "exec", name, *renamed, f'hostname 10.77.0.{number}; exec "$@"', "_"]
            for number, name in enumerate(names, start=1)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def ends(started: list["subprocess.Popen[str]"]) -> list[str]:
    """The outputs, once all commands have ended with exit code 0."""
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)[
        -4000:
    ]
    return said


@slow
@pytest.mark.parametrize(
    "name", ["one-node.sh", "kubernetes-job.yaml", "kubernetes-pytorchjob.yaml"]
)
def test_nodes_train_together(tmp_path: Path, name: str) -> None:
    count = 1 if name == "one-node.sh" else 2
    said = ends(nodes(line_of(name), tmp_path, count, "training.train_iters=3"))
    assert losses(tmp_path / "run").keys() == {1, 2, 3}
    assert any("Training is complete" in text for text in said)
    assert f"× {counted(count, 'process', 'processes')}" in "".join(said)


@slow
def test_nodes_of_two_networks(tmp_path: Path) -> None:
    """A node's own address is not used for another node."""
    with networks() as hosts:
        text = line_of("slurm.sbatch")
        said = ends(
            nodes(text, tmp_path, 2, "training.train_iters=3", head="10.77.0.1", hosts=hosts)
        )
    assert losses(tmp_path / "run").keys() == {1, 2, 3}
    assert "× 2 processes" in "".join(said)
