"""Many square views of one image, each axis by a cubic filter that widens when it shrinks, as Pillow's.

out_i = sum_j w_ij in_j / sum_j w_ij,  w_ij = cubic((j - c_i) / max(r, 1)),  c_i = (i + 0.5) r - 0.5,  r = side / S
cubic (a = -0.5) is zero beyond 2. Taps end at the crop; its width is resized first, and rounded to uint8 in between.
"""
