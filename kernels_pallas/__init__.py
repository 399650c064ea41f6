"""Hand-written kernels, one folder each.

A kernel's folder holds ``reference.py`` (jnp, the truth, and the form XLA runs everywhere), ``tpu.py`` (Mosaic TPU),
``gpu.py`` (Mosaic GPU, or which other form a GPU runs), ``api.py`` (``implementation='auto'`` picks by platform, a name
works or refuses with its reason; ``CASES``, calls at real sizes) and ``bench.py``. A kernel is worth writing only for
what no library kernel does; a mask or a change of positions needs none.
"""
