"""Kernels: matrix products and attention, fast on each kind of processor.

They compute what PyTorch's own operations compute, and step aside (to those) where they would not
be faster:

- `samestep.kernels.gemm`: ``a @ b`` through oneDNN on AMD processors with AVX-512;
- `samestep.kernels.gemm`: makes every ``nn.Linear`` of a model use it;
- `samestep.kernels.packed_attention`: attention that stays inside each sequence of a pack,
  registered with transformers;
- `samestep.kernels.long_attention`: causal attention of one long sequence by products of `gemm`.
"""
