"""Floating-point dtypes of weights, and what each file format calls them. Needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """A floating-point dtype."""

    name: str  # in settings and manifests
    torch: str  # in torch, and in a config.json of Hugging Face
    safetensors: str  # in the header of a safetensors file
    bytes: int
    aliases: tuple[str, ...] = ()  # torch's other names, also accepted in settings

    @property
    def spellings(self) -> tuple[str, ...]:
        """The names that a setting may use."""
        return self.name, self.torch, *self.aliases


DTYPES = (
    Dtype("fp64", "float64", "F64", 8, ("double",)),
    Dtype("fp32", "float32", "F32", 4, ("float",)),
    Dtype("fp16", "float16", "F16", 2, ("half",)),
    Dtype("bf16", "bfloat16", "BF16", 2),
)
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES}
