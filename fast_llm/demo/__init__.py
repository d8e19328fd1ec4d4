"""Everything once, on this machine: `fast-llm demo`.

Real text that every Python carries, and the product's own commands: a tokenizer is trained, prose and code are
prepared, a small Llama is pretrained on prose and exported, and continued on code with the recipe's YAML,
changed by nothing but sizes and paths. Then what was learned and what was forgotten is shown, that
transformers computes the same with the export, and that a run that is killed ends on the same bits.
"""

import ast
import hashlib
import json
import pydoc_data.topics
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fast_llm.errors import UserError

RECIPE = Path(__file__).with_name("train-config.yaml")
VOCABULARY = 4096
PROMPTS = {"prose": "The function returns a list of", "code": "def __init__(self, "}
# A Llama of 1.3 million parameters; sizes that two cores train in minutes.
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
SIZES = (
    "batch.micro_batch_size=8",
    "batch.batch_size=8",
    "batch.sequence_length=256",
    "training.validation.iterations=6",
    "data.split=[90,10,0]",
)


def demo(name: str) -> None:
    """Run all of it in the folder `name`, which is made anew."""
    started = time.monotonic()
    folder = Path(name)
    if folder.exists():
        if not (folder / ".fast-llm-demo").exists():
            raise UserError(
                f"{folder}: is there already and not from an earlier demo; give another folder"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / ".fast-llm-demo").touch()

    title(
        "Text that this Python carries: its reference documentation as prose, its standard library as code"
    )
    prose, code = write_prose(folder / "prose.jsonl"), write_code(folder / "code")
    print(
        f"prose: {prose / 1e6:.1f} MB in {folder}/prose.jsonl     code: {code / 1e6:.1f} MB in {folder}/code/"
    )

    title("A tokenizer, and the shape of a small Llama 3.1")
    model = folder / "shape"
    train_tokenizer(folder, model)
    (model / "config.json").write_text(json.dumps(SHAPE, indent=2))
    print(f"{VOCABULARY} tokens, in {model}/tokenizer.json")

    title("Documents to token files")
    run(
        "prepare",
        "gpt_memmap",
        f"output_path={folder}/prose",
        f"dataset.path={folder}/prose.jsonl",
        f"tokenizer.path={model}",
    )
    run(
        "prepare",
        "gpt_memmap",
        f"output_path={folder}/code-tokens",
        f"dataset.path={folder}/code",
        f"tokenizer.path={model}",
    )

    title("Pretraining on prose, from random weights")
    base = folder / "prose-run"
    run(
        *("train", "gpt", "--config", str(RECIPE)),
        *SIZES,
        *(
            f"data.path={folder}/prose.json",
            f"pretrained.path={model}",
            "pretrained.model_weights=no",
        ),
        *(
            "training.train_iters=280",
            "training.validation.interval=140",
            "training.logs.interval=20",
        ),
        *("training.checkpoint.interval=280", "training.export.interval=280"),
        *("optimizer.learning_rate.base=3e-3", "optimizer.learning_rate.minimum=3e-4"),
        *(
            "optimizer.learning_rate.warmup_iterations=20",
            "optimizer.learning_rate.decay_iterations=280",
        ),
        f"run.experiment_dir={base}",
    )
    pretrained = base / "export" / "llama" / "280"

    title("Continued pretraining on code, with the recipe's YAML")
    steps, half = 120, 50
    recipe = (
        *("train", "gpt", "--config", str(RECIPE)),
        *SIZES,
        *(
            f"data.path={folder}/code-tokens.json",
            f"data.validation_sets.prose={folder}/prose.json",
        ),
        f"pretrained.path={pretrained}",
        *(
            f"training.train_iters={steps}",
            "training.validation.interval=60",
            "training.logs.interval=10",
        ),
        *("training.checkpoint.interval=20", f"training.export.interval={steps}"),
        *("optimizer.learning_rate.base=1e-3", "optimizer.learning_rate.minimum=1e-4"),
        *(
            "optimizer.learning_rate.warmup_iterations=10",
            f"optimizer.learning_rate.decay_iterations={steps}",
        ),
    )
    whole, broken = folder / "code-run", folder / "killed-run"
    run(*recipe, f"run.experiment_dir={whole}")
    continued = whole / "export" / "llama" / str(steps)

    title("The same run, killed half-way and started again")
    killed_at = run_and_kill(
        [*recipe, f"run.experiment_dir={broken}"], broken / "metrics.jsonl", half
    )
    print(f"killed with SIGKILL after step {killed_at}")
    run(*recipe, f"run.experiment_dir={broken}")

    title("What came of it")
    show_losses(whole / "metrics.jsonl", steps)
    picture = folder / "losses.svg"
    picture.write_text(draw(curves(base, whole)))
    print(f"as a picture: {picture}\n")
    show_samples(pretrained, continued)
    checks = [
        compare_logits(whole, steps, continued),
        compare_runs(whole, broken, steps),
    ]
    activate = Path(sys.prefix) / "bin" / "activate"
    first = (
        f", after `source {activate}`"
        if shutil.which("fast-llm") is None and activate.exists()
        else ""
    )
    print(
        f"\nThe demo took {time.monotonic() - started:.0f} s. Three commands to try next{first}:\n"
    )
    print(f"  fast-llm train gpt --config {RECIPE} --validate data.path={folder}/code-tokens.json "
          f"pretrained.path={pretrained} {' '.join(SIZES)}")  # fmt: skip
    print(
        f"  torchrun --nproc_per_node 2 --no-python {' '.join(words([*recipe, f'run.experiment_dir={folder}/two']))}"
    )
    print(
        f"  fast-llm convert gpt input.path={whole}/checkpoint/{steps} output.path={folder}/fp32 output.data_type=fp32"
    )
    if not all(checks):
        raise UserError(
            "the demo found a difference where there must be none; please report it with the output above"
        )


def title(text: str) -> None:
    """A heading on the terminal."""
    print(f"\n━━ {text}", flush=True)


def words(arguments: list[str]) -> list[str]:
    """A command as one would type it."""
    return [shlex.quote(word) for word in ("fast-llm", *arguments)]


def command(arguments: list[str]) -> list[str]:
    """The same command, run by this Python."""
    return [sys.executable, "-m", "fast_llm.cli", *arguments]


def run(*arguments: str) -> None:
    """Show a command and run it; a failure ends the demo."""
    print("$ " + " ".join(words(list(arguments))), flush=True)
    code = subprocess.run(command(list(arguments)), check=False).returncode
    if code:
        raise UserError(f"the command above ended with exit code {code}")


def run_and_kill(arguments: list[str], metrics: Path, step: int) -> int:
    """Start a command and kill it once its metrics have reached a step; the step that they had reached."""
    print("$ " + " ".join(words(arguments)), flush=True)
    with subprocess.Popen(
        command(arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            reached = max((r["step"] for r in read(metrics) if r["phase"] == "training"), default=0)
            if reached >= step:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.05)
        process.wait()
    return reached


def read(metrics: Path) -> list[dict[str, Any]]:
    """The records of a run so far; the last line may be half written."""
    if not metrics.exists():
        return []
    lines = metrics.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def write_prose(path: Path) -> int:
    """The language reference and the docstrings of the standard library, as JSON lines; how many bytes."""
    documents = list(pydoc_data.topics.topics.values())
    for source in sources():
        try:
            tree = ast.parse(source.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        texts = [
            ast.get_docstring(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        document = "\n\n".join(text for text in texts if text)
        if len(document) > 200:
            documents.append(document)
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return sum(map(len, documents))


def write_code(folder: Path) -> int:
    """The sources of the standard library, a file each; how many bytes."""
    folder.mkdir()
    size = 0
    root = Path(sysconfig.get_paths()["stdlib"])
    for source in sources():
        target = folder / "_".join(source.relative_to(root).parts)
        shutil.copyfile(source, target)
        size += target.stat().st_size
    return size


def sources() -> Iterator[Path]:
    """Source files of the standard library, its tests and what was installed left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    unwanted = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "turtledemo",
        "__pycache__",
    }
    for path in sorted(root.rglob("*.py")):
        if not unwanted & set(path.relative_to(root).parts) and path.stat().st_size < 200_000:
            yield path


def train_tokenizer(folder: Path, model: Path) -> None:
    """A byte-level BPE that puts BOS in front, as Llama 3's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [json.loads(line)["text"] for line in (folder / "prose.jsonl").read_text().splitlines()]
    texts += [
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted((folder / "code").iterdir())[::4]
    ]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A",
        pair=f"{special[0]} $A {special[0]} $B",
        special_tokens=[(special[0], 0), (special[1], 1)],
    )
    model.mkdir()
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": special[0],
                "eos_token": special[1],
                "model_max_length": 131072,
            },
            indent=2,
        )
    )
    (model / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": 1}, indent=2)
    )


def show_losses(metrics: Path, steps: int) -> None:
    """Validation losses before and after, on what was learned and on what could be forgotten."""
    found = {record["step"]: record for record in read(metrics) if record["phase"] == "validation"}
    print(f"{'validation loss':18} {'before':>8} {'after':>8}")
    for label, key in (
        ("code (learned)", "language_model_loss"),
        ("prose (forgotten)", "prose_loss"),
    ):
        before, after = found[0][key], found[steps][key]
        print(f"{label:18} {before:8.3f} {after:8.3f}   {after - before:+.3f}")


def show_samples(before: Path, after: Path) -> None:
    """What both models write, through transformers' pipeline."""
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for label, folder in (("before", before), ("after", after)):
        pipe = pipeline("text-generation", model=str(folder))
        for prompt in PROMPTS.values():
            text = pipe(prompt, max_new_tokens=32, do_sample=False, return_full_text=False)[0][
                "generated_text"
            ]
            print(f"{label:6} {prompt!r} → {text!r}")


def compare_logits(run_folder: Path, step: int, export: Path) -> bool:
    """Whether transformers computes with the export what this project computes with the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    from fast_llm.checkpoint import state
    from fast_llm.config.section import read as read_yaml
    from fast_llm.config.section import validate
    from fast_llm.config.train import TrainConfig
    from fast_llm.model.llama import Llama

    config = validate(TrainConfig, read_yaml(run_folder / "config.yaml"))
    ours = Llama(config.model.base_model)
    weights = {f"weight/{name}": parameter.detach() for name, parameter in ours.named_parameters()}
    state.load(run_folder / "checkpoint" / str(step), weights)
    for weight in weights.values():
        weight.copy_(weight.bfloat16())  # the precision of the export
    theirs = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokens = torch.randint(VOCABULARY, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, other = ours(tokens, torch.arange(128)[None]), theirs(tokens).logits
    difference = ((mine - other).norm() / other.norm()).item()
    right: bool = difference < 1e-5
    print(
        f"\n{'✓' if right else '✗'} logits of the export in transformers differ from the trained model's by {difference:.1e}"
    )
    return right


def compare_runs(whole: Path, broken: Path, steps: int) -> bool:
    """Whether the killed run ended on the same bits as the one that was left alone."""

    def digests(folder: Path) -> list[str]:
        files = sorted((folder / "checkpoint" / str(steps)).glob("*.safetensors"))
        files.append(folder / "export" / "llama" / str(steps) / "model.safetensors")
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    def losses(folder: Path) -> dict[int, float]:
        return {
            r["step"]: r["language_model_loss"]
            for r in read(folder / "metrics.jsonl")
            if r["phase"] == "training"
        }

    right = digests(whole) == digests(broken) and losses(whole) == losses(broken)
    print(
        f"{'✓' if right else '✗'} the killed run ends on the same losses, weights and moments, bit for bit"
    )
    return right


def curves(base: Path, whole: Path) -> dict[str, list[tuple[float, float]]]:
    """What the picture shows: loss against step over both runs."""
    first = read(base / "metrics.jsonl")
    second = read(whole / "metrics.jsonl")
    offset = max(r["step"] for r in first)

    def points(
        records: list[dict[str, Any]], phase: str, key: str, shift: int
    ) -> list[tuple[float, float]]:
        return [(r["step"] + shift, r[key]) for r in records if r["phase"] == phase and key in r]

    return {
        "training": points(first, "training", "language_model_loss", 0)
        + points(second, "training", "language_model_loss", offset),
        "prose (validation)": points(first, "validation", "language_model_loss", 0)
        + points(second, "validation", "prose_loss", offset),
        "code (validation)": points(second, "validation", "language_model_loss", offset),
    }


def draw(lines: dict[str, list[tuple[float, float]]]) -> str:
    """Curves as an SVG picture."""
    width, height, left, bottom = 720, 360, 50, 40
    points = [point for line in lines.values() for point in line]
    right = max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)

    def place(x: float, y: float) -> str:
        return f"{left + x / right * (width - left - 20):.1f},{20 + (high - y) / (high - low) * (height - bottom - 20):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for tick in range(5):
        y = low + (high - low) * tick / 4
        x = right * tick / 4
        at_y, at_x = place(0, y).split(",")[1], place(x, low).split(",")[0]
        parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{at_y}" y2="{at_y}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 6}" y="{at_y}" text-anchor="end" dominant-baseline="middle">{y:.2f}</text>'
        )
        parts.append(
            f'<text x="{at_x}" y="{height - bottom + 18}" text-anchor="middle">{x:.0f}</text>'
        )
    parts.append(
        f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">step (loss in nats per token)</text>'
    )
    for number, ((label, line), colour) in enumerate(
        zip(lines.items(), ("#888888", "#1f77b4", "#d62728"), strict=True)
    ):
        parts.append(
            f'<polyline points="{" ".join(place(*p) for p in line)}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{place(*p).replace(",", chr(34) + " cy=" + chr(34))}" r="3" fill="{colour}"/>'
            for p in line
        ]
        parts.append(
            f'<text x="{width - 180}" y="{34 + 18 * number}" fill="{colour}">{label}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])
