// SPDX-License-Identifier: Apache-2.0
#include "device.h"

#ifndef SPARSE_ATTN_EMULATED
// Of libtorch_cuda, which only a torch with CUDA has; nothing else has CUDA tensors.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace sparse_attn::ops {

#ifdef SPARSE_ATTN_EMULATED

bool on_device(const Tensor& x) {
  return x.is_cpu();
}

const char* const kDevice = "on the CPU";

Device::Device(const Tensor&) {}

#else

bool on_device(const Tensor& x) {
  return x.is_cuda();
}

const char* const kDevice = "on a CUDA device";

Device::Device(const Tensor& like) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "sparse_attn: this torch is built without CUDA; install one with it");
  guard_.emplace(like.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

#endif

Tensor aligned_rows(const Tensor& x) {
  constexpr int64_t kElements = 16 / 2;
  bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim < 3; ++dim)
    aligned = aligned && (x.size(dim) <= 1 || x.stride(dim) % kElements == 0);
  if (aligned) return x;
  const int64_t sizes[] = {x.size(0), x.size(1), x.size(2), x.size(3)};
  Tensor copy = empty_dense(x, sizes, {0, 1, 2, 3}, x.scalar_type());
  torch::stable::copy_(copy, x);
  return copy;
}

cuda::DeviceCall device_call(const AttentionArgs& args) {
  cuda::DeviceCall call;
  AttentionParams& p = call.call;
  p = call_params(args);
  STD_TORCH_CHECK(p.head_dim <= kMaxCudaHeadDim && p.head_dim_v <= kMaxCudaHeadDim,
                  "sparse_attn: the CUDA kernels run head_dim up to ", kMaxCudaHeadDim, ", not ",
                  p.head_dim, " and ", p.head_dim_v);
  STD_TORCH_CHECK(p.dtype != DType::kFloat32,
                  "sparse_attn: the CUDA kernels run bfloat16 and float16, not float32");
  STD_TORCH_CHECK(p.seqlen_k <= (int64_t{1} << 31) - (int64_t{1} << 21),
                  "sparse_attn: the CUDA kernels run 2^31 - 2^21 keys, not ", p.seqlen_k);
  STD_TORCH_CHECK(p.index.num_masks * p.index.block_n < (int64_t{1} << 31),
                  "sparse_attn: block_bits has ", p.index.num_masks, " masks of ", p.index.block_n,
                  " keys; the CUDA kernels number 2^31 in all");
  const auto& index = args.index;
  for (const Tensor* x : {&args.k, &args.v, &index.heads, &index.block_indptr, &index.block_indices,
                          &index.column_indptr, &index.column_indices})
    STD_TORCH_CHECK(x->get_device_index() == args.q.get_device_index(),
                    "sparse_attn: k, v and the index are not all on the device of q");
  for (const std::optional<Tensor>* x :
       {&index.block_bits_ids, &index.block_bits, &index.column_bias, &args.seq_ranges,
        &args.block_table, &args.sinks})
    STD_TORCH_CHECK(!x->has_value() || (*x)->get_device_index() == args.q.get_device_index(),
                    "sparse_attn: sinks, seq_ranges, block_table and the index are not all on the "
                    "device of q");
  // Rows that the index has no list for would be left without a result.
  const int64_t covered = p.index.num_tiles * p.index.block_m;
  STD_TORCH_CHECK(args.seq_ranges.has_value() || covered >= p.seqlen_q,
                  "sparse_attn: the index covers ", covered, " query rows, the call has ",
                  p.seqlen_q);
  call.max_q_len = static_cast<int32_t>(std::min(p.seqlen_q, covered));
  if (args.seq_ranges.has_value()) call.seq_ranges = data<int32_t>(*args.seq_ranges);
  call.q_offset = args.q_offset;
  call.batch = args.q.size(0);
  call.num_pages = args.k.size(0);
  return call;
}

void raise_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // else the next call would be told of it too
  STD_TORCH_CHECK(error == cudaSuccess, "sparse_attn::", op, ": ", cudaGetErrorString(error));
}

}  // namespace sparse_attn::ops
