#pragma once

#include <cstddef>
#include <cstdint>

namespace stellar_fast {

// Rows of heads: element (row, head, channel) lies at data + row * row_stride + head * head_stride + channel, strides in elements.
struct Heads {
  void *data;
  ptrdiff_t row_stride, head_stride;
};

struct AttentionShape {
  int sequences, heads, head_dim;
  const int32_t *starts_q, *starts_k;  // sequences + 1 each: row ranges of sequence i
  float scale;
  bool is_bfloat16;  // of all Heads; else float
};

// out = softmax(scale q k^T) v within each sequence, in fp32; lse (heads, rows of q) is the logarithm of each row's sum of exponentials. A
// sequence without keys gives zeros and lse = -inf. Scores of the sequence stay in the caches.
void token_attention_forward(const AttentionShape &shape, Heads q, Heads k, Heads v, Heads out, float *lse, int threads);

// Gradients of q, k and v; the probabilities are computed again, their sums too: from lse alone those of large scores would be off. Each
// sequence and head is one task: the result does not depend on the number of threads.
void token_attention_backward(const AttentionShape &shape, Heads grad_out, Heads q, Heads k, Heads v, Heads grad_q, Heads grad_k,
                              Heads grad_v, int threads);

}  // namespace stellar_fast
