"""The Triton backend: kernels for any GPU that Triton compiles for."""
