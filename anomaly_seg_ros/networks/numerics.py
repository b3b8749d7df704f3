# SPDX-License-Identifier: Apache-2.0
"""Make torch's first answer as good as its second."""

from functools import lru_cache


@lru_cache(maxsize=1)
def settle_vector_math() -> None:
    """
    Call each of torch's vector functions once on one element; later calls cost nothing.

    torch 2.13 carries a version of Intel's MKL that picks its kernel in a function's first call;
    where several threads make that call at once, one of them may compute its share with errors of
    1e-4 (pytorch issue 188792). Observed here in one process of ten, and enough to fail a parity
    check, or to pass a wrong reference.
    """
    import torch

    one = torch.ones(1)
    for function in (torch.exp, torch.expm1, torch.log, torch.log1p, torch.log2, torch.tanh,
                     torch.erf, torch.sqrt, torch.sin, torch.cos, torch.round, torch.floor):
        function(one)
