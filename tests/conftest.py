"""Said before jax starts: eight CPU devices for the sharding tests, and quick compilation.

Tests compile much and compute little. Without most optimisations a program compiles in half the time and runs the same
operations in the same precision; benchmarks and experiments run with all of them.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
