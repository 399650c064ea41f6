"""Hand-written kernels, one folder each. None exists yet: every method so far runs on XLA through `lm.attention`.

A kernel's folder holds ``reference.py`` (jnp, the truth), ``tpu.py`` (Mosaic TPU), ``gpu.py`` (Mosaic GPU), ``api.py``
(``implementation=None`` picks by platform, a name works or refuses with its reason) and ``bench.py``. A kernel is worth
writing only for what no library kernel does; a mask or a change of positions needs none.
"""
