"""The texts of tasks that contamination.py looks for."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from fast_llm.evaluation.contamination import Ngrams
from fast_llm.evaluation.harness import reproducible
from fast_llm.evaluation.tasks import quiet

_BATCH = 10_000  # texts


def ngrams_of(loaded: Mapping[str, Any], limit: int | None, tokenizer: Tokenizer) -> Ngrams:
    """The n-grams of loaded tasks (`harness.load`), of at most `limit` examples each.

    `tokenizer`: that of the data.
    """
    tasks = {}
    for name, task in loaded["tasks"].items():
        examples = _texts(task, limit)
        encoded = iter(_encode([text for one in examples for text in one], tokenizer))
        tasks[name] = [[next(encoded) for _ in one] for one in examples]
    return Ngrams(tasks)


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    found = []
    for first in range(0, len(texts), _BATCH):
        batch = tokenizer.encode_batch(list(texts[first:][:_BATCH]), add_special_tokens=False)
        found += [one.ids for one in batch]
    return found


def _texts(task: Any, limit: int | None) -> list[list[str]]:
    """Of each example, its question with each of its answers."""
    settings = {"num_fewshot": 0, "description": ""}
    before = {name: task.get_config(name) for name in settings}
    try:
        for name, value in settings.items():
            task.set_config(key=name, value=value)
        with quiet(), reproducible():
            task.build_all_requests(limit=limit)
        examples: dict[int, list[str]] = {}
        for instance in task.instances:
            text = "".join(part for part in instance.args if isinstance(part, str))
            if instance.request_type == "generate_until":
                target = task.doc_to_target(instance.doc)
                text += f" {target}" if isinstance(target, str) else ""
            examples.setdefault(instance.doc_id, []).append(text)
        return list(examples.values())
    finally:
        for name, value in before.items():
            task.set_config(key=name, value=value)
