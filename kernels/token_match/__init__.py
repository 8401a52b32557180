"""Matching of predicted tokens to target tokens by entropic optimal transport (STELLAR, section "Matching").

cost = |pred - target|,  u = v = 0, then five rounds of
u = -eps logsumexp_t((v - cost) / eps),   v = -eps logsumexp_q((u - cost) / eps)
index = argmax_t exp((u + v - cost) / eps), for each predicted token: not one-to-one.
"""
