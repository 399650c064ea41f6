"""Hand-written kernels, one folder each, for what no library kernel does.

A kernel's folder holds ``reference.py`` (jnp, the truth), ``tpu.py`` (Mosaic TPU), ``gpu.py`` (what runs on a GPU),
``api.py`` (``implementation=None`` picks by platform, a name works or refuses with its reason) and ``bench.py``, whose
``cases(chip)`` and ``small_cases()`` `kernels_pallas.check` compiles and runs. A mask or a change of positions needs
no kernel of its own: `kernels_pallas.flash` takes any mask. Nothing here imports `lm`.
"""
