"""What can be tested of the GPU suite without a GPU: its message, and its model's shape."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.models.llama import FAMILY
from fast_llm.models.parameters import shapes
from tests.gpu import files
from tests.models.published import LLAMA_8B_JSON

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "this machine has no GPU that PyTorch sees\n"


def test_its_model_is_that_of_the_recipe() -> None:
    given = {name: shape for part in files.shards(32) for name, shape in part.items()}
    config = validate(
        BaseModelConfig, Document(FAMILY.architecture(LLAMA_8B_JSON, "config.json"), {}, "")
    )
    assert given == shapes(config)
    count = sum(math.prod(shape) for shape in given.values())
    assert count == files.HEAD_PARAMETERS + 32 * files.BLOCK_PARAMETERS == 8_030_261_248
