// SPDX-License-Identifier: Apache-2.0
#include "common.h"

#include <iterator>
#include <limits>

namespace sparse_attn::ops {
namespace {

void check_index_tensor(const Tensor& x, ScalarType dtype, int64_t dim, const char* name) {
  STD_TORCH_CHECK(on_device(x), "sparse_attn: index tensor ", name, " is not ", kDevice);
  STD_TORCH_CHECK(x.scalar_type() == dtype, "sparse_attn: index tensor ", name,
                  " has the wrong dtype");
  STD_TORCH_CHECK(x.dim() == dim, "sparse_attn: index tensor ", name, " has ", x.dim(),
                  " dimensions, expected ", dim);
  STD_TORCH_CHECK(x.is_contiguous(), "sparse_attn: index tensor ", name, " is not contiguous");
}

void check_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(on_device(x), "sparse_attn: ", name, " is not ", kDevice);
  STD_TORCH_CHECK(x.dim() == 4, "sparse_attn: ", name, " has ", x.dim(),
                  " dimensions, expected [batch, heads, seqlen, head_dim]");
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) <= 1, "sparse_attn: ", name,
                  " is not contiguous in its last dimension (stride ", x.stride(3), ")");
}

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "sparse_attn: dtype is not float32, bfloat16 or float16");
  }
}

void check_head_dim(int64_t dim) {
  STD_TORCH_CHECK(dim > 0 && dim % 8 == 0 && dim <= kMaxHeadDim, "sparse_attn: head_dim=", dim,
                  " is not a multiple of 8 up to ", kMaxHeadDim);
}

int64_t count_sequences(const AttentionArgs& args) {
  const int64_t batch = args.q.size(0);
  if (!args.seq_ranges.has_value()) return batch;
  const Tensor& ranges = *args.seq_ranges;
  check_index_tensor(ranges, ScalarType::Int, 2, "seq_ranges");
  STD_TORCH_CHECK(ranges.size(1) == 5, "sparse_attn: seq_ranges has ", ranges.size(1),
                  " columns, expected 5");
  STD_TORCH_CHECK(batch == 1 || ranges.size(0) == batch, "sparse_attn: seq_ranges has ",
                  ranges.size(0), " rows, expected the batch size ", batch);
  return ranges.size(0);
}

std::vector<Sequence> read_sequences(const AttentionArgs& args, int64_t count, int64_t seqlen_k) {
  const int64_t batch = args.q.size(0);
  const int64_t seqlen_q = args.q.size(2);
  std::vector<Sequence> sequences;
  if (!args.seq_ranges.has_value()) {
    for (int64_t b = 0; b < batch; ++b)
      sequences.push_back({b, 0, seqlen_q, 0, seqlen_k, args.q_offset});
    return sequences;
  }
  const int32_t* row = data<int32_t>(*args.seq_ranges);
  for (int64_t s = 0; s < count; ++s, row += 5) {
    const Sequence sequence{batch == 1 ? 0 : s, row[0], row[1], row[2], row[3], row[4]};
    STD_TORCH_CHECK(row[0] >= 0 && row[1] >= 0 && int64_t{row[0]} + row[1] <= seqlen_q,
                    "sparse_attn: seq_ranges row ", s, " leaves q: start ", row[0], ", length ",
                    row[1], ", rows ", seqlen_q);
    STD_TORCH_CHECK(row[2] >= 0 && row[3] >= 0 && int64_t{row[2]} + row[3] <= seqlen_k,
                    "sparse_attn: seq_ranges row ", s, " leaves k: start ", row[2], ", length ",
                    row[3], ", keys ", seqlen_k);
    sequences.push_back(sequence);
  }
  // Threads would race on rows that two sequences share.
  if (batch == 1) check_disjoint(sequences, "q", &Sequence::q_start, &Sequence::q_len);
  return sequences;
}

void set_pages(const Tensor& block_table, AttentionParams& p) {
  check_index_tensor(block_table, ScalarType::Int, 2, "block_table");
  p.pages = {data<int32_t>(block_table), block_table.size(1), p.seqlen_k};
  STD_TORCH_CHECK(p.pages.page_size > 0 && p.pages.page_size % 8 == 0,
                  "sparse_attn: page_size=", p.pages.page_size, " is not a positive multiple of 8");
  p.seqlen_k = p.pages.max_pages * p.pages.page_size;
  STD_TORCH_CHECK(p.seqlen_k < (int64_t{1} << 31) - 128,
                  "sparse_attn: block_table's pages hold 2^31 tokens or more");
}

// Every page that a sequence's keys lie in must exist. Entries past them are never read.
void check_pages(const AttentionParams& p, int64_t num_pages,
                 const std::vector<Sequence>& sequences) {
  const auto count = static_cast<int64_t>(sequences.size());
  for (int64_t s = 0; s < count; ++s) {
    const Sequence& sequence = sequences[s];
    if (sequence.k_len == 0) continue;
    const int64_t last = (sequence.k_start + sequence.k_len - 1) / p.pages.page_size;
    for (int64_t i = sequence.k_start / p.pages.page_size; i <= last; ++i) {
      const int64_t page = p.pages.block_table[s * p.pages.max_pages + i];
      STD_TORCH_CHECK(page >= 0 && page < num_pages, "sparse_attn: block_table[", s, ", ", i,
                      "] is page ", page, ", the cache has ", num_pages);
    }
  }
}

}  // namespace

void check_disjoint(const std::vector<Sequence>& sequences, const char* name,
                    int64_t Sequence::* start, int64_t Sequence::* length) {
  std::vector<std::pair<int64_t, int64_t>> spans;
  for (const Sequence& s : sequences)
    if (s.*length > 0) spans.emplace_back(s.*start, s.*start + s.*length);
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i)
    STD_TORCH_CHECK(spans[i].first >= spans[i - 1].second, "sparse_attn: seq_ranges overlap in ",
                    name, " at token ", spans[i].first);
}

IndexView index_view(const IndexArgs& args) {
  check_index_tensor(args.heads, ScalarType::Int, 2, "heads");
  check_index_tensor(args.block_indptr, ScalarType::Long, 3, "block_indptr");
  check_index_tensor(args.block_indices, ScalarType::Int, 1, "block_indices");
  check_index_tensor(args.column_indptr, ScalarType::Long, 3, "column_indptr");
  check_index_tensor(args.column_indices, ScalarType::Int, 1, "column_indices");
  STD_TORCH_CHECK(args.heads.size(1) == 4, "sparse_attn: index tensor heads has ",
                  args.heads.size(1), " columns, expected 4");
  STD_TORCH_CHECK(args.block_m == 1 || (args.block_m > 0 && args.block_m % 16 == 0),
                  "sparse_attn: block_m=", args.block_m, " is neither 1 nor a multiple of 16");
  STD_TORCH_CHECK(args.block_n > 0 && args.block_n % 8 == 0 && args.block_n <= (1 << 20),
                  "sparse_attn: block_n=", args.block_n, " is not a positive multiple of 8");
  IndexView index;
  index.block_m = static_cast<int32_t>(args.block_m);
  index.block_n = static_cast<int32_t>(args.block_n);
  index.heads = data<int32_t>(args.heads);
  index.num_heads = args.heads.size(0);
  index.batch = args.block_indptr.size(0);
  index.num_tiles = args.block_indptr.size(2) - 1;
  for (int64_t d = 0; d < 3; ++d)
    STD_TORCH_CHECK(args.block_indptr.size(d) == args.column_indptr.size(d),
                    "sparse_attn: block_indptr and column_indptr differ in dimension ", d, ": ",
                    args.block_indptr.size(d), " and ", args.column_indptr.size(d));
  STD_TORCH_CHECK(args.block_indptr.size(1) == index.num_heads && index.num_tiles >= 0,
                  "sparse_attn: block_indptr is not [batch, ", index.num_heads,
                  " heads, tiles + 1]");
  index.block_indptr = data<int64_t>(args.block_indptr);
  index.block_indices = data<int32_t>(args.block_indices);
  index.block_capacity = args.block_indices.size(0);
  index.column_indptr = data<int64_t>(args.column_indptr);
  index.column_indices = data<int32_t>(args.column_indices);
  index.column_capacity = args.column_indices.size(0);
  STD_TORCH_CHECK(args.block_bits_ids.has_value() == args.block_bits.has_value(),
                  "sparse_attn: block_bits_ids and block_bits come together or not at all");
  if (args.block_bits_ids.has_value()) {
    check_index_tensor(*args.block_bits_ids, ScalarType::Int, 1, "block_bits_ids");
    check_index_tensor(*args.block_bits, ScalarType::Long, 3, "block_bits");
    STD_TORCH_CHECK(args.block_bits_ids->size(0) == index.block_capacity,
                    "sparse_attn: block_bits_ids has ", args.block_bits_ids->size(0),
                    " entries, block_indices ", index.block_capacity);
    STD_TORCH_CHECK(args.block_bits->size(1) == args.block_n &&
                        args.block_bits->size(2) == (args.block_m + 63) / 64,
                    "sparse_attn: block_bits is not [masks, ", args.block_n, ", ",
                    (args.block_m + 63) / 64, "]");
    index.block_bits_ids = data<int32_t>(*args.block_bits_ids);
    index.block_bits = data<int64_t>(*args.block_bits);
    index.num_masks = args.block_bits->size(0);
  }
  if (args.column_bias.has_value()) {
    check_index_tensor(*args.column_bias, ScalarType::Float, 1, "column_bias");
    STD_TORCH_CHECK(args.column_bias->size(0) == index.column_capacity,
                    "sparse_attn: column_bias has ", args.column_bias->size(0),
                    " entries, column_indices ", index.column_capacity);
    index.column_bias = data<float>(*args.column_bias);
  }
  return index;
}

// torch::stable::new_empty looks its operator up by name in every call, which a short call feels.
Tensor empty_dense(const Tensor& like, const int64_t* sizes, std::initializer_list<int> order,
                   ScalarType dtype) {
  int64_t strides[4];
  int64_t step = 1;
  for (auto dim = std::rbegin(order); dim != std::rend(order); ++dim) {
    strides[*dim] = step;
    step *= std::max<int64_t>(sizes[*dim], 1);
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(order.size()), sizes,
                                                         strides, code, device_type,
                                                         like.get_device_index(), &handle));
  return Tensor(handle);
}

TensorView tensor_view(const Tensor& x) {
  return {static_cast<char*>(const_cast<void*>(x.const_data_ptr())), x.stride(0), x.stride(1),
          x.stride(2)};
}

std::pair<TensorView, DType> rows_view(const Tensor& x, const char* name) {
  check_rows(x, name);
  return {tensor_view(x), dtype_of(x)};
}

AttentionParams query_key_params(const Tensor& q, const Tensor& k, bool paged) {
  check_rows(q, "q");
  check_rows(k, "k");
  AttentionParams p;
  p.dtype = dtype_of(q);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type(), "sparse_attn: q and k have different dtypes");
  p.num_heads = q.size(1);
  p.num_heads_kv = k.size(1);
  p.seqlen_q = q.size(2);
  p.seqlen_k = k.size(2);
  const int64_t head_dim = q.size(3);
  STD_TORCH_CHECK((paged || k.size(0) == q.size(0)) && k.size(3) == head_dim,
                  "sparse_attn: q and k differ in batch or head_dim");
  STD_TORCH_CHECK(p.num_heads_kv > 0 && p.num_heads % p.num_heads_kv == 0,
                  "sparse_attn: ", p.num_heads, " query heads do not divide into ", p.num_heads_kv,
                  " KV heads");
  check_head_dim(head_dim);
  STD_TORCH_CHECK(p.seqlen_q < (int64_t{1} << 31) && p.seqlen_k < (int64_t{1} << 31) - 128,
                  "sparse_attn: sequences of 2^31 tokens and more are not supported");
  p.head_dim = static_cast<int32_t>(head_dim);
  p.q = tensor_view(q);
  p.k = tensor_view(k);
  return p;
}

AttentionParams call_params(const AttentionArgs& args) {
  const bool paged = args.block_table.has_value();
  AttentionParams p = query_key_params(args.q, args.k, paged);
  check_rows(args.v, "v");
  STD_TORCH_CHECK(args.v.scalar_type() == args.q.scalar_type(),
                  "sparse_attn: q and v have different dtypes");
  STD_TORCH_CHECK(args.v.size(0) == args.k.size(0) && args.v.size(1) == args.k.size(1) &&
                      args.v.size(2) == args.k.size(2),
                  "sparse_attn: k and v differ in batch, heads or length");
  check_head_dim(args.v.size(3));
  p.head_dim_v = static_cast<int32_t>(args.v.size(3));
  p.v = tensor_view(args.v);
  p.causal = args.causal;
  p.softmax_scale = static_cast<float>(args.softmax_scale);
  p.softcap = static_cast<float>(args.softcap);
  p.index = index_view(args.index);
  if (args.sinks.has_value()) {
    const Tensor& sinks = *args.sinks;
    STD_TORCH_CHECK(on_device(sinks) && sinks.scalar_type() == ScalarType::Float &&
                        sinks.dim() == 1 && sinks.size(0) == p.num_heads && sinks.is_contiguous(),
                    "sparse_attn: sinks is not a contiguous float32 tensor of ", p.num_heads,
                    " numbers ", kDevice);
    p.sinks = data<float>(sinks);
  }

  if (paged) set_pages(*args.block_table, p);
  p.num_sequences = count_sequences(args);
  STD_TORCH_CHECK(!paged || args.block_table->size(0) == p.num_sequences,
                  "sparse_attn: block_table has ", paged ? args.block_table->size(0) : 0,
                  " rows, the call has ", p.num_sequences, " sequences");
  STD_TORCH_CHECK(p.index.batch == 1 || p.index.batch == p.num_sequences,
                  "sparse_attn: the index has batch ", p.index.batch, ", the call ",
                  p.num_sequences);
  STD_TORCH_CHECK(p.index.num_heads == 1 || p.index.num_heads == p.num_heads ||
                      p.index.num_heads == p.num_heads_kv,
                  "sparse_attn: the index has ", p.index.num_heads, " heads, the call ",
                  p.num_heads, " query and ", p.num_heads_kv, " KV heads");
  return p;
}

AttentionParams attention_params(const AttentionArgs& args, std::vector<Sequence>& sequences) {
  AttentionParams p = call_params(args);
  sequences = read_sequences(args, p.num_sequences, p.seqlen_k);
  if (args.block_table.has_value()) check_pages(p, args.k.size(0), sequences);
  p.sequences = sequences.data();
  int64_t longest = 0;
  for (const Sequence& s : sequences) longest = std::max(longest, s.q_len);
  STD_TORCH_CHECK(p.index.num_tiles * args.index.block_m >= longest,
                  "sparse_attn: the index covers ", p.index.num_tiles * args.index.block_m,
                  " query rows, the call has ", longest);
  return p;
}

Tensor empty_rows(const Tensor& like, int64_t heads, int64_t seqlen, int64_t dim) {
  const int64_t sizes[] = {like.size(0), heads, seqlen, dim};
  if (like.stride(1) < like.stride(2))
    return empty_dense(like, sizes, {0, 2, 1, 3}, like.scalar_type());
  return empty_dense(like, sizes, {0, 1, 2, 3}, like.scalar_type());
}

std::pair<Tensor, Tensor> new_results(const Tensor& q, bool ranges, AttentionParams& p) {
  Tensor out = empty_rows(q, p.num_heads, p.seqlen_q, p.head_dim_v);
  const int64_t lse_sizes[] = {q.size(0), p.num_heads, p.seqlen_q};
  Tensor lse = empty_dense(q, lse_sizes, {0, 1, 2}, ScalarType::Float);
  if (ranges) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -INFINITY);
  }
  p.out = tensor_view(out);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  return {out, lse};
}

cpu::Executor torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t n, const std::function<void(int64_t)>& work) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) work(i);
            });
          }};
}

void raise_fault(const char* op, const IndexFault& fault) {
  STD_TORCH_CHECK(!fault, "sparse_attn::", op, ": ", fault.message());
}

}  // namespace sparse_attn::ops
