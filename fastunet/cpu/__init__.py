"""What runs on a CPU in the place of the kernels."""
