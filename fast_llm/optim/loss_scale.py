"""The loss scale: a factor that keeps small fp16 gradients from rounding to zero.

bf16 and fp32 need none (a factor of 1). The scale of fp16 is halved when gradients overflow, and
doubled after `window` updates without overflow (Micikevicius et al. 2018, "Mixed precision
training"). All processes have the same gradient norm, so they compute the same scale without
communication.
"""

from typing import Any

from fast_llm.config.optimizer import GradientScalerConfig


class LossScale:
    """The current factor, and its updates."""

    def __init__(self, config: GradientScalerConfig, dtype: str):
        self.config = config
        self.dynamic = config.constant is None and dtype == "fp16"
        self.value = config.constant or (config.initial if self.dynamic else 1.0)
        self.clean_updates = 0
        self.failures_left = config.hysteresis

    @property
    def exhausted(self) -> bool:
        """Whether a smaller factor is not possible: a non-finite gradient is then an error."""
        return not self.dynamic or self.value <= self.config.minimum

    def update(self, finite: bool) -> None:
        """Adapt to the gradients of a step, which were `finite` or not."""
        if not self.dynamic:
            return
        if not finite:
            self.clean_updates = 0
            self.failures_left -= 1
            if self.failures_left <= 0:
                self.value = max(self.value * 0.5, self.config.minimum)
            return
        self.clean_updates += 1
        if self.clean_updates == self.config.window:
            self.clean_updates = 0
            self.failures_left = self.config.hysteresis
            self.value *= 2

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "value": self.value,
            "clean_updates": self.clean_updates,
            "failures_left": self.failures_left,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from the `state` of a checkpoint; a constant factor keeps its configured
        value.
        """
        if self.dynamic:
            self.value = state["value"]
            self.clean_updates = state["clean_updates"]
            self.failures_left = state["failures_left"]
