"""The CPU kernels: any plan, three dtypes, on the instruction set found at run time."""
