"""Residual sum and LayerNorm of it.

total  = residual + x                                           (..., D)
normed = (total - mean) rstd weight + bias                      rstd = 1 / sqrt(variance + eps), over D
d total_in = d total + rstd (g - mean(g) - n mean(g n)),        g = weight d normed, n = (total - mean) rstd
d weight = sum of n d normed,  d bias = sum of d normed;  x and residual both have d total_in.
"""
