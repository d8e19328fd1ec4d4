"""Input files of the suite: the recipe, and a model of Llama-3.1-8B's shape with random weights."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from fast_llm.data.tokenizer_formats import LLAMA3_SPECIAL
from tests.models.published import LLAMA_8B_JSON

BOS, EOS = LLAMA3_SPECIAL[:2]
HEAD = {
    "model.embed_tokens.weight": (128256, 4096),
    "lm_head.weight": (128256, 4096),
    "model.norm.weight": (4096,),
}
BLOCK = {
    "self_attn.q_proj.weight": (4096, 4096),
    "self_attn.k_proj.weight": (1024, 4096),
    "self_attn.v_proj.weight": (1024, 4096),
    "self_attn.o_proj.weight": (4096, 4096),
    "mlp.gate_proj.weight": (14336, 4096),
    "mlp.up_proj.weight": (14336, 4096),
    "mlp.down_proj.weight": (4096, 14336),
    "input_layernorm.weight": (4096,),
    "post_attention_layernorm.weight": (4096,),
}
HEAD_PARAMETERS, BLOCK_PARAMETERS = 1_050_677_248, 218_112_000


def shards(layers: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each weight file: the ends of the model, then eight blocks a file."""
    files = [dict(HEAD)]
    for first in range(0, layers, 8):
        numbers = range(first, min(first + 8, layers))
        files.append(
            {f"model.layers.{n}.{name}": shape for n in numbers for name, shape in BLOCK.items()}
        )
    return files


def write_model(folder: Path, layers: int, tokenizer: Path) -> None:
    """Write a Hugging Face folder with random weights in bf16, four files at a time."""
    shutil.copytree(tokenizer, folder)
    (folder / "config.json").write_text(
        json.dumps(LLAMA_8B_JSON | {"num_hidden_layers": layers}, indent=2) + "\n"
    )
    generator = torch.Generator("cuda").manual_seed(0)
    files = shards(layers)
    names = [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]
    with ThreadPoolExecutor(4) as pool:
        waiting = []
        for name, shapes in zip(names, files, strict=True):
            tensors = {
                tensor: torch.ones(shape, dtype=torch.bfloat16)
                if len(shape) == 1
                else torch.empty(shape, dtype=torch.bfloat16, device="cuda")
                .normal_(0, 0.02, generator=generator)
                .cpu()
                for tensor, shape in shapes.items()
            }
            waiting.append(pool.submit(save_file, tensors, folder / name, {"format": "pt"}))
            del tensors
        for each in waiting:
            each.result()
    index = {tensor: name for name, shapes in zip(names, files, strict=True) for tensor in shapes}
    total = 2 * (HEAD_PARAMETERS + layers * BLOCK_PARAMETERS)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def write_tutorial(place: Path, layers: int, data: Path) -> Path:
    """Write the recipe's YAML, model and data to `place`; return the YAML's path."""
    root = Path(__file__).parent.parent.parent
    tutorial = place / "fast-llm-tutorial"
    tutorial.mkdir(parents=True)
    shutil.copyfile(data / "code.json", tutorial / "dataset.json")
    shutil.copytree(data / "code", tutorial / "code")
    write_model(tutorial / "pretrained-model", layers, data / "code" / "tokenizer")
    return Path(
        shutil.copyfile(
            root / "fast_llm" / "demo" / "train-config.yaml", place / "train-config.yaml"
        )
    )
