// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stdint.h>

#include "masquant.h"

// What every instruction set provides. Memory comes from the caller, so that no library template is instantiated with
// instructions that another CPU lacks.
struct Kernels {
    int64_t (*group_bytes)(const mq_group*, int64_t tokens, int threads);
    void (*group_forward)(const mq_group*, const void* x, bool x_bfloat16, int64_t tokens, const uint8_t* rows,
                          void* const* y, bool y_bfloat16, char* memory, int threads);
    void (*group_quantize)(const mq_group*, const void* x, bool x_bfloat16, int64_t tokens, const uint8_t* rows,
                           int8_t* q, float* scale, char* memory);
    int64_t (*decoder_bytes)(const mq_decoder*, int64_t tokens, int64_t past, int threads);
    void (*decoder_forward)(const mq_decoder*, int64_t tokens, int64_t past, float* hidden, const uint8_t* rows,
                            const float* cosine, const float* sine, int64_t normed, char* memory, int threads);
    int64_t (*read_bytes)(const uint8_t*, int64_t bytes, int threads);
    int64_t (*peak_operations)(int64_t rounds, int threads);
    int64_t* patched_tokens;
};
