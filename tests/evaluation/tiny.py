"""A tiny model with a tokenizer, and tasks in local files, for tests of evaluations."""

import json
import random
from pathlib import Path

_TEXT = (
    "the of and a to in is that it was for on are as with his they at be this from have or by one"
    " had not but what all were when we there can an your which their said if do will each about"
    " how up out them then she many some so these would other into has more her two like him see"
    " time could no make than first been its who now people my made over did down only way find"
)
WORDS = _TEXT.split()
VOCABULARY = 400
CONTEXT = 64  # tokens; some examples are longer


def sentence(chance: random.Random, words: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(words))


def write_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama whose answers differ, with a tokenizer that adds BOS."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    chance = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence(chance, 20) for _ in range(300)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.mul_(5)
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: {kind}
"""
_REST = {
    "tiny_choice": """\
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_last": """\
doc_to_text: "{{question.split(' ')[:-1]|join(' ')}} "
doc_to_target: "{{question.split(' ')[-1]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "tiny_text": """\
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "tiny_generate": """\
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
_KINDS = {
    "tiny_choice": "multiple_choice",
    "tiny_last": "loglikelihood",
    "tiny_text": "loglikelihood_rolling",
    "tiny_generate": "generate_until",
}


def write_tasks(folder: Path) -> Path:
    """Four tasks and the group `tiny` of three, which generate nothing."""
    folder.mkdir(parents=True)
    chance = random.Random(1)
    with (folder / "questions.jsonl").open("w") as file:
        for number in range(30):
            question = {
                "question": sentence(chance, 15 if number % 5 else 90),
                "choices": [sentence(chance, chance.randint(1, 4)) for _ in range(4)],
                "answer": chance.randrange(4),
            }
            file.write(json.dumps(question) + "\n")
    with (folder / "texts.jsonl").open("w") as file:
        for number in range(6):
            file.write(json.dumps({"text": sentence(chance, 30 + 60 * number)}) + "\n")
    for name, rest in _REST.items():
        data = folder / ("texts.jsonl" if name == "tiny_text" else "questions.jsonl")
        head = _TASK.format(name=name, data=data, kind=_KINDS[name])
        (folder / f"{name}.yaml").write_text(head + rest)
    (folder / "group.yaml").write_text("group: tiny\ntask: [tiny_choice, tiny_last, tiny_text]\n")
    return folder
