"""Triton kernels for NVIDIA GPUs (compute capability 8.0 and up) and AMD GPUs, and their launchers.

Importing this package imports nothing; its modules import triton and are loaded by the first call that needs them.
"""
