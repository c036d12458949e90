// SPDX-License-Identifier: Apache-2.0
// What a kernel is given: plain pointers and numbers, no torch. Pointers carry their shape.
#pragma once

#include <cstdint>

namespace sparse_attn {

constexpr int kMaxHeadDim = 512;      // of any backend
constexpr int kMaxCudaHeadDim = 256;  // of the CUDA kernels

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// Internal linkage: translation units built for different instruction sets must not share it.
static inline int64_t element_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

enum HeadKind : int32_t { kDense = 0, kStreaming = 1, kListed = 2 };

// A [batch, heads, seqlen, dim] tensor with unit stride in dim; strides count elements.
struct TensorView {
  char* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

// A SparseIndex as the kernels see it (sparse_attn/index.py documents the meaning).
struct IndexView {
  const int32_t* heads = nullptr;           // [num_heads, 4] kind, sink, window, dense_tail
  const int64_t* block_indptr = nullptr;    // [batch, num_heads, num_tiles + 1]
  const int32_t* block_indices = nullptr;   // [block_capacity]
  const int32_t* block_bits_ids = nullptr;  // [block_capacity] or null
  const int64_t* block_bits = nullptr;      // [num_masks, block_n, ceil(block_m / 64)] or null
  const int64_t* column_indptr = nullptr;   // [batch, num_heads, num_tiles + 1]
  const int32_t* column_indices = nullptr;  // [column_capacity]
  const float* column_bias = nullptr;       // [column_capacity] or null
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t num_tiles = 0;
  int64_t block_capacity = 0;
  int64_t column_capacity = 0;
  int64_t num_masks = 0;
  int32_t block_m = 0;
  int32_t block_n = 0;
};

// One sequence of the call: its rows of q and k, and where query row 0 stands on the key axis.
struct Sequence {
  int64_t batch;  // index into the batch axis of q, k and v
  int64_t q_start, q_len, k_start, k_len, q_offset;
};

// Keys and values in pages of any order: key j of sequence s lies in page
// block_table[s][j / page_size]. The batch axis of k and v then counts pages.
struct PageView {
  const int32_t* block_table = nullptr;  // [num_sequences, max_pages]; null: not paged
  int64_t max_pages = 0;
  int64_t page_size = 0;
};

struct AttentionParams {
  TensorView q;                         // [batch, num_heads, seqlen_q, head_dim]
  TensorView k;                         // [batch, num_heads_kv, seqlen_k, head_dim]
  TensorView v;                         // [batch, num_heads_kv, seqlen_k, head_dim_v]
  TensorView out;                       // [batch, num_heads, seqlen_q, head_dim_v]
  float* lse = nullptr;                 // [batch, num_heads, seqlen_q] contiguous
  const float* sinks = nullptr;         // [num_heads] or null
  const Sequence* sequences = nullptr;  // [num_sequences]
  IndexView index;
  PageView pages;
  DType dtype = DType::kFloat32;
  int64_t num_sequences = 0;
  int64_t num_heads = 0;
  int64_t num_heads_kv = 0;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int32_t head_dim = 0;
  int32_t head_dim_v = 0;
  float softmax_scale = 1.0f;
  float softcap = 0.0f;  // 0: none
  bool causal = true;
};

// What attention's backward adds: gradients in, gradients out. Gradients have the dtype of the
// inputs except the float32 row terms.
struct BackwardParams {
  AttentionParams forward;       // out unused; lse is the forward's
  TensorView grad_out;           // [batch, num_heads, seqlen_q, head_dim_v]
  const float* delta = nullptr;  // [batch, num_heads, seqlen_q]: rowsum(grad_out * out) - grad_lse
  TensorView grad_q;             // [batch, num_heads, seqlen_q, head_dim]
  TensorView grad_k;             // [batch, num_heads_kv, seqlen_k, head_dim]
  TensorView grad_v;             // [batch, num_heads_kv, seqlen_k, head_dim_v]
};

}  // namespace sparse_attn
