"""The kernels of cpu.cpp: built by the machine's own C++ compiler when they are first needed, and called as operations of PyTorch.

On the CPU PyTorch's attention reaches a tenth to a third of what the processor can, and everything between the products runs in several
passes over memory. Without a compiler nothing here is used: the same numbers within rounding, slower. For fp32 and bf16.

The build takes 3 s, once: it is kept in the user's cache folder, under a digest of the source, PyTorch's version and the processor.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = [
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
]
# Operations, so that the compiler of models leaves them alone and a profile names them. Their arguments are those of cpu.cpp.
_SCHEMAS = {
    "rms_norm": "Tensor(a!) out, Tensor(b!) inverse, Tensor x, Tensor weight, int rows, int width, float epsilon",
    "rms_norm_backward": "Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor grad, Tensor x, Tensor weight, Tensor inverse, int rows,"
    " int width",
    "rotate": "Tensor(a!) out, Tensor x, Tensor cos, Tensor sin, int rows, int heads, int width, float direction",
    "swiglu": "Tensor(a!) out, Tensor gate, Tensor up, int count",
    "swiglu_backward": "Tensor(a!) grad_gate, Tensor(b!) grad_up, Tensor grad, Tensor gate, Tensor up, int count",
    "cross_entropy": "Tensor(a!) logits, Tensor labels, Tensor(b!) log_sums, Tensor(c!) chosen, int rows, int vocabulary, int ignored,"
    " bool known, bool gradient",
    "attention_backward": "Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v, Tensor grad, Tensor out, Tensor log_sums, Tensor q,"
    " Tensor k, Tensor v, Tensor ends, int documents, int queries, int keys, int width",
}
_C_TYPES = {int: ctypes.c_int64, bool: ctypes.c_int64, float: ctypes.c_double}


class _Loaded:
    """What this machine has; filled once. A plain attribute, since the compiler of models would look into a cached function."""

    library: ctypes.CDLL | None = None
    products: tuple[bool, bool] = (False, False)  # of small blocks in fp32, in bf16
    problem: str | None = None  # why there is no library; None: nobody has asked yet


def usable(x: Tensor, products: bool = False) -> bool:
    """Whether the kernels (those that need `products` of small blocks) are for this tensor, and here."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if _Loaded.problem is None:
        load()
    return _Loaded.library is not None and (
        not products or _Loaded.products[x.dtype == torch.bfloat16]
    )


def load() -> str:
    """Build the kernels if need be, and load them; why that is impossible, or nothing."""
    if _Loaded.problem is None:
        _Loaded.problem = ""
        try:
            library = ctypes.CDLL(str(_built()))
            library.kernel.restype, library.kernel.argtypes = (
                ctypes.c_void_p,
                (ctypes.c_char_p, ctypes.c_int64),
            )
            has = [
                ctypes.CFUNCTYPE(ctypes.c_bool)(library.kernel(b"has_products", paired))
                for paired in (0, 1)
            ]
            _Loaded.library, _Loaded.products = library, (has[0](), has[1]())
        except subprocess.CalledProcessError as error:
            _Loaded.problem = (error.stderr.strip() or str(error)).splitlines()[0]
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            _Loaded.problem = str(error)
    return _Loaded.problem


def _built() -> Path:
    """The path of the library, which is built if it is not there."""
    lib = Path(torch.__file__).parent / "lib"
    key = "\n".join([_SOURCE.read_text(), torch.__version__, str(lib), _processor(), *_FLAGS])
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fast_llm"
    path = cached / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        cached.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=cached
        ) as folder:  # many processes may do so at once; the last one wins
            new = Path(folder) / "cpu.so"
            command = [os.environ.get("CXX", "c++"), *_FLAGS, str(_SOURCE), "-o", str(new)]
            command += [f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            new.replace(path)
    return path


def _processor() -> str:
    """What the compiler's `native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(
            line for line in lines[:40] if line.startswith(("model", "flags", "Features", "CPU"))
        )
    except OSError:
        return platform.processor()


def run(name: str, *arguments: Any) -> None:
    """Call a kernel with tensors, which are contiguous, and numbers. It is that for bf16 if any of the tensors is."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    assert all(x.is_contiguous() for x in tensors), name
    kinds = tuple(_C_TYPES.get(type(x), ctypes.c_void_p) for x in arguments)
    function = _function(name, any(x.dtype == torch.bfloat16 for x in tensors), kinds)
    function(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments))


@cache
def _function(name: str, paired: bool, kinds: tuple[Any, ...]) -> Callable[..., None]:
    assert _Loaded.library is not None
    return ctypes.CFUNCTYPE(None, *kinds)(_Loaded.library.kernel(name.encode(), paired))


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fast_llm::{_name}", f"({_schema}) -> ()")
    torch.library.impl(f"fast_llm::{_name}", "cpu", partial(run, _name))
    torch.library.register_fake(f"fast_llm::{_name}", lambda *arguments: None)


def softmax_cross_entropy_(
    logits: Tensor, labels: Tensor, ignored: int, gradient: bool, log_sums: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `triton_kernels.softmax_cross_entropy_`, on the CPU."""
    known = log_sums is not None
    if log_sums is None:
        log_sums = torch.empty(len(labels), dtype=torch.float32)
    chosen = torch.empty_like(log_sums)
    sizes = logits.shape
    torch.ops.fast_llm.cross_entropy(
        logits, labels, log_sums, chosen, *sizes, ignored, known, gradient
    )
    return log_sums, chosen


def take_faster_exact_products() -> bool:
    """Let PyTorch make fp32 products by oneDNN where these are exact in fp32; whether they are made so.

    On AMD's processors MKL, PyTorch's default, keeps to older instructions: 93 GFLOP/s where oneDNN makes 212. "medium" lets
    oneDNN round factors to bf16, which it does with AMX alone (and on Arm): so not there, and not if a product shows it.
    """
    if (
        platform.machine() != "x86_64"
        or not torch.cpu._is_avx512_supported()
        or torch.cpu._is_amx_tile_supported()
    ):
        return False
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(320, 320, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    if float((left @ right - exact).norm() / exact.norm()) > 1e-5:  # fp32 3e-7, bf16 2e-3
        torch.set_float32_matmul_precision(before)
        return False
    return True
