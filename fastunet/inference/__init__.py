"""Inference: of images of any size, by CUDA graphs, in 8 bits."""
