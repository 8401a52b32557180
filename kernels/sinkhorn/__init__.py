"""Sinkhorn-Knopp assignment of tokens to prototypes (STELLAR, section "Online clustering").

M <- exp(M + 50 - column maximum)
repeat:  M <- M / (column sum + 1e-8) ** scale
         M <- M / (row sum + 1e-8)
Columns are prototypes, rows are tokens of the whole batch: the columns are balanced, then each row becomes a target.
The scalings alone say it all: M = exp(logits / temperature + row + column), where a round takes scale log(column sum +
1e-8) off each column's potential and log(row sum + 1e-8) off each row's, sums of M at the potentials so far.
"""
