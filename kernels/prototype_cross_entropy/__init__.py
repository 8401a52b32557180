"""Cross-entropy of tokens against prototype assignments (STELLAR, section "Online clustering"), without logits.

loss = mean over predictions r of  -sum_c t_c log_softmax(features_r prototypes^T / temperature)_c,   t the target of r
t_c = exp(target logit_c / its temperature + row + column_c), Sinkhorn's assignment, or 1 at a class and 0 elsewhere.
The sum m_r of t need not be one. With the log-sum-exp of a row, dlogits = (softmax m_r - t) / (temperature R).
"""
