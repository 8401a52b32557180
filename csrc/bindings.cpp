// The Python module stellar_fast._C: plain addresses, sizes and strides; shapes and dtypes are checked by the doors in
// stellar_fast/ops, ranges here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>

#include "add_layer_norm/add_layer_norm.h"
#include "build_info/build_info.h"
#include "common/allocator.h"
#include "common/check.h"
#include "common/fingerprint.h"
#include "conv3x3/conv3x3.h"
#include "crop_resize/crop_resize.h"
#include "group_norm_silu/group_norm_silu.h"
#include "koleo/koleo.h"
#include "linear/linear.h"
#include "lowrank_product/lowrank_product.h"
#include "nearest_code/nearest_code.h"
#include "patch_unembed/patch_unembed.h"
#include "prototype_cross_entropy/prototype_cross_entropy.h"
#include "sinkhorn/sinkhorn.h"
#include "token_attention/token_attention.h"
#include "token_match/token_match.h"
#include "upsample_conv2x/upsample_conv2x.h"

namespace py = pybind11;
using namespace stellar_fast;

namespace {

template <typename T>
T *address(uintptr_t value) {
  return reinterpret_cast<T *>(value);
}

py::dict build_info() {
  const CpuInfo cpu = cpu_info();
  py::dict info;
  info["compiler"] = cpu.compiler;
  info["flags"] = cpu.flags;
  info["simd_level"] = cpu.simd_level;
  info["openmp_version"] = cpu.openmp_version;
  info["openmp_library"] = cpu.openmp_library;
#ifdef STELLAR_FAST_CUDA
  const CudaInfo cuda = cuda_info();
  info["cuda_runtime_version"] = cuda.runtime_version;
  info["cuda_architectures"] = cuda.architectures;
  info["cuda_device_count"] = cuda.device_count;
  info["cuda_device_error"] = cuda.device_error;
#endif
  return info;
}

uint64_t fingerprint_released(uintptr_t block, size_t bytes, int threads) {
  const py::gil_scoped_release release;
  return fingerprint(address<const void>(block), bytes, std::max(1, threads));
}

void crop_resize_checked(uintptr_t image, int height, int width, ptrdiff_t row_stride, uintptr_t boxes, uintptr_t flips,
                         int count, int size, uintptr_t out) {
  check(size >= 1, "size must be at least 1 but is ", size);
  const Box *box = address<const Box>(boxes);
  for (int i = 0; i < count; ++i) {
    const Box &b = box[i];
    check(b.height >= 1 && b.width >= 1 && b.top >= 0 && b.left >= 0 && b.height <= height - b.top && b.width <= width - b.left,
          "box ", i, " (top ", b.top, ", left ", b.left, ", height ", b.height, ", width ", b.width,
          ") must lie inside the image, which is ", height, " x ", width);
  }
  const py::gil_scoped_release release;
  crop_resize(address<const uint8_t>(image), row_stride, box, address<const uint8_t>(flips), count, size,
              address<uint8_t>(out));
}

// (address, row stride, head stride), strides in elements.
using HeadsArgument = std::tuple<uintptr_t, ptrdiff_t, ptrdiff_t>;

Heads heads(const HeadsArgument &x) { return {address<void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)}; }

AttentionShape attention_shape(uintptr_t starts_q, uintptr_t starts_k, int sequences, int num_heads, int head_dim, float scale,
                               bool is_bfloat16, int rows_q, int rows_k) {
  const AttentionShape shape{sequences,   num_heads, head_dim, address<const int32_t>(starts_q), address<const int32_t>(starts_k),
                             scale, is_bfloat16};
  for (const auto &[name, starts, rows] : {std::tuple{"q", shape.starts_q, rows_q}, {"k", shape.starts_k, rows_k}}) {
    check(starts[0] == 0 && starts[sequences] == rows, "cu_seqlens_", name, " must run from 0 to ", rows, " but runs from ", starts[0],
          " to ", starts[sequences]);
    for (int i = 0; i < sequences; ++i)
      check(starts[i] <= starts[i + 1], "cu_seqlens_", name, " must not fall but goes from ", starts[i], " to ", starts[i + 1]);
  }
  return shape;
}

void token_attention_forward_checked(uintptr_t starts_q, uintptr_t starts_k, int sequences, int num_heads, int head_dim, float scale,
                                     bool is_bfloat16, int rows_q, int rows_k, HeadsArgument q, HeadsArgument k, HeadsArgument v,
                                     HeadsArgument out, uintptr_t lse, int threads) {
  const auto shape = attention_shape(starts_q, starts_k, sequences, num_heads, head_dim, scale, is_bfloat16, rows_q, rows_k);
  const py::gil_scoped_release release;
  token_attention_forward(shape, heads(q), heads(k), heads(v), heads(out), address<float>(lse), threads);
}

void token_attention_backward_checked(uintptr_t starts_q, uintptr_t starts_k, int sequences, int num_heads, int head_dim, float scale,
                                      bool is_bfloat16, int rows_q, int rows_k, HeadsArgument grad_out, HeadsArgument q,
                                      HeadsArgument k, HeadsArgument v, HeadsArgument grad_q, HeadsArgument grad_k,
                                      HeadsArgument grad_v, int threads) {
  const auto shape = attention_shape(starts_q, starts_k, sequences, num_heads, head_dim, scale, is_bfloat16, rows_q, rows_k);
  const py::gil_scoped_release release;
  token_attention_backward(shape, heads(grad_out), heads(q), heads(k), heads(v), heads(grad_q), heads(grad_k), heads(grad_v),
                           threads);
}

// (images, patches, tokens, key width, value width)
using LowrankSizes = std::tuple<int, int, int, int, int>;
// (address, whether bf16 rather than fp32, image stride, row stride), strides in elements.
using MatricesArgument = std::tuple<uintptr_t, bool, ptrdiff_t, ptrdiff_t>;

LowrankShape lowrank_shape(const LowrankSizes &sizes) {
  const auto [images, patches, tokens, key_width, value_width] = sizes;
  check(images >= 0 && patches >= 1 && key_width >= 1 && value_width >= 1, "sizes must be positive but are ", images, ", ", patches,
        ", ", key_width, ", ", value_width);
  check(tokens >= 1 && tokens <= kLowrankMaxTokens, "tokens must be 1 to ", kLowrankMaxTokens, " but are ", tokens);
  return {images, patches, tokens, key_width, value_width};
}

Matrices matrices(const MatricesArgument &x) {
  return {address<const void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

void lowrank_product_forward_checked(const LowrankSizes &sizes, const MatricesArgument &query, const MatricesArgument &key,
                                     const MatricesArgument &value, uintptr_t bias, float temperature, uintptr_t out,
                                     uintptr_t localization, uintptr_t peak, uintptr_t logits, uintptr_t query_scale,
                                     uintptr_t key_scale, int threads) {
  const LowrankForward call{lowrank_shape(sizes),   matrices(query),      matrices(key),          matrices(value),
                            address<const float>(bias), temperature,      address<float>(out),    address<float>(localization),
                            address<float>(peak),   address<float>(logits), address<float>(query_scale), address<float>(key_scale)};
  const py::gil_scoped_release release;
  lowrank_product_forward(call, threads);
}

void lowrank_product_backward_checked(const LowrankSizes &sizes, const MatricesArgument &grad_out, uintptr_t grad_localization,
                                      const MatricesArgument &query, const MatricesArgument &key, const MatricesArgument &value,
                                      uintptr_t logits, uintptr_t query_scale, uintptr_t key_scale, float temperature,
                                      uintptr_t grad_query, uintptr_t grad_key, uintptr_t grad_value, int threads) {
  const LowrankBackward call{lowrank_shape(sizes),
                             matrices(grad_out),
                             address<const float>(grad_localization),
                             matrices(query),
                             matrices(key),
                             matrices(value),
                             address<const float>(logits),
                             address<const float>(query_scale),
                             address<const float>(key_scale),
                             temperature,
                             address<void>(grad_query),
                             address<void>(grad_key),
                             address<void>(grad_value)};
  check(!call.grad_out.is_bfloat16, "grad_out must be fp32");
  const py::gil_scoped_release release;
  lowrank_product_backward(call, threads);
}

// (address, whether bf16 rather than fp32, row stride in elements); a null address where it is absent.
using RowsArgument = std::tuple<uintptr_t, bool, ptrdiff_t>;

Rows rows(const RowsArgument &x) { return {address<void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)}; }

void add_layer_norm_forward_checked(int count, int width, RowsArgument x, RowsArgument residual, uintptr_t weight, uintptr_t bias,
                                    float eps, uintptr_t total, RowsArgument normed, uintptr_t mean, uintptr_t rstd, int threads) {
  check(width >= 1, "width must be at least 1 but is ", width);
  const py::gil_scoped_release release;
  add_layer_norm_forward(count, width, rows(x), rows(residual), address<const float>(weight), address<const float>(bias), eps,
                         address<void>(total), rows(normed), address<float>(mean), address<float>(rstd), threads);
}

void add_layer_norm_backward_checked(int count, int width, RowsArgument grad_normed, RowsArgument grad_total, RowsArgument total,
                                     uintptr_t weight, uintptr_t mean, uintptr_t rstd, uintptr_t grad, uintptr_t grad_x,
                                     uintptr_t grad_weight, uintptr_t grad_bias, int threads) {
  check(width >= 1, "width must be at least 1 but is ", width);
  const py::gil_scoped_release release;
  add_layer_norm_backward(count, width, rows(grad_normed), rows(grad_total), rows(total), address<const float>(weight),
                          address<const float>(mean), address<const float>(rstd), address<void>(grad), address<void>(grad_x),
                          address<float>(grad_weight), address<float>(grad_bias), threads);
}

// (logits, whether bf16 rather than fp32, row stride in elements, row and column potentials, temperature, classes, index); null addresses
// where they are absent. The door checks that index and classes are in range.
using PrototypeTargetsArgument = std::tuple<uintptr_t, bool, ptrdiff_t, uintptr_t, uintptr_t, float, uintptr_t, uintptr_t>;

void prototype_cross_entropy_rows_checked(int count, int prototypes, uintptr_t logits, bool is_bfloat16,
                                          const PrototypeTargetsArgument &t, float temperature, uintptr_t weights, uintptr_t loss,
                                          int threads) {
  check(count >= 0 && prototypes >= 1 && threads >= 1, "sizes must be positive but are ", count, ", ", prototypes, ", ", threads);
  const PrototypeTargets targets{address<const void>(std::get<0>(t)),    std::get<1>(t), std::get<2>(t),
                                 address<const float>(std::get<3>(t)),   address<const float>(std::get<4>(t)),
                                 std::get<5>(t),                         address<const int64_t>(std::get<6>(t)),
                                 address<const int64_t>(std::get<7>(t))};
  const py::gil_scoped_release release;
  prototype_cross_entropy_rows(count, prototypes, address<void>(logits), is_bfloat16, targets, temperature,
                               address<const float>(weights), address<double>(loss), threads);
}

// (address, whether bf16 rather than fp32, row stride in elements, rows, columns, temperature)
using SinkhornArgument = std::tuple<uintptr_t, bool, ptrdiff_t, int, int, double>;

SinkhornLogits sinkhorn_logits(const SinkhornArgument &x, int parts) {
  const auto [data, is_bfloat16, stride, rows, columns, temperature] = x;
  check(rows >= 1 && columns >= 1 && parts >= 1, "sizes must be positive but are ", rows, ", ", columns, ", ", parts);
  return {rows, columns, address<const void>(data), is_bfloat16, stride, float(1 / temperature)};
}

void sinkhorn_columns_checked(const SinkhornArgument &logits, uintptr_t peaks, uintptr_t sums, int parts) {
  const SinkhornLogits x = sinkhorn_logits(logits, parts);
  const py::gil_scoped_release release;
  sinkhorn_columns(x, address<float>(peaks), address<float>(sums), parts);
}

void sinkhorn_rows_checked(const SinkhornArgument &logits, uintptr_t column, uintptr_t row, uintptr_t sums, uintptr_t out,
                           uintptr_t entropy, uintptr_t first, int parts) {
  const SinkhornLogits x = sinkhorn_logits(logits, parts);
  const py::gil_scoped_release release;
  sinkhorn_rows(x, address<const float>(column), address<float>(row), address<float>(sums), address<float>(out), address<float>(entropy),
                address<int64_t>(first), parts);
}

void gelu_forward_checked(uintptr_t x, uintptr_t out, size_t count, bool is_bfloat16, int threads) {
  const py::gil_scoped_release release;
  gelu_forward(address<const void>(x), address<void>(out), count, is_bfloat16, threads);
}

void gelu_backward_checked(uintptr_t x, uintptr_t grad, uintptr_t grad_x, uintptr_t out, size_t count, bool is_bfloat16, int threads) {
  const py::gil_scoped_release release;
  gelu_backward(address<const void>(x), address<const void>(grad), address<void>(grad_x), address<void>(out), count, is_bfloat16,
                threads);
}

void transpose_checked(uintptr_t in, ptrdiff_t stride, int rows, int columns, uintptr_t out, uintptr_t sums, bool is_bfloat16,
                       int threads) {
  const py::gil_scoped_release release;
  transpose(address<const void>(in), stride, rows, columns, address<void>(out), address<float>(sums), is_bfloat16, threads);
}

// (address, whether bf16 rather than fp32, image stride, view stride, token stride), strides in elements.
using TokensArgument = std::tuple<uintptr_t, bool, ptrdiff_t, ptrdiff_t, ptrdiff_t>;

Tokens tokens_of(const TokensArgument &x) {
  return {address<const void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x), std::get<4>(x)};
}

void token_match_checked(int images, int views, int tokens, int width, const TokensArgument &pred, const TokensArgument &target,
                         uintptr_t keep, float epsilon, int iterations, uintptr_t index, uintptr_t plan, int threads) {
  check(images >= 0 && views >= 0 && width >= 1, "sizes must be positive but are ", images, ", ", views, ", ", width);
  check(tokens >= 1 && tokens <= kTokenMatchMaxTokens, "tokens must be 1 to ", kTokenMatchMaxTokens, " but are ", tokens);
  const TokenMatch call{images,  views,      tokens, width, tokens_of(pred), tokens_of(target), address<const uint8_t>(keep),
                        epsilon, iterations, address<int64_t>(index), address<float>(plan)};
  const py::gil_scoped_release release;
  token_match(call, threads);
}

Koleo koleo_call(int images, int tokens, int width, const TokensArgument &x, float min_distance, uintptr_t index, uintptr_t distance,
                 uintptr_t norm) {
  check(images >= 1 && width >= 1, "sizes must be positive but are ", images, ", ", width);
  check(tokens >= 2 && tokens <= kKoleoMaxTokens, "tokens must be 2 to ", kKoleoMaxTokens, " but are ", tokens);
  return {images, tokens, width, tokens_of(x), min_distance, address<int64_t>(index), address<float>(distance), address<float>(norm)};
}

float koleo_forward_checked(int images, int tokens, int width, const TokensArgument &x, float min_distance, uintptr_t index,
                            uintptr_t distance, uintptr_t norm, int threads) {
  const Koleo call = koleo_call(images, tokens, width, x, min_distance, index, distance, norm);
  const py::gil_scoped_release release;
  return koleo_forward(call, threads);
}

void koleo_backward_checked(int images, int tokens, int width, const TokensArgument &x, float min_distance, uintptr_t index,
                            uintptr_t distance, uintptr_t norm, float grad_loss, uintptr_t grad_x, int threads) {
  const Koleo call = koleo_call(images, tokens, width, x, min_distance, index, distance, norm);
  for (ptrdiff_t i = 0; i < ptrdiff_t(images) * tokens; ++i)
    check(call.index[i] >= 0 && call.index[i] < tokens, "index must be 0 to ", tokens - 1, " but is ", call.index[i]);
  const py::gil_scoped_release release;
  koleo_backward(call, grad_loss, address<void>(grad_x), threads);
}

// (rows, codes, width, z, stride of its rows, codebook, stride of its rows, out), strides in elements.
using NearestCodeArgument = std::tuple<ptrdiff_t, int, int, uintptr_t, ptrdiff_t, uintptr_t, ptrdiff_t, uintptr_t>;

NearestCode nearest_code_call(const NearestCodeArgument &x) {
  const auto [rows, codes, width, z, z_stride, codebook, codebook_stride, out] = x;
  check(rows >= 0 && codes >= 1 && codes <= 1 << 30 && width >= 0, "sizes must be positive but are ", rows, ", ", codes, ", ", width);
  return {rows, codes, width, address<const void>(z), z_stride, address<const float>(codebook), codebook_stride, address<int64_t>(out)};
}

void nearest_code_checked(const NearestCodeArgument &x, bool is_bfloat16, int threads) {
  const NearestCode call = nearest_code_call(x);
  const py::gil_scoped_release release;
  nearest_code(call, is_bfloat16, threads);
}

#ifdef STELLAR_FAST_CUDA
void nearest_code_cuda_checked(int device, uintptr_t stream, const NearestCodeArgument &x, int splits, uintptr_t squares, uintptr_t best,
                               uintptr_t index, int dtype) {
  const NearestCode call = nearest_code_call(x);
  check(splits >= 1 && splits <= 65535, "splits must be 1 to 65535 but are ", splits);
  const NearestCodeScratch scratch{splits, address<float>(squares), address<float>(best), address<int32_t>(index)};
  const py::gil_scoped_release release;
  nearest_code_cuda({device, stream}, call, scratch, Dtype(dtype));
}
#endif

// (images, channels, rows of patches, columns of them, side of a patch in pixels)
using PatchGridArgument = std::tuple<int, int, int, int, int>;

PatchGrid patch_grid(const PatchGridArgument &sizes) {
  const auto [images, channels, rows, columns, side] = sizes;
  check(images >= 0 && channels >= 1 && rows >= 1 && columns >= 1 && side >= 1, "sizes must be positive but are ", images, ", ", channels,
        ", ", rows, ", ", columns, ", ", side);
  const double most = 2147483647;  // of bands, and of pixels in one
  check(double(images) * channels * rows <= most && double(columns) * side * side <= most, "sizes are too large: ", images, ", ", channels,
        ", ", rows, ", ", columns, ", ", side);
  return {images, channels, rows, columns, side};
}

void patch_unembed_forward_checked(const PatchGridArgument &sizes, uintptr_t patches, uintptr_t bias, uintptr_t image, bool is_bfloat16,
                                   int threads) {
  const PatchGrid grid = patch_grid(sizes);
  const py::gil_scoped_release release;
  patch_unembed_forward(grid, address<const void>(patches), address<const void>(bias), address<void>(image), is_bfloat16, threads);
}

void patch_unembed_backward_checked(const PatchGridArgument &sizes, uintptr_t image, uintptr_t patches, uintptr_t sums, bool is_bfloat16,
                                    int threads) {
  const PatchGrid grid = patch_grid(sizes);
  const py::gil_scoped_release release;
  patch_unembed_backward(grid, address<const void>(image), address<void>(patches), address<float>(sums), is_bfloat16, threads);
}

#ifdef STELLAR_FAST_CUDA
void patch_unembed_forward_cuda_checked(int device, uintptr_t stream, const PatchGridArgument &sizes, uintptr_t patches, uintptr_t bias,
                                        uintptr_t image, int dtype) {
  const PatchGrid grid = patch_grid(sizes);
  const py::gil_scoped_release release;
  patch_unembed_forward_cuda({device, stream}, grid, address<const void>(patches), address<const void>(bias), address<void>(image),
                             Dtype(dtype));
}

void patch_unembed_backward_cuda_checked(int device, uintptr_t stream, const PatchGridArgument &sizes, uintptr_t image, uintptr_t patches,
                                         uintptr_t sums, int dtype) {
  const PatchGrid grid = patch_grid(sizes);
  const py::gil_scoped_release release;
  patch_unembed_backward_cuda({device, stream}, grid, address<const void>(image), address<void>(patches), address<float>(sums),
                              Dtype(dtype));
}
#endif

// (images, pixels, channels, groups, address of weight, of bias, eps); weight and bias are fp32.
using GroupNormArgument = std::tuple<ptrdiff_t, ptrdiff_t, int, int, uintptr_t, uintptr_t, float>;

GroupNorm group_norm(const GroupNormArgument &x) {
  const auto [images, pixels, channels, groups, weight, bias, eps] = x;
  check(images >= 0 && pixels >= 0 && channels >= 1, "sizes must be positive but are ", images, ", ", pixels, ", ", channels);
  check(groups >= 1 && channels % groups == 0, "groups ", groups, " must divide channels ", channels);
  return {images, pixels, channels, groups, address<const float>(weight), address<const float>(bias), eps};
}

void group_norm_silu_forward_checked(const GroupNormArgument &norm, uintptr_t x, uintptr_t residual, uintptr_t y, uintptr_t stats,
                                     bool given, uintptr_t out, bool is_bfloat16, int threads) {
  const GroupNorm call = group_norm(norm);
  const py::gil_scoped_release release;
  group_norm_silu_forward(call, address<const void>(x), address<const void>(residual), address<void>(y), address<float>(stats), given,
                          address<void>(out), is_bfloat16, threads);
}

void group_norm_silu_backward_checked(const GroupNormArgument &norm, uintptr_t stats, uintptr_t grad_out, uintptr_t grad_y, uintptr_t x,
                                      uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_bias, bool is_bfloat16, int threads) {
  const GroupNorm call = group_norm(norm);
  const py::gil_scoped_release release;
  group_norm_silu_backward(call, address<const float>(stats), address<const void>(grad_out), address<const void>(grad_y),
                           address<const void>(x), address<void>(grad_x), address<float>(grad_weight), address<float>(grad_bias),
                           is_bfloat16, threads);
}

#ifdef STELLAR_FAST_CUDA
size_t group_norm_silu_workspace_cuda_checked(const GroupNormArgument &norm) { return group_norm_silu_workspace_cuda(group_norm(norm)); }

void group_norm_silu_forward_cuda_checked(int device, uintptr_t stream, const GroupNormArgument &norm, uintptr_t x, uintptr_t residual,
                                          uintptr_t y, uintptr_t stats, bool given, uintptr_t out, int dtype, uintptr_t workspace) {
  const GroupNorm call = group_norm(norm);
  const py::gil_scoped_release release;
  group_norm_silu_forward_cuda({device, stream}, call, address<const void>(x), address<const void>(residual), address<void>(y),
                               address<float>(stats), given, address<void>(out), Dtype(dtype), address<float>(workspace));
}

void group_norm_silu_backward_cuda_checked(int device, uintptr_t stream, const GroupNormArgument &norm, uintptr_t stats,
                                           uintptr_t grad_out, uintptr_t grad_y, uintptr_t x, uintptr_t grad_x, uintptr_t grad_weight,
                                           uintptr_t grad_bias, int dtype, uintptr_t workspace) {
  const GroupNorm call = group_norm(norm);
  const py::gil_scoped_release release;
  group_norm_silu_backward_cuda({device, stream}, call, address<const float>(stats), address<const void>(grad_out),
                                address<const void>(grad_y), address<const void>(x), address<void>(grad_x), address<float>(grad_weight),
                                address<float>(grad_bias), Dtype(dtype), address<float>(workspace));
}
#endif

// (images, height, width, channels) of Upsampled
using UpsampledArgument = std::tuple<int, int, int, int>;

Upsampled upsampled(const UpsampledArgument &sizes, int groups) {
  const auto [images, height, width, channels] = sizes;
  check(images >= 0 && height >= 1 && width >= 1 && channels >= 1, "sizes must be positive but are ", images, ", ", height, ", ", width, ", ",
        channels);
  check(4 * (height + 1.0) * (width + 1.0) <= 2147483647 && 4.0 * channels <= 2147483647 && images * (height + 1.0) <= 2147483647,
        "sizes are too large: ", images, ", ", height, ", ", width, ", ", channels);
  check(groups >= 0 && (groups == 0 || channels % groups == 0), "groups ", groups, " must divide channels ", channels);
  return {images, height, width, channels};
}

void upsample_conv2x_interleave_checked(const UpsampledArgument &sizes, uintptr_t phases, uintptr_t bias, uintptr_t out, int groups,
                                        uintptr_t stats, bool is_bfloat16, int threads) {
  const Upsampled size = upsampled(sizes, groups);
  const py::gil_scoped_release release;
  upsample_conv2x_interleave(size, address<const void>(phases), address<const float>(bias), address<void>(out), groups,
                             address<float>(stats), is_bfloat16, threads);
}

void upsample_conv2x_products_checked(const UpsampledArgument &sizes, uintptr_t x, int in_channels, uintptr_t weights, uintptr_t bias,
                                      uintptr_t out, int groups, uintptr_t stats, bool is_bfloat16, int threads) {
  const Upsampled size = upsampled(sizes, groups);
  check(in_channels >= 1, "in_channels must be at least 1 but is ", in_channels);
  check(!is_bfloat16 || upsample_conv2x_multiplies_bf16(), "this processor does not multiply bfloat16");
  const py::gil_scoped_release release;
  upsample_conv2x_products(size, address<const void>(x), in_channels, address<const void>(weights), address<const float>(bias),
                           address<void>(out), groups, address<float>(stats), is_bfloat16, threads);
}

void upsample_conv2x_split_checked(const UpsampledArgument &sizes, uintptr_t grad_out, uintptr_t grad_phases, uintptr_t grad_bias,
                                   bool is_bfloat16, int threads) {
  const Upsampled size = upsampled(sizes, 0);
  const py::gil_scoped_release release;
  upsample_conv2x_split(size, address<const void>(grad_out), address<void>(grad_phases), address<float>(grad_bias), is_bfloat16, threads);
}

#ifdef STELLAR_FAST_CUDA
int upsample_conv2x_chunks_cuda_checked(const UpsampledArgument &sizes, int dtype) {
  return upsample_conv2x_chunks_cuda(upsampled(sizes, 0), Dtype(dtype));
}

void upsample_conv2x_interleave_cuda_checked(int device, uintptr_t stream, const UpsampledArgument &sizes, uintptr_t phases, uintptr_t bias,
                                             uintptr_t out, int groups, uintptr_t stats, uintptr_t scratch, int dtype) {
  const Upsampled size = upsampled(sizes, groups);
  const py::gil_scoped_release release;
  upsample_conv2x_interleave_cuda({device, stream}, size, address<const void>(phases), address<const float>(bias), address<void>(out), groups,
                                  address<float>(stats), address<float>(scratch), Dtype(dtype));
}

void upsample_conv2x_split_cuda_checked(int device, uintptr_t stream, const UpsampledArgument &sizes, uintptr_t grad_out,
                                        uintptr_t grad_phases, uintptr_t scratch, int dtype) {
  const Upsampled size = upsampled(sizes, 0);
  const py::gil_scoped_release release;
  upsample_conv2x_split_cuda({device, stream}, size, address<const void>(grad_out), address<void>(grad_phases), address<float>(scratch),
                             Dtype(dtype));
}
#endif

// (images, height, width, in_channels, channels) of Convolved
void conv3x3_checked(const std::tuple<int, int, int, int, int> &sizes, uintptr_t x, uintptr_t weight, uintptr_t panels,
                     uintptr_t bias, uintptr_t residual, uintptr_t out, int groups, uintptr_t stats, int threads) {
  const auto [images, height, width, in_channels, channels] = sizes;
  check(images >= 0 && height >= 1 && width >= 1 && in_channels >= 1 && channels >= 1, "sizes must be positive but are ", images, ", ",
        height, ", ", width, ", ", in_channels, ", ", channels);
  check(std::max(1, images) * (height + 1.0) * (width + 1.0) <= 2147483647, "sizes are too large: ", images, ", ", height, ", ", width);
  check(groups >= 0 && (groups == 0 || channels % groups == 0), "groups ", groups, " must divide channels ", channels);
  const Convolved size{images, height, width, in_channels, channels};
  const py::gil_scoped_release release;
  conv3x3(size, address<const float>(x), address<const float>(weight), address<float>(panels), address<const float>(bias), address<const float>(residual),
          address<float>(out), groups, address<float>(stats), threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info);
  module.def("source_hashes", &source_hashes);
  module.def("raise_allocator_thresholds", &raise_allocator_thresholds);
  module.def("fingerprint", &fingerprint_released);
  module.def("conv3x3", &conv3x3_checked);
  module.def("crop_resize", &crop_resize_checked, py::arg("image"), py::arg("height"), py::arg("width"),
             py::arg("row_stride"), py::arg("boxes"), py::arg("flips"), py::arg("count"), py::arg("size"), py::arg("out"));
  module.def("group_norm_silu_forward", &group_norm_silu_forward_checked);
  module.def("group_norm_silu_backward", &group_norm_silu_backward_checked);
#ifdef STELLAR_FAST_CUDA
  module.def("group_norm_silu_workspace_cuda", &group_norm_silu_workspace_cuda_checked);
  module.def("group_norm_silu_forward_cuda", &group_norm_silu_forward_cuda_checked);
  module.def("group_norm_silu_backward_cuda", &group_norm_silu_backward_cuda_checked);
#endif
  module.def("token_attention_forward", &token_attention_forward_checked);
  module.def("token_attention_backward", &token_attention_backward_checked);
  module.def("lowrank_product_forward", &lowrank_product_forward_checked);
  module.def("lowrank_product_backward", &lowrank_product_backward_checked);
  module.def("prototype_cross_entropy_rows", &prototype_cross_entropy_rows_checked);
  module.def("sinkhorn_columns", &sinkhorn_columns_checked);
  module.def("sinkhorn_rows", &sinkhorn_rows_checked);
  module.def("gelu_forward", &gelu_forward_checked);
  module.def("gelu_backward", &gelu_backward_checked);
  module.def("transpose", &transpose_checked);
  module.def("add_layer_norm_forward", &add_layer_norm_forward_checked);
  module.def("add_layer_norm_backward", &add_layer_norm_backward_checked);
  module.def("token_match", &token_match_checked);
  module.def("koleo_forward", &koleo_forward_checked);
  module.def("koleo_backward", &koleo_backward_checked);
  module.def("nearest_code", &nearest_code_checked);
#ifdef STELLAR_FAST_CUDA
  module.def("nearest_code_cuda", &nearest_code_cuda_checked);
#endif
  module.def("patch_unembed_forward", &patch_unembed_forward_checked);
  module.def("patch_unembed_backward", &patch_unembed_backward_checked);
#ifdef STELLAR_FAST_CUDA
  module.def("patch_unembed_forward_cuda", &patch_unembed_forward_cuda_checked);
  module.def("patch_unembed_backward_cuda", &patch_unembed_backward_cuda_checked);
#endif
  module.def("upsample_conv2x_interleave", &upsample_conv2x_interleave_checked);
  module.def("upsample_conv2x_multiplies_bf16", &upsample_conv2x_multiplies_bf16);
  module.def("upsample_conv2x_products", &upsample_conv2x_products_checked);
  module.def("upsample_conv2x_split", &upsample_conv2x_split_checked);
#ifdef STELLAR_FAST_CUDA
  module.def("upsample_conv2x_chunks_cuda", &upsample_conv2x_chunks_cuda_checked);
  module.def("upsample_conv2x_interleave_cuda", &upsample_conv2x_interleave_cuda_checked);
  module.def("upsample_conv2x_split_cuda", &upsample_conv2x_split_cuda_checked);
#endif
}
