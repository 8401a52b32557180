"""Tokens of several views, packed one sequence after another, from the pixels of the patches that are kept.

A sequence: cls_token + position_0, then W ((pixels - mean) / std) + b + position_(1+p) of each kept patch p, then the
sparse tokens. In fp32 mean and std fold into the projection: W' = W / std, b' = b - sum over pixels of W' mean.
"""
