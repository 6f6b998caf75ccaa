// SPDX-License-Identifier: Apache-2.0
// The C interface: chooses the instruction set, provides memory and threads, packs weights.
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "isa.h"
#include "masquant.h"

#if defined(__x86_64__)
extern const Kernels avx512vnni, avxvnni, avx2;
#elif defined(__aarch64__)
#include <sys/auxv.h>
extern const Kernels neon;
#endif
extern const Kernels scalar;

namespace {

struct Choice {
    const char* name;
    const Kernels* kernels;
    bool (*usable)();
};

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
bool has_avxvnni() {
    unsigned a = 7, b = 0, c = 1, d = 0;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return has_avx2() && (a & (1u << 4));
}
const Choice choices[] = {{"avx512vnni", &avx512vnni, has_avx512vnni},
                          {"avxvnni", &avxvnni, has_avxvnni},
                          {"avx2", &avx2, has_avx2},
                          {"scalar", &scalar, always}};
#elif defined(__aarch64__)
bool has_dotprod() {
#if defined(__APPLE__)
    return true;
#else
    return getauxval(AT_HWCAP) & (1 << 20);  // HWCAP_ASIMDDP
#endif
}
const Choice choices[] = {{"neon", &neon, has_dotprod}, {"scalar", &scalar, always}};
#else
const Choice choices[] = {{"scalar", &scalar, always}};
#endif

const Choice* best() {
    for (const Choice& c : choices)
        if (c.usable()) return &c;
    return nullptr;
}
const Choice*& selected() {
    static const Choice* choice = best();
    return choice;
}

// A thread's memory for its calls: grows, and is kept up to a bound so that decoding does not allocate.
class Memory {
  public:
    ~Memory() { free(data_); }
    char* get(int64_t bytes) {
        if (bytes > size_ || (size_ > keep && bytes <= keep)) {
            free(data_);
            size_ = 0;
            data_ = static_cast<char*>(aligned_alloc(64, (bytes + 4159) / 64 * 64));
            if (data_) size_ = bytes;
        }
        return data_;
    }

  private:
    static constexpr int64_t keep = 64 << 20;
    char* data_ = nullptr;
    int64_t size_ = 0;
};
thread_local Memory memory;

}  // namespace

int64_t mq_struct_size(int32_t which) {
    const int64_t sizes[] = {sizeof(mq_patch), sizeof(mq_rotation), sizeof(mq_group), sizeof(mq_layer),
                             sizeof(mq_decoder)};
    return sizes[which];
}

const char* mq_instruction_sets(int32_t usable) {
    static thread_local char names[128];
    names[0] = 0;
    for (const Choice& c : choices)
        if (!usable || c.usable()) {
            if (names[0]) strcat(names, ",");
            strcat(names, c.name);
        }
    return names;
}

int32_t mq_select(const char* name) {
    for (const Choice& c : choices)
        if (!strcmp(c.name, name) && c.usable()) {
            selected() = &c;
            return 1;
        }
    return 0;
}

const char* mq_selected(void) { return selected()->name; }
int32_t mq_threads(void) { return omp_get_max_threads(); }
int64_t mq_patched_tokens(void) { return *selected()->kernels->patched_tokens; }

namespace {

// Visits every integer of the packed blocks: body(row, input, byte, shift), row and input possibly beyond the matrix.
template <class Body>
void each_integer(int32_t bits, int32_t rows, int32_t in_features, Body body) {
    const int64_t padded = (in_features + 15) / 16 * 16, blocks = (rows + MQ_BLOCK - 1) / MQ_BLOCK;
    const int64_t block_bytes = padded * bits * MQ_BLOCK / 8;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t i = 0; i < block_bytes; i++) {
            const int64_t line = i / 64, row = block * MQ_BLOCK + i % 64 / 4, j = i % 4;
            if (bits == 8) {
                body(row, line * 4 + j, block * block_bytes + i, 0);
            } else {
                body(row, line * 8 + j, block * block_bytes + i, 0);
                body(row, line * 8 + 4 + j, block * block_bytes + i, 4);
            }
        }
}

}  // namespace

void mq_pack(int32_t bits, int32_t rows, int32_t in_features, const uint8_t* disk, int64_t row_bytes, uint8_t* blocks) {
    const int zero = 1 << (bits - 1);
    each_integer(bits, rows, in_features, [=](int64_t row, int64_t k, int64_t byte, int shift) {
        int value = zero;
        if (row < rows && k < in_features) {
            const uint8_t* from = disk + row * row_bytes;
            value = bits == 8 ? from[k] : (from[k / 2] >> (k % 2 * 4)) & 15;
        }
        blocks[byte] = shift ? (uint8_t)(blocks[byte] | value << shift) : (uint8_t)value;
    });
}

void mq_unpack(int32_t bits, int32_t rows, int32_t in_features, const uint8_t* blocks, uint8_t* disk,
               int64_t row_bytes) {
    memset(disk, 0, rows * row_bytes);
    each_integer(bits, rows, in_features, [=](int64_t row, int64_t k, int64_t byte, int shift) {
        if (row >= rows || k >= in_features) return;
        uint8_t* to = disk + row * row_bytes;
        if (bits == 8) {
            to[k] = blocks[byte];
        } else {
            to[k / 2] = (uint8_t)(to[k / 2] | ((blocks[byte] >> shift) & 15) << (k % 2 * 4));
        }
    });
}

int32_t mq_group_forward(const mq_group* group, const void* x, int32_t x_bfloat16, int64_t tokens, const uint8_t* rows,
                         void* const* y, int32_t y_bfloat16) {
    if (tokens == 0) return 0;
    const Kernels* k = selected()->kernels;
    const int threads = omp_get_max_threads();
    char* room = memory.get(k->group_bytes(group, tokens, threads));
    if (!room) return -1;
    k->group_forward(group, x, x_bfloat16, tokens, rows, y, y_bfloat16, room, threads);
    return 0;
}

int32_t mq_quantize(const mq_group* group, const void* x, int32_t x_bfloat16, int64_t tokens, const uint8_t* rows,
                    int8_t* q, float* scale) {
    const Kernels* k = selected()->kernels;
    char* room = memory.get(k->group_bytes(group, 1, 1));
    if (!room) return -1;
    k->group_quantize(group, x, x_bfloat16, tokens, rows, q, scale, room);
    return 0;
}

int32_t mq_decoder_forward(const mq_decoder* decoder, int64_t tokens, int64_t past, float* hidden, const uint8_t* rows,
                           const float* cosine, const float* sine, int64_t normed) {
    if (tokens == 0) return 0;
    const Kernels* k = selected()->kernels;
    const int threads = omp_get_max_threads();
    char* room = memory.get(k->decoder_bytes(decoder, tokens, past, threads));
    if (!room) return -1;
    k->decoder_forward(decoder, tokens, past, hidden, rows, cosine, sine, normed, room, threads);
    return 0;
}

int64_t mq_read(const uint8_t* data, int64_t bytes) {
    return selected()->kernels->read_bytes(data, bytes, omp_get_max_threads());
}

int64_t mq_peak(int64_t rounds) { return selected()->kernels->peak_operations(rounds, omp_get_max_threads()); }
