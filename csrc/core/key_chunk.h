// SPDX-License-Identifier: Apache-2.0
// The interface between the lists and the inner loops: a chunk of keys as row pointers. Plain data
// only, since translation units built for different instruction sets include it.
#pragma once

#include <cstdint>

namespace sparse_attn {

constexpr int kTileRows = 64;   // query rows a kernel tile holds at most
constexpr int kChunkKeys = 64;  // keys a chunk holds at most
constexpr int kKeyPadding = 4;  // kernels may read pointers up to the next multiple of this

// Half-open key limits of each row of a tile: row r sees the keys [lo[r], hi[r]).
struct RowLimits {
  alignas(64) int32_t lo[kTileRows];
  alignas(64) int32_t hi[kTileRows];
  int32_t min_lo, max_lo, min_hi, max_hi;  // over the tile's real rows
};

struct KeyChunk {
  int32_t count = 0;
  const RowLimits* limits = nullptr;  // null: every row sees every key of the chunk
  bool has_bias = false;
  bool has_bits = false;
  int32_t position[kChunkKeys];
  const char* k[kChunkKeys + kKeyPadding];
  const char* v[kChunkKeys + kKeyPadding];
  float bias[kChunkKeys];
  uint64_t bits[kChunkKeys];  // bit r: tile row r sees this key
};

}  // namespace sparse_attn
