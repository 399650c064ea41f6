"""Activations times group-quantised int4 or int8 weights, dequantised in the kernel. Inference; see api.py."""
