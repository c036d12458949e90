// SPDX-License-Identifier: Apache-2.0
// Schemas, and parts of them, that both modules need.
#pragma once

#define INDEX_ARGS                                                                         \
  "Tensor heads, Tensor block_indptr, Tensor block_indices, Tensor? block_bits_ids, "      \
  "Tensor? block_bits, Tensor column_indptr, Tensor column_indices, Tensor? column_bias, " \
  "int block_m, int block_n"
#define CALL_ARGS \
  "Tensor? seq_ranges, SymInt q_offset, bool causal, float softmax_scale, float softcap"
#define ATTENTION_SCHEMA                                               \
  "attention(Tensor q, Tensor k, Tensor v, " INDEX_ARGS ", " CALL_ARGS \
  ", Tensor? sinks, Tensor? block_table=None) -> (Tensor out, Tensor lse)"
