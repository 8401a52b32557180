"""Tokens to pixels: a transposed convolution with stride = kernel = p, whose patches do not overlap.

out[b, c, y p + i, x p + j] = bias[c] + sum_h tokens[b, y W + x, h] weight[h, c, i, j]
that is one product (B P, H) (H, C p p), and each of its rows laid out as a patch of the image;
the gradients are products with the gradient's patches, and sums of its channels.
"""
