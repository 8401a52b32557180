"""Affine map of the last dimension, and its gradients.

y = x W^T + b          x (..., I), W (O, I), b (O)
dx = dy W,  dW = dy^T x,  db = sum of dy
"""
