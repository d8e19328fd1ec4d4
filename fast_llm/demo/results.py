"""The demo's results: losses, a picture, generated text and two exact comparisons."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fast_llm.demo.commands import read
from fast_llm.demo.corpus import VOCABULARY

PROMPTS = ("The function returns a list of", "def __init__(self, ")


def show_losses(metrics: Path, steps: int) -> None:
    """Print validation losses before and after, on the new data (code) and the old (prose)."""
    found = {record["step"]: record for record in read(metrics) if record["phase"] == "validation"}
    print(f"{'validation loss':18} {'before':>8} {'after':>8}")
    for label, key in (
        ("code (learned)", "language_model_loss"),
        ("prose (forgotten)", "prose_loss"),
    ):
        before, after = found[0][key], found[steps][key]
        print(f"{label:18} {before:8.3f} {after:8.3f}   {after - before:+.3f}")


def show_samples(models: Mapping[str, Path], prompts: Iterable[str]) -> None:
    """Print text that models generate, through transformers' pipeline. `models`: by label."""
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipes = {label: pipeline("text-generation", model=str(path)) for label, path in models.items()}
    width = max(map(len, models))
    for prompt in prompts:
        for label, pipe in pipes.items():
            text = pipe(prompt, max_new_tokens=32, do_sample=False, return_full_text=False)[0][
                "generated_text"
            ]
            print(f"{label:{width}} {prompt!r} → {text!r}")


def compare_logits(run_folder: Path, step: int, export: Path) -> bool:
    """Whether transformers' logits with the export equal ours with the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    from fast_llm.checkpoint import state
    from fast_llm.config.document import read as read_yaml
    from fast_llm.config.train import TrainConfig
    from fast_llm.config.validate import validate
    from fast_llm.model.decoder import CausalLM

    config = validate(TrainConfig, read_yaml(run_folder / "config.yaml"))
    ours = CausalLM(config.model.base_model)
    weights = {f"weight/{name}": parameter.detach() for name, parameter in ours.named_parameters()}
    state.load(run_folder / "checkpoint" / str(step), weights)
    for weight in weights.values():
        weight.copy_(weight.bfloat16())  # the precision of the export
    theirs = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokens = torch.randint(VOCABULARY, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, other = ours(tokens, torch.arange(128)[None]), theirs(tokens).logits
    difference = ((mine - other).norm() / other.norm()).item()
    equal: bool = difference < 1e-5
    print(
        f"\n{'✓' if equal else '✗'} logits of the export in transformers differ from the trained"
        f" model's by {difference:.1e}"
    )
    return equal


def compare_runs(undisturbed: Path, killed: Path, steps: int) -> bool:
    """Whether the killed run ended on the same bits as the undisturbed one."""

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

    equal = digests(undisturbed) == digests(killed) and losses(undisturbed) == losses(killed)
    print(
        f"{'✓' if equal else '✗'} the killed run ends on the same losses, weights and moments, bit"
        " for bit"
    )
    return equal


def curves(base: Path, undisturbed: Path) -> dict[str, list[tuple[float, float]]]:
    """The curves of the picture: loss against step, over both runs."""
    first = read(base / "metrics.jsonl")
    second = read(undisturbed / "metrics.jsonl")
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
        across = left + x / right * (width - left - 20)
        down = 20 + (high - y) / (high - low) * (height - bottom - 20)
        return f"{across:.1f},{down:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for tick in range(5):
        y = low + (high - low) * tick / 4
        x = right * tick / 4
        at_y, at_x = place(0, y).split(",")[1], place(x, low).split(",")[0]
        parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{at_y}" y2="{at_y}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 6}" y="{at_y}" text-anchor="end" dominant-baseline="middle">'
            f"{y:.2f}</text>"
        )
        parts.append(
            f'<text x="{at_x}" y="{height - bottom + 18}" text-anchor="middle">{x:.0f}</text>'
        )
    parts.append(
        f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">'
        "step (loss in nats per token)</text>"
    )
    for number, ((label, line), colour) in enumerate(
        zip(lines.items(), ("#888888", "#1f77b4", "#d62728"), strict=True)
    ):
        parts.append(
            f'<polyline points="{" ".join(place(*p) for p in line)}" fill="none"'
            f' stroke="{colour}" stroke-width="2"/>'
        )
        for across, down in (place(*point).split(",") for point in line):
            parts.append(f'<circle cx="{across}" cy="{down}" r="3" fill="{colour}"/>')
        parts.append(
            f'<text x="{width - 180}" y="{34 + 18 * number}" fill="{colour}">{label}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])
