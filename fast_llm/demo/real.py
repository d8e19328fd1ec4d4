"""`fast-llm demo --real`: a real model learns German manual pages, with and without replay.

SmolLM2-135M continues on German manual pages for 40 steps of 2,048 tokens: once on them alone, once
with 25 % of English prose. Validation watches German, the English of the replay (documents that
are not trained on) and other English, which no run trains on. Then the demo merges the first model
with the base, and measures an average of the second.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fast_llm.demo import create_folder, title
from fast_llm.demo.commands import run
from fast_llm.demo.corpus import write_prose
from fast_llm.demo.manpages import write_german, write_jargon
from fast_llm.demo.results import show_samples
from fast_llm.demo.smollm2 import make_model
from fast_llm.report import NAME as REPORT
from fast_llm.report import write_report
from fast_llm.report.comparison import as_text, compare
from fast_llm.report.records import RunRecords

CONFIG = Path(__file__).with_name("continue-config.yaml")
CACHE = Path("build") / "real"  # the model and Debian's packages, for every demo
STEPS = 40
SETS = ("german", "english", "jargon")
PROMPTS = ("Die Datei wird", "Mit dieser Option", "Paris is the capital of")


def demo_real(name: str) -> None:
    """Run the demo in the folder `name`, which is replaced if it is from an earlier demo.

    Raises UserError.
    """
    started = time.monotonic()
    folder = Path(name)
    create_folder(folder)
    title("SmolLM2-135M, and three texts: German manual pages, Python's documentation, jargon")
    model = make_data()

    title("German alone")
    train(folder, model, "german-alone", shares(0))
    title("German with a replay of 25 % English, and an average of the weights")
    average = ["training.averages.ema.decay=0.9", "training.averages.ema.interval=1"]
    train(folder, model, "with-replay", shares(0.25), *average)

    title("Two more models without training: half-way back to the base, and the average")
    exports = {name: folder / name / "export" for name in ("german-alone", "with-replay")}
    alone = exports["german-alone"] / "llama" / str(STEPS)
    merged = folder / "half-way"
    run("merge", str(merged), str(alone), "--base", str(model), "--weights", "0.5")
    measure(folder, merged, "german-alone-half-way")
    measure(folder, exports["with-replay"] / "llama-ema" / str(STEPS), "with-replay-average")

    title("Text before and after")
    replayed = exports["with-replay"] / "llama" / str(STEPS)
    show_samples({"before": model, "alone": alone, "replay": replayed}, PROMPTS)

    title("What was learned (german) and forgotten (english, jargon), in nats per token")
    runs = ["german-alone", "with-replay", "german-alone-half-way", "with-replay-average"]
    page = report(folder, runs)
    print(f"\nThe demo took {time.monotonic() - started:.0f} s.")
    print(f"The report, a page for a browser: {page}")


def train(folder: Path, model: Path, name: str, *settings: str) -> None:
    """Continue the model; `name` of the run."""
    run("train", "gpt", "--config", str(CONFIG), *paths(folder / name, model), *settings)


def measure(folder: Path, model: Path, name: str, *settings: str) -> None:
    """Measure the losses of a model without training it; `name` of the run."""
    without = ["training.train_iters=0", "training.export.interval=null"]
    train(folder, model, name, *settings, *without)


def write_texts(folder: Path, cache: Path) -> None:
    """Write german.jsonl, english.jsonl and jargon.jsonl, as far as they are not in the folder."""
    writers: dict[str, Callable[[Path], int]] = {
        "german": lambda path: write_german(path, cache / "debian"),
        "english": write_prose,
        "jargon": lambda path: write_jargon(path, cache / "debian"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in writers.items():
        path = folder / f"{name}.jsonl"
        if not path.exists():
            partial = folder / f".{name}.jsonl"
            write(partial)
            partial.rename(path)
        print(f"{name}: {path.stat().st_size / 1e6:.1f} MB in {path}", flush=True)


def make_data(cache: Path = CACHE) -> Path:
    """Make the model, and cache/tokens/german.json and so on, as far as they are not there.

    Returns the model's folder. Raises UserError if a package of Python or Debian is missing.
    """
    model = make_model(cache)
    if all((cache / "tokens" / f"{name}.json").exists() for name in SETS):
        print(f"the texts are in {cache}/tokens already", flush=True)
        return model
    write_texts(cache / "texts", cache)
    for name in SETS:
        run(
            *("prepare", "gpt_memmap", f"output_path={cache}/tokens/{name}"),
            *(f"dataset.path={cache}/texts/{name}.jsonl", f"tokenizer.path={model}"),
        )
    return model


def paths(run_folder: Path, model: Path, cache: Path = CACHE) -> list[str]:
    """The settings that say where the data, the model and the run are."""
    tokens = cache / "tokens"
    return [
        *(f"data.sources.{source}.path={tokens}/{source}.json" for source in ("german", "english")),
        f"data.validation_sets.jargon={tokens}/jargon.json",
        f"pretrained.path={model}",
        f"run.experiment_dir={run_folder}",
    ]


def shares(replay: float) -> str:
    """The setting of the shares of German and English in training."""
    return f"data.stages=[{{weights: {{german: {1 - replay:g}, english: {replay:g}}}}}]"


def report(folder: Path, names: Sequence[str]) -> Path:
    """Print what each run learned and forgot, and write the page of all. Returns where."""
    records = [RunRecords(folder / name) for name in names]
    for one in records:
        one.update()
    found = compare(records, names)
    assert found is not None
    print(as_text(found), flush=True)
    return write_report([str(folder / name) for name in names], str(folder / REPORT))
