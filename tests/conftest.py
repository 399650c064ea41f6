"""Said before jax starts: eight CPU devices for the sharding tests, quick compilation, and where programs are kept.

Tests compile much and compute little. Without most optimisations a program compiles in half the time and runs the same
operations in the same precision; benchmarks and experiments run with all of them. Compiled programs are kept in
``.cache/tests/compiled`` unless the caller names another place; ``COLD=1`` begins with none.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{Path(__file__).resolve().parent.parent}/.cache/tests/compiled")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

from lm.compat import QUICK_TO_COMPILE

known = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in known:
    known += " --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = " ".join((known, *QUICK_TO_COMPILE))
jax.devices()  # reads them, once
os.environ["XLA_FLAGS"] = known  # the compiler for TPUs ends the process over a flag that it does not know

gc.set_threshold(50_000, 20, 100)  # tracing makes many objects, and looking for garbage was a fifth of the suite's time

pytest_plugins = ["programs"]
pytest.register_assert_rewrite("cases")

OWN = Path(__file__).resolve().parent.parent / ".cache" / "tests" / "compiled"
MAPS = Path("/proc/self/maps")
MANY = 20_000  # Linux gives a process 65,530 memory mappings; every compiled program takes some, and then XLA crashes


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("COLD", "0") not in ("", "0") and not hasattr(config, "workerinput"):
        shutil.rmtree(OWN, ignore_errors=True)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are not a test's name: compressed ones hold the hour, and two workers must collect the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Compiled programs are forgotten between files once there are many."""
    yield
    if MAPS.is_file() and MAPS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts to train on: a few topics of Python's documentation, one file each."""
    folder = tmp_path_factory.mktemp("texts")
    for name in sorted(topics)[:12]:
        (folder / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """The folder of a tiny training that nothing happened to (tests/train/tiny_run.py), for tests that need some run.
    They read it; who wants to change one copies it."""
    import tiny_run

    folder = tmp_path_factory.mktemp("trained") / "run"
    tiny_run.train(folder, texts)
    return folder
