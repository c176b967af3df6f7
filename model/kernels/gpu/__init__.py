"""Triton kernels, one file each, with a launcher and a PyTorch twin beside the kernel.

A launch says whether products and sums may be fused (`enable_fp_fusion`): Triton's default changes.
A kernel and its twin take the same arguments and are compared by tests/model/gpu/, on a GPU
natively and everywhere else through Triton's interpreter (TRITON_INTERPRET=1). Inner arithmetic
is float32; a result is rounded once, when it is stored. Importing this package needs triton,
which torch's CUDA builds bring along.
"""
