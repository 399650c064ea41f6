"""What computes attention: `dense`, the reference; `blocked`, tiles with an online softmax; `listed`, blocks of keys
listed per query; `pallas`, the kernels of `kernels_pallas`; `ring`, where a layout cuts the length."""
