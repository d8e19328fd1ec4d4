"""C++ kernels for the CPU (cpu.cpp): compiled by the machine's own compiler at first use, called as
PyTorch operators.

PyTorch's attention on the CPU reaches a tenth to a third of what the processor can, and everything
between the matmuls makes several passes over memory. Without a compiler these kernels are not used:
the results are the same within rounding, and training is slower. They support fp32 and bf16.

Compiling takes 3 s. The library is kept in the user's cache folder, under a digest of the source,
PyTorch's version and the processor.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
# Custom operators: opaque to torch.compile, and named in profiles. Their arguments are those of
# cpu.cpp.
_SCHEMAS = {
    "rms_norm": "Tensor(a!) out, Tensor(b!) inverse, Tensor x, Tensor weight, int rows, int width,"
    " float epsilon",
    "rms_norm_backward": "Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor grad, Tensor x,"
    " Tensor weight, Tensor inverse, int rows, int width",
    "rotate": "Tensor(a!) out, Tensor x, Tensor cos, Tensor sin, int rows, int heads, int width,"
    " int rotated, float direction",
    "swiglu": "Tensor(a!) out, Tensor gate, Tensor up, int count",
    "swiglu_backward": "Tensor(a!) grad_gate, Tensor(b!) grad_up, Tensor grad, Tensor gate,"
    " Tensor up, int count",
    "cross_entropy": "Tensor(a!) logits, Tensor labels, Tensor(b!) log_sums, Tensor(c!) chosen,"
    " int rows, int vocabulary, int ignore_index, bool known, bool gradient, float z_loss",
    "attention_backward": "Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v, Tensor grad,"
    " Tensor out, Tensor log_sums, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens,"
    " int documents, int queries, int keys, int width, int window, float scale, float softcap",
}
_C_TYPES = {int: ctypes.c_int64, bool: ctypes.c_int64, float: ctypes.c_double}


class _Loaded:
    """The library, once loaded. In attributes: torch.compile would trace a cached function."""

    library: ctypes.CDLL | None = None
    has_matmul: tuple[bool, bool] = (False, False)  # of small blocks, in fp32 and in bf16
    problem: str | None = None  # why there is no library, or ""; None before `load` was called


def usable(x: Tensor, matmul: bool = False) -> bool:
    """Whether the kernels are loaded and support x; `matmul`: those that multiply small blocks."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if _Loaded.problem is None:
        load()
    return _Loaded.library is not None and (
        not matmul or _Loaded.has_matmul[x.dtype == torch.bfloat16]
    )


def load(again: bool = False) -> str:
    """Compile the kernels if needed and load them; returns why that failed, or an empty string.

    Only the first call does so, unless `again`.
    """
    if again or _Loaded.problem is None:
        _Loaded.problem = ""
        try:
            library = ctypes.CDLL(str(_built()))
            library.kernel.restype, library.kernel.argtypes = (
                ctypes.c_void_p,
                (ctypes.c_char_p, ctypes.c_int64),
            )
            has = [
                ctypes.CFUNCTYPE(ctypes.c_bool)(library.kernel(b"has_matmul", paired))
                for paired in (0, 1)
            ]
            _Loaded.library, _Loaded.has_matmul = library, (has[0](), has[1]())
        except subprocess.CalledProcessError as error:
            _Loaded.problem = (error.stderr.strip() or str(error)).splitlines()[0]
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            _Loaded.problem = str(error)
    return _Loaded.problem


@contextmanager
def disabled() -> Iterator[None]:
    """Compute with PyTorch's operations, as on a machine without a C++ compiler."""
    before = _Loaded.library, _Loaded.problem
    _Loaded.library, _Loaded.problem = None, "disabled"
    try:
        yield
    finally:
        _Loaded.library, _Loaded.problem = before


def _built() -> Path:
    """The path of the compiled library; compiles it if it is not in the cache."""
    lib = Path(torch.__file__).parent / "lib"
    key = "\n".join([_SOURCE.read_text(), torch.__version__, str(lib), _processor(), *_FLAGS])
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fast_llm"
    path = cached / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        cached.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=cached
        ) as folder:  # several processes may compile at once; the last one wins
            new = Path(folder) / "cpu.so"
            command = [os.environ.get("CXX", "c++"), *_FLAGS, str(_SOURCE), "-o", str(new)]
            command += [f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            new.replace(path)
    return path


def _processor() -> str:
    """The processor, as far as the compiler's `-march=native` depends on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(
            line for line in lines[:40] if line.startswith(("model", "flags", "Features", "CPU"))
        )
    except OSError:
        return platform.processor()


def run(name: str, *arguments: Any) -> None:
    """Call a kernel with contiguous tensors and numbers: for bf16 if any tensor is, else fp32."""
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
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    gradient: bool,
    log_sums: Tensor | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`softmax_cross_entropy_` of kernels/triton.py, on the CPU."""
    known = log_sums is not None
    if log_sums is None:
        log_sums = torch.empty(len(labels), dtype=torch.float32)
    chosen = torch.empty_like(log_sums)
    sizes = logits.shape
    torch.ops.fast_llm.cross_entropy(
        logits, labels, log_sums, chosen, *sizes, ignore_index, known, gradient, z_loss
    )
    return log_sums, chosen


def use_faster_exact_matmul() -> bool:
    """Let PyTorch compute fp32 matmuls with oneDNN for this process, if they stay exact; returns
    whether it does.

    On AMD's processors MKL, PyTorch's default, uses older instructions: 93 GFLOP/s where oneDNN
    reaches 212. The precision "medium" allows oneDNN to round operands to bf16, which it does only
    with AMX (and on Arm). So it is not set there, and not if a test matmul is inexact.
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
