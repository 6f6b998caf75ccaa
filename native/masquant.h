// SPDX-License-Identifier: Apache-2.0
// Low-bit linears on CPU: the C interface of masquant's kernels. All pointers stay the caller's.
#pragma once
#include <stdint.h>

#define MQ_ABI_VERSION 1
#define MQ_BLOCK 16  // output rows that are interleaved in a packed weight

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
#ifdef __cplusplus
extern "C" {
#endif

// Low-rank patch of one modality: y += ((x / smooth) a^T * a_scale) b. Factors are bfloat16, or int8 with a_scale.
typedef struct {
    int32_t rank;  // 0: none
    int32_t is_int8;
    const void* a;  // [rank, padded_in]
    const void* b;  // [rank, blocks * MQ_BLOCK]
    const float* a_scale;  // [rank] or null
} mq_patch;

// Orthogonal transform: signs, then the odd part's matrix (x) Hadamard. `size` 0: none.
typedef struct {
    int32_t size;
    int32_t odd;
    const float* signs;  // [size]
    const float* matrix;  // [odd, odd], applied as row vector times matrix; null if odd is 1
} mq_rotation;

// Linears with one input, rows of all members one below the other, each padded to whole blocks.
//   weight  [blocks][padded_in / 8][16 rows][4 bytes]   4 bits: byte j holds k0 + j in its low, k0 + 4 + j in its high half
//           [blocks][padded_in / 4][16 rows][4 bytes]   8 bits
//   scale   bfloat16 [blocks][groups][16]
// Integers are stored unsigned, with the offset 2^(bits - 1).
typedef struct {
    int32_t in_features;
    int32_t padded_in;  // whole 16
    int32_t bits;  // 4 or 8
    int32_t group_size;  // inputs a scale, a multiple of 16; padded_in for one scale a row
    int32_t activation_bits;  // 6 or 8; 16: the sum of two integers of 8 bits, each with its own scale
    int32_t members;
    int32_t modalities;
    int32_t max_rank;
    const int32_t* member_rows;  // [members]
    const uint8_t* weight;
    const uint16_t* scale;
    const float* bias;  // [blocks * 16] or null
    const uint16_t* smooth;  // bfloat16 [modalities, in_features] or null; row 0 is ones and not read
    const mq_patch* patches;  // [modalities] or null
    mq_rotation rotation;  // of the input
} mq_group;

typedef struct {
    mq_group qkv, o, gate_up, down;
    const float* input_norm;  // [hidden]
    const float* post_norm;  // [hidden]
    const float* q_norm;  // [head_dim] or null
    const float* k_norm;
    float* key_cache;  // [kv_heads][capacity / 16][head_dim][16]
    float* value_cache;  // [kv_heads][capacity][head_dim]
} mq_layer;

// A decoder of pre-norm blocks with rotary attention and a gated SiLU MLP.
typedef struct {
    int32_t layers, hidden, heads, kv_heads, head_dim, rotary_dim, intermediate, capacity;
    float eps, attention_scale;
    const mq_layer* layer;
    const float* final_norm;  // [hidden]
    mq_rotation residual;  // of the hidden states, on entrance; undone before the final norm
} mq_decoder;

// Bytes of the interface's structs, for a check of its other side.
int64_t mq_struct_size(int32_t which);  // 0 patch, 1 rotation, 2 group, 3 layer, 4 decoder
// Names of the instruction sets compiled in, best first, separated by commas; only those that this CPU has if `usable`.
const char* mq_instruction_sets(int32_t usable);
// Choose one by name; 0 if it is not usable.
int32_t mq_select(const char* name);
const char* mq_selected(void);
int32_t mq_threads(void);

// Between disk (rows of little-endian integers with offset, low half first, `row_bytes` apart) and packed blocks.
// Padding inputs and rows get the integer 0.
void mq_pack(int32_t bits, int32_t rows, int32_t in_features, const uint8_t* disk, int64_t row_bytes, uint8_t* blocks);
void mq_unpack(int32_t bits, int32_t rows, int32_t in_features, const uint8_t* blocks, uint8_t* disk, int64_t row_bytes);

// y[member] [tokens, member_rows] of x [tokens, in_features], contiguous, float32 or bfloat16. `rows`: modality of each
// token, null if all are text. Returns 0, or -1 without memory.
int32_t mq_group_forward(const mq_group* group, const void* x, int32_t x_bfloat16, int64_t tokens, const uint8_t* rows,
                         void* const* y, int32_t y_bfloat16);
// The first half alone, as the specification's quantize_input: q int8 [tokens, in_features], scale [tokens] (with 16
// bits: [tokens, 2, in_features] and [tokens, 2]).
int32_t mq_quantize(const mq_group* group, const void* x, int32_t x_bfloat16, int64_t tokens, const uint8_t* rows,
                    int8_t* q, float* scale);
// Hidden states float32 [tokens, hidden] through all blocks, in place; keys and values are appended at `past`.
// `cosine`, `sine`: [tokens, rotary_dim]. The last norm is applied to the last `normed` tokens only.
int32_t mq_decoder_forward(const mq_decoder* decoder, int64_t tokens, int64_t past, float* hidden, const uint8_t* rows,
                           const float* cosine, const float* sine, int64_t normed);
// Tokens that went through a patch since the library was loaded, over all groups.
int64_t mq_patched_tokens(void);
// Sum of all bytes, read with every thread: what memory gives.
int64_t mq_read(const uint8_t* data, int64_t bytes);
// Integer products in registers with every thread: what the CPU gives. Returns the operations done.
int64_t mq_peak(int64_t rounds);

#ifdef __cplusplus
}
#endif
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
