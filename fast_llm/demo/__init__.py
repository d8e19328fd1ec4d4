"""`fast-llm demo`: everything once, on this machine, without a network.

The demo trains a tokenizer on text that every Python installation contains, prepares prose and
code, pretrains a small Llama on prose, and continues it on code with the recipe's YAML; only sizes
and paths differ. Then it shows what the model learned and forgot, and checks two things exactly:
transformers computes the same with the export, and a killed run ends on the same bits. It takes a
few minutes on two cores.
"""

import json
import shutil
import sys
import time
from pathlib import Path

from fast_llm.demo.commands import run, run_and_kill, words
from fast_llm.demo.corpus import VOCABULARY, train_tokenizer, write_code, write_prose
from fast_llm.demo.results import (
    PROMPTS,
    compare_logits,
    compare_runs,
    curves,
    draw,
    show_losses,
    show_samples,
)
from fast_llm.errors import UserError
from fast_llm.report import NAME as REPORT

RECIPE = Path(__file__).with_name("train-config.yaml")
# A Llama of 1.3 million parameters, which two CPU cores train in minutes.
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


PRETRAINING_STEPS, STEPS, KILL_AT = 280, 120, 50


def demo(name: str) -> None:
    """Run the demo in the folder `name`, which is replaced if it is from an earlier demo."""
    started = time.monotonic()
    folder = Path(name)
    create_folder(folder)
    model = make_data(folder)
    pretrained = pretrain(folder, model)
    recipe = continued_pretraining(folder, pretrained)
    undisturbed, killed = folder / "code-run", folder / "killed-run"

    title("Continued pretraining on code, with the recipe's YAML")
    run(*recipe, f"run.experiment_dir={undisturbed}")

    title("The same run, killed half-way and started again")
    killed_at = run_and_kill(
        [*recipe, f"run.experiment_dir={killed}"], killed / "metrics.jsonl", KILL_AT
    )
    print(f"killed with SIGKILL after step {killed_at}")
    run(*recipe, f"run.experiment_dir={killed}")

    title("Results")
    continued = undisturbed / "export" / "llama" / str(STEPS)
    show_losses(undisturbed / "metrics.jsonl", STEPS)
    picture = folder / "losses.svg"
    picture.write_text(draw(curves(folder / "prose-run", undisturbed)))
    print(f"as a picture: {picture}\n")
    show_samples({"before": pretrained, "after": continued}, PROMPTS)
    checks = [
        compare_logits(undisturbed, STEPS, continued),
        compare_runs(undisturbed, killed, STEPS),
    ]
    print(f"\nThe demo took {time.monotonic() - started:.0f} s.", end=" ")
    suggest(folder, pretrained, recipe)
    print(f"\nThe report of the run, a page for a browser: {undisturbed / REPORT}")
    if not all(checks):
        raise UserError(
            "the demo found a difference where there must be none; please report it with the"
            " output above"
        )


def create_folder(folder: Path) -> None:
    """Make an empty folder. Raises UserError if it exists and is not from an earlier demo."""
    if folder.exists():
        if not (folder / ".fast-llm-demo").exists():
            raise UserError(
                f"{folder}: exists already and is not from an earlier demo; give another folder"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / ".fast-llm-demo").touch()


def make_data(folder: Path) -> Path:
    """Write prose and code as token files.

    Returns the folder of the model's shape and tokenizer.
    """
    title("Text from this Python installation: its documentation as prose, its library as code")
    prose, code = write_prose(folder / "prose.jsonl"), write_code(folder / "code")
    print(
        f"prose: {prose / 1e6:.1f} MB in {folder}/prose.jsonl"
        f"     code: {code / 1e6:.1f} MB in {folder}/code/"
    )
    title("A tokenizer, and the shape of a small Llama 3.1")
    model = folder / "shape"
    train_tokenizer(folder, model)
    (model / "config.json").write_text(json.dumps(SHAPE, indent=2))
    print(f"{VOCABULARY} tokens, in {model}/tokenizer.json")
    title("Documents to token files")
    for source, output in (("prose.jsonl", "prose"), ("code", "code-tokens")):
        run(
            *("prepare", "gpt_memmap", f"output_path={folder}/{output}"),
            *(f"dataset.path={folder}/{source}", f"tokenizer.path={model}"),
        )
    return model


def pretrain(folder: Path, model: Path) -> Path:
    """Train on prose from random weights. Returns the exported model."""
    title("Pretraining on prose, from random weights")
    base = folder / "prose-run"
    steps = PRETRAINING_STEPS
    run(
        *("train", "gpt", "--config", str(RECIPE)),
        *SIZES,
        f"data.path={folder}/prose.json",
        f"pretrained.path={model}",
        "pretrained.model_weights=no",
        f"training.train_iters={steps}",
        "training.validation.interval=140",
        "training.logs.interval=20",
        f"training.checkpoint.interval={steps}",
        f"training.export.interval={steps}",
        "optimizer.learning_rate.base=3e-3",
        "optimizer.learning_rate.minimum=3e-4",
        "optimizer.learning_rate.warmup_iterations=20",
        f"optimizer.learning_rate.decay_iterations={steps}",
        f"run.experiment_dir={base}",
    )
    return base / "export" / "llama" / str(steps)


def continued_pretraining(folder: Path, pretrained: Path) -> list[str]:
    """The command that continues the model on code, but for run.experiment_dir."""
    return [
        *("train", "gpt", "--config", str(RECIPE)),
        *SIZES,
        f"data.path={folder}/code-tokens.json",
        f"data.validation_sets.prose={folder}/prose.json",
        f"pretrained.path={pretrained}",
        f"training.train_iters={STEPS}",
        "training.validation.interval=60",
        "training.logs.interval=10",
        "training.checkpoint.interval=20",
        f"training.export.interval={STEPS}",
        "optimizer.learning_rate.base=1e-3",
        "optimizer.learning_rate.minimum=1e-4",
        "optimizer.learning_rate.warmup_iterations=10",
        f"optimizer.learning_rate.decay_iterations={STEPS}",
    ]


def suggest(folder: Path, pretrained: Path, recipe: list[str]) -> None:
    """Print three commands to try next."""
    activate = Path(sys.prefix) / "bin" / "activate"
    found = shutil.which("fast-llm") is not None or not activate.exists()
    first = "" if found else f", after `source {activate}`"
    checkpoint = folder / "code-run" / "checkpoint" / str(STEPS)
    print(f"Three commands to try next{first}:\n")
    print(
        f"  fast-llm train gpt --config {RECIPE} --validate data.path={folder}/code-tokens.json"
        f" pretrained.path={pretrained} {' '.join(SIZES)}"
    )
    two = " ".join(words([*recipe, f"run.experiment_dir={folder}/two"]))
    print(f"  torchrun --nproc_per_node 2 --no-python {two}")
    print(
        f"  fast-llm convert gpt input.path={checkpoint} output.path={folder}/fp32"
        " output.data_type=fp32"
    )


def title(text: str) -> None:
    """Print a heading."""
    print(f"\n━━ {text}", flush=True)
