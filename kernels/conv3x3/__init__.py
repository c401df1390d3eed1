"""3x3 convolution: a file for each variant of the kernel, the gradients, and what is launched when."""
