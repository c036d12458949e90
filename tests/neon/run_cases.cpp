// SPDX-License-Identifier: Apache-2.0
// Attention and its gradients on cases that come from a file, without torch: the kernels of another
// processor under its emulator. test_neon.py writes the cases and reads what is written back.
//
// A case is the int64 numbers and doubles of `Numbers`, then arrays, each a count of bytes (int64)
// and the bytes; a count of 0 is an absent array. Tensors are contiguous.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <vector>

#include "cpu/attention.h"

namespace {

using namespace sparse_attn;

struct Numbers {
  int64_t dtype, batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v, causal, q_offset;
  int64_t index_batch, index_heads, num_tiles, block_m, block_n, num_masks, block_capacity,
      column_capacity;
  double softmax_scale, softcap;
};

std::vector<char> read_array(std::FILE* from) {
  int64_t bytes = 0;
  if (std::fread(&bytes, sizeof(bytes), 1, from) != 1) throw std::runtime_error("short file");
  std::vector<char> x(bytes);
  if (bytes > 0 && std::fread(x.data(), bytes, 1, from) != 1)
    throw std::runtime_error("short file");
  return x;
}

void write_array(std::FILE* to, const std::vector<char>& x) {
  if (std::fwrite(x.data(), 1, x.size(), to) != x.size()) throw std::runtime_error("disk is full");
}

template <class T>
T* as(std::vector<char>& x) {
  return x.empty() ? nullptr : reinterpret_cast<T*>(x.data());
}

TensorView view(std::vector<char>& x, int64_t heads, int64_t seqlen, int64_t dim) {
  return {as<char>(x), heads * seqlen * dim, seqlen * dim, dim};
}

void check(const IndexFault& fault) {
  if (fault) throw std::runtime_error(fault.message());
}

void run_case(const Numbers& n, std::FILE* from, std::FILE* to) {
  std::vector<char> q = read_array(from), k = read_array(from), v = read_array(from);
  std::vector<char> heads = read_array(from), block_indptr = read_array(from),
                    block_indices = read_array(from), bits_ids = read_array(from),
                    bits = read_array(from), column_indptr = read_array(from),
                    column_indices = read_array(from), column_bias = read_array(from);
  std::vector<char> sinks = read_array(from), grad_out = read_array(from), delta = read_array(from);

  AttentionParams p;
  p.dtype = static_cast<DType>(n.dtype);
  const int64_t width = element_size(p.dtype);
  std::vector<char> out(n.batch * n.heads * n.seqlen_q * n.head_dim_v * width);
  std::vector<char> lse(n.batch * n.heads * n.seqlen_q * sizeof(float));
  p.q = view(q, n.heads, n.seqlen_q, n.head_dim);
  p.k = view(k, n.heads_kv, n.seqlen_k, n.head_dim);
  p.v = view(v, n.heads_kv, n.seqlen_k, n.head_dim_v);
  p.out = view(out, n.heads, n.seqlen_q, n.head_dim_v);
  p.lse = as<float>(lse);
  p.sinks = as<const float>(sinks);
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < n.batch; ++b)
    sequences.push_back({b, 0, n.seqlen_q, 0, n.seqlen_k, n.q_offset});
  p.sequences = sequences.data();
  p.num_sequences = n.batch;
  p.index = {as<const int32_t>(heads),
             as<const int64_t>(block_indptr),
             as<const int32_t>(block_indices),
             as<const int32_t>(bits_ids),
             as<const int64_t>(bits),
             as<const int64_t>(column_indptr),
             as<const int32_t>(column_indices),
             as<const float>(column_bias),
             n.index_batch,
             n.index_heads,
             n.num_tiles,
             n.block_capacity,
             n.column_capacity,
             n.num_masks,
             static_cast<int32_t>(n.block_m),
             static_cast<int32_t>(n.block_n)};
  p.num_heads = n.heads;
  p.num_heads_kv = n.heads_kv;
  p.seqlen_q = n.seqlen_q;
  p.seqlen_k = n.seqlen_k;
  p.head_dim = static_cast<int32_t>(n.head_dim);
  p.head_dim_v = static_cast<int32_t>(n.head_dim_v);
  p.softmax_scale = static_cast<float>(n.softmax_scale);
  p.softcap = static_cast<float>(n.softcap);
  p.causal = n.causal != 0;

  // Two workers in turn: the split of long keys and the merge are as with two threads.
  const cpu::Executor executor = {2, [](int64_t count, const std::function<void(int64_t)>& work) {
                                    for (int64_t i = 0; i < count; ++i) work(i);
                                  }};
  check(cpu::attention_forward(p, executor));
  write_array(to, out);
  write_array(to, lse);
  if (grad_out.empty()) return;

  BackwardParams b;
  std::vector<char> grad_q(q.size()), grad_k(k.size()), grad_v(v.size());
  b.forward = p;
  b.grad_out = view(grad_out, n.heads, n.seqlen_q, n.head_dim_v);
  b.delta = as<const float>(delta);
  b.grad_q = view(grad_q, n.heads, n.seqlen_q, n.head_dim);
  b.grad_k = view(grad_k, n.heads_kv, n.seqlen_k, n.head_dim);
  b.grad_v = view(grad_v, n.heads_kv, n.seqlen_k, n.head_dim_v);
  check(cpu::attention_backward(b, executor));
  write_array(to, grad_q);
  write_array(to, grad_k);
  write_array(to, grad_v);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::FILE* from = std::fopen(argv[1], "rb");
  std::FILE* to = std::fopen(argv[2], "wb");
  if (from == nullptr || to == nullptr) return 2;
  try {
    Numbers numbers;
    while (std::fread(&numbers, sizeof(numbers), 1, from) == 1) run_case(numbers, from, to);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return std::fclose(to) == 0 ? 0 : 1;
}
