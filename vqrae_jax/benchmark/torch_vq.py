"""The textbook vector quantizer in PyTorch, timed: `python torch_vq.py N K C REPEATS` prints seconds per training step.

All distances at once, one-hot matmuls for counts, sums and lookup, EMA update: how the layer is commonly written. It
runs as a program of its own, so that PyTorch may live in another environment than JAX.
"""

import sys
import time


def main(n: int, k: int, c: int, repeats: int) -> None:
    import torch

    torch.manual_seed(0)
    z, codebook = torch.randn(n, c), torch.randn(k, c)
    counts, sums = torch.ones(k), codebook.clone()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        with torch.no_grad():
            distances = z.pow(2).sum(1, keepdim=True) - 2 * z @ codebook.T + codebook.pow(2).sum(1)
            indices = distances.argmin(1)
            chosen = torch.zeros(n, k).scatter_(1, indices[:, None], 1.0)
            quantized = chosen @ codebook
            counts.mul_(0.99).add_(chosen.sum(0), alpha=0.01)
            sums.mul_(0.99).add_(chosen.T @ z, alpha=0.01)
            codebook = sums / ((counts + 1e-5) / (counts.sum() + k * 1e-5) * counts.sum())[:, None]
            ((quantized - z) ** 2).mean()
        best = min(best, time.perf_counter() - start)
    print(best)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
