"""Score-and-mask flash attention: output and log-sum-exp, gradient through both, empty tiles never visited."""

from kernels_pallas.flash.api import flash

__all__ = ["flash"]
