"""Triton kernels and their launchers, on raw tensors: no autograd, no modules, no validation of the user's input."""
