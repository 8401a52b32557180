"""Affine map of the last dimension, with an exact GELU before or behind it, and its gradients.

y = f(x) W^T + b  or  f(x W^T + b)      x (..., I), W (O, I), b (O); f(z) = z Phi(z), or none
dy to dx = dy W, dW = dy^T x, db = sum of dy
f'(z) = Phi(z) + z phi(z)               Phi, phi: distribution and density of the standard normal
"""
