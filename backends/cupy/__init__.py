"""Raw CUDA kernels, compiled by NVRTC and launched through CuPy."""
