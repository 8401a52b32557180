"""Nearest x2, then a 3x3 "same" convolution, without the upsampled image.

Taps that meet the same input pixel are summed: in one dimension y[2i] = w0 x[i-1] + (w1 + w2) x[i] and
y[2i+1] = (w0 + w1) x[i] + w2 x[i+1], in two four 2x2 convolutions (the phases).
With d[i] = x[i] - x[i-1] and s = w0 + w1 + w2 that is y[2i] = s x[i] - w0 d[i] and y[2i+1] = s x[i] + w2 d[i+1]: in two
dimensions 9 products where the phases have 16 and the plain formula 36.
Statistics of groups of channels: mean and biased variance.
"""
