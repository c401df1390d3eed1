"""Measurements of fastunet: what its kernels compile to, how fast they run, and how well a trained model does."""
