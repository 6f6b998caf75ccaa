// SPDX-License-Identifier: Apache-2.0
// Vectors of LANES floats or integers as compiler vector types; the one operation that differs between instruction
// sets is `dot`: four unsigned weights times four signed inputs per lane, exact.
#include <stdint.h>
#include <string.h>

#if defined(MQ_AVX512VNNI) || defined(MQ_AVXVNNI) || defined(MQ_AVX2)
#include <immintrin.h>
#elif defined(MQ_NEON)
#include <arm_neon.h>
#endif

#if defined(MQ_AVX512VNNI)
#define LANES 16
#elif defined(MQ_AVXVNNI) || defined(MQ_AVX2)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef int8_t vb __attribute__((vector_size(LANES)));

constexpr int L = LANES, P = MQ_BLOCK / LANES;  // P vectors hold a block's rows

template <class V>
static inline V load(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
static inline void store(void* p, V v) {
    memcpy(p, &v, sizeof v);
}
static inline vf set1(float x) { return vf{} + x; }
static inline vi set1(int32_t x) { return vi{} + x; }
static inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }
static inline vi bits(vf v) { return (vi)v; }
static inline vf load_bf16(const uint16_t* p) { return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16); }
static inline vf load_int8(const int8_t* p) { return __builtin_convertvector(load<vb>(p), vf); }
static inline void store_bf16(uint16_t* p, vf v) {
    vu u = (vu)v;
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vu quiet = (u >> 16) | 0x40u;  // not a number stays so
    vi nan = (vi)((u & 0x7fffffffu) > 0x7f800000u);
    store(p, __builtin_convertvector((rounded & ~(vu)nan) | (quiet & (vu)nan), vh));
}
static inline vi maximum(vi a, vi b) { return a > b ? a : b; }
static inline vf maximum(vf a, vf b) { return a > b ? a : b; }
static inline vf minimum(vf a, vf b) { return a < b ? a : b; }
// Nearest integer, ties to even, for |v| < 2^22.
static inline vf round_even(vf v) {
    const vf magic = set1(12582912.0f);
    return (v + magic) - magic;
}
static inline float sum(vf v) {
    float s = 0;
    for (int i = 0; i < L; i++) s += v[i];
    return s;
}
static inline int32_t sum(vi v) {
    int32_t s = 0;
    for (int i = 0; i < L; i++) s += v[i];
    return s;
}
static inline int32_t largest(vi v) {
    int32_t m = v[0];
    for (int i = 1; i < L; i++) m = v[i] > m ? v[i] : m;
    return m;
}
static inline float largest(vf v) {
    float m = v[0];
    for (int i = 1; i < L; i++) m = v[i] > m ? v[i] : m;
    return m;
}
// e^x, relative error below 2e-7 (Cephes' polynomial); 0 far below, infinite far above.
static inline vf exponential(vf x) {
    vf y = minimum(maximum(x, set1(-104.0f)), set1(89.0f));
    y = x == x ? y : x;
    vf n = round_even(y * 1.44269504088896341f);
    vf f = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = set1(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    vi e = __builtin_convertvector(x == x ? n : vf{}, vi);
    vi half = e >> 1;  // in two steps, since 2^n alone may overflow
    return p * (vf)((half + 127) << 23) * (vf)((e - half + 127) << 23);
}
#if defined(__clang__)
template <int H>
static inline vf exchange(vf v) {  // lane i gets lane i ^ H
#if LANES == 16
    return __builtin_shufflevector(v, v, 0 ^ H, 1 ^ H, 2 ^ H, 3 ^ H, 4 ^ H, 5 ^ H, 6 ^ H, 7 ^ H, 8 ^ H, 9 ^ H, 10 ^ H,
                                   11 ^ H, 12 ^ H, 13 ^ H, 14 ^ H, 15 ^ H);
#elif LANES == 8
    return __builtin_shufflevector(v, v, 0 ^ H, 1 ^ H, 2 ^ H, 3 ^ H, 4 ^ H, 5 ^ H, 6 ^ H, 7 ^ H);
#else
    return __builtin_shufflevector(v, v, 0 ^ H, 1 ^ H, 2 ^ H, 3 ^ H);
#endif
}
#else
template <int H>
static inline vf exchange(vf v) {
    vi index;
    for (int i = 0; i < L; i++) index[i] = i ^ H;
    return __builtin_shuffle(v, index);
}
#endif
// One Hadamard step within vectors.
template <int H>
static inline vf butterfly(vf v) {
    vf sign;
    for (int i = 0; i < L; i++) sign[i] = i & H ? -1.0f : 1.0f;
    return exchange<H>(v) + v * sign;
}

// Keeps the compiler from knowing a value.
static inline void hide(vi& v) {
#if defined(MQ_AVX512VNNI)
    __asm__ volatile("" : "+v"(v));
#elif defined(MQ_AVXVNNI) || defined(MQ_AVX2)
    __asm__ volatile("" : "+x"(v));
#else
    __asm__ volatile("" : "+m"(v));
#endif
}

// acc + sum over four bytes of each lane: unsigned w (at most 15, or with WIDE 255) times signed x.
#if defined(MQ_AVX512VNNI)
template <bool WIDE>
static inline vi dot(vi acc, vi w, vi x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
}
constexpr int ROWS = 8, BLOCKS = 2;  // of a tile in registers
#elif defined(MQ_AVXVNNI)
template <bool WIDE>
static inline vi dot(vi acc, vi w, vi x) {
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
}
constexpr int ROWS = 2, BLOCKS = 1;
#elif defined(MQ_AVX2)
template <bool WIDE>
static inline vi dot(vi acc, vi w, vi x) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (!WIDE)  // pairs of products stay below 2^15
        return acc + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, (__m256i)x), ones);
    __m256i low = _mm256_maddubs_epi16((__m256i)(w & 0x0f0f0f0f), (__m256i)x);
    __m256i high = _mm256_maddubs_epi16((__m256i)((w >> 4) & 0x0f0f0f0f), (__m256i)x);
    return acc + (vi)_mm256_madd_epi16(low, ones) + ((vi)_mm256_madd_epi16(high, ones) << 4);
}
constexpr int ROWS = 2, BLOCKS = 1;
#elif defined(MQ_NEON)
template <bool WIDE>
static inline vi dot(vi acc, vi w, vi x) {
    if (!WIDE) return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)x);
    const vi top = set1((int32_t)0x80808080);  // u = (u ^ 128) + 128 as signed bytes
    const int8x16_t ones = vdupq_n_s8(1);
    int32x4_t sum_x = vdotq_s32(vdupq_n_s32(0), ones, (int8x16_t)x);
    return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)(w ^ top), (int8x16_t)x) + ((vi)sum_x << 7);
}
constexpr int ROWS = 2, BLOCKS = 1;
#else
template <bool WIDE>
static inline vi dot(vi acc, vi w, vi x) {
    uint8_t a[4 * L];
    int8_t b[4 * L];
    store(a, w);
    store(b, x);
    for (int i = 0; i < L; i++)
        for (int j = 0; j < 4; j++) acc[i] += (int32_t)a[4 * i + j] * b[4 * i + j];
    return acc;
}
constexpr int ROWS = 2, BLOCKS = 1;
#endif
