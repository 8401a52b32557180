"""KoLeo: spreads the K tokens of one image apart (STELLAR, section "Losses").

x <- x / max(|x|, 1e-8);  n(k) = nearest other token by dot product;
loss = -mean log(0.5 |x_k - x_n(k) + 1e-8| + 1e-8), the inner 1e-8 added to every element.
"""
