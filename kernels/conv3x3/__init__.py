"""3x3 "same" convolution of channels-last images by fewer products (Winograd), with a residual and statistics.

In one dimension two outputs of three taps w, from four pixels d, are
    m0 = (d0 - d2) w0                    m1 = (d1 + d2) (w0 + w1 + w2) / 2
    m2 = (d2 - d1) (w0 - w1 + w2) / 2    m3 = (d1 - d3) w2
    y0 = m0 + m1 + m2                    y1 = m1 - m2 - m3
four products where the plain formula has six; in two dimensions 16 where it has 36. The transformed taps are made anew
in each call. Larger tiles would take fewer products still, and lose digits to their constants.
Source: "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308).
"""
