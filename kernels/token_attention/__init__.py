"""Attention within short sequences that are packed one after another (block-diagonal attention).

For each sequence and head: out = softmax(scale q k^T) v        q (Tq, heads, head_dim), k and v (Tk, heads, head_dim)
lse = log of a row's sum of exponentials, kept for the backward, which computes the probabilities P again:
dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(dO O)), dQ = scale dS K, dK = scale dS^T Q.
"""
