// SPDX-License-Identifier: Apache-2.0
// The kernels, compiled once per instruction set. Every function runs inside of a parallel region: all threads of the
// team call it with the same arguments, work is shared by `omp for`, and results are complete after a barrier.
#include <math.h>
#include <omp.h>
#include <stddef.h>

#include "masquant.h"
#include "simd.h"

namespace {

constexpr int B = MQ_BLOCK;
constexpr int64_t LONG_BLOCK = 1 << 16;  // bytes; longer ones are faster several at once

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory of one call, carved from one allocation.
struct Arena {
    char* at;
    template <class T>
    T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(at);
        at += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

// A group's input, smoothed, rotated, rounded and projected. A token has one row, or with 16-bit activations two, whose
// products are added.
struct Prepared {
    int8_t* q;  // [rows, padded_in]
    float* scale;  // [rows]
    int32_t* correction;  // [rows, groups]: takes the weights' offset off
    float* u;  // [tokens, max_rank]
};

struct Private {  // of one thread
    float *row, *other;  // a token's input and room for its rotation
    uint8_t* panel;  // weights with one byte each
    float* scores;
    Prepared one;  // a single token's, which every thread prepares for itself instead of waiting for another
};

inline int terms_of(const mq_group& g) { return g.activation_bits == 16 ? 2 : 1; }
inline int groups_of(const mq_group& g) { return g.padded_in / g.group_size; }
inline int64_t blocks_of(const mq_group& g) {
    int64_t n = 0;
    for (int i = 0; i < g.members; i++) n += ceil_div(g.member_rows[i], B);
    return n;
}

Prepared take_prepared(Arena& a, const mq_group& g, int64_t tokens) {
    Prepared p;
    const int64_t rows = tokens * terms_of(g);
    p.q = a.take<int8_t>(rows * g.padded_in);
    p.scale = a.take<float>(rows);
    p.correction = a.take<int32_t>(rows * groups_of(g));
    p.u = a.take<float>(tokens * g.max_rank);
    return p;
}
Private take_private(Arena& a, const mq_group& largest, int64_t scores) {
    Private p;
    p.row = a.take<float>(largest.padded_in + L);
    p.other = a.take<float>(largest.padded_in + L);
    p.panel = a.take<uint8_t>((int64_t)largest.padded_in * B * BLOCKS);
    p.scores = a.take<float>(scores);
    p.one = take_prepared(a, largest, 1);
    return p;
}

// ---- input ---------------------------------------------------------------------------------------------------------

// Hadamard transform of v [n], n a power of two, times `factor`.
void hadamard(float* v, int n, float factor) {
    int h = 1;
    if (n >= L) {
        for (int i = 0; i < n; i += L) {
            vf x = load<vf>(v + i) * factor;
            x = butterfly<1>(x);
            x = butterfly<2>(x);
            if (L > 4) x = butterfly<4 % L>(x);
            if (L > 8) x = butterfly<8 % L>(x);
            store(v + i, x);
        }
        h = L;
    } else {
        for (int i = 0; i < n; i++) v[i] *= factor;
    }
    for (; h < n; h *= 2)
        for (int i = 0; i < n; i += 2 * h)
            if (h >= L) {
                for (int j = i; j < i + h; j += L) {
                    vf a = load<vf>(v + j), b = load<vf>(v + j + h);
                    store(v + j, a + b);
                    store(v + j + h, a - b);
                }
            } else {
                for (int j = i; j < i + h; j++) {
                    float a = v[j], b = v[j + h];
                    v[j] = a + b;
                    v[j + h] = a - b;
                }
            }
}

// v [size] times the transform, or its inverse; `other` is room of the same size.
void rotate(const mq_rotation& r, float* v, float* other, bool inverse) {
    const int n = r.size, odd = r.odd, p = n / odd;
    auto flip = [&] {
        int k = 0;
        for (; k + L <= n; k += L) store(v + k, load<vf>(v + k) * load<vf>(r.signs + k));
        for (; k < n; k++) v[k] *= r.signs[k];
    };
    if (!inverse) flip();
    for (int i = 0; i < odd; i++) hadamard(v + i * p, p, 1.0f / sqrtf((float)p));
    if (odd > 1) {
        for (int j = 0; j < odd; j++) {
            int t = 0;
            for (; t + L <= p; t += L) {
                vf s = {};
                for (int i = 0; i < odd; i++)
                    s += load<vf>(v + i * p + t) * r.matrix[inverse ? j * odd + i : i * odd + j];
                store(other + j * p + t, s);
            }
            for (; t < p; t++) {
                float s = 0;
                for (int i = 0; i < odd; i++) s += v[i * p + t] * r.matrix[inverse ? j * odd + i : i * odd + j];
                other[j * p + t] = s;
            }
        }
        memcpy(v, other, sizeof(float) * n);
    }
    if (inverse) flip();
}

inline vf load_factor(const mq_patch& p, const void* base, int64_t i) {
    return p.is_int8 ? load_int8((const int8_t*)base + i) : load_bf16((const uint16_t*)base + i);
}

// u [rank] of a token's smoothed input v [padded_in].
void project(const mq_group& g, const mq_patch& p, const float* v, float* u) {
    for (int r = 0; r < p.rank; r += 4) {
        const int some = p.rank - r < 4 ? p.rank - r : 4;
        vf s[4] = {};
        for (int k = 0; k < g.padded_in; k += L) {
            vf x = load<vf>(v + k);
            for (int i = 0; i < 4; i++)
                if (i < some) s[i] += x * load_factor(p, p.a, (int64_t)(r + i) * g.padded_in + k);
        }
        for (int i = 0; i < some; i++) u[r + i] = sum(s[i]) * (p.a_scale ? p.a_scale[r + i] : 1.0f);
    }
}

int64_t patched_tokens = 0;

inline const mq_patch* patch_of(const mq_group& g, const uint8_t* rows, int64_t token) {
    if (!g.patches) return nullptr;
    const mq_patch* p = g.patches + (rows ? rows[token] : 0);
    return p->rank ? p : nullptr;
}

// v [padded_in] as integers; what they leave is put in its place if `rest`.
void quantize(const mq_group& g, float* v, bool rest, int8_t* q, float* scale, int32_t* correction) {
    vi top = {};  // magnitudes as integers: NaN is largest, so that it is not lost
    for (int k = 0; k < g.padded_in; k += L) top = maximum(top, bits(load<vf>(v + k)) & 0x7fffffff);
    const int32_t top_bits = largest(top);
    float absmax;
    memcpy(&absmax, &top_bits, 4);
    const float limit = (float)((1 << ((g.activation_bits < 8 ? g.activation_bits : 8) - 1)) - 1);
    float step = absmax / limit;
    if (step == 0) step = 1;
    *scale = step;
    const int32_t offset = 1 << (g.bits - 1);
    for (int i = 0, k = 0; i < groups_of(g); i++) {
        vi total = {};
        for (int end = k + g.group_size; k < end; k += L) {
            vf x = load<vf>(v + k);
            vf r = minimum(maximum(round_even(x / step), set1(-limit)), set1(limit));
            vi n = __builtin_convertvector(r, vi);
            total += n;
            store(q + k, __builtin_convertvector(n, vb));
            if (rest) store(v + k, x - r * step);
        }
        correction[i] = -offset * sum(total);
    }
}

// One token: v [padded_in], zero beyond in_features, is overwritten by the rotated and smoothed input.
void prepare_token(const mq_group& g, float* v, float* other, int modality, int8_t* q, float* scale,
                   int32_t* correction, float* u) {
    if (g.rotation.size) rotate(g.rotation, v, other, false);
    if (g.smooth && modality) {
        const uint16_t* s = g.smooth + (int64_t)modality * g.in_features;
        int k = 0;
        for (; k + L <= g.in_features; k += L) store(v + k, load<vf>(v + k) / load_bf16(s + k));
        for (; k < g.in_features; k++) {
            uint32_t b = (uint32_t)s[k] << 16;
            float f;
            memcpy(&f, &b, 4);
            v[k] /= f;
        }
    }
    if (g.patches && g.patches[modality].rank) project(g, g.patches[modality], v, u);
    const int terms = terms_of(g);
    for (int i = 0; i < terms; i++)
        quantize(g, v, i + 1 < terms, q + (int64_t)i * g.padded_in, scale + i, correction + i * groups_of(g));
}

// Inputs of all tokens; fill(token, row) writes one [padded_in]. The result is complete on return.
template <class Fill>
Prepared prepare(const mq_group& g, const Private& mine, Prepared all, int64_t tokens, const uint8_t* rows, Fill fill) {
    const int groups = groups_of(g), terms = terms_of(g);
    if (tokens == 1) {
        fill(0, mine.row);
        prepare_token(g, mine.row, mine.other, rows ? rows[0] : 0, mine.one.q, mine.one.scale, mine.one.correction,
                      mine.one.u);
        return mine.one;
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        fill(t, mine.row);
        prepare_token(g, mine.row, mine.other, rows ? rows[t] : 0, all.q + t * terms * g.padded_in,
                      all.scale + t * terms, all.correction + t * terms * groups, all.u + t * g.max_rank);
    }
    return all;
}

// ---- product -------------------------------------------------------------------------------------------------------

struct Output {
    void* const* y;  // per member [tokens, member_rows]
    bool bfloat16, add;
};

// Where a block's rows go.
struct Target {
    char* y;
    int64_t stride;  // of a token, in elements
    int count;  // rows that are no padding
};

Target target_of(const mq_group& g, const Output& out, int64_t block) {
    int i = 0;
    for (; block >= ceil_div(g.member_rows[i], B); i++) block -= ceil_div(g.member_rows[i], B);
    const int64_t rows = g.member_rows[i], first = block * B;
    return {(char*)out.y[i] + first * (out.bfloat16 ? 2 : 4), rows, (int)(rows - first < B ? rows - first : B)};
}

void emit_other(const Output& out, const Target& to, char* at, const vf* y) {
    alignas(64) float values[B];
    alignas(64) uint16_t halves[B];
    if (out.bfloat16) {
        const bool whole = to.count == B;
        uint16_t* h = whole ? (uint16_t*)at : halves;
        for (int p = 0; p < P; p++) store_bf16(h + p * L, y[p]);
        if (!whole) memcpy(at, halves, 2 * to.count);
        return;
    }
    for (int p = 0; p < P; p++) store(values + p * L, y[p]);
    float* f = (float*)at;
    for (int i = 0; i < to.count; i++) f[i] = out.add ? f[i] + values[i] : values[i];
}

// Write (or add) a token's results y [P] of one block.
inline void emit(const Output& out, const Target& to, int64_t token, const vf* y) {
    char* at = to.y + token * to.stride * (out.bfloat16 ? 2 : 4);
    if (out.bfloat16 || to.count < B) return emit_other(out, to, at, y);
    for (int p = 0; p < P; p++) store(at + 4 * p * L, out.add ? load<vf>(at + 4 * p * L) + y[p] : y[p]);
}

inline void add_bias(const mq_group& g, int64_t block, vf* y) {
    if (g.bias)
        for (int p = 0; p < P; p++) y[p] += load<vf>(g.bias + block * B + p * L);
}

inline void add_patch(const mq_patch& patch, const float* u, int64_t block, int64_t width, vf* y) {
    for (int r = 0; r < patch.rank; r++)
        for (int p = 0; p < P; p++) y[p] += u[r] * load_factor(patch, patch.b, r * width + block * B + p * L);
}

inline int64_t block_bytes(const mq_group& g) { return (int64_t)g.padded_in * g.bits * B / 8; }

// NB neighbouring blocks times NR rows of a prepared input; several blocks keep more memory requests in flight.
template <int BITS, int NR, int NB>
void block_product(const mq_group& g, int64_t block, const Prepared& in, int64_t row, vf (*y)[NB][P]) {
    const int groups = groups_of(g), lines = g.group_size * BITS * B / 8 / 64;  // of 64 bytes
    const int64_t bytes = block_bytes(g);
    const uint8_t* w = g.weight + block * bytes;
    const uint16_t* s = g.scale + block * groups * B;
    const int8_t* q = in.q + row * g.padded_in;
    const int32_t* correction = in.correction + row * groups;
    vf total[NR][NB][P] = {};
    for (int i = 0; i < groups; i++, s += B) {
        vi a[NR][NB][2][P] = {};
        for (int n = 0; n < NR; n++)
            for (int j = 0; j < NB * P; j++) a[n][j / P][0][j % P] = set1(correction[n * groups + i]);
        for (int c = 0; c < lines; c++, w += 64, q += 32 / BITS) {
#pragma GCC unroll 4
            for (int j = 0; j < NB; j++) {
                __builtin_prefetch(w + j * bytes + (NB == 1 ? 4096 : 2048));
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) {
                    const vi v = load<vi>(w + j * bytes + 4 * p * L);
#pragma GCC unroll 4
                    for (int n = 0; n < NR; n++) {
                        int32_t x[2];
                        memcpy(x, q + (int64_t)n * g.padded_in, 32 / BITS);
                        vi* to = &a[n][j][0][p];
                        if (BITS == 4) {
                            *to = dot<false>(*to, v & 0x0f0f0f0f, set1(x[0]));
                            to = &a[n][j][1][p];
                            *to = dot<false>(*to, (v >> 4) & 0x0f0f0f0f, set1(x[1]));
                        } else {
                            *to = dot<true>(*to, v, set1(x[0]));
                        }
                    }
                }
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < NB; j++)
            for (int p = 0; p < P; p++) {
                const vf scale = load_bf16(s + j * groups * B + p * L);
                for (int n = 0; n < NR; n++) total[n][j][p] += to_float(a[n][j][0][p] + a[n][j][1][p]) * scale;
            }
    }
    for (int n = 0; n < NR; n++)
        for (int j = 0; j < NB * P; j++) y[n][j / P][j % P] = total[n][j / P][j % P];
}

// A token's result y [P] from its row's product, or with TERMS 2 also from the next row's, `stride` vectors on.
template <int TERMS>
inline void combine(const Prepared& in, int64_t row, vf* y, int64_t stride) {
    for (int p = 0; p < P; p++) {
        y[p] *= in.scale[row];
        if (TERMS == 2) y[p] += y[stride + p] * in.scale[row + 1];
    }
}

template <int BITS, int TERMS, int NR, int NB>
void multiply_blocks(const mq_group& g, const Prepared& in, int64_t block, const uint8_t* rows, const Output& out) {
    vf y[NR][NB][P];
    block_product<BITS, NR, NB>(g, block, in, 0, y);
    for (int n = 0; n < NR; n += TERMS)
        for (int j = 0; j < NB; j++) {
            combine<TERMS>(in, n, y[n][j], NB * P);
            add_bias(g, block + j, y[n][j]);
            const int64_t token = n / TERMS;
            if (const mq_patch* patch = patch_of(g, rows, token))
                add_patch(*patch, in.u + token * g.max_rank, block + j, blocks_of(g) * B, y[n][j]);
            emit(out, target_of(g, out, block + j), token, y[n][j]);
        }
}

// Few rows: weights are read once, straight from memory.
template <int BITS, int TERMS, int NR>
void multiply_few(const mq_group& g, const Prepared& in, const uint8_t* rows, const Output& out) {
    const int64_t blocks = blocks_of(g);
    // Each thread walks its own stretch of memory.
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    int64_t b = blocks * me / all;
    const int64_t end = blocks * (me + 1) / all;
    constexpr int STREAMS = NR == 1 ? 4 : 1;  // blocks that are multiplied at once
    if (STREAMS > 1 && block_bytes(g) >= LONG_BLOCK)
        for (; b + STREAMS <= end; b += STREAMS) multiply_blocks<BITS, TERMS, NR, STREAMS>(g, in, b, rows, out);
    for (; b < end; b++) multiply_blocks<BITS, TERMS, NR, 1>(g, in, b, rows, out);
#pragma omp barrier
}

// Blocks' weights with one byte each: [padded_in / 4][count][16 rows][4].
template <int BITS>
void unpack_panel(const mq_group& g, int64_t block, int count, uint8_t* panel) {
    for (int j = 0; j < count; j++) {
        const uint8_t* w = g.weight + (block + j) * block_bytes(g);
        uint8_t* to = panel + j * 64;
        for (int k = 0; k < g.padded_in; k += 32 / BITS, w += 64) {
            for (int p = 0; p < P; p++) {
                vi v = load<vi>(w + 4 * p * L);
                store(to + 4 * p * L, BITS == 4 ? v & 0x0f0f0f0f : v);
                if (BITS == 4) store(to + count * 64 + 4 * p * L, (v >> 4) & 0x0f0f0f0f);
            }
            to += count * 64 * (8 / BITS);
        }
    }
}

// MR rows times NB blocks, all sums in registers; TERMS rows are one token's.
template <bool WIDE, int TERMS, int MR, int NB>
void tile(const mq_group& g, int64_t block, const uint8_t* panel, const Prepared& in, int64_t row,
          const uint8_t* rows, const Output& out) {
    static_assert(MR % TERMS == 0, "tokens are not cut");
    const int groups = groups_of(g), quads = g.group_size / 4;
    const int64_t token = row / TERMS;
    constexpr int TOKENS = MR / TERMS;
    const int8_t* q = in.q + row * g.padded_in;
    const int32_t* correction = in.correction + row * groups;
    const uint16_t* s = g.scale + block * groups * B;
    vf f[MR][NB][P] = {};
    for (int i = 0; i < groups; i++) {
        vi a[MR][NB][P];
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
            for (int j = 0; j < NB * P; j++) a[m][j / P][j % P] = set1(correction[m * groups + i]);
        for (int k = 0; k < quads; k++, panel += NB * 64, q += 4) {
            vi w[NB][P];
#pragma GCC unroll 4
            for (int j = 0; j < NB * P; j++) w[j / P][j % P] = load<vi>(panel + 4 * L * j);
#pragma GCC unroll 16
            for (int m = 0; m < MR; m++) {
                int32_t x;
                memcpy(&x, q + (int64_t)m * g.padded_in, 4);
#pragma GCC unroll 4
                for (int j = 0; j < NB * P; j++)
                    a[m][j / P][j % P] = dot<WIDE>(a[m][j / P][j % P], w[j / P][j % P], set1(x));
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < NB * P; j++) {
            vf scale = load_bf16(s + ((int64_t)(j / P) * groups + i) * B + j % P * L);
#pragma GCC unroll 16
            for (int m = 0; m < MR; m++) f[m][j / P][j % P] += to_float(a[m][j / P][j % P]) * scale;
        }
    }
    const mq_patch* patch = patch_of(g, rows, token);
    bool uniform = true;
    for (int m = 1; m < TOKENS; m++) uniform = uniform && patch_of(g, rows, token + m) == patch;
    const int64_t width = blocks_of(g) * B;
#pragma GCC unroll 4
    for (int j = 0; j < NB; j++) {
#pragma GCC unroll 16
        for (int m = 0; m < MR; m += TERMS) {
            combine<TERMS>(in, row + m, f[m][j], NB * P);
            add_bias(g, block + j, f[m][j]);
        }
        if (patch && uniform)  // each factor is loaded once for all tokens
            for (int r = 0; r < patch->rank; r++)
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) {
                    vf b = load_factor(*patch, patch->b, r * width + (block + j) * B + p * L);
#pragma GCC unroll 16
                    for (int m = 0; m < TOKENS; m++) f[m * TERMS][j][p] += in.u[(token + m) * g.max_rank + r] * b;
                }
        const Target to = target_of(g, out, block + j);
#pragma GCC unroll 16
        for (int m = 0; m < TOKENS; m++) {
            if (!uniform)
                if (const mq_patch* own = patch_of(g, rows, token + m))
                    add_patch(*own, in.u + (token + m) * g.max_rank, block + j, width, f[m * TERMS][j]);
            emit(out, to, token + m, f[m * TERMS][j]);
        }
    }
}

// Rows first..last of one panel.
template <int BITS, int TERMS, int NB>
void multiply_panel(const mq_group& g, int64_t block, const uint8_t* panel, const Prepared& in, int64_t first,
                    int64_t last, const uint8_t* rows, const Output& out) {
    constexpr bool WIDE = BITS == 8;
    int64_t r = first;
    for (; r + ROWS <= last; r += ROWS) tile<WIDE, TERMS, ROWS, NB>(g, block, panel, in, r, rows, out);
    for (; ROWS > 4 && r + 4 <= last; r += 4) tile<WIDE, TERMS, 4, NB>(g, block, panel, in, r, rows, out);
    for (; r + 2 <= last; r += 2) tile<WIDE, TERMS, 2, NB>(g, block, panel, in, r, rows, out);
    if (TERMS == 1 && r < last) tile<WIDE, 1, 1, NB>(g, block, panel, in, r, rows, out);
}

template <int BITS, int TERMS>
void multiply_many(const mq_group& g, const Private& mine, const Prepared& in, int64_t tokens, const uint8_t* rows,
                   const Output& out) {
    const int64_t blocks = blocks_of(g), panels = ceil_div(blocks, BLOCKS), count = tokens * TERMS;
    // Few panels are split by rows as well, so that every thread has work.
    int64_t pieces = ceil_div(4 * omp_get_num_threads(), panels);
    const int64_t most = ceil_div(count, 48);
    pieces = pieces < most ? pieces : most;
    const int64_t share = ceil_div(ceil_div(count, pieces), ROWS) * ROWS;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < panels * pieces; task++) {
        const int64_t block = task / pieces * BLOCKS, first = task % pieces * share;
        const int64_t last = first + share < count ? first + share : count;
        if (first >= last) continue;
        if (block + BLOCKS <= blocks) {
            unpack_panel<BITS>(g, block, BLOCKS, mine.panel);
            multiply_panel<BITS, TERMS, BLOCKS>(g, block, mine.panel, in, first, last, rows, out);
        } else {
            unpack_panel<BITS>(g, block, 1, mine.panel);
            multiply_panel<BITS, TERMS, 1>(g, block, mine.panel, in, first, last, rows, out);
        }
    }
}

template <int BITS>
void multiply_bits(const mq_group& g, const Private& mine, const Prepared& in, int64_t tokens, const uint8_t* rows,
                   const Output& out) {
    if (terms_of(g) == 2) {
        if (tokens == 1) return multiply_few<BITS, 2, 2>(g, in, rows, out);
        if (tokens == 2) return multiply_few<BITS, 2, 4>(g, in, rows, out);
        return multiply_many<BITS, 2>(g, mine, in, tokens, rows, out);
    }
    switch (tokens) {
        case 1: return multiply_few<BITS, 1, 1>(g, in, rows, out);
        case 2: return multiply_few<BITS, 1, 2>(g, in, rows, out);
        case 3: return multiply_few<BITS, 1, 3>(g, in, rows, out);
        case 4: return multiply_few<BITS, 1, 4>(g, in, rows, out);
        default: return multiply_many<BITS, 1>(g, mine, in, tokens, rows, out);
    }
}

// The group's outputs; complete on return.
void multiply(const mq_group& g, const Private& mine, const Prepared& in, int64_t tokens, const uint8_t* rows,
              const Output& out) {
#pragma omp master
    if (g.patches)
        for (int64_t t = 0; t < tokens; t++) patched_tokens += patch_of(g, rows, t) != nullptr;
    g.bits == 4 ? multiply_bits<4>(g, mine, in, tokens, rows, out) : multiply_bits<8>(g, mine, in, tokens, rows, out);
}

void fill_row(const mq_group& g, const void* x, bool bfloat16, int64_t token, float* v) {
    const int n = g.in_features;
    int k = 0;
    if (bfloat16) {
        const uint16_t* from = (const uint16_t*)x + token * n;
        for (; k + L <= n; k += L) store(v + k, load_bf16(from + k));
        for (; k < n; k++) {
            uint32_t b = (uint32_t)from[k] << 16;
            memcpy(v + k, &b, 4);
        }
    } else {
        memcpy(v, (const float*)x + token * n, sizeof(float) * n);
        k = n;
    }
    for (; k < g.padded_in; k++) v[k] = 0;
}

// ---- entry points --------------------------------------------------------------------------------------------------

int64_t group_bytes(const mq_group* g, int64_t tokens, int threads) {
    Arena a{nullptr};
    take_prepared(a, *g, tokens);
    for (int i = 0; i < threads; i++) take_private(a, *g, 0);
    return (int64_t)(a.at - (char*)nullptr);
}

void group_forward(const mq_group* g, const void* x, bool x_bfloat16, int64_t tokens, const uint8_t* rows,
                   void* const* y, bool y_bfloat16, char* memory, int threads) {
    Arena arena{memory};
    const Prepared all = take_prepared(arena, *g, tokens);
    const int64_t each = group_bytes(g, 0, 1);
#pragma omp parallel num_threads(threads)
    {
        Arena own{arena.at + omp_get_thread_num() * each};
        const Private mine = take_private(own, *g, 0);
        const Prepared in = prepare(*g, mine, all, tokens, rows,
                                    [&](int64_t t, float* v) { fill_row(*g, x, x_bfloat16, t, v); });
        multiply(*g, mine, in, tokens, rows, Output{y, y_bfloat16, false});
    }
}

void group_quantize(const mq_group* g, const void* x, bool x_bfloat16, int64_t tokens, const uint8_t* rows, int8_t* q,
                    float* scale, char* memory) {
    Arena arena{memory};
    const Private mine = take_private(arena, *g, 0);
    for (int64_t t = 0; t < tokens; t++) {
        fill_row(*g, x, x_bfloat16, t, mine.row);
        const int terms = terms_of(*g);
        prepare_token(*g, mine.row, mine.other, rows ? rows[t] : 0, mine.one.q, scale + t * terms, mine.one.correction,
                      mine.one.u);
        for (int i = 0; i < terms; i++)
            memcpy(q + (t * terms + i) * g->in_features, mine.one.q + (int64_t)i * g->padded_in, g->in_features);
    }
}

int64_t read_bytes(const uint8_t* data, int64_t bytes, int threads) {
    int64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int64_t line = 0; line < bytes / 256; line++) {
        const uint8_t* p = data + line * 256;
        __builtin_prefetch(p + 4096);
        __builtin_prefetch(p + 4160);
        __builtin_prefetch(p + 4224);
        __builtin_prefetch(p + 4288);
        vi s = {};
        for (int i = 0; i < 64 / L; i++) s += load<vi>(p + 4 * L * i);
        total += sum(s);
    }
    return total;
}

// Integer products as fast as they go, all in registers; returns the number of additions and multiplications.
int64_t peak_operations(int64_t rounds, int threads) {
    constexpr int CHAINS = 12;
    int64_t total = 0, sink = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total, sink)
    {
        vi a[CHAINS] = {}, w = set1(0x01020304), x = set1((int32_t)rounds & 0x0f0f0f0f);
        for (int64_t i = 0; i < rounds; i++) {
            hide(w);
            hide(x);
#pragma GCC unroll 16
            for (int c = 0; c < CHAINS; c++) {
                a[c] = dot<false>(a[c], w, x);
                hide(a[c]);
            }
        }
        for (int c = 0; c < CHAINS; c++) sink += sum(a[c]);
        total += rounds * CHAINS * L * 8;
    }
    return sink == 42 ? total + 1 : total;
}

}  // namespace
