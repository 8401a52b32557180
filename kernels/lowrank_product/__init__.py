"""Low-rank semantic x localization product (STELLAR, section "Factorisation").

localization L = softmax_K(cos(query, key) / temperature)      (B, P, K)
out          Z = L value + bias                                (B, P, E)
peak           = max over patches of L                         (B, K)
Each patch is a distribution over K sparse tokens; Z has rank at most K.
"""
