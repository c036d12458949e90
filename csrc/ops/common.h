// SPDX-License-Identifier: Apache-2.0
// From tensors to params: what every attention op checks and fills. Checks here guard memory
// safety; the Python side has raised friendlier errors before.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "../core/types.h"
#include "../cpu/attention.h"

namespace sparse_attn::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensors and numbers of a SparseIndex, in the order of the schemas.
struct IndexArgs {
  const Tensor& heads;
  const Tensor& block_indptr;
  const Tensor& block_indices;
  const std::optional<Tensor>& block_bits_ids;
  const std::optional<Tensor>& block_bits;
  const Tensor& column_indptr;
  const Tensor& column_indices;
  const std::optional<Tensor>& column_bias;
  int64_t block_m;
  int64_t block_n;
};

// Defined by each module: whether its kernels can read a tensor's memory, and how to say where that
// is ("on the CPU").
bool on_device(const Tensor& x);
extern const char* const kDevice;

IndexView index_view(const IndexArgs& args);

// Tensors of a call; `sequences` owns what params.sequences points at.
struct AttentionArgs {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  IndexArgs index;
  const std::optional<Tensor>& seq_ranges;
  int64_t q_offset;
  bool causal;
  double softmax_scale;
  double softcap;
  const std::optional<Tensor>& sinks;  // float32 [num_heads]
  // int32 [num_sequences, max_pages]: k and v are [num_pages, heads, page_size, dim].
  const std::optional<Tensor>& block_table;
};

// The part of the params that q and k alone decide, checked. `paged`: k's batch axis counts pages,
// and seqlen_k is the keys of one page.
AttentionParams query_key_params(const Tensor& q, const Tensor& k, bool paged = false);
// All that the shapes of a call decide, checked: reads no tensor's memory, leaves `sequences` null.
AttentionParams call_params(const AttentionArgs& args);
// The same and the sequences, which are read from memory, as are the pages to check them.
AttentionParams attention_params(const AttentionArgs& args, std::vector<Sequence>& sequences);

// The tensors out and lse that the params of a call then point at; where sequences are ranges of q
// (`ranges`), rows of none of them are 0 and -inf from the start.
std::pair<Tensor, Tensor> new_results(const Tensor& q, bool ranges, AttentionParams& p);

// Throws if two sequences share tokens of q (&Sequence::q_start, q_len) or of k.
void check_disjoint(const std::vector<Sequence>& sequences, const char* name,
                    int64_t Sequence::* start, int64_t Sequence::* length);

TensorView tensor_view(const Tensor& x);
// A checked [batch, heads, seqlen, dim] tensor with a contiguous last dimension.
std::pair<TensorView, DType> rows_view(const Tensor& x, const char* name);
// A dense tensor of at most four dimensions on the device of `like`; `order` names them from the
// slowest in memory to the fastest.
Tensor empty_dense(const Tensor& like, const int64_t* sizes, std::initializer_list<int> order,
                   ScalarType dtype);
// A [batch, heads, seqlen, dim] tensor laid out in memory as `like` is: rows of all heads
// together if `like` is a transposed [batch, seqlen, heads, dim] tensor.
Tensor empty_rows(const Tensor& like, int64_t heads, int64_t seqlen, int64_t dim);
cpu::Executor torch_threads();

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// The int32 lists that `member` of every part holds, one after another, and their lengths. Lists
// are freed as they are copied, so that memory holds them once.
template <class Part>
Tensor gather_lists(const Tensor& like, std::vector<Part>& parts,
                    std::vector<int32_t> Part::* member, Tensor& lengths) {
  auto* length = static_cast<int64_t*>(lengths.mutable_data_ptr());
  int64_t total = 0;
  for (size_t i = 0; i < parts.size(); ++i)
    total += length[i] = static_cast<int64_t>((parts[i].*member).size());
  Tensor all = torch::stable::new_empty(like, {total}, ScalarType::Int);
  auto* to = static_cast<int32_t*>(all.mutable_data_ptr());
  for (Part& part : parts) {
    const std::vector<int32_t> from = std::move(part.*member);
    if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(int32_t));
    to += from.size();
  }
  return all;
}

void raise_fault(const char* op, const IndexFault& fault);

}  // namespace sparse_attn::ops
