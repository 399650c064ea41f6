"""Hand-written kernels, one folder each, for what no library kernel does.

A kernel's folder holds ``reference.py`` (jnp, the truth, and the form XLA runs everywhere), ``tpu.py`` (Mosaic TPU),
``gpu.py`` (Mosaic GPU, for Hopper), ``api.py`` (``implementation='auto'`` picks by platform, a name
works or refuses with its reason) and ``bench.py``, whose cases `kernels_pallas.check` compiles and runs. A mask or a
change of positions needs no kernel of its own: `kernels_pallas.flash` takes any mask.
"""
