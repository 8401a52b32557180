"""GroupNorm and SiLU of images, and of a sum that is formed on the way.

y = x + residual, or x                            (B, C, H, W); m, v: mean and variance of a group's n = C H W / groups
u = (y - m) / sqrt(v + eps),  z = w u + b,  out = z s                 s = 1 / (1 + exp(-z))
d z = d out s (1 + z (1 - s)),  d w = sum of u d z,  d b = sum of d z            over images and pixels
d y_in = (w d z - mean(w d z) - u mean(u w d z)) / sqrt(v + eps) + d y           means over a group
"""
