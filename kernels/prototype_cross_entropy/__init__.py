"""Cross-entropy of tokens against soft prototype assignments (STELLAR, section "Online clustering").

loss = mean over rows r of  -sum_c target_rc log_softmax(logits_r / temperature)_c
The rows of the targets need not sum to one; their sum is kept.
"""
